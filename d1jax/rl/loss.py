"""The policy loss: ratio, clip, KL, aggregation. Pure functions on arrays a token; a method is a choice of names.

B rows, C completion columns, L tokens of a row's text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from d1jax.config import KlInLoss, RlConfig
from d1jax.config.objective import Kl, PolicyLoss, Regression, SelfNormalized
from d1jax.models.transformer import Variables
from d1jax.training.likelihood import RolloutBatch, Scorer

MAX_LOG_RATIO = 20.0  # nats, of what is exponentiated: a ratio of 5e8 is far outside every clip range


class TokenTerms(NamedTuple):
    """Per completion token, fp32. Under a ratio of sequences all of its tokens have the same value."""

    policy_BC: Array  # the surrogate alone; exactly 0 where the advantage is 0 (regression: before the first update)
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
) -> TokenTerms:
    """policy loss(ratio, advantage) + kl.coefficient x KL where a KL is in the loss; log ratio = logp - old at the level of the loss.

    ppo: -min(r A, clip(r, 1 - low, 1 + high) A), DeepSeekMath, arXiv 2402.03300, eq. 3. cispo: -sg(min(r, 1 + high)) A log p, so that
    a clipped token keeps its gradient (MiniMax-M1, arXiv 2506.13585). policy_gradient: -A log p; the ratio is 1. regression: see there.
    self_normalized: -A log p, where the advantages come with their `self_normalized_weights`.

    Every term and its gradient is finite for every finite log-probability: beyond e^20 exp is continued by its tangent (see `exp`). So a
    completion of advantage 0 gives exactly 0 and a clipped one no gradient, however far the policies are apart. ppo at a negative
    advantage has no bound by its definition: there the loss of a log ratio x > 20 is |A| e^20 (x - 19), and its gradient still points back.
    """
    policy_loss = config.policy_loss
    if policy_loss.name == "policy_gradient":
        old_logp_BC = jax.lax.stop_gradient(logp_BC)
    log_ratio_BC = LEVELS[policy_loss.level]((logp_BC - old_logp_BC) * mask_BC, mask_BC)
    ratio_BC = safe_exp(log_ratio_BC)
    low, high = clip_range(policy_loss)
    if policy_loss.name in ("policy_gradient", "self_normalized"):
        policy_BC = -advantage_BC * logp_BC
    elif policy_loss.name == "regression":
        policy_BC = regression(log_ratio_BC, advantage_BC, mask_BC, policy_loss)
    elif policy_loss.name == "cispo":
        policy_BC = -jax.lax.stop_gradient(jnp.minimum(ratio_BC, high)) * advantage_BC * log_ratio_BC
    else:
        policy_BC = -jnp.minimum(ratio_BC * advantage_BC, jnp.clip(ratio_BC, low, high) * advantage_BC)
    if config.kl.name == "loss":
        kl_BC = kl_of(config.kl, logp_BC, reference_logp_BC, mask_BC)
    else:
        kl_BC = jnp.zeros_like(logp_BC)
    return TokenTerms(
        policy_BC=policy_BC,
        loss_BC=policy_BC + config.kl.coefficient * kl_BC,
        ratio_BC=ratio_BC,
        kl_BC=kl_BC,
        clipped_low_BC=(ratio_BC < low) & (advantage_BC < 0),
        clipped_high_BC=(ratio_BC > high) & (advantage_BC > 0),
    )


def regression(log_ratio_BC: Array, advantage_BC: Array, mask_BC: Array, policy_loss: Regression) -> Array:
    """[B, C]: (clip(log ratio of the text, log(1 - low), log(1 + high)) / L - psi A)^2, the same number for all tokens of a text.

    The clip does not look at the advantage: outside of it a text has no gradient in either direction. `loss_aggregation: grpo` makes
    it the mean over texts.

    Source: GDSD, arXiv 2605.29398; the released code, github.com/GaryBall/GDSD, compute_loss of its class GDSDTLCTrainer.
    Differs from that code: L is the length of the text (there: the columns of the completion, all of which are scored).
    """
    lowest, highest = np.log(np.array(clip_range(policy_loss)))
    moved_BC = jnp.clip(log_ratio_BC, lowest, highest) / _length(mask_BC)
    return (moved_BC - policy_loss.scale * advantage_BC) ** 2


def self_normalized_weights(
    logp_BC: Array, old_logp_BC: Array, mask_BC: Array, group: int, policy_loss: SelfNormalized
) -> Array:
    """[B, 1]: G softmax over the group of min(log r, log(1 + high)), log r at the level of the loss: weights of a group have the mean 1.

    So a text whose score jumped has no large weight, and does not make the update larger. The clip does not look at the advantage.

    Source: StableDRL, arXiv 2603.06743; compute_loss_spg of the released code, github.com/JianyuanZhong/StableDRL.
    Differs from that code: new and old scores share their masks (there: each has its own, so weights differ before any learning).
    """
    log_ratio_BC = LEVELS[policy_loss.level]((logp_BC - old_logp_BC) * mask_BC, mask_BC)
    log_ratio_QG = log_ratio_BC[:, 0].reshape(-1, group)
    _, highest = clip_range(policy_loss)
    weight_QG = group * jax.nn.softmax(jnp.minimum(log_ratio_QG, np.log(highest)), axis=1)
    return weight_QG.reshape(-1, 1)


def clip_range(policy_loss: PolicyLoss) -> tuple[float, float]:
    """Between which ratios nothing is clipped."""
    low = 1 - policy_loss.clip_low if policy_loss.name in ("ppo", "regression") else 0.0
    high = jnp.inf if policy_loss.name == "policy_gradient" else 1 + policy_loss.clip_high
    return low, high


def kl_of(kl: KlInLoss, logp_BC: Array, reference_logp_BC: Array, mask_BC: Array) -> Array:
    """[B, C]: the KL of each token; that of the sums over a text, shared by its tokens; or of the means over a text (relative)."""
    estimate = KL[kl.estimator]
    if kl.level == "token":
        return estimate(logp_BC, reference_logp_BC)
    length_B1 = _length(mask_BC)
    sums = (jnp.sum(x * mask_BC, axis=1, keepdims=True) for x in (logp_BC, reference_logp_BC))
    if kl.level == "relative":
        return jnp.broadcast_to(estimate(*(sum_B1 / length_B1 for sum_B1 in sums)), logp_BC.shape)
    return jnp.broadcast_to(estimate(*sums) / length_B1, logp_BC.shape)


def relative_to_group(logp_BC: Array, reference_logp_BC: Array, mask_BC: Array, group: int) -> Array:
    """[B, C]: reference scores plus the group's mean of d = mean over a text of log p - log p_reference, so that d to them is centred.

    The KL of `relative` is then d'^2 / 2 with d' = d - sg(mean of d over the group). With policy_gradient, the aggregation grpo and the
    coefficient lambda its gradient is that of RSPO's loss, -mean sg(A - lambda d') d': A / lambda is what d' is drawn to.

    Source: RSPO, arXiv 2605.10218, eq. 3.3, as restated in FORMULATIONS_V2 of github.com/SDogya/automatic-eureka (section 5.2).
    Differs: d is centred over a group (there: over a micro-batch).
    """
    apart_BC = LEVELS["sequence_mean"]((logp_BC - reference_logp_BC) * mask_BC, mask_BC)
    mean_Q1 = jnp.mean(apart_BC[:, 0].reshape(-1, group), axis=1, keepdims=True)
    return reference_logp_BC + jnp.repeat(mean_Q1, group, axis=0)


def safe_exp(x: Array) -> Array:
    """safe_exp(x), and beyond x = MAX_LOG_RATIO its tangent there: finite, with a finite gradient of the right sign.

    exp overflows in fp32 beyond 88, and 0 x inf in a gradient is NaN: one such token would void the update of the whole batch.
    """
    within = jnp.minimum(x, MAX_LOG_RATIO)
    return jnp.exp(within) * (1 + jnp.maximum(x - MAX_LOG_RATIO, 0.0))


# -- importance-sampling levels: (log ratio per token, mask) -> per token ----------------------------------------------------------


def of_token(log_ratio_BC: Array, mask_BC: Array) -> Array:
    return log_ratio_BC


def of_sequence_sum(log_ratio_BC: Array, mask_BC: Array) -> Array:
    """GDPO, arXiv 2510.08554: safe_exp(ELBO - old ELBO)."""
    return jnp.broadcast_to(jnp.sum(log_ratio_BC, axis=1, keepdims=True), log_ratio_BC.shape)


def of_sequence_mean(log_ratio_BC: Array, mask_BC: Array) -> Array:
    """ESPO, arXiv 2512.03759; GSPO, arXiv 2507.18071: safe_exp((ELBO - old ELBO) / L)."""
    return of_sequence_sum(log_ratio_BC, mask_BC) / _length(mask_BC)


Level = Callable[[Array, Array], Array]
LEVELS: dict[str, Level] = {
    "token": of_token,
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
    """safe_exp(d) - d - 1 with d = reference - policy: unbiased for KL(policy || reference) under the policy, never negative."""
    difference = reference_logp - logp
    return safe_exp(difference) - difference - 1


KL: dict[str, Callable[[Array, Array], Array]] = {"k1": k1, "k2": k2, "k3": k3}


# -- loss aggregation: per-token losses -> one number, as weights over the whole batch ----------------------------------------------
# The weights know the totals of the batch, so the weighted sums of micro-batches add up to the loss of the batch. `group`:
# completions of a problem, which are neighbours.


def bnpo(mask_BC: Array, group: int) -> Array:
    """Mean over the tokens of the batch."""
    return mask_BC / jnp.maximum(mask_BC.sum(), 1)


def group_bnpo(mask_BC: Array, group: int) -> Array:
    """Mean over groups of the mean over a group's tokens: d1's released code, whose micro-batch is one problem's completions.

    A group without a token that counts is in no mean.
    """
    tokens_Q = mask_BC.sum(axis=1).reshape(-1, group).sum(axis=1)
    groups = jnp.maximum(jnp.sum(tokens_Q > 0), 1)
    return mask_BC / (groups * jnp.maximum(jnp.repeat(tokens_Q, group), 1))[:, None]


def grpo(mask_BC: Array, group: int) -> Array:
    """Mean over rows of the mean over a row's tokens (DeepSeekMath; d1, eq. 4); under a sequence ratio the mean over sequences."""
    return mask_BC / (mask_BC.shape[0] * jnp.maximum(mask_BC.sum(axis=1, keepdims=True), 1))


def dr_grpo(mask_BC: Array, group: int) -> Array:
    """Sum over tokens / (rows x C): a long answer weighs more than a short one (Dr. GRPO, arXiv 2503.20783)."""
    return mask_BC / mask_BC.size


def row_sum(mask_BC: Array, group: int) -> Array:
    """Mean over rows of the sum over a row's tokens (wd1)."""
    return mask_BC / mask_BC.shape[0]


# DAPO's mean over the tokens of the whole batch is bnpo here, where no micro-batch has a mean of its own.
AGGREGATIONS: dict[str, Callable[[Array, int], Array]] = {
    "bnpo": bnpo,
    "group_bnpo": group_bnpo,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "row_sum": row_sum,
}


def make_kl_in_reward(scorer: Scorer, kl: Kl) -> Callable[..., tuple[np.ndarray, dict[str, float]]]:
    """`with_kl(reward_QG, policy, reference, rollout, key) -> (rewards, metrics)`: rewards as they are, unless rl.kl = reward.

    PPO takes coefficient x the sum over a text of log p - log p_reference off the reward; no gradient flows through it
    (DeepSeekMath, arXiv 2402.03300, eq. 2). The metric `kl` is its mean over tokens.
    """
    if kl.name != "reward":
        return lambda reward_QG, *_: (reward_QG, {})

    @jax.jit
    def penalty(policy: Variables, reference: Variables, rollout: RolloutBatch, key: Array) -> tuple[Array, Array]:
        text_BC = scorer.text_BC(rollout)
        kl_BC = k1(*(scorer.logps(variables, rollout, key) for variables in (policy, reference)))
        return jnp.sum(kl_BC * text_BC, axis=1), jnp.sum(text_BC)

    def with_kl(
        reward_QG: np.ndarray, policy: Variables, reference: Variables, rollout: RolloutBatch, key: Array
    ) -> tuple[np.ndarray, dict[str, float]]:
        kl_B, tokens = penalty(policy, reference, rollout, key)
        taken_QG = kl.coefficient * np.asarray(kl_B, np.float64).reshape(reward_QG.shape)
        return reward_QG - taken_QG, {"kl": float(kl_B.sum() / tokens)}

    return with_kl
