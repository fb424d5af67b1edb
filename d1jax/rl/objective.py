"""The GRPO objective: ratio, clip, KL, pooling. Pure functions on per-token arrays.

B rows, C completion columns.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


class TokenTerms(NamedTuple):
    """Per completion token, fp32."""

    loss_BC: Array
    ratio_BC: Array
    kl_BC: Array
    clipped_low_BC: Array  # True where the clip removes the gradient from below (negative advantage)
    clipped_high_BC: Array  # and from above (positive advantage)


def token_terms(
    logp_BC: Array,
    old_logp_BC: Array,
    reference_logp_BC: Array | None,
    advantage_B: Array,
    *,
    clip_low: float,
    clip_high: float,
    kl_coefficient: float,
) -> TokenTerms:
    """-min(r A, clip(r, 1 - low, 1 + high) A) + beta k3, with r = exp(logp - old).

    Source: DeepSeekMath, arXiv 2402.03300, eq. 3; d1, arXiv 2504.12216, eq. 4 (low = high = 0.5, beta = 0.04).
    """
    ratio_BC = jnp.exp(logp_BC - old_logp_BC)
    clipped_BC = jnp.clip(ratio_BC, 1 - clip_low, 1 + clip_high)
    advantage_B1 = advantage_B[:, None]
    policy_BC = -jnp.minimum(ratio_BC * advantage_B1, clipped_BC * advantage_B1)
    kl_BC = jnp.zeros_like(logp_BC) if reference_logp_BC is None else k3(logp_BC, reference_logp_BC)
    return TokenTerms(
        loss_BC=policy_BC + kl_coefficient * kl_BC,
        ratio_BC=ratio_BC,
        kl_BC=kl_BC,
        clipped_low_BC=(ratio_BC < 1 - clip_low) & (advantage_B1 < 0),
        clipped_high_BC=(ratio_BC > 1 + clip_high) & (advantage_B1 > 0),
    )


def k3(logp: Array, reference_logp: Array) -> Array:
    """exp(d) - d - 1 with d = reference - policy: unbiased for KL(policy || reference) under the policy, never negative."""
    difference = reference_logp - logp
    return jnp.exp(difference) - difference - 1


# -- pooling: per-token losses -> one number, as weights over the whole batch ----------------------------------------------
# The weights know the totals of the batch, so the weighted sums of micro-batches add up to the loss of the batch.


def bnpo(mask_BC: Array) -> Array:
    """Mean over the tokens of the batch (d1)."""
    return mask_BC / jnp.maximum(mask_BC.sum(), 1)


def grpo(mask_BC: Array) -> Array:
    """Mean over rows of the mean over a row's tokens (DeepSeekMath)."""
    return mask_BC / (mask_BC.shape[0] * jnp.maximum(mask_BC.sum(axis=1, keepdims=True), 1))


def dr_grpo(mask_BC: Array) -> Array:
    """Sum over tokens / (rows x C): a long answer weighs more than a short one (Dr. GRPO, arXiv 2503.20783)."""
    return mask_BC / mask_BC.size


POOLINGS = {"bnpo": bnpo, "grpo": grpo, "dr_grpo": dr_grpo}
