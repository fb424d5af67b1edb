"""The sampler's randomness, keyed by row and step.

B rows, S columns of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from d1jax.diffusion.canvas import row_keys
from d1jax.diffusion.predictions import Pick, inverse_cdf


class Noise(NamedTuple):
    """Where randomness comes from; tests put recorded draws here."""

    token: Callable[[Array, tuple[int, int]], Array]  # (step_B, (B, S)) -> what `pick` needs, [B, S, ...]
    pick: Pick
    uniform: Callable[[Array, tuple[int, int]], Array]  # (step_B, (B, S)) -> [0, 1), for the order


def keyed_noise(key: Array, row_ids_B: Array) -> Noise:
    """Draws that are functions of (key, row id, step): a row's text does not depend on the rest of its batch."""

    def draw(purpose: int, step_B: Array, shape: tuple[int, ...]) -> Array:
        keys_B = row_keys(jax.random.fold_in(key, purpose), row_ids_B)
        return jax.vmap(lambda k, step: jax.random.uniform(jax.random.fold_in(k, step), shape, jnp.float32))(
            keys_B, step_B
        )

    return Noise(
        token=lambda step_B, shape: draw(0, step_B, (*shape[1:], 2)),
        pick=inverse_cdf,
        uniform=lambda step_B, shape: draw(1, step_B, shape[1:]),
    )
