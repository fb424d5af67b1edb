"""The loss over windows of packed text: which tokens are masked, and what each counts.

The first token of a window is given: it is never masked and never scored, so that shifted and unshifted logits, masked diffusion and
next tokens are all measured on the same T - 1 tokens.

B windows, T tokens of a window, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from d1jax.config import AdaptConfig, Alignment
from d1jax.diffusion.canvas import row_uniforms
from d1jax.models.token_logprobs import token_logprobs
from d1jax.models.transformer import Transformer, Variables, head_matrix, hidden_states


class Masked(NamedTuple):
    """Windows as the model sees them, and how much the log-probability of each token counts."""

    tokens_BT: Array
    shown_BT: Array
    length_B: Array  # columns of a window that are there
    weight_BT: Array  # the loss is - sum of weight x log p


def corrupt(key: Array, tokens_BT: Array, config: AdaptConfig, mask_id: int) -> Masked:
    """Masks each token with probability t, drawn for its window from [low, high], and weighs what is masked.

    weight = w / n, where w is 1 / t (inverse) or `cart_weights`, and n the tokens of the batch, or those that are masked.
    Source: LLaDA, arXiv 2502.09992, algorithm 1 (inverse, tokens); DiffuLLaMA, arXiv 2410.17891, released code (inverse, masked);
    DiffuCoder, arXiv 2506.20639, appendix (clean beginnings and cut windows, 1 % each).
    Differs from LLaDA: n counts all tokens of the batch that are there, not B T, which is the same where no window is cut.
    """
    rows, columns = tokens_BT.shape
    row_ids_B = jnp.arange(rows, dtype=jnp.int32)
    place_1T = jnp.arange(columns, dtype=jnp.int32)[None, :]
    draws_key, mask_key = jax.random.split(key)
    t_draw_B, cut_B, cut_at_B, prefix_B, prefix_to_B = row_uniforms(draws_key, row_ids_B, 5).T
    t_B1 = (config.low + (config.high - config.low) * t_draw_B)[:, None]

    span = columns - 2  # both leave a token to score behind the given one
    length_B = jnp.where(cut_B < config.truncated, 2 + (cut_at_B * (span + 1)).astype(jnp.int32), columns)
    length_B = jnp.minimum(length_B, columns)
    given_B = jnp.where(prefix_B < config.clean_prefix, 1 + (prefix_to_B * (length_B - 1)).astype(jnp.int32), 1)
    there_BT = place_1T < length_B[:, None]
    scored_BT = there_BT & (place_1T >= given_B[:, None])
    masked_BT = scored_BT & (row_uniforms(mask_key, row_ids_B, columns) < t_B1)

    worth_BT = 1 / t_B1 if config.weighting.name == "inverse" else cart_weights(masked_BT, there_BT, config.weighting.p)
    counted_BT = masked_BT if config.normalizer == "masked" else there_BT
    total = jnp.maximum(jnp.sum(counted_BT), 1).astype(jnp.float32)
    weight_BT = jnp.where(masked_BT, worth_BT, 0.0) / total
    return Masked(tokens_BT, jnp.where(masked_BT, mask_id, tokens_BT), length_B, weight_BT)


def cart_weights(masked_BT: Array, there_BT: Array, p: float) -> Array:
    """1/2 sum over the clean tokens i of p (1 - p)^(|n - i| - 1), for every position n, [B, T].

    Two passes along the window carry the sums of the tokens to the left and to the right, so no [T, T] matrix is made.
    Source: Dream 7B, arXiv 2508.15487, section 3 (context-adaptive noise rescheduling); p as in its released settings.
    """
    clean_TB = (there_BT & ~masked_BT).T.astype(jnp.float32)

    def step(sum_B: Array, clean_B: Array) -> tuple[Array, Array]:
        return (1 - p) * sum_B + p * clean_B, sum_B  # what lies strictly before

    nothing_B = jnp.zeros(clean_TB.shape[1], jnp.float32)
    _, left_TB = jax.lax.scan(step, nothing_B, clean_TB)
    _, right_TB = jax.lax.scan(step, nothing_B, clean_TB, reverse=True)
    return 0.5 * (left_TB + right_TB).T


def next_tokens(tokens_BT: Array) -> Masked:
    """Windows of which every token but the first is scored from those before it: the mean over tokens."""
    rows, columns = tokens_BT.shape
    weight_BT = jnp.ones((rows, columns), jnp.float32).at[:, 0].set(0.0) / (rows * (columns - 1))
    return Masked(tokens_BT, tokens_BT, jnp.full(rows, columns, jnp.int32), weight_BT)


def token_logps(
    model: Transformer,
    variables: Variables,
    tokens_BT: Array,
    shown_BT: Array,
    length_B: Array,
    visible_BTT: Array | None = None,
) -> Array:
    """log p of each token but the first, [B, T - 1]."""
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None, :], tokens_BT.shape)
    hidden_BTD = hidden_states(model, variables, shown_BT, positions_BT, length_B, visible_BTT)
    return token_logprobs(_scoring(hidden_BTD, model.config.alignment), head_matrix(variables), tokens_BT[:, 1:]).logp


def _scoring(hidden_BTD: Array, alignment: Alignment) -> Array:
    """The states that score the second and later tokens."""
    return hidden_BTD[:, :-1] if alignment == "shifted" else hidden_BTD[:, 1:]


def weighted_loss(
    model: Transformer, variables: Variables, windows: Masked, visible_BTT: Array | None = None
) -> tuple[Array, Array]:
    """(- sum of weight x log p, log p [B, T - 1])."""
    logp_BC = token_logps(model, variables, windows.tokens_BT, windows.shown_BT, windows.length_B, visible_BTT)
    counted_BC = windows.weight_BT[:, 1:]
    return -jnp.sum(jnp.where(counted_BC > 0, counted_BC * logp_BC, 0.0)), logp_BC
