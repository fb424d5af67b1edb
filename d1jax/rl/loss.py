"""The policy objective: ratio, clip, KL, pooling. Pure functions on arrays a token; a method is a choice of names.

B rows, C completion columns, L tokens of a row's text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from d1jax.config import RlConfig

LARGEST = 20.0  # of what is exponentiated: a ratio of 5e8 is far outside every clip range


class TokenTerms(NamedTuple):
    """Per completion token, fp32. Under a ratio of sequences or blocks all of its tokens have the same value."""

    policy_BC: Array  # the surrogate alone; exactly 0 where the advantage is 0
    loss_BC: Array
    ratio_BC: Array
    kl_BC: Array
    clipped_low_BC: Array  # True below the clip range with a negative advantage: there ppo has no gradient
    clipped_high_BC: Array  # and above it with a positive one


def token_terms(
    logp_BC: Array,
    old_logp_BC: Array,
    reference_logp_BC: Array | None,
    advantage_BC: Array,
    mask_BC: Array,
    config: RlConfig,
    block_length: int,
) -> TokenTerms:
    """surrogate(ratio, advantage) + kl_coefficient x KL (where a reference is given), log ratio = logp - old at the level of config.ratio.

    clip "ppo": -min(r A, clip(r, 1 - low, 1 + high) A), DeepSeekMath, arXiv 2402.03300, eq. 3. "dual": also at most dual_clip x |A|
    where A < 0 (arXiv 1912.09729). "cispo": -sg(min(r, 1 + high)) A log p, so that a clipped token keeps its gradient
    (MiniMax-M1, arXiv 2506.13585). "none": -r A.
    ratio "none": the policy gradient, -A log p; the ratio is 1.

    Every term and its gradient is finite for every finite log-probability: beyond e^20 exp is continued by its tangent (see `exp`). So a
    completion of advantage 0 gives exactly 0 and a clipped one no gradient, however far the policies are apart. ppo at a negative
    advantage has no bound by its definition: there the loss of a log ratio x > 20 is |A| e^20 (x - 19), and its gradient still points back.
    """
    if config.ratio == "none":
        old_logp_BC = jax.lax.stop_gradient(logp_BC)
    log_ratio_BC = LEVELS[config.ratio]((logp_BC - old_logp_BC) * mask_BC, mask_BC, block_length)
    ratio_BC = exp(log_ratio_BC)
    low, high = 1 - config.clip_low, 1 + config.clip_high
    clipped_BC = jnp.clip(ratio_BC, low, high)
    if config.ratio == "none":
        policy_BC = -advantage_BC * logp_BC
    elif config.clip == "none":
        policy_BC = -ratio_BC * advantage_BC
    elif config.clip == "cispo":
        policy_BC = -jax.lax.stop_gradient(jnp.minimum(ratio_BC, high)) * advantage_BC * log_ratio_BC
    else:
        policy_BC = -jnp.minimum(ratio_BC * advantage_BC, clipped_BC * advantage_BC)
        if config.clip == "dual":
            policy_BC = jnp.where(advantage_BC < 0, jnp.minimum(policy_BC, -config.dual_clip * advantage_BC), policy_BC)
    if reference_logp_BC is None:
        kl_BC = jnp.zeros_like(logp_BC)
    elif config.kl_level == "token":
        kl_BC = KL[config.kl](logp_BC, reference_logp_BC)
    else:  # of the sums, shared by the row's tokens
        sums = (jnp.sum(x * mask_BC, axis=1, keepdims=True) for x in (logp_BC, reference_logp_BC))
        kl_BC = jnp.broadcast_to(KL[config.kl](*sums) / _length(mask_BC), logp_BC.shape)
    return TokenTerms(
        policy_BC=policy_BC,
        loss_BC=policy_BC + config.kl_coefficient * kl_BC,
        ratio_BC=ratio_BC,
        kl_BC=kl_BC,
        clipped_low_BC=(ratio_BC < low) & (advantage_BC < 0),
        clipped_high_BC=(ratio_BC > high) & (advantage_BC > 0),
    )


def preference_terms(
    logp_BC: Array, reference_logp_BC: Array, advantage_BC: Array, mask_BC: Array, config: RlConfig
) -> TokenTerms:
    """-log sigmoid(preference_scale x [(chosen - its reference) - (rejected - its reference)]) of the summed scores; both rows of a pair.

    The first half of the rows is chosen, the second rejected, in the same order; a pair of advantage 0 is a tie and has no loss.
    ratio: exp of the scaled margin, 1 where policy and reference are one.

    Source: DPO, arXiv 2305.18290, eq. 7; with bounds for likelihoods LLaDA 1.5, arXiv 2505.19223, eq. 9.
    """
    gain_B1 = jnp.sum((logp_BC - reference_logp_BC) * mask_BC, axis=1, keepdims=True)
    pairs = gain_B1.shape[0] // 2
    margin_B1 = jnp.tile(config.preference_scale * (gain_B1[:pairs] - gain_B1[pairs:]), (2, 1))
    loss_BC = jnp.where(advantage_BC == 0, 0.0, -jax.nn.log_sigmoid(margin_B1))
    nothing_BC = jnp.zeros_like(logp_BC)
    ratio_BC = jnp.broadcast_to(exp(margin_B1), logp_BC.shape)
    return TokenTerms(loss_BC, loss_BC, ratio_BC, nothing_BC, nothing_BC > 0, nothing_BC > 0)


def exp(x: Array) -> Array:
    """exp(x), and beyond x = LARGEST its tangent there: finite, with a finite gradient of the right sign.

    exp overflows in fp32 beyond 88, and 0 x inf in a gradient is NaN: one such token would void the update of the whole batch.
    """
    within = jnp.minimum(x, LARGEST)
    return jnp.exp(within) * (1 + jnp.maximum(x - LARGEST, 0.0))


# -- log ratios: (per token, mask, block length) -> per token ----------------------------------------------------------


def of_token(log_ratio_BC: Array, mask_BC: Array, block_length: int) -> Array:
    return log_ratio_BC


def of_block(log_ratio_BC: Array, mask_BC: Array, block_length: int) -> Array:
    """The sum over the tokens of the sampler's block."""
    rows, columns = log_ratio_BC.shape
    sums = jnp.sum(log_ratio_BC.reshape(rows, columns // block_length, block_length), axis=2, keepdims=True)
    return jnp.broadcast_to(sums, (rows, columns // block_length, block_length)).reshape(rows, columns)


def of_sequence_sum(log_ratio_BC: Array, mask_BC: Array, block_length: int) -> Array:
    """GDPO, arXiv 2510.08554: exp(ELBO - old ELBO)."""
    return jnp.broadcast_to(jnp.sum(log_ratio_BC, axis=1, keepdims=True), log_ratio_BC.shape)


def of_sequence_mean(log_ratio_BC: Array, mask_BC: Array, block_length: int) -> Array:
    """ESPO, arXiv 2512.03759; GSPO, arXiv 2507.18071: exp((ELBO - old ELBO) / L)."""
    return of_sequence_sum(log_ratio_BC, mask_BC, block_length) / _length(mask_BC)


Level = Callable[[Array, Array, int], Array]
LEVELS: dict[str, Level] = {
    "none": of_token,
    "token": of_token,
    "block": of_block,
    "sequence_sum": of_sequence_sum,
    "sequence_mean": of_sequence_mean,
}


def _length(mask_BC: Array) -> Array:
    return jnp.maximum(jnp.sum(mask_BC, axis=1, keepdims=True), 1)


# -- KL(policy || reference) from the log-probabilities of a sample of the policy (Schulman, 2020) -------------------------


def k1(logp: Array, reference_logp: Array) -> Array:
    """d' = policy - reference: unbiased, of either sign. As a loss its expected gradient is zero; it belongs into rewards."""
    return logp - reference_logp


def k2(logp: Array, reference_logp: Array) -> Array:
    """d'^2 / 2: biased as a value, but its gradient is that of the KL."""
    return (logp - reference_logp) ** 2 / 2


def k3(logp: Array, reference_logp: Array) -> Array:
    """exp(d) - d - 1 with d = reference - policy: unbiased for KL(policy || reference) under the policy, never negative."""
    difference = reference_logp - logp
    return exp(difference) - difference - 1


KL: dict[str, Callable[[Array, Array], Array]] = {"k1": k1, "k2": k2, "k3": k3}


# -- pooling: per-token losses -> one number, as weights over the whole batch ----------------------------------------------
# The weights know the totals of the batch, so the weighted sums of micro-batches add up to the loss of the batch. `rows` is how
# many rows count: all, or those that were not dropped (their mask is empty). `group`: completions of a problem, which are neighbours.


def bnpo(mask_BC: Array, rows: Array, group: int) -> Array:
    """Mean over the tokens of the batch."""
    return mask_BC / jnp.maximum(mask_BC.sum(), 1)


def group_bnpo(mask_BC: Array, rows: Array, group: int) -> Array:
    """Mean over groups of the mean over a group's tokens: d1's released code, whose micro-batch is one problem's completions.

    A group without a token that counts is in no mean.
    """
    tokens_Q = mask_BC.sum(axis=1).reshape(-1, group).sum(axis=1)
    groups = jnp.maximum(jnp.sum(tokens_Q > 0), 1)
    return mask_BC / (groups * jnp.maximum(jnp.repeat(tokens_Q, group), 1))[:, None]


def grpo(mask_BC: Array, rows: Array, group: int) -> Array:
    """Mean over rows of the mean over a row's tokens (DeepSeekMath; d1, eq. 4); under a sequence ratio the mean over sequences."""
    return mask_BC / (rows * jnp.maximum(mask_BC.sum(axis=1, keepdims=True), 1))


def dr_grpo(mask_BC: Array, rows: Array, group: int) -> Array:
    """Sum over tokens / (rows x C): a long answer weighs more than a short one (Dr. GRPO, arXiv 2503.20783)."""
    return mask_BC / (rows * mask_BC.shape[1])


def row_sum(mask_BC: Array, rows: Array, group: int) -> Array:
    """Mean over rows of the sum over a row's tokens (wd1)."""
    return mask_BC / rows


# DAPO's mean over the tokens of the whole batch is bnpo here, where no micro-batch has a mean of its own; and the mean over
# sequences is grpo, because the tokens of a sequence have one value under a ratio of sequences.
POOLINGS = {
    "bnpo": bnpo,
    "group_bnpo": group_bnpo,
    "grpo": grpo,
    "sequence_mean": grpo,
    "dr_grpo": dr_grpo,
    "row_sum": row_sum,
}
