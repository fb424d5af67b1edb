"""Where the pairs of a preference stage come from: written on the way, or stored.

Q pairs of a step, G completions of a problem, B = 2 Q rows (the better ones, then the worse), C completion columns.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import numpy as np
from jax import Array

from d1jax.evaluation.decode import decoding_copy
from d1jax.models.transformer import Variables
from d1jax.preference.loss import pairs_of
from d1jax.rollouts import metrics
from d1jax.rollouts.generate import Failures, Generator, fetch_and_grade
from d1jax.training.context import Context
from d1jax.training.likelihood import RolloutBatch
from d1jax.training.pair_order import PairOrder
from d1jax.training.stage_log import Clock, StageLog


class Made(NamedTuple):
    """The pairs of a step, as host arrays."""

    batch: RolloutBatch  # B rows
    kept_Q: np.ndarray  # pairs that differ
    values: dict[str, float]  # metrics of how they came about


@dataclass
class Written:
    """The best and the worst of each group, by the task's reward, of completions that are written on the way."""

    context: Context
    log: StageLog
    generate: Generator = field(init=False)
    failures: Failures = field(init=False)

    def __post_init__(self) -> None:
        config = self.context.config.preference
        self.generate = Generator(self.context, config, record_entropy=config.estimator.needs_entropy)
        self.failures = Failures(self.log.stage, min(self.context.config.max_bad_updates, config.steps))

    def __call__(self, step: int, writer: Variables, key: Array, clock: Clock) -> Made:
        config, context, group = (
            self.context.config.preference,
            self.context,
            self.context.config.preference.num_generations,
        )
        prompts = self.generate.prompts(step)
        parts = self.generate(decoding_copy(context, writer), prompts, key)
        rollout, graded = fetch_and_grade(context, config.reward_weights, prompts, parts, group, clock)
        self.log.notes(self.failures.note(step + 1, graded))
        pairs = pairs_of(graded.reward_QG)
        # Both of a pair meet the same masks, so that what they share cancels in the margin.
        mask_ids_B = np.arange(config.rollout_rows, dtype=np.int32) // group
        every = self.generate.batch(prompts, rollout, mask_ids_B)
        batch = jax.tree.map(lambda x_B: x_B[pairs.rows_B], every)
        clock.lap("time/reward_s")
        special, grids = context.tokenizer.special, context.task.columns is not None
        values = {
            **metrics.of_rewards(graded),
            **metrics.of_completions(rollout, graded.texts, group, special.end_ids, grids),
            "pairs/tied": float(pairs.tied_Q.mean()),
        }
        return Made(batch, ~pairs.tied_Q, values)


@dataclass(frozen=True)
class Stored:
    """Pairs of a file or of a generate stage."""

    pairs: PairOrder

    def __call__(self, step: int, writer: Variables, key: Array, clock: Clock) -> Made:
        count = self.pairs.count
        both = jax.tree.map(lambda a, b: np.concatenate([a, b]), *self.pairs.take(step))
        mask_ids_B = np.tile(np.arange(count, dtype=np.int32), 2)
        batch = RolloutBatch(both, mask_ids_B, np.zeros_like(both.completion_BC))
        return Made(batch, np.ones(count, bool), {})
