"""Texts -> rewards, on the host, in a way that no text and no task can take the run down; and when two rewards are a tie.

Q problems, G completions of each, B = Q G rows.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from numbers import Real

import numpy as np

from d1jax.tasks.task import DataError, Row, Task

ROUNDING = 1e-12  # of a sum of rewards, relative to the sum of its terms' sizes


# Rewards are sums of weights x parts, so equal ones may differ by rounding: 0.1 + 0.2 is not 0.3. What is closer than this share of the
# largest reward of the batch is a tie.
TIE = 1e-9


class RewardFn:
    """The rewards of one batch of texts, also of unfinished ones, and what went wrong with them (`failures`)."""

    def __init__(self, task: Task, rows: Sequence[Row], ids: Sequence[int], weights: Mapping[str, float]) -> None:
        self.failures: list[str] = []
        self._task, self._rows, self._ids, self._weights = task, rows, ids, weights

    def parts(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """{name: [B]} of one text a row."""
        parts_B, failures = reward_rows(self._task, self._rows, texts, self._weights, self._ids)
        self.failures += failures
        return parts_B

    def total(self, parts_B: Mapping[str, np.ndarray]) -> np.ndarray:
        """[B]: the weighted sums of parts."""
        return total_rewards(parts_B, self._weights)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """[B]: the weighted sums of one text a row."""
        return self.total(self.parts(texts))


def equal_groups(rewards_QG: np.ndarray) -> np.ndarray:
    """[Q]: whether all completions of a problem have the same reward (up to TIE), so that nothing is learnt from comparing them."""
    return rewards_QG.max(axis=1) - rewards_QG.min(axis=1) <= tolerance(rewards_QG)


def tolerance(rewards: np.ndarray) -> float:
    """How far apart two rewards of this batch may be and still be a tie: TIE x the largest reward."""
    return TIE * np.abs(rewards).max(initial=0.0)


def reward_rows(
    task: Task, rows: Sequence[Row], texts: Sequence[str], names: Collection[str], ids: Sequence[int] | None = None
) -> tuple[dict[str, np.ndarray], list[str]]:
    """({name: [B] rewards} of the task, a line for every row that could not be rewarded).

    A row whose reward raises, or is not a finite number, gets 0 for everything and is named, by its place in the training rows (`ids`): one
    odd text out of thousands must not end a run, and must not go unnoticed either. Raises DataError where a named reward is missing,
    which no text causes.
    """
    judged, failures = [], []
    for index, row, text in zip(ids or range(len(rows)), rows, texts, strict=True):
        place = f"task {task.name!r}, row {index}"
        try:
            rewards = task.rewards(row, text)
        except (Exception, SystemExit) as error:  # a task is user code; whatever it raises concerns one text
            rewards, wrong = {}, f"{place}: rewards raised {type(error).__name__}: {error}"
        else:
            if not isinstance(rewards, Mapping):
                raise DataError(f"{place}: rewards returned a {type(rewards).__name__}; return {{name: number}}")
            missing = sorted(set(names) - set(rewards))
            if missing:
                raise DataError(f"{place}: no reward named {missing}; it gives {sorted(rewards)}")
            wrong = next((f"{place}: reward {name!r} is {value!r}, not a finite number"
                          for name, value in rewards.items() if not _is_finite(value)), None)  # fmt: skip
        if wrong is not None:
            rewards = {}
            failures.append(wrong)
        judged.append(rewards)
    every = sorted({name for rewards in judged for name in rewards} | set(names))
    return {name: np.array([float(rewards.get(name, 0.0)) for rewards in judged]) for name in every}, failures


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def total_rewards(parts_B: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """sum over names of weight x reward, [B] float64; exactly 0 where the parts cancel up to rounding (0.1 + 0.2 - 0.3)."""
    terms_NB = np.stack([weight * parts_B[name] for name, weight in weights.items()])
    total_B = terms_NB.sum(axis=0)
    return np.where(np.abs(total_B) <= ROUNDING * np.abs(terms_NB).sum(axis=0), 0.0, total_B)
