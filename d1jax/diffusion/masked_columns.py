"""The head and what follows it run only for columns that something can be committed in.

B rows, S columns of a block.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from d1jax.diffusion.predictions import Candidates
from d1jax.models import sharding
from d1jax.models.token_logprobs import LOGITS_PER_CHUNK

LOGITS_PER_GROUP = 1_000_000  # fewer are not worth a turn of the loop
ROWS_PER_PRODUCT = {"cpu": 32}  # enough for the head to run at full speed; elsewhere 256 (above the ridge of GPUs)


def of_open_columns(
    function: Callable[..., Candidates], group: int, open_BS: Array, *arrays: Array | None
) -> Candidates:
    """`function` of the arrays [B, S, ...] where columns are open, `group` of a row at a time; elsewhere zeros.

    A row's open columns come first, so groups in which no row has any are not computed, and all logits of a block need not
    exist at once.
    """
    if group == open_BS.shape[1]:
        return function(*arrays)
    order_BS = jnp.argsort(~open_BS, axis=1, stable=True)

    def reordered(x: Array, order_BS: Array) -> Array:
        return jnp.take_along_axis(x, order_BS.reshape(order_BS.shape + (1,) * (x.ndim - 2)), axis=1)

    def part(x: Array, number: Array | int) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, number * group, group, axis=1)

    def add(number: Array, found: Candidates) -> Candidates:
        made = function(*jax.tree.map(lambda x: part(x, number), ordered))
        return jax.tree.map(
            lambda whole, new: jax.lax.dynamic_update_slice_in_dim(whole, new, number * group, axis=1), found, made
        )

    ordered = jax.tree.map(lambda x: reordered(x, order_BS), arrays)
    shapes = jax.eval_shape(lambda: function(*jax.tree.map(lambda x: part(x, 0), ordered)))
    nothing = jax.tree.map(lambda x: jnp.zeros((*open_BS.shape, *x.shape[2:]), x.dtype), shapes)
    most = jnp.max(jnp.sum(open_BS, axis=1))
    found = jax.lax.fori_loop(0, -(-most // group), add, nothing)
    return jax.tree.map(lambda x: reordered(x, jnp.argsort(order_BS, axis=1)), found)


def columns_at_a_time(rows: int, block: int, vocabulary: int) -> int:
    """A divisor of the block: few enough that the logits fit LOGITS_PER_CHUNK, but a group is worth its turn."""
    # Rows are cut over devices; each does a product of its own part.
    mesh = jax.sharding.get_abstract_mesh()
    rows = max(rows // (1 if mesh.empty else sharding.row_shards(mesh)), 1)
    enough = ROWS_PER_PRODUCT.get(jax.default_backend(), 256)
    sizes = [size for size in range(1, block + 1) if block % size == 0]
    worth = (size for size in sizes if rows * size >= enough and rows * size * vocabulary >= LOGITS_PER_GROUP)
    fast = next(worth, block)
    small = [size for size in sizes if rows * size * vocabulary <= LOGITS_PER_CHUNK]
    return min(fast, max(small, default=1))
