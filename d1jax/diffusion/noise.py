"""The sampler's randomness, keyed by row and step.

B rows, S columns of a block.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from d1jax.diffusion.canvas import row_keys

FOR_TOKENS, FOR_ORDER = 0, 1  # what a draw is for: each has numbers of its own


class Noise(Protocol):
    """Where randomness comes from: a pytree, so that it is traced; tests put recorded draws here."""

    def token(self, step_B: Array, shape: tuple[int, int]) -> Array:
        """What the token sampler needs for a block of shape (B, S): fp32 [B, S, ...]."""
        ...

    def uniform(self, step_B: Array, shape: tuple[int, int]) -> Array:
        """Numbers in [0, 1) that decide the order of positions: fp32 [B, S]."""
        ...


class KeyedNoise(NamedTuple):
    """Draws that are functions of (key, row id, step): a row's text does not depend on the rest of its batch."""

    key: Array
    row_ids_B: Array

    def token(self, step_B: Array, shape: tuple[int, int]) -> Array:
        """Two numbers a position, which is what `inverse_cdf` draws a token with: [B, S, 2]."""
        return self._draw(FOR_TOKENS, step_B, (*shape[1:], 2))

    def uniform(self, step_B: Array, shape: tuple[int, int]) -> Array:
        """One number a position: [B, S]."""
        return self._draw(FOR_ORDER, step_B, shape[1:])

    def _draw(self, purpose: int, step_B: Array, row_shape: tuple[int, ...]) -> Array:
        keys_B = row_keys(jax.random.fold_in(self.key, purpose), self.row_ids_B)

        def of_row(key: Array, step: Array) -> Array:
            return jax.random.uniform(jax.random.fold_in(key, step), row_shape, jnp.float32)

        return jax.vmap(of_row)(keys_B, step_B)
