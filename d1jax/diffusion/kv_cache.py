"""Keys and values that the next steps use again, and which columns they compute.

Attention is bidirectional, so every unmasked token changes the keys of all others: a cache is an approximation. It is made by
a pass over the whole canvas at the start of a block (and every `cache.refresh` steps), and until the next one

    prefix   computes the completion from the active block to its end; prompt and finished blocks are as they were
    dual     computes the active block; all else is as it was

In a block-causal model the dual cache is exact: what is kept sees no later block (in_blocks.py).

Source: Fast-dLLM, arXiv 2505.22618. Differs: keys are stored after rotation (positions never move); rows of a batch begin a
block together, so a batch works too; a block that is full after its first pass costs no further one.

B rows, C completion columns, W columns of a window, S columns of a block.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from d1jax.config import SamplerConfig
from d1jax.diffusion.canvas import Canvas, window_hidden
from d1jax.models.transformer import KeyValues, Transformer, Variables, Window, hidden_states_of_window


def block_hidden(
    model: Transformer,
    variables: Variables,
    canvas: Canvas,
    cache: KeyValues,
    block_start: Array,
    config: SamplerConfig,
) -> Array:
    """The hidden states that score the block that starts at column `block_start`, [B, S, D], from a pass over a window.

    A shifted model scores a column from the one before it. The first column of a block has none in the window and reads its
    own; it does not matter, because in such a model the first pass of a block unmasks it.
    """
    length = config.completion_length

    def over(size: int) -> Array:
        start = block_start if config.cache.name == "dual" else length - size
        window = Window(start, block_start, _later_blocks(model, canvas, start))
        tokens_BW = jax.lax.dynamic_slice_in_dim(canvas.completion_BC, start, size, axis=1)
        positions_BW = jax.lax.dynamic_slice_in_dim(canvas.positions_BT, start, size, axis=1)
        hidden_BWD = hidden_states_of_window(model, variables, tokens_BW, positions_BW, canvas.length_B, cache, window)
        if model.config.alignment == "shifted":
            hidden_BWD = jnp.concatenate([hidden_BWD[:, :1], hidden_BWD[:, :-1]], axis=1)
        return window_hidden(hidden_BWD, block_start - start, config.block_length)

    sizes = window_sizes(config)
    if len(sizes) == 1:
        return over(sizes[0])
    smallest = jnp.sum(length - block_start > jnp.asarray(sizes, jnp.int32))
    return jax.lax.switch(smallest, [partial(over, size) for size in sizes])


def _later_blocks(model: Transformer, canvas: Canvas, start: Array) -> Array | None:
    """Of a block-causal model the columns of later blocks than that of column `start`, which it does not see, [B, T]; None of others."""
    if model.config.attention_mask != "block_causal":
        return None
    block_BT = canvas.positions_BT // model.config.mask_block
    own_B1 = jax.lax.dynamic_slice_in_dim(block_BT, start, 1, axis=1)
    return block_BT > own_B1


def window_sizes(config: SamplerConfig) -> tuple[int, ...]:
    """The widths of windows that are compiled, smallest first; a prefix window is rounded up to the next.

    Shapes are static, so each width is a program of its own: a whole completion, a half, a quarter, ... of it.
    """
    if config.cache.name == "dual":
        return (config.block_length,)
    blocks = config.completion_length // config.block_length
    counts = {blocks}
    while min(counts) > 1:
        counts.add(-(-min(counts) // 2))
    return tuple(count * config.block_length for count in sorted(counts))
