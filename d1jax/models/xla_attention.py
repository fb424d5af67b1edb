"""Attention in plain products, which XLA compiles for every device: over the columns of a text, and over a window and what is kept of
all other columns.

B rows, T queries, S keys, H query heads, K key heads, G = H / K query heads that share a key head, h head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import jax
import jax.numpy as jnp
from jax import Array

HIDDEN = -2e38  # the score of a key that is not seen, in fp32; -inf would be NaN where none is seen


def attend_by_xla(
    q_BTHh: Array, k_BSKh: Array, v_BSKh: Array, length_B: Array, visible_BTS: Array | None = None
) -> Array:
    """softmax(q k' / sqrt(h)) v over the first length_B columns of each row, and of these over what visible_BTS [B or 1, T, S] shows,
    [B, T, H, h] in the dtype of q; scores and softmax are fp32. A query that sees no key gets the mean of all values."""
    rows, columns, heads, head_size = q_BTHh.shape
    keys, groups = k_BSKh.shape[1:3]
    seen_BTS = (jnp.arange(keys, dtype=jnp.int32)[None, :] < length_B[:, None])[:, None, :]
    if visible_BTS is not None:
        seen_BTS &= visible_BTS
    # Rotated once: without the barrier XLA's CPU backend rotates again inside of the copies that transpose for the products.
    q_BTHh, k_BSKh = jax.lax.optimization_barrier((q_BTHh, k_BSKh))
    q_BKGTh = q_BTHh.swapaxes(1, 2).reshape(rows, groups, heads // groups, columns, head_size)
    mixed_BKGTh = _softmax_attention(q_BKGTh, k_BSKh.swapaxes(1, 2), v_BSKh.swapaxes(1, 2), seen_BTS)
    return mixed_BKGTh.reshape(rows, heads, columns, head_size).swapaxes(1, 2)


def _scores(q_BKGTh: Array, k_BKSh: Array, seen_BTS: Array) -> Array:
    """q k' / sqrt(h) in fp32 of the keys that a query sees, HIDDEN of the others; one row of `seen` is that of all queries."""
    score_BKGTS = jnp.einsum("BKGTh,BKSh->BKGTS", q_BKGTh, k_BKSh, preferred_element_type=jnp.float32)
    return jnp.where(seen_BTS[:, None, None], score_BKGTS * q_BKGTh.shape[-1] ** -0.5, HIDDEN)


def _exponentials(q_BKGTh: Array, k_BKSh: Array, seen_BTS: Array) -> tuple[Array, Array]:
    """(exp(score - highest), the highest score of each query). Both passes call it and nothing else reads the highest score of the first:
    so XLA compiles one exponential for programs with and without a gradient, and equal weights score equal to the last bit."""
    score_BKGTS = _scores(q_BKGTh, k_BKSh, seen_BTS)
    highest_BKGT1 = jnp.max(score_BKGTS, axis=-1, keepdims=True)
    return jnp.exp(score_BKGTS - highest_BKGT1), highest_BKGT1


def _forward(q_BKGTh: Array, k_BKSh: Array, v_BKSh: Array, seen_BTS: Array) -> tuple[Array, tuple[Array, ...]]:
    weight_BKGTS, _ = _exponentials(q_BKGTh, k_BKSh, seen_BTS)
    total_BKGT1 = jnp.sum(weight_BKGTS, axis=-1, keepdims=True)
    mixed_BKGTh = _einsum("BKGTS,BKSh->BKGTh", weight_BKGTS, v_BKSh) / total_BKGT1
    # Kept in fp32: the gradients of scores are differences from it, and small ones where attention is sharp.
    return mixed_BKGTh.astype(q_BKGTh.dtype), (q_BKGTh, k_BKSh, v_BKSh, seen_BTS, mixed_BKGTh, total_BKGT1)


def _backward(kept: tuple[Array, ...], gradient_BKGTh: Array) -> tuple[Array, Array, Array, None]:
    """With p = softmax(s) and o = p v: dv = p' do, ds = p (do v' - do . o), dq = ds k, dk = ds' q. Source: arXiv 2205.14135, B.2."""
    q_BKGTh, k_BKSh, v_BKSh, seen_BTS, mixed_BKGTh, total_BKGT1 = kept
    weight_BKGTS, highest_BKGT1 = _exponentials(q_BKGTh, k_BKSh, seen_BTS)
    p_BKGTS = weight_BKGTS / total_BKGT1
    dot_BKGT1 = jnp.sum(gradient_BKGTh.astype(jnp.float32) * mixed_BKGTh, axis=-1, keepdims=True)
    of_v_BKSh = _einsum("BKGTS,BKGTh->BKSh", p_BKGTS, gradient_BKGTh)
    of_p_BKGTS = _einsum("BKGTh,BKSh->BKGTS", gradient_BKGTh, v_BKSh)
    # The mean of all values, where no key is seen, does not depend on scores.
    scale_BKGT1 = jnp.where(highest_BKGT1 > HIDDEN / 2, q_BKGTh.shape[-1] ** -0.5, 0.0)
    of_score_BKGTS = p_BKGTS * (of_p_BKGTS - dot_BKGT1) * scale_BKGT1
    of_q_BKGTh = _einsum("BKGTS,BKSh->BKGTh", of_score_BKGTS, k_BKSh)
    of_k_BKSh = _einsum("BKGTS,BKGTh->BKSh", of_score_BKGTS, q_BKGTh)
    return of_q_BKGTh.astype(q_BKGTh.dtype), of_k_BKSh.astype(k_BKSh.dtype), of_v_BKSh.astype(v_BKSh.dtype), None


def _einsum(spec: str, a: Array, b: Array) -> Array:
    """In the dtype of b, added up in fp32."""
    return jnp.einsum(spec, a.astype(b.dtype), b, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _softmax_attention(q_BKGTh: Array, k_BKSh: Array, v_BKSh: Array, seen_BTS: Array) -> Array:
    """softmax(q k' / sqrt(h)) v over the keys that are seen. The way back computes the scores again: a layer keeps no [T, S] for it."""
    return _forward(q_BKGTh, k_BKSh, v_BKSh, seen_BTS)[0]


_softmax_attention.defvjp(_forward, _backward)


def attend_to_past(
    q_BWHh: Array,
    new: tuple[Array, Array],
    past: tuple[Array, Array],
    length_B: Array,
    start: Array | int,
    fresh_from: Array | int,
    hidden_BT: Array | None = None,
) -> Array:
    """Attention of the columns of a window from `start` on, [B, W, H, h]. Their own keys and values count from the column `fresh_from` on;
    those of all other columns are `past`, of which it does not see `hidden_BT`.

    The two are not put together first: that would copy the keys of all columns in every layer and step.
    """
    size, columns = new[0].shape[1], past[0].shape[1]
    place_W = start + jnp.arange(size, dtype=jnp.int32)
    place_T = jnp.arange(columns, dtype=jnp.int32)
    new_hidden_BW = (place_W < fresh_from)[None, :] | (place_W[None, :] >= length_B[:, None])
    replaced_T = (place_T >= fresh_from) & (place_T >= start) & (place_T < start + size)
    past_hidden_BT = replaced_T[None, :] | (place_T[None, :] >= length_B[:, None])
    if hidden_BT is not None:
        past_hidden_BT |= hidden_BT
    return _over(q_BWHh, [(*past, past_hidden_BT), (*new, new_hidden_BW)])


def _over(q_BTHh: Array, parts: Sequence[tuple[Array, Array, Array]]) -> Array:
    """Attention over the keys and values [B, S, K, h] of several parts, without those that are hidden [B, S]."""
    rows, columns, heads, head_size = q_BTHh.shape
    groups = parts[0][0].shape[2]
    q_BKGTh = q_BTHh.swapaxes(1, 2).reshape(rows, groups, heads // groups, columns, head_size)
    scores = []
    for k_BSKh, _, hidden_BS in parts:
        score_BKGTS = jnp.einsum(
            "BKGTh,BKSh->BKGTS", q_BKGTh, k_BSKh.swapaxes(1, 2), preferred_element_type=jnp.float32
        )
        scores.append(score_BKGTS * head_size**-0.5 + jnp.where(hidden_BS, HIDDEN, 0.0)[:, None, None, None, :])
    most = [jnp.max(score_BKGTS, axis=-1, keepdims=True) for score_BKGTS in scores]
    weights = [jnp.exp(score_BKGTS - reduce(jnp.maximum, most)) for score_BKGTS in scores]
    mixed_BKGTh = sum(
        jnp.einsum(
            "BKGTS,BKSh->BKGTh",
            weight_BKGTS.astype(v_BSKh.dtype),
            v_BSKh.swapaxes(1, 2),
            preferred_element_type=jnp.float32,
        )
        for weight_BKGTS, (_, v_BSKh, _) in zip(weights, parts, strict=True)
    )
    total_BKGT1 = sum(jnp.sum(weight_BKGTS, axis=-1, keepdims=True) for weight_BKGTS in weights)
    mixed_BKGTh = (mixed_BKGTh / total_BKGT1).astype(q_BTHh.dtype)
    return mixed_BKGTh.reshape(rows, heads, columns, head_size).swapaxes(1, 2)
