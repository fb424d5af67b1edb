"""The head of a reward model: one number for each state. D width."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

HEAD = "reward_head"  # its collection beside the backbone's: {"kernel": [D], "bias": []}


def new_head(width: int) -> dict[str, Array]:
    """A head that scores everything 0."""
    return {"kernel": jnp.zeros((width,), jnp.float32), "bias": jnp.zeros((), jnp.float32)}
