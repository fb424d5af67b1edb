"""What one denoising step commits: candidates, their confidence, and in which order they are taken.

B rows, S columns of the active block, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from d1jax.config import SamplerConfig
from d1jax.data.tokenizers import SpecialTokens


class Proposal(NamedTuple):
    token_BS: Array  # the candidate of each position
    confidence_BS: Array  # its probability
    priority_BS: Array  # the highest are committed


class Draws(NamedTuple):
    """The randomness of a step, where its settings need any."""

    gumbel_BSV: Array | None  # for tokens
    uniform_BS: Array | None  # for the order


def propose(
    logits_BSV: Array, draws: Draws, temperature: float, special: SpecialTokens, config: SamplerConfig
) -> Proposal:
    """Candidates argmax(logits / temperature + Gumbel) among the top_k and top_p, temperature 0: argmax(logits).

    confidence_of: "model" is softmax(logits)[candidate], "sampling" the same of the tempered and filtered logits. The mask
    token and ids beyond the tokenizer's are never candidates, but stay in the softmax. end_token: "forbidden" takes the end
    token out of the distribution; "last" takes end tokens last, and out of everyone's confidence.

    Source: LLaDA's generate, with its options logits_eos_inf ("forbidden") and confidence_eos_eot_inf ("last"); Dream's
    diffusion_generate.
    Differs: fp32 throughout (LLaDA: float64 noise and bf16 confidence); ties go to the lowest index; "last" works at every
    temperature (there: at 0 only); a mask token cannot be committed.
    """
    vocabulary_V = jnp.arange(logits_BSV.shape[-1])
    ends_V = (vocabulary_V == special.end) | (vocabulary_V == special.turn_end)
    if config.end_token == "forbidden":
        logits_BSV = _without(logits_BSV, vocabulary_V == special.end)
    sampled_BSV = keep_top(logits_BSV / temperature if temperature > 0 else logits_BSV, config.top_k, config.top_p)
    candidates_BSV = _without(sampled_BSV, (vocabulary_V == special.mask) | (vocabulary_V >= special.vocab_size))
    if temperature > 0:
        candidates_BSV = candidates_BSV + draws.gumbel_BSV
    token_BS = jnp.argmax(candidates_BSV, axis=-1).astype(jnp.int32)
    scored_BSV = sampled_BSV if config.confidence_of == "sampling" else logits_BSV
    if config.end_token == "last":
        scored_BSV = _without(scored_BSV, ends_V)
    total_BS = jax.nn.logsumexp(scored_BSV, axis=-1)
    confidence_BS = jnp.exp(jnp.take_along_axis(scored_BSV, token_BS[:, :, None], axis=-1)[:, :, 0] - total_BS)
    # Of all log-probabilities only margin and entropy make use; elsewhere the compiler drops them.
    logp_BSV = scored_BSV - total_BS[:, :, None]
    priority_BS = PRIORITIES[config.remasking](confidence_BS, logp_BSV, draws.uniform_BS)
    if config.remasking_temperature > 0:
        # Gumbel-top-k: without replacement, by softmax(priority / temperature).
        gumbel_BS = -jnp.log(-jnp.log(jnp.clip(draws.uniform_BS, 1e-7, 1 - 1e-7)))
        priority_BS = priority_BS / config.remasking_temperature + gumbel_BS
    if config.end_token == "last":
        priority_BS = jnp.where(ends_V[token_BS], jnp.finfo(jnp.float32).min, priority_BS)
    return Proposal(token_BS, confidence_BS, priority_BS)


def _margin(confidence_BS: Array, logp_BSV: Array, uniform_BS: Array | None) -> Array:
    best_BS2 = jnp.exp(jax.lax.top_k(logp_BSV, 2)[0])
    return best_BS2[:, :, 0] - best_BS2[:, :, 1]


def _negative_entropy(confidence_BS: Array, logp_BSV: Array, uniform_BS: Array | None) -> Array:
    p_BSV = jnp.exp(logp_BSV)
    return jnp.sum(p_BSV * jnp.log(p_BSV + 1e-10), axis=-1)


def _leftmost(confidence_BS: Array, logp_BSV: Array, uniform_BS: Array | None) -> Array:
    return jnp.broadcast_to(-jnp.arange(confidence_BS.shape[1], dtype=jnp.float32)[None, :], confidence_BS.shape)


# (confidence_BS, logp_BSV, uniform_BS) -> priority_BS. Dream's names of the first three: maskgit_plus, topk_margin, entropy.
PRIORITIES: dict[str, Callable[[Array, Array, Array | None], Array]] = {
    "low_confidence": lambda confidence_BS, logp_BSV, uniform_BS: confidence_BS,
    "topk_margin": _margin,
    "entropy": _negative_entropy,
    "random": lambda confidence_BS, logp_BSV, uniform_BS: uniform_BS,
    "left_to_right": _leftmost,
}


def keep_top(logits: Array, top_k: int, top_p: float) -> Array:
    """The logits with -inf outside of the k largest and of the likeliest tokens up to the one with which they reach p.

    top_p first, then top_k, as Dream does; of equal logits the lowest index stays.
    """
    # By rank, not by comparing with the value at the border: XLA may compute logits / temperature twice with other roundings,
    # and the token at the border would be smaller than itself.
    order = jnp.argsort(logits, axis=-1, descending=True, stable=True) if top_p < 1 or top_k else None
    if top_p < 1:
        p = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
        # A token stays while those before it have not passed p: the one that crosses is the last.
        kept = jnp.sum(jnp.cumsum(p, axis=-1) - p <= top_p, axis=-1, keepdims=True)
        logits = jnp.where(jnp.argsort(order, axis=-1) < kept, logits, -jnp.inf)
    if top_k:
        logits = jnp.where(jnp.argsort(order, axis=-1) < top_k, logits, -jnp.inf)
    return logits


def choose(priority_BS: Array, open_BS: Array, count: Array) -> Array:
    """True for the `count` open positions of highest priority; ties go to the lowest index."""
    order_BS = jnp.argsort(jnp.where(open_BS, -priority_BS, jnp.inf), axis=1, stable=True)
    rank_BS = jnp.argsort(order_BS, axis=1)
    return (rank_BS < count) & open_BS


def accept(proposal: Proposal, open_BS: Array, config: SamplerConfig) -> Array:
    """True for the open positions that an adaptive schedule commits in parallel: the first of the order always, and more while

        threshold      confidence >= threshold                                 (Fast-dLLM, arXiv 2505.22618)
        factor         n-th highest confidence >= 1 - factor / (n + 1)         (the same, section on the factor)
        entropy_bound  entropies of the first n - 1 sum to <= entropy_bound    (EB-Sampler, arXiv 2505.24857: sum - max)

    Approximate: tokens committed together do not see each other.
    """
    order_BS = jnp.argsort(jnp.where(open_BS, -proposal.priority_BS, jnp.inf), axis=1, stable=True)
    rank_BS = jnp.argsort(order_BS, axis=1)
    if config.schedule == "threshold":
        accepted_BS = proposal.confidence_BS >= config.threshold
    else:
        sorted_BS = jnp.take_along_axis(jnp.where(open_BS, proposal.priority_BS, -jnp.inf), order_BS, axis=1)
        nth_S = jnp.arange(1, sorted_BS.shape[1] + 1)
        if config.schedule == "factor":
            allowed_BS = sorted_BS >= 1 - config.factor / (nth_S + 1)[None, :]
        else:  # the priority is the negative entropy
            before_BS = jnp.cumsum(jnp.pad(-sorted_BS[:, :-1], ((0, 0), (1, 0))), axis=1)
            allowed_BS = before_BS <= config.entropy_bound
        count_B = jnp.sum(jnp.cumprod(allowed_BS | (nth_S == 1)[None, :], axis=1), axis=1)
        if (
            config.schedule == "factor"
        ):  # the released code takes the last open position along when it is the one that fails
            open_B = jnp.sum(open_BS, axis=1)
            count_B = jnp.where(count_B >= open_B - 1, open_B, count_B)
        accepted_BS = rank_BS < count_B[:, None]
    return open_BS & (accepted_BS | (rank_BS == 0))


def _without(logits_BSV: Array, excluded_V: Array) -> Array:
    return jnp.where(excluded_V[None, None, :], -jnp.inf, logits_BSV)
