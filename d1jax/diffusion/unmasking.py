"""Which of the candidates one denoising step commits.

B rows, S columns of the active block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from d1jax.config import SamplerConfig
from d1jax.data.tokenizers import SpecialTokens
from d1jax.diffusion.canvas import is_any_of
from d1jax.diffusion.predictions import Candidates

STABLE_STEPS = 2  # KLASS: as many changes in a row must have been small


class Order(NamedTuple):
    """In which order the open positions of a block are taken."""

    rank_BS: Array  # 0 is taken first; those that are not open come last
    logp_BS: Array  # of taking this one next, given those before; 0 where the order is not drawn


def in_order(
    candidates: Candidates,
    uniform_BS: Array | None,
    open_BS: Array,
    forced_BS: Array,
    special: SpecialTokens,
    config: SamplerConfig,
) -> Order:
    """The order that config.remasking names: the surest first, by chance, or from the left; forced positions before all.

    remasking_temperature > 0 (Dream's alg_temp) draws without replacement by softmax(sureness / temperature), as Gumbel-top-k.
    end_token "last" puts end tokens behind all others. Ties go to the lowest index.
    """
    slots_S = jnp.arange(open_BS.shape[1], dtype=jnp.float32)
    if config.remasking == "left_to_right":
        weight_BS = jnp.broadcast_to(-slots_S[None, :], open_BS.shape)
    elif config.remasking == "random":
        weight_BS = jnp.zeros(open_BS.shape, jnp.float32)
    else:
        weight_BS = candidates.sureness_BS / (config.remasking_temperature or 1.0)
    priority_BS = weight_BS
    if config.remasking == "random":
        priority_BS = uniform_BS
    elif config.remasking_temperature > 0:
        priority_BS = weight_BS - jnp.log(-jnp.log(jnp.clip(uniform_BS, 1e-7, 1 - 1e-7)))
    drawn_BS = open_BS & ~forced_BS
    if config.end_token == "last":
        end_BS = is_any_of(candidates.token_BS, special.end_ids)
        priority_BS = jnp.where(end_BS, jnp.finfo(jnp.float32).min, priority_BS)
        drawn_BS &= ~end_BS
    # A model that has become NaN must still end.
    priority_BS = jnp.where(jnp.isnan(priority_BS), jnp.finfo(jnp.float32).min, priority_BS)
    priority_BS = jnp.where(forced_BS, jnp.inf, priority_BS)
    order_BS = jnp.argsort(jnp.where(open_BS, -priority_BS, jnp.inf), axis=1, stable=True)
    rank_BS = jnp.argsort(order_BS, axis=1)
    logp_BS = jnp.zeros(open_BS.shape, jnp.float32)
    if is_drawn(config):  # Plackett and Luce: weight over the weights of all that are left
        sorted_BS = jnp.take_along_axis(jnp.where(drawn_BS, weight_BS, -jnp.inf), order_BS, axis=1)
        left_BS = jax.lax.cumlogsumexp(sorted_BS, axis=1, reverse=True)
        logp_BS = jnp.where(drawn_BS, weight_BS - jnp.take_along_axis(left_BS, rank_BS, axis=1), 0.0)
    return Order(rank_BS, logp_BS)


def is_drawn(config: SamplerConfig) -> bool:
    """Whether the order of positions is random."""
    return config.remasking == "random" or config.remasking_temperature > 0


class Choice(NamedTuple):
    commit_BS: Array
    order_logp_BS: Array  # log-probability of what happened to each open position


def first_ones(order: Order, open_BS: Array, count: Array) -> Choice:
    """The first `count` open positions."""
    commit_BS = open_BS & (order.rank_BS < count)
    return Choice(commit_BS, jnp.where(commit_BS, order.logp_BS, 0.0))


def by_chance(uniform_BS: Array, open_BS: Array, forced_BS: Array, chance: Array) -> Choice:
    """Each open position with this probability (Dream's origin), and what is forced."""
    commit_BS = open_BS & (uniform_BS < chance)
    logp_BS = jnp.where(commit_BS, jnp.log(chance), jnp.log1p(-jnp.where(commit_BS, 0.0, chance)))
    return Choice(commit_BS | forced_BS, jnp.where(open_BS & ~forced_BS, logp_BS, 0.0))


# -- rules by which a step commits as many as the model is sure of -----------------------------------------------------


class Evidence(NamedTuple):
    """What such a rule looks at."""

    candidates: Candidates
    rank_BS: Array
    open_BS: Array
    forced_BS: Array
    stable_BS: Array | None  # klass: for how many steps in a row the distribution hardly changed


def accepted(evidence: Evidence, config: SamplerConfig) -> Choice:
    """What the rule named by config.schedule accepts, and in any case the first of the order; where one is forced, that alone.

    Approximate: tokens committed together do not see each other.
    """
    accepted_BS = RULES[config.schedule](evidence, config) | (evidence.rank_BS == 0)
    forced_B1 = jnp.any(evidence.forced_BS, axis=1, keepdims=True)
    commit_BS = jnp.where(forced_B1, evidence.forced_BS, evidence.open_BS & accepted_BS)
    return Choice(commit_BS, jnp.zeros(commit_BS.shape, jnp.float32))


def _above_threshold(evidence: Evidence, config: SamplerConfig) -> Array:
    """confidence >= threshold (Fast-dLLM, arXiv 2505.22618)."""
    return evidence.candidates.confidence_BS >= config.threshold


def _by_factor(evidence: Evidence, config: SamplerConfig) -> Array:
    """The most confident n, while the n-th has at least 1 - factor / (n + 1) (Fast-dLLM's section on the factor)."""
    nth_S = jnp.arange(1, evidence.open_BS.shape[1] + 1, dtype=jnp.int32)
    count_B = _leading(_ranked(evidence, evidence.candidates.confidence_BS) >= 1 - config.factor / (nth_S + 1)[None, :])
    # The released code takes the last open position along when it is the one that fails.
    open_B = jnp.sum(evidence.open_BS, axis=1)
    count_B = jnp.where(count_B >= open_B - 1, open_B, count_B)
    return evidence.rank_BS < count_B[:, None]


def _within_entropy_bound(evidence: Evidence, config: SamplerConfig) -> Array:
    """The surest n, while the entropies of the first n - 1 sum to at most the bound (EB-Sampler, arXiv 2505.24857: sum - max)."""
    entropy_BS = -_ranked(evidence, evidence.candidates.sureness_BS)
    before_BS = jnp.cumsum(jnp.pad(entropy_BS[:, :-1], ((0, 0), (1, 0))), axis=1)
    return evidence.rank_BS < _leading(before_BS <= config.entropy_bound)[:, None]


def _confident_and_stable(evidence: Evidence, config: SamplerConfig) -> Array:
    """confidence > threshold, and KL(now | step before) < kl_threshold in the last two steps (KLASS, arXiv 2511.05664).

    Differs: the history begins anew with each block (there the whole canvas is scored in every step); one position, the
    surest, where none qualifies.
    """
    return (evidence.candidates.confidence_BS > config.threshold) & (evidence.stable_BS >= STABLE_STEPS)


RULES: dict[str, Callable[[Evidence, SamplerConfig], Array]] = {
    "threshold": _above_threshold,
    "factor": _by_factor,
    "entropy_bound": _within_entropy_bound,
    "klass": _confident_and_stable,
}


def change(logp_BSV: Array, before_BSV: Array) -> Array:
    """KL(now | before) of each position, nats."""
    p_BSV = jnp.exp(logp_BSV)
    return jnp.sum(jnp.where(p_BSV > 0, p_BSV * (logp_BSV - before_BSV), 0.0), axis=-1)


def _ranked(evidence: Evidence, values_BS: Array) -> Array:
    """The values of the open positions in their order, then -inf."""
    order_BS = jnp.argsort(evidence.rank_BS, axis=1)
    return jnp.take_along_axis(jnp.where(evidence.open_BS, values_BS, -jnp.inf), order_BS, axis=1)


def _leading(allowed_BS: Array) -> Array:
    """How many from the left are allowed, the first one in any case."""
    return jnp.sum(jnp.cumprod(allowed_BS.at[:, 0].set(True), axis=1), axis=1)
