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
from d1jax.diffusion.canvas import is_any_of


class Predictions(NamedTuple):
    """What one forward pass says of every position of a block."""

    token_BS: Array
    token_logp_BS: Array  # log-probability of drawing it; 0 where it is not drawn
    confidence_BS: Array  # its probability
    confidence_score_BS: Array  # by the measure that config.remasking names: the higher, the earlier it is unmasked
    entropy_BS: Array | None  # of the prediction, where it is recorded
    logp_BSV: Array | None  # all log-probabilities, where the next step compares with them


# What differs from the stored logits is computed where it is read: another [B, S, V] array would cost more than the sums.
LogitsMask = Callable[[Array, Array], Array]  # (logits_x, their ids_x) -> what is sampled from, -inf where never
TokenSampler = Callable[[Array, LogitsMask, Array], Array]  # (logits_xV, logits mask, draws_x...) -> token_x


def predict(
    logits_BSV: Array,
    draws_BS: Array | None,
    token_sampler: TokenSampler,
    *,
    temperature: float | Array = 1.0,
    special: SpecialTokens,
    config: SamplerConfig,
    record_entropy: bool = False,
    keep_logp: bool = False,
) -> Predictions:
    """`Predictions` of a block: a sample of softmax(logits / temperature) among the top_k and top_p; without draws: argmax(logits).

    config.remasking.confidence_of: "model" is softmax(logits)[token], "sampling" the same of the tempered and filtered logits. The mask
    token and ids beyond the tokenizer's are never predicted, but stay in the softmax of the confidence. end_token:
    "forbidden" takes the end token out of the distribution, "all_forbidden" also what closes a turn; "last" takes end tokens
    out of everyone's confidence. record_entropy keeps the entropies, keep_logp all log-probabilities.

    Source: LLaDA's generate, with its options logits_eos_inf ("forbidden") and confidence_eos_eot_inf ("last"); Dream's
    diffusion_generate.
    Differs: fp32 throughout (LLaDA: float64 noise and bf16 confidence); ties go to the lowest index; "last" works at every
    temperature (there: at 0 only); a mask token cannot be predicted.
    """
    ids_11V = jnp.arange(logits_BSV.shape[-1], dtype=jnp.int32)[None, None, :]
    sampled_BSV = logits_BSV
    divisor = 1.0 if draws_BS is None else temperature
    if config.top_k or config.top_p < 1:
        sampled_BSV = _filtered(logits_BSV, ids_11V, divisor, special, config)
        divisor = 1.0  # the filtered logits are tempered already

    def sampled_mask(values: Array, ids: Array) -> Array:
        values = _without_forbidden(values / divisor, ids, special, config)
        return jnp.where(_is_never(ids, special), -jnp.inf, values)

    def scored_mask(values: Array, ids: Array) -> Array:
        values = _without_forbidden(values / (divisor if from_sampled else 1.0), ids, special, config)
        return jnp.where(is_any_of(ids, special.end_ids), -jnp.inf, values) if config.end_token == "last" else values

    from_sampled = config.remasking.confidence_of == "sampling"
    source_BSV = sampled_BSV if from_sampled else logits_BSV
    if draws_BS is not None:
        token_BS = token_sampler(sampled_BSV, sampled_mask, draws_BS).astype(jnp.int32)
        total_BS = jax.nn.logsumexp(sampled_mask(sampled_BSV, ids_11V), axis=-1)
        token_logp_BS = sampled_mask(_at(sampled_BSV, token_BS), token_BS) - total_BS
    else:
        token_BS = highest(sampled_BSV, sampled_mask).astype(jnp.int32)
        token_logp_BS = jnp.zeros(token_BS.shape, jnp.float32)
    scored_BSV = scored_mask(source_BSV, ids_11V)
    total_BS = jax.nn.logsumexp(scored_BSV, axis=-1)
    # A filter may leave end tokens only, which "last" takes out of the confidence.
    total_BS = jnp.where(jnp.isfinite(total_BS), total_BS, 0.0)
    confidence_BS = jnp.exp(scored_mask(_at(source_BSV, token_BS), token_BS) - total_BS)
    # Of all log-probabilities only margin, entropy and klass make use; elsewhere the compiler drops them.
    logp_BSV = scored_BSV - total_BS[:, :, None]
    score_BS = CONFIDENCE_SCORES.get(config.remasking.name, _of_the_token)(confidence_BS, logp_BSV)
    if config.end_token == "last":
        score_BS = jnp.where(is_any_of(token_BS, special.end_ids), jnp.finfo(jnp.float32).min, score_BS)
    entropy_BS = -_negative_entropy(confidence_BS, logp_BSV) if record_entropy else None
    kept_BSV = logp_BSV if keep_logp else None
    return Predictions(token_BS, token_logp_BS, confidence_BS, score_BS, entropy_BS, kept_BSV)


def _filtered(
    logits_BSV: Array, ids_11V: Array, divisor: float | Array, special: SpecialTokens, config: SamplerConfig
) -> Array:
    """The tempered logits with -inf outside of top_k and top_p."""
    within_BSV = _without_forbidden(logits_BSV, ids_11V, special, config) / divisor
    kept_BSV = keep_top(within_BSV, config.top_k, config.top_p)
    # Where a filter leaves only tokens that are never sampled (the mask, when the model shouts it), it is not applied.
    some_BS1 = jnp.any(jnp.isfinite(kept_BSV) & ~_is_never(ids_11V, special), axis=-1, keepdims=True)
    return jnp.where(some_BS1, kept_BSV, within_BSV)


def _is_never(ids: Array, special: SpecialTokens) -> Array:
    """True for ids that are never sampled: the mask, and those that only pad the embedding."""
    return (ids == special.mask) | (ids >= special.vocab_size)


def _of_the_token(confidence_BS: Array, logp_BSV: Array) -> Array:
    return confidence_BS


def _margin(confidence_BS: Array, logp_BSV: Array) -> Array:
    best_BS2 = jnp.exp(jax.lax.top_k(logp_BSV, 2)[0])
    return best_BS2[:, :, 0] - best_BS2[:, :, 1]


def _negative_entropy(confidence_BS: Array, logp_BSV: Array) -> Array:
    p_BSV = jnp.exp(logp_BSV)
    return jnp.sum(p_BSV * jnp.log(p_BSV + 1e-10), axis=-1)


# Dream's names: topk_margin, entropy; maskgit_plus is the token's own confidence.
CONFIDENCE_SCORES: dict[str, Callable[[Array, Array], Array]] = {"topk_margin": _margin, "entropy": _negative_entropy}


# -- one token of many -------------------------------------------------------------------------------------------------
#
# The vocabulary is cut into R runs of r, about sqrt(V) each. A pass over the logits leaves one number a run; the rest looks at
# the runs and at one of them. XLA's argmax over a whole vocabulary takes 17 times as long as the maxima of runs (2 CPU cores).


def highest(logits_xV: Array, logits_mask: LogitsMask) -> Array:
    """argmax(logits_mask(logits)); ties go to the lowest index."""
    runs_xRr, ids_Rr = _runs(logits_xV)
    top_xR = jnp.max(logits_mask(runs_xRr, _like(ids_Rr, runs_xRr)), axis=-1)
    run_x = jnp.argmax(top_xR, axis=-1)
    inside_xr, ids_xr = _inside(runs_xRr, run_x)
    return run_x * runs_xRr.shape[-1] + jnp.argmax(logits_mask(inside_xr, ids_xr), axis=-1)


def inverse_cdf(logits_xV: Array, logits_mask: LogitsMask, uniform_x2: Array) -> Array:
    """A sample of softmax(logits_mask(logits)): the distribution of Gumbel-max from two random numbers instead of V.

    The first number chooses a run by its mass, the second a token inside, so the sums stay short (fp32 keeps its precision)
    and a token of probability 1e-12 still has its chance.
    """
    runs_xRr, ids_Rr = _runs(logits_xV)
    runs_ids = _like(ids_Rr, runs_xRr)
    highest_x = jnp.max(logits_mask(runs_xRr, runs_ids), axis=(-2, -1))
    mass_xR = jnp.sum(jnp.exp(logits_mask(runs_xRr, runs_ids) - highest_x[..., None, None]), axis=-1)
    run_x = _first_beyond(mass_xR, uniform_x2[..., 0])
    inside_xr, ids_xr = _inside(runs_xRr, run_x)
    inside_xr = logits_mask(inside_xr, ids_xr)
    # Relative to the run's own highest: an unlikely run must not underflow.
    highest_x = jnp.max(inside_xr, axis=-1)
    return run_x * runs_xRr.shape[-1] + _first_beyond(jnp.exp(inside_xr - highest_x[..., None]), uniform_x2[..., 1])


def _runs(logits_xV: Array) -> tuple[Array, Array]:
    """(logits [..., R, r], ids [R, r]). r divides V where V has a divisor near its root; else the last run is padded with -inf."""
    vocabulary = logits_xV.shape[-1]
    root = vocabulary**0.5
    near = [size for size in range(1, vocabulary + 1) if vocabulary % size == 0 and root / 4 <= size <= root * 4]
    size = min(near, key=lambda size: abs(size - root), default=round(root))
    padding = -vocabulary % size
    if padding:
        widths = [(0, 0)] * (logits_xV.ndim - 1) + [(0, padding)]
        logits_xV = jnp.pad(logits_xV, widths, constant_values=-jnp.inf)
    ids_Rr = jnp.arange(vocabulary + padding, dtype=jnp.int32).reshape(-1, size)
    return logits_xV.reshape(*logits_xV.shape[:-1], *ids_Rr.shape), ids_Rr


def _inside(runs_xRr: Array, run_x: Array) -> tuple[Array, Array]:
    """The logits [..., r] of the chosen run, and their ids."""
    inside_xr = jnp.take_along_axis(runs_xRr, run_x[..., None, None], axis=-2)[..., 0, :]
    size = runs_xRr.shape[-1]
    return inside_xr, run_x[..., None] * size + _like(jnp.arange(size, dtype=jnp.int32), inside_xr)


def _like(ids: Array, values: Array) -> Array:
    return ids.reshape((1,) * (values.ndim - ids.ndim) + ids.shape)


def _first_beyond(mass_xN: Array, uniform_x: Array) -> Array:
    """The first index up to which the mass is more than `uniform` of the whole; never one without mass."""
    upto_xN = jnp.cumsum(mass_xN, axis=-1)
    first_x = jnp.sum(upto_xN <= uniform_x[..., None] * upto_xN[..., -1:], axis=-1)
    # A parallel sum may round its last terms apart although nothing is added between them.
    last_x = mass_xN.shape[-1] - 1 - jnp.argmax(mass_xN[..., ::-1] > 0, axis=-1)
    return jnp.minimum(first_x, last_x)


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


def _without_forbidden(values: Array, ids: Array, special: SpecialTokens, config: SamplerConfig) -> Array:
    if config.end_token == "forbidden":
        return jnp.where(ids == special.end, -jnp.inf, values)
    return (
        jnp.where(is_any_of(ids, special.end_ids), -jnp.inf, values) if config.end_token == "all_forbidden" else values
    )
