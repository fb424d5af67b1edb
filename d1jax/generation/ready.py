"""What earlier stages of a run have left for a stage: rows that were kept, pairs of them, reward models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from d1jax.config import Stage
from d1jax.data.examples import joined
from d1jax.data.pairs import StoredPairs
from d1jax.diffusion.reward_model import RewardModel
from d1jax.generation.rows import as_pairs, as_problems
from d1jax.models.transformer import in_model_dtype
from d1jax.training.context import Context, names_of_pairs
from d1jax.weights.run import RunDirectory
from d1jax.weights.variables import reward_variables_at


def ready(stage: Stage, contexts: Mapping[str, Context], directory: RunDirectory) -> Context:
    """The context of a stage with what earlier stages have left for it: rows, pairs and reward models."""
    seen = contexts[stage.name]
    models = {
        name: RewardModel(
            seen.model,
            in_model_dtype(reward_variables_at(seen, directory, name), seen.model.config),
            seen.tokenizer.special,
        )
        for name in seen.config.models_of(stage)
    }
    seen = dataclasses.replace(seen, reward_models=models)
    if names_of_pairs(seen.config, stage):
        return dataclasses.replace(seen, pairs_of_sources=_pairs(stage, contexts, directory))
    if stage.kind != "sft":
        return seen
    columns = seen.config.sft.completion_length or seen.config.sampler.completion_length
    parts = [
        seen.train if name == "task" else as_problems(contexts[name], directory.kept(name), columns)
        for name in seen.config.sft.data
    ]
    return dataclasses.replace(seen, train=joined(parts, seen.tokenizer.special.end))


def _pairs(stage: Stage, contexts: Mapping[str, Context], directory: RunDirectory) -> tuple[StoredPairs, ...]:
    """The pairs of each source of a stage, in the order in which it names them."""
    seen, setting = contexts[stage.name], f"{stage.name}.data"
    columns = seen.config.sampler.completion_length
    return tuple(
        seen.pairs_of_sources[0] if name == "task" else as_pairs(contexts[name], directory.kept(name), columns, setting)
        for name in names_of_pairs(seen.config, stage)
    )
