"""Bits per byte of held-out text: exactly for next tokens, by the ELBO for masked diffusion.

B windows, T tokens of a window, C = T - 1 of them scored, N windows in all.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from d1jax.adapt.loss import token_logps
from d1jax.data.packing import Windows
from d1jax.diffusion.canvas import row_uniforms
from d1jax.models import sharding
from d1jax.models.transformer import Transformer, Variables


class BitsPerByte(NamedTuple):
    """`error` is one standard error, over windows: it holds both what differs between texts and what the maskings add."""

    bits_per_byte: float
    error: float
    windows: int
    samples: int  # maskings of a window; 1 where nothing is drawn


def bits_per_byte(
    model: Transformer,
    variables: Variables,
    windows: Windows,
    mesh: Mesh,
    batch_size: int,
    mask_id: int,
    samples: int,
    key: Array,
) -> BitsPerByte:
    """Of a causal model the bits of its next tokens; of any other the upper bound that the ELBO gives, from `samples` maskings of a
    window. The first token of a window is given and costs nothing, nor do its bytes count.

    The rows of a last batch that is not full are filled with its first ones, which are not counted.
    """
    causal = model.config.attention_mask == "causal"
    samples = 1 if causal else samples
    nats, count = [], len(windows.tokens_NT)
    for start in range(0, count, batch_size):
        rows_B = np.minimum(np.arange(start, start + batch_size), count - 1)
        tokens_BT = sharding.shard_batch(mesh, windows.tokens_NT[rows_B])
        ids_B = sharding.shard_batch(mesh, rows_B.astype(np.int32))
        made = (
            _next_token_nats(model, variables, tokens_BT)
            if causal
            else _elbo_nats(model, samples, variables, tokens_BT, ids_B, key, mask_id)
        )
        nats.append(made)  # the devices are at the next batch while the host waits for none
    nats_N = np.concatenate([np.asarray(sharding.fetch(made)) for made in nats])[:count]
    return _ratio(nats_N / math.log(2), windows.bytes_NT[:, 1:].sum(axis=1), samples)


def _ratio(bits_N: np.ndarray, bytes_N: np.ndarray, samples: int) -> BitsPerByte:
    """Sum of bits / sum of bytes, and the standard error of this ratio over windows."""
    value = bits_N.sum(dtype=np.float64) / bytes_N.sum(dtype=np.float64)
    residual_N = bits_N - value * bytes_N
    error = math.nan
    if len(bits_N) > 1:
        error = math.sqrt(len(bits_N)) * residual_N.std(ddof=1) / bytes_N.sum(dtype=np.float64)
    return BitsPerByte(float(value), float(error), len(bits_N), samples)


@partial(jax.jit, static_argnames="model")
def _next_token_nats(model: Transformer, variables: Variables, tokens_BT: Array) -> Array:
    length_B = jnp.full(tokens_BT.shape[0], tokens_BT.shape[1], jnp.int32)
    return -jnp.sum(token_logps(model, variables, tokens_BT, tokens_BT, length_B), axis=1)


@partial(jax.jit, static_argnames=("model", "samples"))
def _elbo_nats(
    model: Transformer,
    samples: int,
    variables: Variables,
    tokens_BT: Array,
    row_ids_B: Array,
    key: Array,
    mask_id: Array | int,
) -> Array:
    """[B]: the mean over `samples` maskings of (C / m) x nats of the m tokens that are masked.

    m is uniform on 1 .. C, one draw from each of `samples` equal parts of that range; which m tokens is uniform. The expectation is the
    negative ELBO of the C tokens. Source: LLaDA, arXiv 2502.09992, equation 6; the parts of the range are ours, and only lower the
    variance.
    """
    scored = tokens_BT.shape[1] - 1
    length_B = jnp.full(tokens_BT.shape[0], tokens_BT.shape[1], jnp.int32)

    def sample(total_B: Array, number: Array) -> tuple[Array, None]:
        count_key, which_key = jax.random.split(jax.random.fold_in(key, number))
        place_B = (number + row_uniforms(count_key, row_ids_B, 1)[:, 0]) / samples
        count_B1 = (1 + jnp.minimum((place_B * scored).astype(jnp.int32), scored - 1))[:, None]
        order_BC = jnp.argsort(jnp.argsort(row_uniforms(which_key, row_ids_B, scored), axis=1), axis=1)
        masked_BC = order_BC < count_B1
        shown_BT = tokens_BT.at[:, 1:].set(jnp.where(masked_BC, mask_id, tokens_BT[:, 1:]))
        logp_BC = token_logps(model, variables, tokens_BT, shown_BT, length_B)
        nats_B = -jnp.sum(jnp.where(masked_BC, logp_BC, 0.0), axis=1) * scored / count_B1[:, 0]
        return total_B + nats_B / samples, None

    return jax.lax.scan(sample, jnp.zeros(tokens_BT.shape[0], jnp.float32), jnp.arange(samples, dtype=jnp.int32))[0]
