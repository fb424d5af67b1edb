"""The likelihood that a method works with: its views of a rollout batch, their scores, and which tokens count.

B rows, C completion columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from optax.microbatching import AccumulationType

from d1jax.config import RlConfig, SamplerConfig
from d1jax.data.tokenizers import SpecialTokens
from d1jax.diffusion.canvas import Canvas, through_first_end
from d1jax.diffusion.estimators import views_of
from d1jax.diffusion.likelihood import Scores, Views, score
from d1jax.models.transformer import Transformer, Variables
from d1jax.rl.loss import KL
from d1jax.training.optimizer import over_micro_batches


class Batch(NamedTuple):
    """A rollout batch; every array has a row axis."""

    canvas: Canvas
    mask_ids_B: Array  # rows of equal id meet equal masks
    reveal_step_BC: Array
    advantage_BC: Array
    kept_B: Array  # False: the row is in no sum and in no mean
    entropy_BC: Array | None = None  # of the rollout, where the estimator asks for it


@dataclass(frozen=True)
class Scorer:
    """Policy, old policy and reference all go through the same one, under the views of the same key."""

    model: Transformer
    config: RlConfig
    sampler: SamplerConfig
    special: SpecialTokens

    def views(self, key: Array, batch: Batch) -> Views:
        return views_of(
            key, batch.canvas, batch.mask_ids_B, batch.reveal_step_BC, estimator=self.config.estimator,
            sampler=self.sampler, special=self.special, prompt_mask=self.config.prompt_mask, entropy_BC=batch.entropy_BC,
        )  # fmt: skip

    def text_BC(self, batch: Batch) -> Array:
        return through_first_end(batch.canvas.completion_BC, self.special.end_ids)

    def scores(self, variables: Variables, batch: Batch, views: Views) -> Scores:
        """The estimate; where the advantage is negative, upper_share of it is the upper bound (SPG, arXiv 2510.09541).

        The upper bound of the tokens that some view scores stands for all L of the text: times L / their number.
        """
        estimator = self.config.estimator
        if estimator.upper_share == 0:
            return score(self.model, variables, batch.canvas, views)
        scores = score(self.model, variables, batch.canvas, views, estimator.upper_exponent)
        found_B1 = jnp.sum(jnp.any(views.weight_NBC > 0, axis=0), axis=1, keepdims=True)
        scale_B1 = jnp.sum(self.text_BC(batch), axis=1, keepdims=True) / jnp.maximum(found_B1, 1)
        mixed_BC = estimator.upper_share * scale_B1 * scores.upper + (1 - estimator.upper_share) * scores.logp
        return scores._replace(logp=jnp.where(batch.advantage_BC < 0, mixed_BC, scores.logp))

    def logps(self, variables: Variables, batch: Batch, key: Array) -> Array:
        """[B, C] without a gradient, in micro-batches."""

        def of_rows(variables: Variables, batch: Batch) -> Array:
            return self.scores(variables, batch, self.views(key, batch)).logp

        return over_micro_batches(of_rows, 1, batch, self.config.micro_batches, AccumulationType.CONCAT)(
            variables, batch
        )

    def counted_BC(self, key: Array, batch: Batch) -> Array:
        """The tokens that pooling counts: the texts of the rows that are kept; in a mean of scores only what has one."""
        text_BC = self.text_BC(batch) & batch.kept_B[:, None]
        if self.config.estimator.weight == "uniform" or self.config.estimator.subset < 1:
            text_BC &= jnp.any(self.views(key, batch).weight_NBC > 0, axis=0)
        return text_BC


def make_penalty(scorer: Scorer) -> Callable[..., tuple[Array, Array]]:
    """`penalty(policy, reference, batch, key) -> ([B] sums of the KL estimate over a text, tokens in all)`,
    compiled: what PPO takes off the reward (DeepSeekMath, arXiv 2402.03300, eq. 2), summed over the text and without its
    gradient, which comes with the reward.
    """

    @jax.jit
    def penalty(policy: Variables, reference: Variables, batch: Batch, key: Array) -> tuple[Array, Array]:
        text_BC = scorer.text_BC(batch)
        kl_BC = KL[scorer.config.kl](*(scorer.logps(variables, batch, key) for variables in (policy, reference)))
        return jnp.sum(kl_BC * text_BC, axis=1), jnp.sum(text_BC)

    return penalty
