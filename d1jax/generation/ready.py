"""What earlier stages of a run have left for a stage: rows that were kept, pairs of them, reward models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial

from d1jax.config import Stage
from d1jax.data.examples import joined
from d1jax.diffusion.reward_model import RewardModel, served
from d1jax.generation.rows import as_pairs, as_problems, as_steps
from d1jax.training.context import Context, Judged, is_stepwise, judged_by_name
from d1jax.weights.run import RunDirectory
from d1jax.weights.variables import reward_variables_at


def ready(stage: Stage, contexts: Mapping[str, Context], directory: RunDirectory) -> Context:
    """The context of a stage with what earlier stages have left for it: rows, pairs and reward models."""
    seen = contexts[stage.name]

    def model(name: str) -> RewardModel:
        variables = served(reward_variables_at(seen, directory, name), seen.model.config)
        of_steps = is_stepwise(contexts[name].config, seen.config.stage(name))
        return RewardModel(seen.model, variables, seen.tokenizer.special, of_steps)

    judge = seen.config.step_model_of(stage)
    seen = dataclasses.replace(
        seen,
        reward_models={name: model(name) for name in seen.config.models_of(stage)},
        step_model=model(judge) if judge else None,
    )
    if judged_by_name(seen.config, stage):
        return dataclasses.replace(seen, judged_sources=_judged(stage, contexts, directory))
    if stage.kind != "sft":
        return seen
    columns = seen.config.sft.completion_length or seen.config.sampler.completion_length
    parts = [
        seen.train if name == "task" else as_problems(contexts[name], directory.kept(name), columns)
        for name in seen.config.sft.data
    ]
    return dataclasses.replace(seen, train=joined(parts, seen.tokenizer.special.end))


def _judged(stage: Stage, contexts: Mapping[str, Context], directory: RunDirectory) -> tuple[Judged, ...]:
    """The pairs, or the texts with labelled steps, of each source of a stage, in the order in which it names them."""
    seen, setting = contexts[stage.name], f"{stage.name}.data"
    columns = seen.config.sampler.completion_length
    read: Callable[..., Judged] = as_steps
    if not is_stepwise(seen.config, stage):
        several = seen.config.reward_model.pairs_per_prompt if stage.kind == "reward_model" else 1
        read = partial(as_pairs, most=several)
    return tuple(
        seen.judged_sources[0] if name == "task" else read(contexts[name], directory.kept(name), columns, setting)
        for name in judged_by_name(seen.config, stage)
    )
