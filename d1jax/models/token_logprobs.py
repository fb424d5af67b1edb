"""log p(token) at given positions without ever building [B, T, V].

N scored positions (any leading shape x), G targets of each, D width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from d1jax.data.tokenizers import SpecialTokens
from d1jax.models.transformer import project

LOGITS_PER_CHUNK = 2**25  # fp32 values alive at once: 128 MiB
LOWEST = -1e30  # a logit of probability 0 that is finite, so that 0 x it is no NaN


class TokenScores(NamedTuple):
    """Both fp32, of the leading shape of the targets."""

    logp: Array
    entropy: Array


def token_logprobs(
    hidden_xD: Array,
    head_DV: Array,
    targets_x: Array,
    chunk: int | None = None,
    sampled_by: SpecialTokens | None = None,
) -> TokenScores:
    """log softmax(hidden head)[target] and the entropy of that softmax, for every position, or, with targets [*x, G], for G tokens at each.

    Positions are scored in chunks, under `jax.checkpoint` where there are several, so neither pass keeps more than chunk x V logits.
    A single chunk is kept for the way back, which saves one of the head's four products. Padding of the last chunk is scored and dropped.
    `chunk` defaults to what fits LOGITS_PER_CHUNK.

    sampled_by: the distribution of a sampler, which draws neither the mask nor ids that only pad the embedding: they have
    probability 0. None: the softmax over all rows of the head, as published training code has it.
    """
    width, shape = hidden_xD.shape[-1], targets_x.shape
    count = hidden_xD.size // width
    chunk = min(chunk or max(LOGITS_PER_CHUNK // head_DV.shape[1], 1), count)
    chunks = -(-count // chunk)
    padding = chunks * chunk - count
    hidden_ND = jnp.pad(hidden_xD.reshape(count, width), ((0, padding), (0, 0))).reshape(chunks, chunk, width)
    targets_NG = jnp.pad(targets_x.reshape(count, -1), ((0, padding), (0, 0))).reshape(chunks, chunk, -1)

    def score(args: tuple[Array, Array]) -> TokenScores:
        hidden_nD, targets_nG = args
        logits_nV = project(hidden_nD, head_DV)
        if sampled_by is not None:
            ids_1V = jnp.arange(logits_nV.shape[1], dtype=jnp.int32)[None, :]
            drawn_1V = (ids_1V != sampled_by.mask) & (ids_1V < sampled_by.vocab_size)
            logits_nV = jnp.where(drawn_1V, logits_nV, LOWEST)
        norm_n1 = jax.nn.logsumexp(logits_nV, axis=-1, keepdims=True)
        logp_nG = jnp.take_along_axis(logits_nV, targets_nG, axis=-1) - norm_n1
        p_nV = jnp.exp(logits_nV - norm_n1)
        entropy_n1 = norm_n1 - jnp.sum(p_nV * logits_nV, axis=-1, keepdims=True)
        return TokenScores(logp_nG, jnp.broadcast_to(entropy_n1, logp_nG.shape))

    if chunks == 1:
        scores = jax.tree.map(lambda x: x[None], score((hidden_ND[0], targets_NG[0])))
    else:
        scores = jax.lax.map(jax.checkpoint(score), (hidden_ND, targets_NG))
    return jax.tree.map(lambda x: x.reshape(-1, targets_NG.shape[-1])[:count].reshape(shape), scores)
