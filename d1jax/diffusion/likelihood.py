"""What a likelihood estimator shows to the model, and the one scorer of all estimators.

An estimator is a plan of views (estimators.py); `score` runs one forward pass a view and sums the weighted
log-probabilities. The policy, the old policy and the reference always see the same plan, because it is a pure function of its key.

N views, B rows, C completion columns, P prompt columns.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from d1jax.diffusion.canvas import Alignment, Canvas, completion_hidden, row_uniforms
from d1jax.models.token_logprobs import TokenScores, token_logprobs
from d1jax.models.transformer import Transformer, Variables, head_matrix, hidden_states


class Views(NamedTuple):
    """What the model sees in each forward pass, and how much each position of it counts in the score."""

    completion_NBC: Array
    prompt_NBP: Array
    weight_NBC: Array


def hidden_prompt(key: Array, canvas: Canvas, row_ids_B: Array, *, mask_id: int, prompt_mask: float) -> Array:
    """The prompt with each of its tokens masked with probability `prompt_mask`: special tokens too, padding never.

    Source: d1, arXiv 2504.12216, section 3.2 (p = 0.15).
    Differs from the released code: draws are keyed by (key, row, position), not by a 12-bit global seed.
    """
    hide_BP = (row_uniforms(key, row_ids_B, canvas.prompt_BP.shape[1]) < prompt_mask) & canvas.prompt_mask_BP
    return jnp.where(hide_BP, mask_id, canvas.prompt_BP)


def score(model: Transformer, variables: Variables, canvas: Canvas, views: Views) -> TokenScores:
    """sum over views of weight x log p(completion token | view), [B, C] fp32; the entropy is summed alike."""
    alignment: Alignment = model.config.alignment

    def one_view(view: Views) -> TokenScores:
        seen = canvas._replace(completion_BC=view.completion_NBC, prompt_BP=view.prompt_NBP)
        hidden_BTD = hidden_states(model, variables, seen.tokens_BT, seen.positions_BT, seen.length_B)
        hidden_BCD = completion_hidden(hidden_BTD, canvas, alignment)
        scores = token_logprobs(hidden_BCD, head_matrix(variables), canvas.completion_BC)
        return TokenScores(*(view.weight_NBC * value for value in scores))

    if views.completion_NBC.shape[0] == 1:
        return one_view(jax.tree.map(lambda x: x[0], views))
    return jax.tree.map(lambda x: x.sum(0), jax.lax.map(jax.checkpoint(one_view), views))
