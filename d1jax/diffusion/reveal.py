"""What one denoising step commits: candidates, their confidence, and the schedule.

B rows, S columns of the active block, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from d1jax.config import SamplerConfig
from d1jax.data.tokenizers import SpecialTokens


class Proposal(NamedTuple):
    token_BS: Array  # the candidate of each position
    confidence_BS: Array  # its probability under the model
    priority_BS: Array  # the highest are committed


def tokens_per_step(block_length: int, steps_per_block: int) -> tuple[int, ...]:
    """How many positions each step of a block commits; the first steps take the remainder: 8 in 3 -> (3, 3, 2)."""
    base, extra = divmod(block_length, steps_per_block)
    return tuple(base + (step < extra) for step in range(steps_per_block))


def propose(
    logits_BSV: Array,
    gumbel_BSV: Array | None,
    uniform_BS: Array | None,
    temperature: float,
    special: SpecialTokens,
    config: SamplerConfig,
) -> Proposal:
    """Candidates argmax(logits / temperature + Gumbel), temperature 0: argmax(logits); confidence softmax(logits)[candidate].

    remasking: low_confidence gives priority to the confidence, random to `uniform_BS`. The mask token and ids beyond the
    tokenizer's are never candidates, but stay in the softmax. end_token: "forbidden" takes the end token out of the
    distribution; "last" lets end tokens be candidates of priority 0 and takes them out of everyone's confidence.

    Source: LLaDA's generate, with its options logits_eos_inf ("forbidden") and confidence_eos_eot_inf ("last").
    Differs: fp32 throughout (LLaDA: float64 noise and bf16 confidence); ties go to the lowest index; "last" works at every
    temperature (there: at 0 only); a mask token cannot be committed.
    """
    vocabulary_V = jnp.arange(logits_BSV.shape[-1])
    ends_V = (vocabulary_V == special.end) | (vocabulary_V == special.turn_end)
    if config.end_token == "forbidden":
        logits_BSV = _without(logits_BSV, vocabulary_V == special.end)
    candidates_BSV = _without(logits_BSV, (vocabulary_V == special.mask) | (vocabulary_V >= special.vocab_size))
    if temperature > 0:
        candidates_BSV = candidates_BSV / temperature + gumbel_BSV
    token_BS = jnp.argmax(candidates_BSV, axis=-1).astype(jnp.int32)
    if config.end_token == "last":
        logits_BSV = _without(logits_BSV, ends_V)
    chosen_BS = jnp.take_along_axis(logits_BSV, token_BS[:, :, None], axis=-1)[:, :, 0]
    confidence_BS = jnp.exp(chosen_BS - jax.nn.logsumexp(logits_BSV, axis=-1))
    if config.remasking == "low_confidence":
        return Proposal(token_BS, confidence_BS, confidence_BS)
    last_BS = ends_V[token_BS] if config.end_token == "last" else jnp.zeros_like(token_BS, bool)
    return Proposal(token_BS, confidence_BS, jnp.where(last_BS, 0.0, uniform_BS))


def choose(priority_BS: Array, open_BS: Array, count: Array) -> Array:
    """True for the `count` open positions of highest priority; ties go to the lowest index."""
    order_BS = jnp.argsort(jnp.where(open_BS, -priority_BS, jnp.inf), axis=1, stable=True)
    rank_BS = jnp.argsort(order_BS, axis=1)
    return (rank_BS < count) & open_BS


def _without(logits_BSV: Array, excluded_V: Array) -> Array:
    return jnp.where(excluded_V[None, None, :], -jnp.inf, logits_BSV)
