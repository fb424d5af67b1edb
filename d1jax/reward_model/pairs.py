"""A reward model that learns from pairs of texts, of which one is better.

Q pairs of an update, B = 2 Q rows (the better texts, then the worse ones).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from d1jax.config import RewardModelConfig, UserError
from d1jax.data.pairs import StoredPairs
from d1jax.data.tokenizers import SpecialTokens
from d1jax.diffusion.canvas import Canvas
from d1jax.diffusion.reward_model import RewardModel, text_scores
from d1jax.evaluation.statistics import wilson_interval
from d1jax.models import sharding
from d1jax.models.transformer import Transformer, Variables
from d1jax.reward_model.loss import LOSSES, accuracy, quality
from d1jax.training.context import Context
from d1jax.training.pair_order import PairOrder


class Rows(NamedTuple):
    """Pairs, a pair a row."""

    better: Canvas
    worse: Canvas
    weight_Q: np.ndarray  # 1 / pairs of the update


def check(sources: Sequence[StoredPairs], config: RewardModelConfig) -> None:
    """Raises UserError where the loss compares two texts, and there are single ones."""
    if config.loss == "pairwise" and not all(pairs.matched for pairs in sources):
        raise UserError(
            "config: reward_model.loss = pairwise compares two texts of one prompt, and these are single texts with labels; set it to "
            "pointwise"
        )


def is_empty(pairs: StoredPairs) -> bool:
    return not len(pairs.better) or not len(pairs.worse)


def order(pairs: StoredPairs, count: int, seed: int) -> PairOrder:
    """What gives the pairs of a step."""
    return PairOrder(pairs, count, seed)


def joined(parts: Sequence[tuple[Canvas, Canvas]]) -> Rows:
    """The pairs of an update, of all sources; prompts are padded to the longest."""
    better, worse = (joined_canvas([pair[side] for pair in parts]) for side in (0, 1))
    count = len(better.prompt_length_B)
    return Rows(better, worse, np.full(count, 1 / count, np.float32))


def joined_canvas(canvases: Sequence[Canvas]) -> Canvas:
    """The rows of several canvases; prompts are padded to the longest."""
    width = max(canvas.prompt_BP.shape[1] for canvas in canvases)
    prompts = [np.pad(one.prompt_BP, ((0, 0), (0, width - one.prompt_BP.shape[1]))) for one in canvases]
    return Canvas(
        np.concatenate([one.completion_BC for one in canvases]),
        np.concatenate(prompts),
        np.concatenate([one.prompt_length_B for one in canvases]),
    )


def loss(
    model: Transformer, variables: Variables, rows: Rows, special: SpecialTokens, config: RewardModelConfig
) -> tuple[Array, tuple[Array, Array]]:
    """(the sum over these pairs of their part of the mean loss, (scores of the better texts, of the worse ones))."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), rows.better, rows.worse)
    better_Q, worse_Q = jnp.split(text_scores(model, variables, both, special), 2)
    return jnp.sum(rows.weight_Q * LOSSES[config.loss](better_Q, worse_Q)), (better_Q, worse_Q)


def metrics(scores: tuple[Array, Array], rows: Rows) -> dict[str, Array]:
    """Margin and accuracy of an update, under TRL's names."""
    better_Q, worse_Q = scores
    return {"rewards/margins": jnp.mean(better_Q - worse_Q), "rewards/accuracies": accuracy(better_Q, worse_Q)}


def measured(context: Context, variables: Variables, pairs: StoredPairs, size: int) -> dict[str, Any]:
    """{"pairs", "accuracy", "ci95" of it, "margin", "calibration_error"} on held-out pairs; single texts are paired as they come."""
    judge = RewardModel(context.model, variables, context.tokenizer.special)
    count = min(len(pairs.better), len(pairs.worse))
    scores = []
    for side in (pairs.better, pairs.worse):
        found = []
        for first in range(0, count, size):
            places = np.minimum(np.arange(first, first + size), count - 1)  # one program for all batches
            rows = side.at(places)
            canvas = Canvas(rows.target_RC, rows.prompt_RP, rows.prompt_length_R)
            found.append(sharding.fetch(judge.scores(sharding.shard_batch(context.mesh, canvas))))
        scores.append(np.concatenate(found)[:count].astype(np.float64))
    worth = quality(*scores)
    return {"pairs": count, **worth, "ci95": list(wilson_interval(worth["accuracy"] * count, count))}
