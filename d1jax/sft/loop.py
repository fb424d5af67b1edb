"""One masked SFT stage, top to bottom.

B rows, C completion columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from d1jax.config import SftConfig, UserError
from d1jax.data.order import RowOrder
from d1jax.data.tokenizers import SpecialTokens
from d1jax.diffusion.canvas import Canvas, through_first_end
from d1jax.diffusion.forward_process import corrupt
from d1jax.evaluation import grade
from d1jax.models import sharding
from d1jax.models.transformer import Transformer, Variables
from d1jax.sft.loss import NORMALIZERS, masked_loss
from d1jax.training.context import Context
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
from d1jax.training.stage_log import StageLog


class Rows(NamedTuple):
    clean: Canvas
    row_ids_B: Array
    eligible_BC: Array  # the targets
    weight_B: Array


def train(context: Context, start: Variables, log: StageLog) -> Variables:
    """Runs (or continues, or finds finished) the stage; returns its last weights, an adapter beside what it was trained on."""
    config, problems = context.config.sft, context.train
    targets = problems.has_target_R.nonzero()[0]
    if not len(targets):
        raise UserError(
            f"config: stage {log.stage!r} needs rows with solutions, and {context.config.task.train} has none; "
            "leave it out of stages"
        )

    trainable, frozen = split(with_adapter(context, start, log.stage))
    trained_table(trainable, frozen, config.optimizer, log.note)
    optimizer = make_optimizer(config.optimizer, config.steps)
    schedule = make_schedule(config.optimizer, config.steps)
    state = new_state(optimizer, trainable, context.mesh, config.optimizer.offload)
    update = make_update(context.model, optimizer, config, context.tokenizer.special, state)
    items, first = log.resume({"trainable": state.trainable, "optimizer": state.optimizer})
    state = TrainState(items["trainable"], items["optimizer"])

    order = RowOrder(len(targets), context.config.seed)
    for step in range(first, config.steps):
        # -- the batch: a function of the step
        rows_B = targets[order.take(step * config.batch_size, config.batch_size)]
        clean = Canvas(problems.target_RC[rows_B], problems.prompt_RP[rows_B], problems.prompt_length_R[rows_B])
        clean = sharding.shard_batch(context.mesh, clean)

        # -- the update
        key = jax.random.fold_in(context.key(log.stage), step)
        state, metrics = update(state, frozen, clean, key)
        values = {**metrics, "learning_rate": float(schedule(step))}

        # -- what is left behind
        if log.evaluates(step + 1):
            values |= grade.watch(context, {**frozen, **state.trainable})
        log.log_metrics(step + 1, values, watch=("loss", "grad_norm"))
        log.save_checkpoint(step + 1, {"trainable": state.trainable, "optimizer": state.optimizer})
    return {**frozen, **state.trainable}


def make_update(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    config: SftConfig,
    special: SpecialTokens,
    state: TrainState,
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """The compiled step: corrupt, score, update. `update(state, frozen, clean, key) -> (state, metrics)`."""

    def loss(trainable: Any, rows: Rows, frozen: Variables, key: Array) -> tuple[Array, Array]:
        corruption = corrupt(key, rows.clean, rows.row_ids_B, mask_id=special.mask, eps=config.eps)
        value = masked_loss(model, {**frozen, **trainable}, rows.clean, corruption, rows.eligible_BC, rows.weight_B)
        return value, corruption.masked_BC

    @compiled_update(state)
    def update(state: TrainState, frozen: Variables, clean: Canvas, key: Array) -> tuple[TrainState, dict[str, Array]]:
        text_BC = through_first_end(clean.completion_BC, special.end_ids)
        eligible_BC = jnp.ones_like(text_BC) if config.score_padding else text_BC
        rows = Rows(
            clean,
            jnp.arange(eligible_BC.shape[0], dtype=jnp.int32),
            eligible_BC,
            NORMALIZERS[config.normalizer](eligible_BC),
        )
        value, masked_BC, gradient = gradients(
            lambda t, r: loss(t, r, frozen, key), state.trainable, rows, config.grad_accumulation_steps
        )
        state = apply_gradient(optimizer, state, gradient, value)
        in_a_row, in_all = bad_updates(state.optimizer)
        return state, {
            "loss": value,
            "grad_norm": optax.tree.norm(gradient),
            "mask/frac": jnp.mean(masked_BC, dtype=jnp.float32),
            "nonfinite/in_a_row": in_a_row,
            "nonfinite/total": in_all,
        }

    return update
