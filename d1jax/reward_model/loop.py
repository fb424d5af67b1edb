"""One reward model stage, top to bottom: pairs, their scores, one update; then what it is worth on pairs that were held out.

Q pairs of an update, B = 2 Q rows (the better texts, then the worse ones).

Source: DeepSeek-V2, arXiv 2405.04434, section 4.2, for pointwise and pairwise losses; DeepSeekMath, arXiv 2402.03300, algorithm 1, for the
replay of older pairs.
Differs: the score of a text is the mean over its tokens, of states that all see the whole text.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from d1jax.config import RewardModelConfig, UserError
from d1jax.data.pairs import StoredPairs, split_by_prompt
from d1jax.data.tokenizers import SpecialTokens
from d1jax.diffusion.canvas import Canvas
from d1jax.diffusion.reward_model import RewardModel, text_scores
from d1jax.models import sharding
from d1jax.models.reward_head import HEAD, new_head
from d1jax.models.transformer import Transformer, Variables
from d1jax.reward_model.loss import LOSSES, accuracy, quality
from d1jax.training.context import Context
from d1jax.training.optimizer import (
    TrainState,
    apply_gradient,
    bad_updates,
    gradients,
    make_optimizer,
    make_schedule,
    new_state,
    placement,
)
from d1jax.training.pair_order import PairOrder
from d1jax.training.setup import split, trained_table, with_adapter
from d1jax.training.stage_log import Clock, StageLog


class Rows(NamedTuple):
    """Pairs, a pair a row."""

    better: Canvas
    worse: Canvas


def train(context: Context, start: Variables, log: StageLog) -> tuple[Variables, dict[str, Any]]:
    """(the last weights with their head, what they are worth on held-out pairs). Runs, continues, or finds the stage finished."""
    config, special = context.config.reward_model, context.tokenizer.special
    learnt, held_out = _parts(context, config)
    head = start.get(HEAD) or jax.device_put(new_head(context.model.config.width), sharding.replicated(context.mesh))
    trainable, frozen = split(with_adapter(context, {k: v for k, v in start.items() if k != HEAD}, log.stage))
    trainable = {**trainable, HEAD: head}
    trained_table(trainable, frozen, log.note)
    optimizer = make_optimizer(config.optimizer, config.steps)
    schedule = make_schedule(config.optimizer, config.steps)
    state = new_state(optimizer, trainable, context.mesh)
    update = make_update(context.model, optimizer, config, special, state)
    items, first = log.resume({"trainable": state.trainable, "optimizer": state.optimizer})
    state = TrainState(items["trainable"], items["optimizer"])

    sources = [
        PairOrder(pairs, count, context.config.seed) for pairs, count in zip(learnt, config.counts(), strict=True)
    ]
    for step in range(first, config.steps):
        clock = Clock()
        rows = sharding.shard_batch(context.mesh, _rows([source.take(step) for source in sources]))
        state, metrics = update(state, frozen, rows)
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        clock.lap("time/update_s")
        values |= {"learning_rate": float(schedule(step)), **clock.laps}
        log.log_metrics(step + 1, values, watch=("loss", "rewards/accuracies", "rewards/margins"))
        log.save_checkpoint(step + 1, {"trainable": state.trainable, "optimizer": state.optimizer})
    variables = {**frozen, **state.trainable}
    return variables, measured(context, variables, held_out, config.batch_size)


def _parts(context: Context, config: RewardModelConfig) -> tuple[list[StoredPairs], StoredPairs]:
    """(the pairs of each source that are learnt from, the pairs that are held out of the first source). Of the others those of held-out
    prompts are left out, too."""
    sources = context.pairs_of_sources
    if config.loss == "pairwise" and not all(pairs.matched for pairs in sources):
        raise UserError(
            "config: reward_model.loss = pairwise compares two texts of one prompt, and these are single texts with labels; set it to "
            "pointwise"
        )
    learnt, held_out = split_by_prompt(sources[0], config.held_out, context.config.seed)
    held = held_out.prompts()
    others = [pairs.without(held) for pairs in sources[1:]]
    for name, pairs in zip(config.data, [learnt, *others], strict=True):
        if not len(pairs.better) or not len(pairs.worse):
            raise UserError(
                f"config: reward_model.data: {name} has no pair left to learn from; keep more, or lower held_out"
            )
    return [learnt, *others], held_out


def _rows(parts: list[tuple[Canvas, Canvas]]) -> Rows:
    """The pairs of an update, of all sources; prompts are padded to the longest."""
    width = max(canvas.prompt_BP.shape[1] for pair in parts for canvas in pair)

    def joined(side: int) -> Canvas:
        canvases = [pair[side] for pair in parts]
        prompts = [np.pad(one.prompt_BP, ((0, 0), (0, width - one.prompt_BP.shape[1]))) for one in canvases]
        return Canvas(
            np.concatenate([one.completion_BC for one in canvases]),
            np.concatenate(prompts),
            np.concatenate([one.prompt_length_B for one in canvases]),
        )

    return Rows(joined(0), joined(1))


def make_update(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    config: RewardModelConfig,
    special: SpecialTokens,
    state: TrainState,
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """`update(state, frozen, rows) -> (state, metrics)`, compiled; the loss is the mean over the pairs."""

    def loss(trainable: Any, rows: Rows, frozen: Variables) -> tuple[Array, tuple[Array, Array]]:
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), rows.better, rows.worse)
        better_Q, worse_Q = jnp.split(text_scores(model, {**frozen, **trainable}, both, special), 2)
        return jnp.sum(LOSSES[config.loss](better_Q, worse_Q)) / config.batch_size, (better_Q, worse_Q)

    @partial(jax.jit, donate_argnums=0, out_shardings=(placement(state), None))
    def update(state: TrainState, frozen: Variables, rows: Rows) -> tuple[TrainState, dict[str, Array]]:
        value, (better_Q, worse_Q), gradient = gradients(
            lambda trainable, rows: loss(trainable, rows, frozen), state.trainable, rows, config.grad_accumulation_steps
        )
        state = apply_gradient(optimizer, state, gradient, value)
        in_a_row, in_all = bad_updates(state.optimizer)
        return state, {
            "loss": value,
            "grad_norm": optax.tree.norm(gradient),
            "rewards/margins": jnp.mean(better_Q - worse_Q),
            "rewards/accuracies": accuracy(better_Q, worse_Q),
            "nonfinite/in_a_row": in_a_row,
            "nonfinite/total": in_all,
        }

    return update


def measured(context: Context, variables: Variables, pairs: StoredPairs, size: int) -> dict[str, Any]:
    """{"pairs", "accuracy", "margin", "calibration_error"} on held-out pairs; single texts are paired as they come."""
    judge = RewardModel(context.model, variables, context.tokenizer.special)
    count = min(len(pairs.better), len(pairs.worse))
    scores = []
    for side in (pairs.better, pairs.worse):
        found = []
        for first in range(0, count, size):
            places = np.minimum(np.arange(first, first + size), count - 1)  # one program for all batches
            rows = side.at(places)
            canvas = Canvas(rows.target_RC, rows.prompt_RP, rows.prompt_length_R)
            found.append(jax.device_get(judge.scores(sharding.shard_batch(context.mesh, canvas))))
        scores.append(np.concatenate(found)[:count].astype(np.float64))
    return {"pairs": count, **quality(*scores)}
