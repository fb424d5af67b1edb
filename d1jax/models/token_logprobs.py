"""log p(token) at given positions without ever building [B, T, V].

N scored positions (any leading shape), D width, V vocabulary.
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
    """log softmax(hidden head)[target] and the entropy of that softmax, for every position.

    Positions are scored in chunks, under `jax.checkpoint` where there are several, so neither pass keeps more than chunk x V logits.
    A single chunk is kept for the way back, which saves one of the head's four products. Padding of the last chunk is scored and dropped.
    `chunk` defaults to what fits LOGITS_PER_CHUNK.

    sampled_by: the distribution of a sampler, which draws neither the mask nor ids that only pad the embedding: they have
    probability 0. None: the softmax over all rows of the head, as published training code has it.
    """
    shape, width = targets_x.shape, hidden_xD.shape[-1]
    count = targets_x.size
    chunk = min(chunk or max(LOGITS_PER_CHUNK // head_DV.shape[1], 1), count)
    chunks = -(-count // chunk)
    padding = chunks * chunk - count
    hidden_ND = jnp.pad(hidden_xD.reshape(count, width), ((0, padding), (0, 0))).reshape(chunks, chunk, width)
    targets_N = jnp.pad(targets_x.reshape(count), (0, padding)).reshape(chunks, chunk)

    def score(args: tuple[Array, Array]) -> TokenScores:
        hidden_nD, targets_n = args
        logits_nV = project(hidden_nD, head_DV)
        if sampled_by is not None:
            ids_1V = jnp.arange(logits_nV.shape[1], dtype=jnp.int32)[None, :]
            drawn_1V = (ids_1V != sampled_by.mask) & (ids_1V < sampled_by.vocab_size)
            logits_nV = jnp.where(drawn_1V, logits_nV, LOWEST)
        norm_n = jax.nn.logsumexp(logits_nV, axis=-1)
        logp_n = jnp.take_along_axis(logits_nV, targets_n[:, None], axis=-1)[:, 0] - norm_n
        p_nV = jnp.exp(logits_nV - norm_n[:, None])
        return TokenScores(logp_n, norm_n - jnp.sum(p_nV * logits_nV, axis=-1))

    if chunks == 1:
        scores = jax.tree.map(lambda x: x[None], score((hidden_ND[0], targets_N[0])))
    else:
        scores = jax.lax.map(jax.checkpoint(score), (hidden_ND, targets_N))
    return jax.tree.map(lambda x: x.reshape(-1)[:count].reshape(shape), scores)
