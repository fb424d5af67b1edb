"""The value model of PPO: the policy's backbone with a scalar head, which says what a half-decoded text will earn.

It is a model of its own beside the policy: full fine-tuning starts it as a copy of the policy, LoRA as an adapter of its own on the shared
base. The value of a token is read where the token is still masked, in the state that the sampler unmasked it from.

N views, B rows, C completion columns, U inner updates.

Source: TraceRL, arXiv 2509.06949, section 4.3, and its released code (Gen-Verse/dLLM-RL).
Differs: the loss is the mean over the tokens of the batch (theirs: over rows of their mean over columns), the head starts at zero, and any
estimator may score the policy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from optax.microbatching import AccumulationType

from d1jax.config import RlConfig
from d1jax.config.advantage import Gae
from d1jax.config.estimator import Trajectory
from d1jax.diffusion.canvas import completion_hidden
from d1jax.diffusion.estimators import views_of
from d1jax.diffusion.likelihood import Views
from d1jax.models import sharding
from d1jax.models.reward_head import HEAD, new_head
from d1jax.models.transformer import Transformer, Variables, hidden_states
from d1jax.rl import gae
from d1jax.training.context import Context
from d1jax.training.likelihood import RolloutBatch, Scorer
from d1jax.training.optimizer import (
    TrainState,
    apply_gradient,
    bad_updates,
    compiled_update,
    gradients,
    make_optimizer,
    new_state,
    over_micro_batches,
)


class ValueModel(NamedTuple):
    """How values are read and learnt. A method without one has start = None, values None, and an update that changes nothing."""

    start: TrainState | None
    values: Callable[[TrainState | None, Variables, RolloutBatch], np.ndarray | None]
    update: Callable[..., tuple[TrainState | None, dict[str, float]]]

    def notes(self) -> list[str]:
        """Lines for the log: what it takes of the memory."""
        if self.start is None:
            return []
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(self.start))
        return [f"memory: the value model's weights and Adam's two moments: {held / 1e9:.3g} GB more"]


class Rows(NamedTuple):
    """What one micro-batch of an update needs."""

    batch: RolloutBatch
    old_value_BC: Array
    return_BC: Array
    weight_BC: Array  # 1 / tokens of the batch where a token is learnt from, else 0


def make_value_model(
    context: Context, config: RlConfig, scorer: Scorer, trainable: Variables, updates: int
) -> ValueModel:
    """The value model of a stage.

    `values(state, frozen, batch)` is [B, C] on the host; `update(state, frozen, batch, value_BC, reward_B)` makes as many optimizer updates
    on the batch as the policy does, and returns metrics as numbers.
    """
    if config.advantage.name != "gae":
        return ValueModel(None, lambda *_: None, lambda state, *_: (state, {}))
    advantage: Gae = config.advantage
    optimizer = make_optimizer(
        dataclasses.replace(config.optimizer, learning_rate=advantage.value_learning_rate), updates
    )
    head = jax.device_put(new_head(context.model.config.width), sharding.replicated(context.mesh))
    start = new_state(optimizer, {**trainable, HEAD: head}, context.mesh, config.optimizer.offload)
    read = make_read(scorer, advantage)
    learn = make_update(scorer, optimizer, config, start)

    def values(state: TrainState, frozen: Variables, batch: RolloutBatch) -> np.ndarray:
        return np.asarray(sharding.fetch(read({**frozen, **state.trainable}, batch)), np.float64)

    def update(
        state: TrainState, frozen: Variables, batch: RolloutBatch, value_BC: np.ndarray, reward_B: np.ndarray
    ) -> tuple[TrainState, dict[str, float]]:
        step_BC, text_BC = gae.steps_of(
            *sharding.fetch((batch.unmask_step_BC, scorer.text_BC(batch))), advantage.shrink
        )
        return_BC = gae.returns(reward_B, step_BC, text_BC, advantage.discount)
        arrays = (value_BC, return_BC, text_BC / max(text_BC.sum(), 1))
        rows = Rows(batch, *sharding.shard_batch(context.mesh, tuple(one.astype(np.float32) for one in arrays)))
        state, metrics = learn(state, frozen, rows)
        measured = {name: float(value) for name, value in jax.device_get(metrics).items()}
        return state, {**measured, **quality(value_BC[text_BC], return_BC[text_BC])}

    return ValueModel(start, values, update)


def quality(value_T: np.ndarray, return_T: np.ndarray) -> dict[str, float]:
    """{"value/mean", "value/explained_variance"}: 1 - var(R - V) / var(R), of all tokens T; 0 where the returns are all equal."""
    spread = return_T.var() if len(return_T) else 0.0
    explained = 1 - (return_T - value_T).var() / spread if spread > 0 else 0.0
    return {"value/mean": float(value_T.mean()) if len(value_T) else 0.0, "value/explained_variance": float(explained)}


def make_read(scorer: Scorer, advantage: Gae) -> Callable[[Variables, RolloutBatch], Array]:
    """`read(variables, batch)`: [B, C] values, compiled, in the micro-batches of the scorer and without a gradient."""

    @jax.jit
    def read(variables: Variables, batch: RolloutBatch) -> Array:
        def of_rows(variables: Variables, batch: RolloutBatch) -> Array:
            return token_values(scorer.model, variables, batch, views(scorer, batch, advantage))

        return over_micro_batches(of_rows, 1, batch, scorer.parts, AccumulationType.CONCAT)(variables, batch)

    return read


def views(scorer: Scorer, batch: RolloutBatch, advantage: Gae) -> Views:
    """The states that the sampler unmasked something from, whatever the policy is scored in; nothing of it is drawn."""
    return views_of(
        jax.random.key(0), batch.canvas, batch.mask_ids_B, batch.unmask_step_BC, estimator=Trajectory(shrink=advantage.shrink),
        sampler=scorer.sampler, special=scorer.special, prompt_mask=0.0,
    )  # fmt: skip


def token_values(model: Transformer, variables: Variables, batch: RolloutBatch, views: Views) -> Array:
    """[B, C] fp32: head x the state that predicts each token, in the view that scores it; 0 where none does."""
    head, canvas = variables[HEAD], batch.canvas
    backbone = {name: value for name, value in variables.items() if name != HEAD}

    def of_view(completion_BC: Array, prompt_BP: Array) -> Array:
        shown = canvas._replace(completion_BC=completion_BC, prompt_BP=prompt_BP)
        hidden_BTD = hidden_states(model, backbone, *shown.arrays)
        hidden_BCD = completion_hidden(hidden_BTD, canvas, model.config.alignment).astype(jnp.float32)
        return hidden_BCD @ head["kernel"] + head["bias"]

    def add(value_BC: Array, view: tuple[Array, Array, Array]) -> tuple[Array, None]:
        completion_BC, prompt_BP, weight_BC = view
        return value_BC + weight_BC * jax.checkpoint(of_view)(completion_BC, prompt_BP), None

    zero_BC = jnp.zeros(canvas.completion_BC.shape, jnp.float32)
    return jax.lax.scan(add, zero_BC, (views.completion_NBC, views.prompt_NBP, views.weight_NBC))[0]


def token_loss(value_BC: Array, old_value_BC: Array, return_BC: Array, clip: float) -> Array:
    """[B, C]: max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / 2 (PPO's clipped value loss)."""
    clipped_BC = old_value_BC + jnp.clip(value_BC - old_value_BC, -clip, clip)
    return jnp.maximum((value_BC - return_BC) ** 2, (clipped_BC - return_BC) ** 2) / 2


def make_update(
    scorer: Scorer, optimizer: optax.GradientTransformation, config: RlConfig, state: TrainState
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """`update(state, frozen, rows) -> (state, metrics)`: the inner updates of one rollout batch, compiled; means over them."""
    advantage: Gae = config.advantage

    def loss(trainable: Any, rows: Rows, frozen: Variables) -> tuple[Array, Array]:
        seen = views(scorer, rows.batch, advantage)
        value_BC = token_values(scorer.model, {**frozen, **trainable}, rows.batch, seen)
        loss_BC = token_loss(value_BC, rows.old_value_BC, rows.return_BC, advantage.value_clip)
        outside_BC = jnp.abs(value_BC - rows.old_value_BC) > advantage.value_clip
        return jnp.sum(rows.weight_BC * loss_BC), rows.weight_BC * outside_BC

    @compiled_update(state)
    def update(state: TrainState, frozen: Variables, rows: Rows) -> tuple[TrainState, dict[str, Array]]:
        def iteration(state: TrainState, _: None) -> tuple[TrainState, dict[str, Array]]:
            value, outside_BC, gradient = gradients(
                lambda trainable, rows: loss(trainable, rows, frozen),
                state.trainable,
                rows,
                config.grad_accumulation_steps,
            )
            state = apply_gradient(optimizer, state, gradient, value)
            metrics = {
                "value/loss": value,
                "value/clip_ratio": jnp.sum(outside_BC),
                "value/grad_norm": optax.tree.norm(gradient),
            }
            return state, metrics

        state, metrics_U = jax.lax.scan(iteration, state, None, length=config.num_iterations)
        in_a_row, in_all = bad_updates(state.optimizer)
        return state, {
            **jax.tree.map(jnp.mean, metrics_U),
            "nonfinite/in_a_row": in_a_row,
            "nonfinite/total": in_all,
        }

    return update
