"""Texts -> rewards, on the host, in a way that no text and no task can take the run down; and when two rewards are a tie.

Q problems, G completions of each, B = Q G rows.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from d1jax.config.reward_model import MODEL
from d1jax.models import processes
from d1jax.tasks.judging import columns_of
from d1jax.tasks.reward_functions import call as call_reward
from d1jax.tasks.reward_functions import resolve
from d1jax.tasks.task import DataError, Row, Task

ROUNDING = 1e-12  # of a sum of rewards, relative to the sum of its terms' sizes


# Rewards are sums of weights x parts, so equal ones may differ by rounding: 0.1 + 0.2 is not 0.3. What is closer than this share of the
# largest reward of the batch is a tie.
TIE = 1e-9


class Rewards(NamedTuple):
    """What a batch of texts has earned."""

    parts_B: dict[str, np.ndarray]
    failures: list[str]  # a line for every function that failed, and for every text that the task could not reward
    own_B: np.ndarray  # whether the task has given any of the named rewards
    working: list[str]  # the functions that gave numbers
    broken: list[str]  # those that raised, so that all texts of the batch count as 0

    @property
    def rewarded_B(self) -> np.ndarray:
        """Whether any of the named rewards could be computed."""
        return self.own_B | bool(self.working)


class RewardFn:
    """The rewards of one batch of texts, also of unfinished ones, and what went wrong with them (`failures`)."""

    def __init__(self, task: Task, rows: Sequence[Row], ids: Sequence[int], weights: Mapping[str, float]) -> None:
        self.failures: list[str] = []
        self.any_rewarded = False  # of the texts so far
        self._task, self._rows, self._ids, self._weights = task, rows, ids, weights
        self._names = [name for name in weights if not name.startswith(MODEL)]  # those that are computed from texts

    def parts(self, texts: Sequence[str], first: int = 0) -> dict[str, np.ndarray]:
        """{name: [B]} of one text a row, from the row `first` on."""
        found = processes.gathered(self._own_part(texts, first))
        # A function that fails on a batch of several processes has failed, whichever of them had the text.
        broken = {name for part in found for name in part["broken"]}
        for part in found:
            self.failures += part["failures"]
            self.any_rewarded |= part["any_own"] or not set(part["working"]) <= broken
        parts = [{name: np.array(values, float) for name, values in part["parts"].items()} for part in found]
        whole = joined(parts, np.diff(processes.bounds(len(texts))).tolist())
        return {name: np.zeros(len(texts)) if name in broken else values_B for name, values_B in whole.items()}

    def _own_part(self, texts: Sequence[str], first: int) -> dict[str, Any]:
        """What the texts have earned that are this process's part."""
        own = processes.own_part(len(texts))
        some = slice(first + own.start, first + own.stop)
        found = reward_rows(self._task, self._rows[some], texts[own], self._names, self._ids[some])
        return {
            "parts": {name: values_B.tolist() for name, values_B in found.parts_B.items()},
            "failures": found.failures,
            "any_own": bool(found.own_B.any()),
            "working": found.working,
            "broken": found.broken,
        }

    def total(self, parts_B: Mapping[str, np.ndarray]) -> np.ndarray:
        """[B]: the weighted sums of parts."""
        return total_rewards(parts_B, self._weights)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """[B]: the weighted sums of one text a row."""
        return self.total(self.parts(texts))


def joined(parts: Sequence[Mapping[str, np.ndarray]], sizes: Sequence[int]) -> dict[str, np.ndarray]:
    """{name: [B]} of parts of a batch of so many rows; NaN for the rows of a part that has no reward of that name."""
    names = sorted({name for one in parts for name in one})
    return {
        name: np.concatenate([one.get(name, np.full(size, np.nan)) for one, size in zip(parts, sizes, strict=True)])
        for name in names
    }


def equal_groups(rewards_QG: np.ndarray) -> np.ndarray:
    """[Q]: whether all completions of a problem have the same reward (up to TIE), so that nothing is learnt from comparing them."""
    return rewards_QG.max(axis=1) - rewards_QG.min(axis=1) <= tolerance(rewards_QG)


def tolerance(rewards: np.ndarray) -> float:
    """How far apart two rewards of this batch may be and still be a tie: TIE x the largest reward."""
    return TIE * np.abs(rewards).max(initial=0.0)


def reward_rows(
    task: Task, rows: Sequence[Row], texts: Sequence[str], names: Collection[str], ids: Sequence[int] | None = None
) -> Rewards:
    """`Rewards` of one text a row; NaN where a reward does not apply to it.

    All of the task's own rewards, and those of `names` that it does not have (`tasks/reward_functions.py`). A row whose reward raises,
    or is not a finite number, gets 0 for everything of the task and is named, by its place in the training rows (`ids`): one odd text out
    of thousands must not end a run, and must not go unnoticed either. Raises DataError where a named reward is missing, which no text
    causes.
    """
    places = list(ids or range(len(rows)))
    judged, failures = _of_task(task, rows, texts, places)
    offered = {name for rewards in judged for name in rewards}
    functions = {name: found for name in names if name not in offered and (found := resolve(name)) is not None}
    if not len(texts):  # the part of one of many processes: a user's own function need not know what to do with none
        functions = {}
    missing = sorted(set(names) - offered - set(functions))
    if missing and any(judged):
        raise DataError(f"task {task.name!r}, row {places[0]}: no reward named {missing}; it gives {sorted(offered)}")
    parts_B = {
        name: np.array([_number(rewards.get(name, 0.0)) for rewards in judged])
        for name in sorted(offered | set(missing))
    }
    prompts = [task.prompt(row) for row in rows] if functions else []
    columns = columns_of(task, rows) if functions else []
    told, broken = [], []
    for name, function in functions.items():
        try:
            values = call_reward(name, function, prompts, texts, columns, failures)
        except DataError:
            raise
        except Exception as error:  # a user's own function: its batch counts as 0
            told.append(f"reward {name!r}, {len(texts)} texts: {type(error).__name__}: {error}")
            broken.append(name)
            values = [0.0] * len(texts)
        parts_B[name] = np.array([_number(value) for value in values])
    # A text is rewarded by what its task says of it, where that is asked for, or by any function.
    own = set(names) & offered
    own_B = np.array([bool(own and rewards) for rewards in judged], bool)
    working = [name for name in functions if name not in broken]
    return Rewards(parts_B, [*told, *failures], own_B, working, broken)


def _of_task(
    task: Task, rows: Sequence[Row], texts: Sequence[str], places: Sequence[int]
) -> tuple[list[dict[str, float | None]], list[str]]:
    """The task's own rewards of every text, together where it can; {} and a line for a text that cannot be rewarded."""
    judged: list[Any] = []
    if hasattr(task, "rewards_many"):
        with suppress(Exception, SystemExit):  # then one after the other, to find the text that it is
            judged = list(task.rewards_many(rows, texts))
    failures = []
    for index, (row, text) in enumerate(zip(rows, texts, strict=True)):
        place = f"task {task.name!r}, row {places[index]}"
        if len(judged) <= index:
            try:
                judged.append(task.rewards(row, text))
            except (Exception, SystemExit) as error:  # a task is user code; whatever it raises concerns one text
                judged.append({})
                failures.append(f"{place}: rewards raised {type(error).__name__}: {error}")
                continue
        rewards = judged[index]
        if not isinstance(rewards, Mapping):
            raise DataError(f"{place}: rewards returned a {type(rewards).__name__}; return {{name: number}}")
        wrong = [name for name, value in rewards.items() if value is not None and not _is_finite(value)]
        if wrong:
            failures.append(f"{place}: reward {wrong[0]!r} is {rewards[wrong[0]]!r}, not a finite number")
            judged[index] = {}
    return judged, failures


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def total_rewards(parts_B: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """sum over names of weight x reward, [B] float64; exactly 0 where the parts cancel up to rounding (0.1 + 0.2 - 0.3).

    A reward that does not apply to a row (NaN) adds nothing there.
    """
    terms_NB = np.stack([np.nan_to_num(weight * parts_B[name], nan=0.0) for name, weight in weights.items()])
    total_B = terms_NB.sum(axis=0)
    return np.where(np.abs(total_B) <= ROUNDING * np.abs(terms_NB).sum(axis=0), 0.0, total_B)
