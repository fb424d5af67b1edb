"""Texts -> rewards, on the host, in a way that no text and no task can take the run down."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from d1jax.tasks.task import Row, Task


def reward_rows(
    task: Task, rows: Sequence[Row], texts: Sequence[str], names: Sequence[str] | Mapping[str, float]
) -> tuple[dict[str, np.ndarray], int]:
    """({name: [B] rewards} of the task, how many rows could not be rewarded).

    A row whose reward raises, or is not a finite number, gets 0 for everything and is counted: one odd text out of thousands
    must not end a run, and must not go unnoticed either. Raises ValueError where a named reward is missing, which no text causes.
    """
    judged, failures = [], 0
    for index, (row, text) in enumerate(zip(rows, texts, strict=True)):
        try:
            rewards = task.rewards(row, text)
        except Exception:  # a task is user code; whatever it raises concerns one text
            rewards = {}
        else:
            missing = sorted(set(names) - set(rewards))
            if missing:
                raise ValueError(
                    f"task {task.name!r}, row {index}: no reward named {missing}; it gives {sorted(rewards)}"
                )
        if not rewards or not all(math.isfinite(value) for value in rewards.values()):
            rewards, failures = {}, failures + 1
        judged.append(rewards)
    every = sorted({name for rewards in judged for name in rewards} | set(names))
    return {name: np.array([rewards.get(name, 0.0) for rewards in judged]) for name in every}, failures


def total_rewards(parts_B: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """sum over names of weight x reward, [B] float64."""
    return sum(weight * parts_B[name] for name, weight in weights.items())
