"""Optimizers from optax, the training state, and gradients summed over micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh
from optax import microbatching

from d1jax.config import OptimizerConfig
from d1jax.models.sharding import replicated
from d1jax.models.transformer import MASTER

UNLIMITED = 2**31 - 1
HOST = "pinned_host"  # memory that the device can copy from by itself


class TrainState(NamedTuple):
    trainable: Any  # {"params": ...} or, under LoRA, {"lora": ...}; always fp32
    optimizer: Any  # Adam's moments: fp32, the first in `optimizer.first_moment`


def make_schedule(config: OptimizerConfig, updates: int) -> optax.Schedule:
    """The learning rate as a function of the update, over `updates` updates."""
    after = max(updates - config.warmup_steps, 1)
    body = {
        "constant": optax.constant_schedule(config.learning_rate),
        "linear": optax.linear_schedule(config.learning_rate, config.final * config.learning_rate, after),
        "cosine": optax.cosine_decay_schedule(config.learning_rate, after, config.final),
    }[config.schedule]
    if config.warmup_steps == 0:
        return body
    return optax.join_schedules(
        [optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps), body], [config.warmup_steps]
    )


def make_optimizer(config: OptimizerConfig, updates: int) -> optax.GradientTransformation:
    """AdamW behind a clip. An update that is not finite changes nothing; the state counts how many in a row (bad_updates)."""
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm > 0 else optax.identity()
    adamw = optax.adamw(
        make_schedule(config, updates),
        b1=config.beta1,
        b2=config.beta2,
        weight_decay=config.weight_decay,
        mask=_decayed,
        mu_dtype=config.first_moment,
    )
    # apply_if_finite would give up and apply the update after its limit; the loops stop the run instead.
    return optax.apply_if_finite(optax.chain(clip, adamw), max_consecutive_errors=UNLIMITED)


def new_state(optimizer: optax.GradientTransformation, trainable: Any, mesh: Mesh, offload: bool = False) -> TrainState:
    """The state before the first update: fp32 master weights, and moments, placed like the parameters that they belong to.

    bf16 has 8 bits: at a learning rate of 1e-6 nearly every update of a weight is less than half a step of it and would be rounded away.
    So what is trained is kept in fp32, whatever dtype the weights came in; the model casts it to its own dtype where it
    computes. The parameters are copied, because updates donate their state and `trainable` belongs to the caller. offload: the moments
    are in the memory of the host (`optimizer.offload`).
    """
    trainable = jax.tree.map(lambda x: jnp.array(x, MASTER, copy=True), trainable)
    where = jax.tree.map(lambda x: x.sharding, abstract_state(optimizer, trainable, mesh).optimizer)
    state = TrainState(trainable, jax.jit(optimizer.init, out_shardings=where)(trainable))
    return in_host_memory(state) if offload else state


def abstract_state(
    optimizer: optax.GradientTransformation, trainable: Any, mesh: Mesh, offload: bool = False
) -> TrainState:
    """The shape, dtype and placement of all that `new_state` makes, without making it; `trainable` may be shapes with placements."""
    masters = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, MASTER, sharding=x.sharding), trainable)
    shapes = jax.eval_shape(optimizer.init, masters)

    def placed(shape: jax.ShapeDtypeStruct, like: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=like.sharding)

    counters = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    optimizer_state = optax.tree_map_params(
        optimizer, placed, shapes, masters, transform_non_params=lambda x: placed(x, counters)
    )
    if offload:
        optimizer_state = jax.tree.map(lambda x: placed(x, _away(x)) if x.ndim else x, optimizer_state)
    return TrainState(masters, optimizer_state)


def _away(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding.with_memory_kind(HOST))


def in_host_memory(state: TrainState) -> TrainState:
    """The state with the moments in the memory of the host, from where `compiled_update` takes them."""
    away = jax.tree.map(
        lambda x: jax.device_put(x, x.sharding.with_memory_kind(HOST)) if x.ndim else x, state.optimizer
    )
    return state._replace(optimizer=away)


def compiled_update(state: TrainState, outputs: int = 1) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator of `update(state, ...) -> (state, output, ...)`: compiled, and the state is donated.

    The new state is left where the old one was (`state` is an example), so that the next update needs no second program. Moments that wait
    in the memory of the host are on the device during the update.
    """
    places = jax.tree.map(lambda x: x.sharding, state)
    offloaded = any(place.memory_kind == HOST for place in jax.tree.leaves(places.optimizer))

    def decorate(update: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(update)
        def with_moments(state: TrainState, *arguments: Any) -> Any:
            if offloaded:
                moments = jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), state.optimizer)
                state = state._replace(optimizer=moments)
            return update(state, *arguments)

        return jax.jit(with_moments, donate_argnums=0, out_shardings=(places, *[None] * outputs))

    return decorate


def bad_updates(optimizer_state: optax.ApplyIfFiniteState) -> tuple[Array, Array]:
    """(skipped in a row, skipped in all)."""
    return optimizer_state.notfinite_count, optimizer_state.total_notfinite


def _decayed(params: Any) -> Any:
    """Weight decay is for matrices: kernels and adapters, not norms, biases or the embedding."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in ("kernel", "ff_out", "a", "b"), params)


def gradients(
    loss: Callable[..., tuple[Array, Any]],
    trainable: Any,
    rows: Any,
    micro_batches: int,
    auxiliary: Any = microbatching.AccumulationType.CONCAT,
    rows_alike: int = 1,
) -> tuple[Array, Any, Any]:
    """(loss, auxiliary arrays, gradient): loss and gradient are summed over micro-batches of the rows, arrays [B, ...] put together.

    `loss(trainable, rows)` returns sums over rows of terms already divided by the totals of the whole batch, so every split
    of the batch gives the same gradient. rows_alike: so many rows, one behind the other, come into one micro-batch; then all auxiliary
    arrays have a row axis.
    """

    def value_and_grad(trainable: Any, rows: Any) -> tuple[tuple[Array, Any], Any]:
        return jax.value_and_grad(loss, has_aux=True)(trainable, rows)

    add = microbatching.AccumulationType.SUM
    rows = with_sets_together(rows, micro_batches, rows_alike)
    summed = over_micro_batches(value_and_grad, 1, rows, micro_batches, ((add, auxiliary), add))
    (value, arrays), grads = summed(trainable, rows)
    return value, in_order(arrays, micro_batches, rows_alike), grads


def with_sets_together(rows: Any, micro_batches: int, size: int) -> Any:
    """The rows in an order in which `over_micro_batches`, whose part m has the rows m, m + micro_batches, ..., keeps sets of `size` rows,
    one behind the other, whole and in their order. Rows stay on their devices where each has a whole number of such sets a part.
    """
    if micro_batches == 1 or size == 1:
        return rows
    return jax.tree.map(lambda x: _turned(x, micro_batches, size), rows)


def in_order(arrays: Any, micro_batches: int, size: int) -> Any:
    """Undoes `with_sets_together`."""
    if micro_batches == 1 or size == 1:
        return arrays
    return jax.tree.map(lambda x: _turned(x, size, micro_batches), arrays)


def _turned(x: Array, inner: int, innermost: int) -> Array:
    """With the last two of three axes of rows, [B / (inner x innermost), inner, innermost], exchanged."""
    outer = x.shape[0] // (inner * innermost)
    return x.reshape(outer, inner, innermost, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def over_micro_batches(
    function: Callable[..., Any], argnum: int, rows: Any, micro_batches: int, accumulate: Any
) -> Callable[..., Any]:
    """`function` run on parts of its rows, one after the other."""
    if micro_batches == 1:
        return function
    count = jax.tree.leaves(rows)[0].shape[0]
    return microbatching.microbatch(function, argnum, count // micro_batches, accumulate)


def apply_gradient(
    optimizer: optax.GradientTransformation, state: TrainState, gradient: Any, loss: Array
) -> TrainState:
    """One optimizer update. A loss that is not finite makes the gradient count as not finite too."""
    gradient = jax.tree.map(lambda g: jnp.where(jnp.isfinite(loss), g, jnp.nan), gradient)
    change, optimizer_state = optimizer.update(gradient, state.optimizer, state.trainable)
    return TrainState(optax.apply_updates(state.trainable, change), optimizer_state)
