"""Which of the predicted tokens one denoising step unmasks.

B rows, S columns of the active block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from d1jax.config import EntropyBound, Factor, Klass, SamplerConfig, Threshold
from d1jax.config.sampler import Schedule
from d1jax.data.tokenizers import SpecialTokens
from d1jax.diffusion.canvas import is_any_of
from d1jax.diffusion.predictions import Predictions

STABLE_STEPS = 2  # KLASS: as many changes in a row must have been small
LOWEST = jnp.finfo(jnp.float32).min


class Order(NamedTuple):
    """In which order the masked positions of a block are taken."""

    rank_BS: Array  # 0 is taken first; those that are not masked come last
    logp_BS: Array  # of taking this one next, given those before; 0 where the order is not drawn


def in_order(
    predictions: Predictions,
    uniform_BS: Array | None,
    masked_BS: Array,
    forced_BS: Array,
    special: SpecialTokens,
    config: SamplerConfig,
) -> Order:
    """The `Order` that config.remasking names: the surest first, by chance, or from the left; forced positions before all.

    Its temperature > 0 (Dream's alg_temp) draws without replacement by softmax(confidence score / temperature), as
    Gumbel-top-k. end_token "last" puts end tokens behind all others. Ties go to the lowest index.
    """
    weight_BS = _weight(predictions, masked_BS.shape, config)
    priority_BS = weight_BS
    if config.remasking.name == "random":
        priority_BS = uniform_BS
    elif config.remasking.temperature > 0:
        # Gumbel noise: the order of the sums is a draw without replacement.
        priority_BS = weight_BS - jnp.log(-jnp.log(jnp.clip(uniform_BS, 1e-7, 1 - 1e-7)))
    drawn_BS = masked_BS & ~forced_BS
    if config.end_token == "last":
        end_BS = is_any_of(predictions.token_BS, special.end_ids)
        priority_BS = jnp.where(end_BS, LOWEST, priority_BS)
        drawn_BS &= ~end_BS
    # A model that has become NaN must still end.
    priority_BS = jnp.where(jnp.isnan(priority_BS), LOWEST, priority_BS)
    priority_BS = jnp.where(forced_BS, jnp.inf, priority_BS)
    order_BS = jnp.argsort(jnp.where(masked_BS, -priority_BS, jnp.inf), axis=1, stable=True)
    rank_BS = jnp.argsort(order_BS, axis=1)
    logp_BS = jnp.zeros(masked_BS.shape, jnp.float32)
    if config.has_drawn_order:  # Plackett and Luce: weight over the weights of all that are left
        sorted_BS = jnp.take_along_axis(jnp.where(drawn_BS, weight_BS, -jnp.inf), order_BS, axis=1)
        left_BS = jax.lax.cumlogsumexp(sorted_BS, axis=1, reverse=True)
        logp_BS = jnp.where(drawn_BS, weight_BS - jnp.take_along_axis(left_BS, rank_BS, axis=1), 0.0)
    return Order(rank_BS, logp_BS)


def _weight(predictions: Predictions, shape: tuple[int, ...], config: SamplerConfig) -> Array:
    """What config.remasking goes by, [B, S]: the higher, the earlier (or the likelier to be early)."""
    if config.remasking.name == "left_to_right":
        columns_S = jnp.arange(shape[1], dtype=jnp.float32)
        return jnp.broadcast_to(-columns_S[None, :], shape)
    if config.remasking.name == "random":
        return jnp.zeros(shape, jnp.float32)
    return predictions.confidence_score_BS / (config.remasking.temperature or 1.0)


class Selection(NamedTuple):
    """What one step unmasks."""

    unmask_BS: Array
    order_logp_BS: Array  # log-probability of what happened to each masked position


# -- schedules that fix how many ---------------------------------------------------------------------------------------


def top_k(order: Order, masked_BS: Array, count: Array) -> Selection:
    """The first `count` masked positions of the order."""
    unmask_BS = masked_BS & (order.rank_BS < count)
    return Selection(unmask_BS, jnp.where(unmask_BS, order.logp_BS, 0.0))


def bernoulli(uniform_BS: Array, masked_BS: Array, forced_BS: Array, probability: Array) -> Selection:
    """Each masked position with this probability (Dream's origin), and what is forced."""
    unmask_BS = masked_BS & (uniform_BS < probability)
    logp_BS = jnp.where(unmask_BS, jnp.log(probability), jnp.log1p(-jnp.where(unmask_BS, 0.0, probability)))
    return Selection(unmask_BS | forced_BS, jnp.where(masked_BS & ~forced_BS, logp_BS, 0.0))


# -- rules by which a step unmasks as many as the model is sure of -----------------------------------------------------


class UnmaskingState(NamedTuple):
    """What such a rule looks at."""

    predictions: Predictions
    rank_BS: Array
    masked_BS: Array
    forced_BS: Array
    stable_steps_BS: Array | None  # Klass: for how many steps in a row the distribution hardly changed


def above_threshold(rule: Threshold, state: UnmaskingState) -> Array:
    """confidence >= threshold (Fast-dLLM, arXiv 2505.22618)."""
    return state.predictions.confidence_BS >= rule.threshold


def by_factor(rule: Factor, state: UnmaskingState) -> Array:
    """The most confident n, while the n-th has at least 1 - factor / (n + 1) (Fast-dLLM's section on the factor)."""
    nth_S = jnp.arange(1, state.masked_BS.shape[1] + 1, dtype=jnp.int32)
    needed_S = 1 - rule.factor / (nth_S + 1)
    count_B = _leading(_ranked(state, state.predictions.confidence_BS) >= needed_S[None, :])
    # The released code takes the last masked position along when it is the one that fails.
    masked_B = jnp.sum(state.masked_BS, axis=1)
    count_B = jnp.where(count_B >= masked_B - 1, masked_B, count_B)
    return state.rank_BS < count_B[:, None]


def within_entropy_bound(rule: EntropyBound, state: UnmaskingState) -> Array:
    """The surest n, while the entropies of the first n - 1 sum to at most the bound (EB-Sampler, arXiv 2505.24857: sum - max).

    It reads the confidence score as the negative entropy, which is what remasking "entropy" makes of it.
    """
    entropy_BS = -_ranked(state, state.predictions.confidence_score_BS)
    before_BS = jnp.cumsum(jnp.pad(entropy_BS[:, :-1], ((0, 0), (1, 0))), axis=1)
    return state.rank_BS < _leading(before_BS <= rule.bound)[:, None]


def confident_and_stable(rule: Klass, state: UnmaskingState) -> Array:
    """confidence > threshold, and KL(now | step before) < kl_threshold in the last two steps (KLASS, arXiv 2511.05664).

    Differs: the history begins anew with each block (there the whole canvas is scored in every step); one position, the
    surest, where none qualifies.
    """
    return (state.predictions.confidence_BS > rule.threshold) & (state.stable_steps_BS >= STABLE_STEPS)


# By the name of the schedule: (schedule with its thresholds, state) -> bool [B, S]; what is said of positions that are not masked
# is not read.
RULES: dict[str, Callable[[Any, UnmaskingState], Array]] = {
    "threshold": above_threshold,
    "factor": by_factor,
    "entropy_bound": within_entropy_bound,
    "klass": confident_and_stable,
}


def stable_steps(rule: Klass, logp_BSV: Array, before_BSV: Array, stable_steps_BS: Array, known_B: Array) -> Array:
    """For how many steps in a row each distribution has hardly changed, [B, S]; 0 where no step before is known."""
    still_BS = (change(logp_BSV, before_BSV) < rule.kl_threshold) & known_B[:, None]
    return jnp.where(still_BS, stable_steps_BS + 1, 0)


def accepted(rule: Schedule, state: UnmaskingState) -> Selection:
    """What the rule accepts, and in any case the first of the order; where one is forced, that alone.

    Approximate: tokens unmasked together do not see each other.
    """
    accepted_BS = RULES[rule.name](rule, state) | (state.rank_BS == 0)
    forced_B1 = jnp.any(state.forced_BS, axis=1, keepdims=True)
    unmask_BS = jnp.where(forced_B1, state.forced_BS, state.masked_BS & accepted_BS)
    return Selection(unmask_BS, jnp.zeros(unmask_BS.shape, jnp.float32))


def change(logp_BSV: Array, before_BSV: Array) -> Array:
    """KL(now | before) of each position, nats."""
    p_BSV = jnp.exp(logp_BSV)
    return jnp.sum(jnp.where(p_BSV > 0, p_BSV * (logp_BSV - before_BSV), 0.0), axis=-1)


def _ranked(state: UnmaskingState, values_BS: Array) -> Array:
    """The values of the masked positions in their order, then -inf."""
    order_BS = jnp.argsort(state.rank_BS, axis=1)
    return jnp.take_along_axis(jnp.where(state.masked_BS, values_BS, -jnp.inf), order_BS, axis=1)


def _leading(allowed_BS: Array) -> Array:
    """How many from the left are allowed, the first one in any case."""
    return jnp.sum(jnp.cumprod(allowed_BS.at[:, 0].set(True), axis=1), axis=1)
