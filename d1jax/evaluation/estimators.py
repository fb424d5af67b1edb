"""Scoring the same texts with many estimators, under many draws of their maskings.

S draws (keys), B rows (texts), C completion columns, R repeats of the large-sample ELBO.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from d1jax.config import (
    AnyEstimator,
    Autoregressive,
    Block,
    Coupled,
    Elbo,
    OneStep,
    Quadrature,
    SamplerConfig,
    Trajectory,
)
from d1jax.data.tokenizers import SpecialTokens
from d1jax.diffusion.canvas import Canvas, through_first_end
from d1jax.diffusion.estimators import views_of
from d1jax.diffusion.likelihood import score
from d1jax.models.transformer import Transformer, Variables

STRATA = 16  # maskings of one repeat of the large-sample ELBO, their counts spread evenly
MAX_VIEWS = 64  # an autoregressive score takes a pass a column
TRUTH = Elbo(samples=STRATA)


class Candidate(NamedTuple):
    """An estimator with the setting that belongs to it; `decoupled` names the one of as many passes without complements."""

    name: str
    estimator: AnyEstimator
    prompt_mask: float = 0.0
    decoupled: str = ""

    @property
    def drawn(self) -> bool:
        return self.prompt_mask > 0 or self.estimator.draws_masks


def candidates(completion_length: int) -> list[Candidate]:
    """The published estimators, and for each coupled one the maskings that cost as many passes."""
    distributions: dict[str, dict[str, Any]] = {
        "exact": {},
        "independent": {"counts": "independent"},
        "(0.2, 0.8)": {"counts": "independent", "low": 0.2, "high": 0.8},
    }

    def elbo(distribution: str, samples: int) -> Candidate:
        return Candidate(f"elbo {distribution} K={samples}", Elbo(samples=samples, **distributions[distribution]))

    def coupled(distribution: str, samples: int, full_mask: bool) -> Candidate:
        estimator = Coupled(samples=samples, full_mask=full_mask, **distributions[distribution])
        name = f"coupled {distribution} K={samples}" + (" + full" if full_mask else "")
        return Candidate(name, estimator, 0.0, f"elbo {distribution} K={2 * samples + full_mask}")

    table = [Candidate("one_step p=0.15", OneStep(), 0.15), Candidate("one_step p=0", OneStep())]
    table += [elbo("exact", k) for k in (1, 2, 3, 4, 5)]
    table += [elbo("independent", k) for k in (1, 2, 4)]
    table += [elbo("(0.2, 0.8)", k) for k in (1, 2, 3, 4, 5)]
    table += [
        coupled(distribution, k, full)
        for distribution in ("exact", "(0.2, 0.8)")
        for k in (1, 2)
        for full in (False, True)
    ]
    table += [
        Candidate("quadrature K=3", Quadrature(samples=3)),
        Candidate("block K=2", Block(samples=2)),
        Candidate("trajectory K=4", Trajectory(samples=4)),
    ]
    if completion_length <= MAX_VIEWS:
        table.append(Candidate("autoregressive", Autoregressive()))
    return table


# -- measuring ---------------------------------------------------------------------------------------------------------


class RolloutBatch(NamedTuple):
    """Rollouts on the device. The rows from `rows` on only fill the batch up."""

    canvas: Canvas
    row_ids_B: Array
    unmask_step_BC: Array
    rows: int


@dataclass(frozen=True)
class Bench:
    """A model and the texts that every estimator scores."""

    model: Transformer
    variables: Variables
    sampler: SamplerConfig
    special: SpecialTokens
    batches: tuple[RolloutBatch, ...]

    @property
    def valid_BC(self) -> np.ndarray:
        """The text of each row: what counts in a score."""
        valid = [
            np.asarray(through_first_end(b.canvas.completion_BC, self.special.end_ids))[: b.rows] for b in self.batches
        ]
        return np.concatenate(valid)

    def settings(self, candidate: Candidate) -> dict[str, Any]:
        return {"estimator": candidate.estimator, "sampler": self.sampler, "special": self.special} | {
            "prompt_mask": candidate.prompt_mask
        }


@partial(jax.jit, static_argnames=("model", "estimator", "sampler", "special", "prompt_mask"))
def _scores(model: Transformer, variables: Variables, batch: RolloutBatch, key: Array, **settings: Any) -> Array:
    views = views_of(key, batch.canvas, batch.row_ids_B, batch.unmask_step_BC, **settings)
    return score(model, variables, batch.canvas, views).logp


@partial(jax.jit, static_argnames=("model", "estimator", "sampler", "special", "prompt_mask"))
def _gradient(model: Transformer, variables: Variables, batch: RolloutBatch, key: Array, **settings: Any) -> Variables:
    """Of the sum of +score of the rows with an even id and -score of the others."""
    counts_B = jnp.arange(batch.row_ids_B.shape[0], dtype=jnp.int32) < batch.rows
    sign_B = jnp.where(counts_B, 1.0 - 2.0 * (batch.row_ids_B % 2), 0.0)
    views = views_of(key, batch.canvas, batch.row_ids_B, batch.unmask_step_BC, **settings)
    return jax.grad(lambda v: jnp.sum(sign_B[:, None] * score(model, v, batch.canvas, views).logp))(variables)


def passes_of(bench: Bench, candidate: Candidate) -> int:
    """Forward passes over a row for one score: the views of its plan."""
    batch = bench.batches[0]

    def views(key: Array) -> Any:
        return views_of(key, batch.canvas, batch.row_ids_B, batch.unmask_step_BC, **bench.settings(candidate))

    return jax.eval_shape(views, jax.random.key(0)).weight_NBC.shape[0]


def scores(bench: Bench, candidate: Candidate, key: Array) -> np.ndarray:
    """[B, C]: one draw of the score of every token, on the host."""
    parts = [
        np.asarray(_scores(bench.model, bench.variables, batch, key, **bench.settings(candidate)))[: batch.rows]
        for batch in bench.batches
    ]
    return np.concatenate(parts).astype(np.float64)


def draws(bench: Bench, candidate: Candidate, key: Array, samples: int) -> np.ndarray:
    """[S, B, C]. Draw s has the key (key, s) for every estimator, so that no result depends on which others are measured."""
    return np.stack([scores(bench, candidate, jax.random.fold_in(key, s)) for s in range(samples)])


def large_sample_elbo(bench: Bench, key: Array, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """(ELBO, its standard error) of each row, [B], from `samples` maskings of exact counts in R = samples / 16 repeats.

    ELBO = E over n ~ U{1..L} and subsets of n tokens of (L / n) x their log-probabilities (LLaDA, arXiv 2502.09992, eq. 14).
    """
    repeats = samples // STRATA
    summed_RB = draws(bench, Candidate("truth", TRUTH), key, repeats).sum(axis=2)
    return summed_RB.mean(axis=0), summed_RB.std(axis=0, ddof=1) / math.sqrt(repeats)


def gradient_noise(bench: Bench, candidate: Candidate, key: Array, samples: int) -> float | None:
    """Variance of the gradient over draws / squared norm of its mean, from S draws; None where the mean is lost in the noise.

    variance = sum over parameters of the unbiased variance; squared norm = |mean|^2 - variance / S, without the noise's own
    part. The gradient is that of sum_b sign_b score_b: signs +1 and -1 in turn stand for advantages, which sum to zero, too.
    """
    total = None
    squares = 0.0
    for s in range(samples):
        parts = [
            _gradient(bench.model, bench.variables, batch, jax.random.fold_in(key, s), **bench.settings(candidate))
            for batch in bench.batches
        ]
        gradient = jax.tree.map(lambda *xs: sum(np.asarray(x, np.float64) for x in xs), *parts)
        squares += _norm2(gradient)
        total = gradient if total is None else jax.tree.map(np.add, total, gradient)
    mean2 = _norm2(total) / samples**2
    variance = max(squares / samples - mean2, 0.0) * samples / (samples - 1)
    signal = mean2 - variance / samples
    return variance / signal if signal > 0 else None


def _norm2(tree: Any) -> float:
    return float(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(tree)))
