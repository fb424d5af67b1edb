"""A process reward model: it learns which steps of a text are right, a step being a line.

The score of a step is the mean over its tokens, as that of a text is. Every state sees the whole text, so a step is judged in the light of
those behind it, too; DeepSeekMath's model (arXiv 2402.03300, section 4.1.3) is causal and judges it by what stands before.

B rows, C completion columns, K most steps of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from d1jax.config import RewardModelConfig
from d1jax.data.order import RowOrder
from d1jax.data.pairs import prompt_keys
from d1jax.data.steps import StoredSteps
from d1jax.data.tokenizers import SpecialTokens
from d1jax.diffusion.canvas import Canvas
from d1jax.diffusion.reward_model import RewardModel, step_scores, text_score_of_steps, token_scores
from d1jax.evaluation.statistics import wilson_interval
from d1jax.models import sharding
from d1jax.models.transformer import Transformer, Variables
from d1jax.reward_model.loss import quality, quality_of_steps, stepwise
from d1jax.reward_model.pairs import joined_canvas
from d1jax.training.context import Context


class Rows(NamedTuple):
    """Texts with labelled steps, a text a row."""

    canvas: Canvas
    length_B: np.ndarray
    step_BC: np.ndarray
    label_BK: np.ndarray  # 0 where nothing is said of a step
    weight_BK: np.ndarray  # 1 / labelled steps of the update, and 0 where nothing is said


@dataclass(frozen=True)
class StepOrder:
    """`count` texts a step, in a shuffled order."""

    stored: StoredSteps
    count: int
    order: RowOrder

    def take(self, step: int) -> StoredSteps:
        return self.stored.at(self.order.take(step * self.count, self.count))


def check(sources: Sequence[StoredSteps], config: RewardModelConfig) -> None:
    """Nothing: texts with steps are what the loss asks for."""


def is_empty(stored: StoredSteps) -> bool:
    return not len(stored)


def order(stored: StoredSteps, count: int, seed: int) -> StepOrder:
    """What gives the texts of a step."""
    return StepOrder(stored, count, RowOrder(len(stored), seed + 2))


def joined(parts: Sequence[StoredSteps]) -> Rows:
    """The texts of an update, of all sources."""
    most = max(one.label_RK.shape[1] for one in parts)
    label_BK = np.concatenate(
        [np.pad(one.label_RK, ((0, 0), (0, most - one.label_RK.shape[1])), constant_values=np.nan) for one in parts]
    )
    known_BK = ~np.isnan(label_BK)
    return Rows(
        joined_canvas([canvas_of(one) for one in parts]),
        np.concatenate([one.length_R for one in parts]).astype(np.int32),
        np.concatenate([one.step_RC for one in parts]).astype(np.int32),
        np.nan_to_num(label_BK).astype(np.float32),
        (known_BK / max(known_BK.sum(), 1)).astype(np.float32),
    )


def canvas_of(stored: StoredSteps) -> Canvas:
    texts = stored.texts
    return Canvas(texts.target_RC, texts.prompt_RP, texts.prompt_length_R)


def loss(
    model: Transformer, variables: Variables, rows: Rows, special: SpecialTokens, config: RewardModelConfig
) -> tuple[Array, Array]:
    """(the sum over these texts of their part of the mean loss of a step, the scores of the steps [B, K])."""
    score_BC = token_scores(model, variables, rows.canvas)
    score_BK = step_scores(score_BC, rows.step_BC, rows.length_B, rows.label_BK.shape[1])
    return jnp.sum(rows.weight_BK * stepwise(score_BK, rows.label_BK)), score_BK


def metrics(score_BK: Array, rows: Rows) -> dict[str, Array]:
    """Of an update: share of the steps that are judged rightly, and mean score of the right ones minus that of the wrong ones."""
    right_BK, wrong_BK = (rows.weight_BK * (rows.label_BK == label) for label in (1, 0))
    means = [jnp.sum(part_BK * score_BK) / jnp.maximum(jnp.sum(part_BK), 1e-9) for part_BK in (right_BK, wrong_BK)]
    judged_BK = (score_BK > 0) == (rows.label_BK == 1)
    return {"rewards/margins": means[0] - means[1], "rewards/accuracies": jnp.sum(rows.weight_BK * judged_BK)}


def measured(context: Context, variables: Variables, stored: StoredSteps, size: int) -> dict[str, Any]:
    """`quality_of_steps` of held-out texts, with "ci95" of the accuracy, as if steps of one text were independent; and under "texts" what
    the scores of whole texts are worth, {which pairs: {"pairs", "accuracy", "ci95"}}."""
    judge = RewardModel(context.model, variables, context.tokenizer.special)
    count, of_steps, of_texts = len(stored), [], []
    for first in range(0, count, size):
        rows = stored.at(np.minimum(np.arange(first, first + size), count - 1))  # one program for all batches
        placed = sharding.shard_batch(context.mesh, canvas_of(rows))
        score_BC = np.asarray(sharding.fetch(judge.token_scores(placed)), np.float64)
        of_steps.append(np.asarray(step_scores(score_BC, rows.step_RC, rows.length_R, rows.label_RK.shape[1])))
        of_texts.append(text_score_of_steps(score_BC, rows.step_RC, rows.length_R))
    score_RK, text_R = np.concatenate(of_steps)[:count], np.concatenate(of_texts)[:count]
    known_RK = ~np.isnan(stored.label_RK)
    worth = quality_of_steps(score_RK[known_RK], stored.label_RK[known_RK])
    texts = {name: ordered(text_R, pairs) for name, pairs in pairs_of_texts(stored).items() if pairs}
    return {**worth, "ci95": list(wilson_interval(worth["accuracy"] * worth["steps"], worth["steps"])), "texts": texts}


def pairs_of_texts(stored: StoredSteps) -> dict[str, list[tuple[int, int]]]:
    """The places of a better and a worse text of one problem, a pair a problem: the first one whose labelled steps are all right and the
    first with a wrong one ("right and wrong"); the highest and the lowest share of right steps, where these differ ("best and worst")."""
    known_R = np.sum(~np.isnan(stored.label_RK), axis=1)
    share_R = np.nansum(stored.label_RK, axis=1) / np.maximum(known_R, 1)
    by_prompt: dict[bytes, list[int]] = {}
    for place, key in enumerate(prompt_keys(stored.texts)):
        if known_R[place]:
            by_prompt.setdefault(key, []).append(place)
    right_wrong, best_worst = [], []
    for places in by_prompt.values():
        right, wrong = (
            [place for place in places if share_R[place] == 1],
            [place for place in places if share_R[place] < 1],
        )
        best, worst = max(places, key=share_R.__getitem__), min(places, key=share_R.__getitem__)
        right_wrong += [(right[0], wrong[0])] if right and wrong else []
        best_worst += [(best, worst)] if share_R[best] > share_R[worst] else []
    return {"right and wrong": right_wrong, "best and worst": best_worst}


def ordered(text_R: np.ndarray, pairs: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """{"pairs", "accuracy", "ci95"}: the share of the pairs whose better text, the first, scores higher; a tie is half."""
    better_Q, worse_Q = text_R[np.array(pairs)].T
    share = quality(better_Q, worse_Q)["accuracy"]
    return {"pairs": len(pairs), "accuracy": share, "ci95": list(wilson_interval(share * len(pairs), len(pairs)))}
