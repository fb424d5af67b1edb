"""The masked SFT loss: cross-entropy on hidden tokens, weighted by the inverse of the probability of hiding them.

B rows, C completion columns.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from d1jax.diffusion.canvas import Canvas, completion_hidden
from d1jax.diffusion.forward_process import Corruption
from d1jax.models.token_logprobs import token_logprobs
from d1jax.models.transformer import Transformer, Variables, head_matrix, hidden_states


def per_row(eligible_BC: Array) -> Array:
    """1 / (rows x tokens of the row): LLaDA's mean over rows of each row's mean."""
    rows = eligible_BC.shape[0]
    return 1.0 / (rows * jnp.maximum(eligible_BC.sum(axis=1), 1))


def batch_token(eligible_BC: Array) -> Array:
    """1 / (tokens of the batch): d1's mean over all positions outside the prompts, padding included."""
    total = jnp.maximum(eligible_BC.sum(), 1)
    return jnp.full(eligible_BC.shape[0], 1.0 / total, jnp.float32)


NORMALIZERS = {"per_row": per_row, "batch_token": batch_token}


def masked_loss(
    model: Transformer, variables: Variables, clean: Canvas, corruption: Corruption, eligible_BC: Array, weight_B: Array
) -> Array:
    """sum_i weight_i sum_k 1[k hidden and eligible] CE_ik / p_i, with the weights of a normaliser over the whole batch.

    Where every completion column is eligible, the end tokens behind the text included, a row has as many targets as every
    other, and the two normalisers are the same number; they differ where only the text through the first token that ends it is.

    Source: LLaDA, arXiv 2502.09992, algorithm 2 (per_row); d1, arXiv 2504.12216, released code (batch_token).
    Differs from d1's code: 1 / p, not 1 / t, as in the paper (the same up to eps).
    """
    seen = corruption.canvas
    hidden_BTD = hidden_states(model, variables, *seen.arrays)
    hidden_BCD = completion_hidden(hidden_BTD, seen, model.config.alignment)
    logp_BC = token_logprobs(hidden_BCD, head_matrix(variables), clean.completion_BC).logp
    row_B = -jnp.sum(jnp.where(corruption.masked_BC & eligible_BC, logp_BC, 0.0), axis=1) / corruption.probability_B
    return jnp.sum(weight_B * row_B)
