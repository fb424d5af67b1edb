"""Bidirectional attention and rotary positions.

B rows, T columns, H query heads, K key heads, h head size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def rotary_angles(positions_BT: Array, head_size: int, theta: float) -> tuple[Array, Array]:
    """cos and sin of p * theta^(-2i/h), [B, T, h/2]. fp32: bf16 would round position 257 to 256."""
    frequency_h = theta ** (-jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size)
    angle_BTh = positions_BT.astype(jnp.float32)[:, :, None] * frequency_h[None, None, :]
    return jnp.cos(angle_BTh), jnp.sin(angle_BTh)


def rotate(x_BTHh: Array, cos_BTh: Array, sin_BTh: Array, full_precision: bool = True) -> Array:
    """Half rotation (NeoX pairs i, i + h/2), returned in the dtype of x.

    full_precision: in fp32, as LLaDA's rope_full_precision does. Otherwise cos and sin are rounded to the dtype of x and the
    rotation runs in it, as Dream (Qwen2) does; in fp32 both are the same.
    """
    dtype = jnp.float32 if full_precision else x_BTHh.dtype
    first, second = jnp.split(x_BTHh.astype(dtype), 2, axis=-1)
    cos, sin = (angle_BTh.astype(dtype)[:, :, None, :] for angle_BTh in (cos_BTh, sin_BTh))
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTHh.dtype)


def attend(q_BTHh: Array, k_BTKh: Array, v_BTKh: Array, length_B: Array) -> Array:
    """softmax(q k' / sqrt(h)) v over the first length_B columns of each row, [B, T, H, h]; the softmax is fp32.

    Only keys are hidden: a query in the padding still attends to the real columns and stays finite, as in LLaDA.
    """
    return jax.nn.dot_product_attention(q_BTHh, k_BTKh, v_BTKh, key_value_seq_lengths=length_B, implementation="xla")
