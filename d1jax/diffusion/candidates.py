"""What every masked position would become: its token, how likely that was, and how sure the model is of it.

B rows, S columns of the active block, V vocabulary, x any leading shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from d1jax.config import SamplerConfig
from d1jax.data.tokenizers import SpecialTokens


class Candidates(NamedTuple):
    token_BS: Array
    token_logp_BS: Array  # log-probability of drawing it; 0 at temperature 0
    confidence_BS: Array  # its probability
    sureness_BS: Array  # by the measure that config.remasking names
    logp_BSV: Array | None  # all log-probabilities, where the next step compares with them


Pick = Callable[[Array, Array], Array]  # (logits_xV, draws_x...) -> token_x


def candidates(
    logits_BSV: Array,
    draws_BS: Array | None,
    pick: Pick,
    *,
    temperature: float,
    special: SpecialTokens,
    config: SamplerConfig,
) -> Candidates:
    """A sample of softmax(logits / temperature) among the top_k and top_p at each position; temperature 0: argmax(logits).

    confidence_of: "model" is softmax(logits)[candidate], "sampling" the same of the tempered and filtered logits. The mask
    token and ids beyond the tokenizer's are never candidates, but stay in the softmax of the confidence. end_token:
    "forbidden" takes the end token out of the distribution; "last" takes end tokens out of everyone's confidence.

    Source: LLaDA's generate, with its options logits_eos_inf ("forbidden") and confidence_eos_eot_inf ("last"); Dream's
    diffusion_generate.
    Differs: fp32 throughout (LLaDA: float64 noise and bf16 confidence); ties go to the lowest index; "last" works at every
    temperature (there: at 0 only); a mask token cannot be committed.
    """
    vocabulary_V = jnp.arange(logits_BSV.shape[-1])
    if config.end_token == "forbidden":
        logits_BSV = _without(logits_BSV, vocabulary_V == special.end)
    sampled_BSV = keep_top(logits_BSV / temperature if temperature > 0 else logits_BSV, config.top_k, config.top_p)
    allowed_BSV = _without(sampled_BSV, (vocabulary_V == special.mask) | (vocabulary_V >= special.vocab_size))
    if temperature > 0:
        token_BS = pick(allowed_BSV, draws_BS).astype(jnp.int32)
        token_logp_BS = _at(allowed_BSV, token_BS) - jax.nn.logsumexp(allowed_BSV, axis=-1)
    else:
        token_BS = jnp.argmax(allowed_BSV, axis=-1).astype(jnp.int32)
        token_logp_BS = jnp.zeros(token_BS.shape, jnp.float32)
    scored_BSV = sampled_BSV if config.confidence_of == "sampling" else logits_BSV
    if config.end_token == "last":
        scored_BSV = _without(scored_BSV, is_end(vocabulary_V, special))
    total_BS = jax.nn.logsumexp(scored_BSV, axis=-1)
    confidence_BS = jnp.exp(_at(scored_BSV, token_BS) - total_BS)
    # Of all log-probabilities only margin, entropy and klass make use; elsewhere the compiler drops them.
    logp_BSV = scored_BSV - total_BS[:, :, None]
    sureness_BS = SURENESS.get(config.remasking, _of_the_candidate)(confidence_BS, logp_BSV)
    if config.end_token == "last":
        sureness_BS = jnp.where(is_end(token_BS, special), jnp.finfo(jnp.float32).min, sureness_BS)
    return Candidates(
        token_BS, token_logp_BS, confidence_BS, sureness_BS, logp_BSV if config.schedule == "klass" else None
    )


def is_end(tokens: Array, special: SpecialTokens) -> Array:
    return (tokens == special.end) | (tokens == special.turn_end)


def _of_the_candidate(confidence_BS: Array, logp_BSV: Array) -> Array:
    return confidence_BS


def _margin(confidence_BS: Array, logp_BSV: Array) -> Array:
    best_BS2 = jnp.exp(jax.lax.top_k(logp_BSV, 2)[0])
    return best_BS2[:, :, 0] - best_BS2[:, :, 1]


def _negative_entropy(confidence_BS: Array, logp_BSV: Array) -> Array:
    p_BSV = jnp.exp(logp_BSV)
    return jnp.sum(p_BSV * jnp.log(p_BSV + 1e-10), axis=-1)


# Dream's names: topk_margin, entropy; maskgit_plus is the candidate's own confidence.
SURENESS: dict[str, Callable[[Array, Array], Array]] = {"topk_margin": _margin, "entropy": _negative_entropy}


def inverse_cdf(logits_xV: Array, uniform_x2: Array) -> Array:
    """A sample of softmax(logits) for each position: the same law as Gumbel-max, from two random numbers instead of V.

    The vocabulary is cut into about sqrt(V) runs. The first number chooses a run by its mass, the second a token inside, so
    the sums stay short (fp32 keeps its precision) and a token of probability 1e-12 still has its chance.
    """
    vocabulary = logits_xV.shape[-1]
    size = max(round(vocabulary**0.5), 1)
    runs = -(-vocabulary // size)
    padding = [(0, 0)] * (logits_xV.ndim - 1) + [(0, runs * size - vocabulary)]
    padded_xRr = jnp.pad(logits_xV, padding, constant_values=-jnp.inf).reshape(*logits_xV.shape[:-1], runs, size)
    highest_x = jnp.max(logits_xV, axis=-1)
    mass_xR = jnp.sum(jnp.exp(padded_xRr - highest_x[..., None, None]), axis=-1)
    run_x = _first_beyond(mass_xR, uniform_x2[..., 0])
    inside_xr = jnp.take_along_axis(padded_xRr, run_x[..., None, None], axis=-2)[..., 0, :]
    # Relative to the run's own highest: an unlikely run must not underflow.
    highest_x = jnp.max(inside_xr, axis=-1)
    return run_x * size + _first_beyond(jnp.exp(inside_xr - highest_x[..., None]), uniform_x2[..., 1])


def _first_beyond(mass_xN: Array, uniform_x: Array) -> Array:
    """The first index up to which the mass is more than `uniform` of the whole; never one without mass."""
    upto_xN = jnp.cumsum(mass_xN, axis=-1)
    return jnp.sum(upto_xN <= uniform_x[..., None] * upto_xN[..., -1:], axis=-1)


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


def _at(values_BSV: Array, token_BS: Array) -> Array:
    return jnp.take_along_axis(values_BSV, token_BS[:, :, None], axis=-1)[:, :, 0]


def _without(logits_BSV: Array, excluded_V: Array) -> Array:
    return jnp.where(excluded_V[None, None, :], -jnp.inf, logits_BSV)
