"""A reward model: the bidirectional backbone, and one number for each token of a text.

A model of texts scores one by the mean over its tokens, a model of steps (a process reward model) by the chance that all its steps are
right. Every state sees the whole text, so no last token has to stand for it.

B rows, C completion columns, K most steps of a row, T columns of a canvas, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from d1jax.config import ModelConfig
from d1jax.data.tokenizers import SpecialTokens
from d1jax.diffusion.canvas import Canvas, through_first_end
from d1jax.models.reward_head import HEAD
from d1jax.models.transformer import Transformer, Variables, hidden_states, in_model_dtype


def token_scores(model: Transformer, variables: Variables, canvas: Canvas) -> Array:
    """[B, C] fp32: hidden state of each completion column times the head."""
    backbone = {name: value for name, value in variables.items() if name != HEAD}
    hidden_BTD = hidden_states(model, backbone, *canvas.arrays)
    hidden_BCD = hidden_BTD[:, : canvas.completion_BC.shape[1]].astype(jnp.float32)
    head: Mapping[str, Any] = variables[HEAD]
    return hidden_BCD @ head["kernel"] + head["bias"]


def served(variables: Variables, config: ModelConfig) -> Variables:
    """The variables in the dtype of the activations, for many passes; the head stays in the fp32 in which it is applied."""
    backbone = {name: value for name, value in variables.items() if name != HEAD}
    return {**in_model_dtype(backbone, config), HEAD: variables[HEAD]}


def text_scores(model: Transformer, variables: Variables, canvas: Canvas, special: SpecialTokens) -> Array:
    """[B]: the mean of the token scores over the text, through the first token that ends it."""
    text_BC = through_first_end(canvas.completion_BC, special.end_ids)
    scores_BC = token_scores(model, variables, canvas)
    return jnp.sum(scores_BC * text_BC, axis=1) / jnp.sum(text_BC, axis=1)


def step_scores(score_BC: Array, step_BC: Array, length_B: Array, steps: int) -> Array:
    """[B, K]: the mean of the token scores over each step of a text of `length_B` tokens; 0 for a step without tokens. K = steps."""
    text_BC = jnp.arange(score_BC.shape[1], dtype=jnp.int32)[None, :] < length_B[:, None]
    of_step_BCK = (step_BC[:, :, None] == jnp.arange(steps, dtype=jnp.int32)[None, None, :]) & text_BC[:, :, None]
    total_BK = jnp.sum(score_BC[:, :, None] * of_step_BCK, axis=1)
    return total_BK / jnp.maximum(jnp.sum(of_step_BCK, axis=1), 1)


def text_score_of_steps(score_BC: np.ndarray, step_BC: np.ndarray, length_B: np.ndarray) -> np.ndarray:
    """[B] float64: the chance that every step of the text is right, the product of sigmoid(score) over its steps.

    The score of a step is that of `step_scores`, by numpy: the devices are at the next texts, and would be waited for.

    Source: Lightman et al., arXiv 2305.20050.
    """
    rows, columns = step_BC.shape
    steps_B = step_BC.max(axis=1, initial=0) + 1
    steps = int(steps_B.max(initial=1))
    text_BC = (np.arange(columns)[None, :] < length_B[:, None]) & (step_BC >= 0)
    place_N = (np.arange(rows)[:, None] * steps + step_BC)[text_BC]
    total_BK = np.bincount(place_N, score_BC[text_BC], rows * steps).reshape(rows, steps)
    count_BK = np.bincount(place_N, minlength=rows * steps).reshape(rows, steps)
    score_BK = total_BK / np.maximum(count_BK, 1)
    there_BK = np.arange(steps)[None, :] < steps_B[:, None]
    log_chance_BK = -np.logaddexp(0, -score_BK)
    return np.exp(np.sum(log_chance_BK * there_BK, axis=1))


@dataclass(frozen=True)
class RewardModel:
    """A trained reward model on its devices."""

    model: Transformer
    variables: Variables
    special: SpecialTokens
    of_steps: bool = False  # whether it has learnt to judge steps, and a text by them

    def scores(self, canvas: Canvas) -> Array:
        """[B], computed where the model lies; the call returns before that is done."""
        return _scores(self.model, self.special, self.variables, canvas)

    def token_scores(self, canvas: Canvas) -> Array:
        """[B, C], computed where the model lies; the call returns before that is done."""
        return _token_scores(self.model, self.variables, canvas)


@partial(jax.jit, static_argnums=(0, 1))
def _scores(model: Transformer, special: SpecialTokens, variables: Variables, canvas: Canvas) -> Array:
    return text_scores(model, variables, canvas, special)


@partial(jax.jit, static_argnums=0)
def _token_scores(model: Transformer, variables: Variables, canvas: Canvas) -> Array:
    return token_scores(model, variables, canvas)
