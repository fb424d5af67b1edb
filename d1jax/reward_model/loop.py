"""One reward model stage, top to bottom: texts, their scores, one update; then what it is worth on texts that were held out.

What is learnt from is pairs of texts (pairs.py), or texts whose steps are right or wrong (steps.py).

Source: DeepSeek-V2, arXiv 2405.04434, section 4.2, for pointwise and pairwise losses; DeepSeekMath, arXiv 2402.03300, algorithm 1, for the
replay of older texts, and section 4.1.3 for rewards of steps.
Differs: the score of a text is the mean over its tokens, of states that all see the whole text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import jax
import optax
from jax import Array

from d1jax.config import RewardModelConfig, Stage, UserError
from d1jax.data.pairs import split_by_prompt
from d1jax.data.tokenizers import SpecialTokens
from d1jax.models import sharding
from d1jax.models.reward_head import HEAD, new_head
from d1jax.models.transformer import Transformer, Variables
from d1jax.reward_model import pairs, steps
from d1jax.training.context import Context, Judged
from d1jax.training.optimizer import (
    TrainState,
    apply_gradient,
    bad_updates,
    compiled_update,
    gradients,
    make_optimizer,
    make_schedule,
    new_state,
)
from d1jax.training.setup import split, trained_table, with_adapter
from d1jax.training.stage_log import Clock, StageLog


def train(context: Context, start: Variables, log: StageLog) -> tuple[Variables, dict[str, Any]]:
    """(the last weights with their head, what they are worth on held-out pairs). Runs, continues, or finds the stage finished."""
    config, special = context.config.reward_model, context.tokenizer.special
    kind = kind_of(config)
    learnt, held_out = _parts(context, config)
    head = start.get(HEAD) or jax.device_put(new_head(context.model.config.width), sharding.replicated(context.mesh))
    trainable, frozen = split(with_adapter(context, {k: v for k, v in start.items() if k != HEAD}, log.stage))
    trainable = {**trainable, HEAD: head}
    trained_table(trainable, frozen, config.optimizer, log.note)
    optimizer = make_optimizer(config.optimizer, config.steps)
    schedule = make_schedule(config.optimizer, config.steps)
    state = new_state(optimizer, trainable, context.mesh, config.optimizer.offload)
    update = make_update(context.model, optimizer, config, special, state)
    items, first = log.resume({"trainable": state.trainable, "optimizer": state.optimizer})
    state = TrainState(items["trainable"], items["optimizer"])

    sources = [
        kind.order(stored, count, context.config.seed) for stored, count in zip(learnt, config.counts(), strict=True)
    ]
    for step in range(first, config.steps):
        clock = Clock()
        rows = sharding.shard_batch(context.mesh, kind.joined([source.take(step) for source in sources]))
        state, metrics = update(state, frozen, rows)
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        clock.lap("time/update_s")
        values |= {"learning_rate": float(schedule(step)), **clock.laps}
        log.log_metrics(step + 1, values, watch=("loss", "rewards/accuracies", "rewards/margins"))
        log.save_checkpoint(step + 1, {"trainable": state.trainable, "optimizer": state.optimizer})
    variables = {**frozen, **state.trainable}
    return variables, kind.measured(context, variables, held_out, config.batch_size)


def check_rows(contexts: Mapping[str, Context], stages: Sequence[Stage]) -> None:
    """Raises UserError where a stage that learns from the rows of its task alone cannot: what others keep is not there yet."""
    for stage in stages:
        config = contexts[stage.name].config.reward_model
        if stage.kind == "reward_model" and config.data == ("task",):
            _parts(contexts[stage.name], config)


def kind_of(config: RewardModelConfig) -> ModuleType:
    """What the loss learns from: the module of pairs, or of steps."""
    return steps if config.loss == "stepwise" else pairs


def _parts(context: Context, config: RewardModelConfig) -> tuple[list[Judged], Judged]:
    """(the texts of each source that are learnt from, those that are held out of the first source). Of the others those of held-out
    prompts are left out, too."""
    kind, sources = kind_of(config), context.judged_sources
    kind.check(sources, config)
    learnt, held_out = split_by_prompt(sources[0], config.held_out, context.config.seed)
    held = held_out.prompts()
    others = [stored.without(held) for stored in sources[1:]]
    for name, stored in zip(config.data, [learnt, *others], strict=True):
        if kind.is_empty(stored):
            raise UserError(
                f"config: reward_model.data: {name} has nothing left to learn from; keep more, or lower held_out"
            )
    return [learnt, *others], held_out


def make_update(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    config: RewardModelConfig,
    special: SpecialTokens,
    state: TrainState,
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """`update(state, frozen, rows) -> (state, metrics)`, compiled; the loss is the mean over the pairs or the labelled steps."""
    kind = kind_of(config)

    @compiled_update(state)
    def update(state: TrainState, frozen: Variables, rows: Any) -> tuple[TrainState, dict[str, Array]]:
        value, scores, gradient = gradients(
            lambda trainable, rows: kind.loss(model, {**frozen, **trainable}, rows, special, config),
            state.trainable, rows, config.grad_accumulation_steps,
        )  # fmt: skip
        state = apply_gradient(optimizer, state, gradient, value)
        in_a_row, in_all = bad_updates(state.optimizer)
        return state, {
            "loss": value,
            "grad_norm": optax.tree.norm(gradient),
            **kind.metrics(scores, rows),
            "nonfinite/in_a_row": in_a_row,
            "nonfinite/total": in_all,
        }

    return update
