"""Texts -> rewards, on the host, in a way that no text and no task can take the run down."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real

import numpy as np

from d1jax.tasks.task import Row, Task


def reward_rows(
    task: Task, rows: Sequence[Row], texts: Sequence[str], names: Sequence[str] | Mapping[str, float]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """({name: [B] rewards} of the task, a line for every row that could not be rewarded).

    A row whose reward raises, or is not a finite number, gets 0 for everything and is named: one odd text out of thousands
    must not end a run, and must not go unnoticed either. Raises ValueError where a named reward is missing, which no text causes.
    """
    judged, failures = [], []
    for index, (row, text) in enumerate(zip(rows, texts, strict=True)):
        place = f"task {task.name!r}, row {index}"
        try:
            rewards = task.rewards(row, text)
        except Exception as error:  # a task is user code; whatever it raises concerns one text
            rewards, wrong = {}, f"{place}: rewards raised {type(error).__name__}: {error}"
        else:
            missing = sorted(set(names) - set(rewards))
            if missing:
                raise ValueError(f"{place}: no reward named {missing}; it gives {sorted(rewards)}")
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
    """sum over names of weight x reward, [B] float64."""
    return sum(weight * parts_B[name] for name, weight in weights.items())
