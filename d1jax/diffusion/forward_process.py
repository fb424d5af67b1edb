"""The forward process: which tokens of a completion are masked.

B rows, C completion columns.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from d1jax.diffusion.canvas import Canvas, row_uniforms


class Corruption(NamedTuple):
    canvas: Canvas  # what the model sees
    masked_BC: Array  # True where a token is masked
    probability_B: Array  # with which it was


def corrupt(key: Array, canvas: Canvas, row_ids_B: Array, *, mask_id: int, eps: float) -> Corruption:
    """Each completion token is masked independently with p = (1 - eps) t + eps, t ~ U(0, 1) a row. The prompt never is.

    Source: LLaDA, arXiv 2502.09992, guidelines (eps = 1e-3 keeps 1 / p bounded).
    """
    time_key, mask_key = jax.random.split(key)
    t_B = row_uniforms(time_key, row_ids_B, 1)[:, 0]
    probability_B = (1 - eps) * t_B + eps
    masked_BC = row_uniforms(mask_key, row_ids_B, canvas.completion_BC.shape[1]) < probability_B[:, None]
    return apply_mask(canvas, masked_BC, probability_B, mask_id)


def apply_mask(canvas: Canvas, masked_BC: Array, probability_B: Array, mask_id: int) -> Corruption:
    corrupted = canvas._replace(completion_BC=jnp.where(masked_BC, mask_id, canvas.completion_BC))
    return Corruption(corrupted, masked_BC, probability_B)
