"""A rollout batch: G completions of each of the next problems, graded; a function of (seed, step) and the weights.

Q problems, G completions of each, B = Q G rows, C completion columns, P prompt columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jax import Array

from d1jax.config.reward_model import MODEL
from d1jax.config.training import SamplingConfig
from d1jax.data.order import RowOrder
from d1jax.data.steps import text_steps
from d1jax.diffusion import decoding
from d1jax.diffusion.canvas import Canvas
from d1jax.diffusion.noise import KeyedNoise
from d1jax.diffusion.reward_model import text_score_of_steps
from d1jax.diffusion.rollout import Rollout
from d1jax.evaluation import decode
from d1jax.models import sharding
from d1jax.models.transformer import Variables
from d1jax.rollouts.rewards import RewardFn, joined
from d1jax.tasks.task import DataError, Row
from d1jax.training.context import Context
from d1jax.training.likelihood import RolloutBatch
from d1jax.training.stage_log import Clock


class Prompts(NamedTuple):
    """The problems of a rollout batch, each G times in a row; host arrays."""

    rows: list[Row]
    ids: list[int]  # their places among the training rows
    prompt_BP: np.ndarray
    prompt_length_B: np.ndarray

    def canvas(self, rollout: Rollout) -> Canvas:
        return Canvas(rollout.tokens_BC, self.prompt_BP, self.prompt_length_B)


@dataclass
class Generator:
    """Draws the rollout batches of a stage."""

    context: Context
    config: SamplingConfig
    record_entropy: bool = False
    order: RowOrder = field(init=False)

    def __post_init__(self) -> None:
        self.order = RowOrder(len(self.context.train), self.context.config.seed + 1)

    def prompts(self, step: int) -> Prompts:
        """The problems of a step, each num_generations times."""
        count = self.config.prompts_per_step
        return self.prompts_of(self.order.take(step * count, count))

    def prompts_of(self, places: Sequence[int]) -> Prompts:
        """These training rows, each num_generations times."""
        problems = self.context.train
        ids_B = np.repeat(np.asarray(places), self.config.num_generations)
        rows = [problems.rows[place] for place in ids_B]
        return Prompts(rows, ids_B.tolist(), problems.prompt_RP[ids_B], problems.prompt_length_R[ids_B])

    def __call__(self, variables: Variables, prompts: Prompts, key: Array) -> list[Rollout]:
        """One completion a row, in parts of rows_at_a_time rows, on the devices: handed over to them, and perhaps not decoded yet.

        A row draws from (key, its place in the batch) alone, whatever the parts are.
        """
        mesh, size = self.context.mesh, self.config.rows_at_a_time
        sampler = self.context.sampler(self.config.temperature, self.record_entropy)
        parts = []
        for start in range(0, len(prompts.rows), size):
            some = slice(start, start + size)
            row_ids_B = np.arange(start, start + size, dtype=np.int32)
            given = decoding.Prompts(prompts.prompt_BP[some], prompts.prompt_length_B[some])
            noise = KeyedNoise(key, sharding.shard_batch(mesh, row_ids_B))
            parts.append(sampler.sample(variables, sharding.shard_batch(mesh, given), noise))
        return parts

    def batch(self, prompts: Prompts, rollout: Rollout, mask_ids_B: np.ndarray) -> RolloutBatch:
        """The rollout as a likelihood looks at it; rows of equal mask id meet equal masks."""
        entropy_BC = rollout.entropy_BC if self.record_entropy else None
        return RolloutBatch(prompts.canvas(rollout), mask_ids_B, rollout.unmask_step_BC, entropy_BC)


class Graded(NamedTuple):
    """What the task says of a rollout batch."""

    texts: list[str]
    parts_B: dict[str, np.ndarray]
    reward_QG: np.ndarray
    judge: RewardFn  # for texts that are made of these
    token_score_BC: np.ndarray | None = None  # by the process reward model, where the stage asks one


def fetch_and_grade(
    context: Context, weights: Mapping[str, float], prompts: Prompts, parts: Sequence[Rollout], group: int, clock: Clock
) -> tuple[Rollout, Graded]:
    """(the rollout batch as host arrays, its texts and their rewards by the task's rules).

    Each part is graded as soon as it is decoded, on the host, while the devices decode the next. `clock` gets what was waited for
    the devices as time/rollout_s, and the grading as time/reward_s.
    """
    judge = RewardFn(context.task, prompts.rows, prompts.ids, weights)
    by_models = [_asked(context, prompts, part, index) for index, part in enumerate(parts)]
    judge.any_rewarded = bool(context.reward_models) or context.step_model is not None
    fetched: list[Rollout] = []
    texts: list[str] = []
    rewards: list[dict[str, np.ndarray]] = []
    token_scores: list[np.ndarray] = []
    for part, asked in zip(parts, by_models, strict=True):
        decoded, (scores, of_tokens) = sharding.fetch((part, asked))
        fetched.append(decoded)
        token_scores += [] if of_tokens is None else [of_tokens]
        clock.lap("time/rollout_s")
        written = decode.texts_of(context, fetched[-1])
        by_model = {MODEL + name: _of_texts(context, name, values, decoded) for name, values in scores.items()}
        rewards.append({**judge.parts(written, first=len(texts)), **by_model})
        texts += written
        clock.lap("time/reward_s")
    rollout = Rollout(*(np.concatenate(arrays) for arrays in zip(*fetched, strict=True)))
    parts_B = joined(rewards, [len(part.length_B) for part in fetched])
    token_score_BC = np.concatenate(token_scores) if token_scores else None
    return rollout, Graded(texts, parts_B, judge.total(parts_B).reshape(-1, group), judge, token_score_BC)


def _asked(context: Context, prompts: Prompts, part: Rollout, index: int) -> tuple[dict[str, Array], Array | None]:
    """({reward model: [B], or [B, C] of one that has learnt steps}, [B, C] by the model of `rl.supervision`) of a part of a rollout
    batch, handed over to the devices."""
    if not context.reward_models and context.step_model is None:
        return {}, None
    size = part.tokens_BC.shape[0]
    some = slice(index * size, (index + 1) * size)
    prompt = (prompts.prompt_BP[some], prompts.prompt_length_B[some])
    canvas = Canvas(part.tokens_BC, *sharding.shard_batch(context.mesh, prompt))
    by_name = {
        name: model.token_scores(canvas) if model.of_steps else model.scores(canvas)
        for name, model in context.reward_models.items()
    }
    return by_name, None if context.step_model is None else context.step_model.token_scores(canvas)


def _of_texts(context: Context, name: str, values: np.ndarray, part: Rollout) -> np.ndarray:
    """[B]: the scores of texts by a reward model, whose values have come from the devices; the lines of a text are found on the host."""
    if not context.reward_models[name].of_steps:
        return np.asarray(values, np.float64)
    step_BC = text_steps(part.tokens_BC, part.length_B, context.tokenizer)
    return text_score_of_steps(values, step_BC, part.length_B)


@dataclass
class Failures:
    """Counts the steps in a row without a text that could be rewarded."""

    stage: str
    limit: int
    in_a_row: int = 0

    def note(self, step: int, graded: Graded) -> list[str]:
        """Lines for the log. Raises DataError where no text of the last `limit` steps could be rewarded, so nothing is learnt."""
        failures = graded.judge.failures
        self.in_a_row = 0 if graded.judge.any_rewarded else self.in_a_row + 1
        if self.in_a_row >= self.limit:
            raise DataError(
                f"{self.stage} step {step}: no text of the last {self.in_a_row} steps could be rewarded, so nothing "
                f"is learnt; {failures[0]}"
            )
        functions = [line for line in dict.fromkeys(failures) if line.startswith("reward ")]
        texts = [line for line in failures if not line.startswith("reward ")]
        told = [f"step {step}: {line}; it counts as 0" for line in functions]
        return told + [f"step {step}: {line}; it counts as 0 ({len(texts)} such texts)" for line in texts[:1]]
