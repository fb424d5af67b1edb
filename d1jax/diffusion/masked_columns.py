"""The head and what follows it run only for columns that something can be unmasked in.

B rows, S columns of a block.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from d1jax.diffusion.predictions import Predictions
from d1jax.models import sharding
from d1jax.models.token_logprobs import LOGITS_PER_CHUNK

LOGITS_PER_TURN = 1_000_000  # fewer are not worth a turn of the loop
ROWS_PER_PRODUCT = {"cpu": 32}  # enough for the head to run at full speed; elsewhere 256 (above the ridge of GPUs)


def apply_to_masked(
    function: Callable[..., Predictions], chunk: int, masked_BS: Array, *arrays: Array | None
) -> Predictions:
    """`function` of the arrays [B, S, ...] where columns are masked, `chunk` of a row at a time; elsewhere zeros.

    A row's masked columns come first, so chunks in which no row has any are not computed, and all logits of a block need not
    exist at once.
    """
    if chunk == masked_BS.shape[1]:
        return function(*arrays)
    order_BS = jnp.argsort(~masked_BS, axis=1, stable=True)

    def reordered(x: Array, order_BS: Array) -> Array:
        return jnp.take_along_axis(x, order_BS.reshape(order_BS.shape + (1,) * (x.ndim - 2)), axis=1)

    def part(x: Array, number: Array | int) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, number * chunk, chunk, axis=1)

    def add(number: Array, found: Predictions) -> Predictions:
        made = function(*jax.tree.map(lambda x: part(x, number), ordered))
        return jax.tree.map(
            lambda whole, new: jax.lax.dynamic_update_slice_in_dim(whole, new, number * chunk, axis=1), found, made
        )

    ordered = jax.tree.map(lambda x: reordered(x, order_BS), arrays)
    shapes = jax.eval_shape(lambda: function(*jax.tree.map(lambda x: part(x, 0), ordered)))
    zeros = jax.tree.map(lambda x: jnp.zeros((*masked_BS.shape, *x.shape[2:]), x.dtype), shapes)
    most = jnp.max(jnp.sum(masked_BS, axis=1))
    # As many turns as the row with the most masks needs: a number that only the device knows, so no scan.
    found = jax.lax.fori_loop(0, -(-most // chunk), add, zeros)
    return jax.tree.map(lambda x: reordered(x, jnp.argsort(order_BS, axis=1)), found)


def column_chunk(rows: int, block: int, vocabulary: int, platform: str | None = None) -> int:
    """A divisor of the block: few enough columns that the logits fit LOGITS_PER_CHUNK, but a chunk is worth its turn.

    platform: what the program will run on (None: what this process computes on).
    """
    # Rows are cut over devices; each does a product of its own part.
    mesh = jax.sharding.get_abstract_mesh()
    rows = max(rows // (1 if mesh.empty else sharding.row_shards(mesh)), 1)
    enough = ROWS_PER_PRODUCT.get(platform or jax.default_backend(), 256)
    sizes = [size for size in range(1, block + 1) if block % size == 0]
    worth = (size for size in sizes if rows * size >= enough and rows * size * vocabulary >= LOGITS_PER_TURN)
    fast = next(worth, block)
    small = [size for size in sizes if rows * size * vocabulary <= LOGITS_PER_CHUNK]
    return min(fast, max(small, default=1))
