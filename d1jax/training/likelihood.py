"""The likelihood that an algorithm works with: its views of a rollout batch, their scores, and which tokens count.

B rows, C completion columns, N views.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from optax.microbatching import AccumulationType

from d1jax.config import AnyEstimator, SamplerConfig
from d1jax.data.tokenizers import SpecialTokens
from d1jax.diffusion.canvas import Canvas, through_first_end
from d1jax.diffusion.estimators import views_of
from d1jax.diffusion.likelihood import Scores, Views, score
from d1jax.models.transformer import Transformer, Variables
from d1jax.training.optimizer import in_order, over_micro_batches, with_sets_together


class RolloutBatch(NamedTuple):
    """Completions as a likelihood looks at them; every array has a row axis."""

    canvas: Canvas
    mask_ids_B: Array  # rows of equal id meet equal masks
    unmask_step_BC: Array
    entropy_BC: Array | None = None  # of the rollout, where the estimator asks for it


@dataclass(frozen=True)
class Scorer:
    """Policy, old policy and reference all go through the same one, under the views of the same key."""

    model: Transformer
    estimator: AnyEstimator
    sampler: SamplerConfig
    special: SpecialTokens
    prompt_mask: float = 0.0
    parts: int = 1  # micro-batches of what is scored without a gradient
    # Completions of one problem, one behind the other: a view that hides all of each is passed once for them.
    rows_alike: int = 1

    def views(self, key: Array, batch: RolloutBatch) -> Views:
        """The masked views of a batch: a pure function of the key and the rows' mask ids."""
        return views_of(
            key, batch.canvas, batch.mask_ids_B, batch.unmask_step_BC, estimator=self.estimator,
            sampler=self.sampler, special=self.special, prompt_mask=self.prompt_mask, entropy_BC=batch.entropy_BC,
            rows_alike=self.rows_alike,
        )  # fmt: skip

    def text_BC(self, batch: RolloutBatch) -> Array:
        """[B, C]: the text of each row, through the first token that ends it."""
        return through_first_end(batch.canvas.completion_BC, self.special.end_ids)

    def scores(
        self, variables: Variables, batch: RolloutBatch, views: Views, advantage_BC: Array | None = None
    ) -> Scores:
        """The estimate of log p; where the advantage is negative, upper_share of it is the upper bound (SPG, arXiv 2510.09541).

        The upper bound of the tokens that some view scores stands for all L of the text: times L / their number.
        """
        estimator = self.estimator
        if estimator.upper_share == 0 or advantage_BC is None:
            return score(self.model, variables, batch.canvas, views)
        scores = score(self.model, variables, batch.canvas, views, estimator.upper_exponent)
        found_B1 = jnp.sum(jnp.any(views.weight_NBC > 0, axis=0), axis=1, keepdims=True)
        scale_B1 = jnp.sum(self.text_BC(batch), axis=1, keepdims=True) / jnp.maximum(found_B1, 1)
        mixed_BC = estimator.upper_share * scale_B1 * scores.upper + (1 - estimator.upper_share) * scores.logp
        return scores._replace(logp=jnp.where(advantage_BC < 0, mixed_BC, scores.logp))

    def logps(self, variables: Variables, batch: RolloutBatch, key: Array, advantage_BC: Array | None = None) -> Array:
        """[B, C] without a gradient, in micro-batches."""

        def of_rows(variables: Variables, rows: tuple[RolloutBatch, Array | None]) -> Array:
            batch, advantage_BC = rows
            return self.scores(variables, batch, self.views(key, batch), advantage_BC).logp

        rows = with_sets_together((batch, advantage_BC), self.parts, self.rows_alike)
        of_parts = over_micro_batches(of_rows, 1, rows, self.parts, AccumulationType.CONCAT)
        return jax.lax.stop_gradient(in_order(of_parts(variables, rows), self.parts, self.rows_alike))

    def counted_BC(self, key: Array, batch: RolloutBatch) -> Array:
        """[B, C]: the tokens that a mean counts: the text; where some tokens may be in no view, only those that are in one."""
        text_BC = self.text_BC(batch)
        if self.estimator.scores_a_part:
            text_BC &= jnp.any(self.views(key, batch).weight_NBC > 0, axis=0)
        return text_BC
