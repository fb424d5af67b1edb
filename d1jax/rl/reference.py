"""The reference policy: the one at the start of the stage, fixed or moved towards the policy now and then."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from d1jax.config import ModelConfig, RlConfig
from d1jax.models.transformer import Variables, in_model_dtype


def at_the_start(config: RlConfig, model: ModelConfig, trainable: Variables, frozen: Variables) -> Variables:
    """The policy at the start; a method without a reference gets {}. Under LoRA the base is shared, and only the adapter is copied.

    One that never moves is kept in the dtype in which it computes, which changes no score.
    """
    if not config.needs_reference:
        return {}
    start = {**frozen, **_copy(trainable)}
    return start if config.reference.name == "moving" else in_model_dtype(start, model)


def moved(config: RlConfig, reference: Variables, policy: Variables, step: int) -> Variables:
    """The reference after a step: every reference.every steps mix x policy + (1 - mix) x reference, where the reference lives.

    A mix of 1 is a copy, bit for bit.
    """
    if config.reference.name != "moving" or (step + 1) % config.reference.every:
        return reference
    if config.reference.mix == 1:
        return _copy(policy)
    where = jax.tree.map(lambda x: x.sharding, reference)
    return jax.jit(_weighted, out_shardings=where)(reference, policy, config.reference.mix)


def _weighted(reference: Variables, policy: Variables, share: float) -> Variables:
    return jax.tree.map(lambda r, p: (share * p + (1 - share) * r).astype(r.dtype), reference, policy)


def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)
