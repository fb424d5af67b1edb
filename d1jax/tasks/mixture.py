"""Several tasks in one run: each row belongs to one of them, which writes its prompt and judges its text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import nan
from typing import Any, ClassVar

import numpy as np

from d1jax.tasks.judging import columns_of
from d1jax.tasks.task import DataError, Row, Task

OWN = ("name", "weight", "train", "test")


@dataclass(frozen=True)
class Mixture:
    """Tasks with sampling weights, as in d1's unified model.

    Fields: `tasks`, {label: {name: gsm8k, weight: 1, train: SOURCE, test: SOURCE, and fields of that task}}; a source is a file, hub:NAME
    or "generated". `style`, for tasks that name none; `split_seed`. A task with fewer training rows than its share comes round
    again, so that the shares are those of the weights.
    """

    name: ClassVar[str] = "mixture"
    alphabet: ClassVar[str] = "".join(map(chr, range(32, 127))) + "\n\t"
    columns: ClassVar[None] = None

    style: str = "instruct"
    split_seed: int = 0
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from d1jax.tasks import make  # the table that this task is in

        if not isinstance(self.tasks, Mapping) or not self.tasks:
            raise ValueError(
                "mixture: tasks is empty; write {gsm8k: {name: gsm8k, train: hub:openai/gsm8k/main, weight: 1}, ...}"
            )
        made, weights = {}, {}
        for label, given in self.tasks.items():
            if not isinstance(given, Mapping) or not {"train", "test"} & set(given):
                raise ValueError(
                    f"mixture: tasks.{label} = {given!r:.60}: write {{name: TASK, train: SOURCE, test: SOURCE, weight: 1}}"
                )
            wrong = next((key for key in ("name", "train", "test") if not isinstance(given.get(key, ""), str)), None)
            if wrong:
                raise ValueError(f"mixture: tasks.{label}.{wrong} = {given[wrong]!r:.60}: a text was expected")
            weight = given.get("weight", 1)
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
                raise ValueError(f"mixture: tasks.{label}.weight = {weight!r} must be a number above 0")
            options = {key: value for key, value in given.items() if key not in OWN}
            name = given.get("name", label)
            made[label] = make(name, **{"style": self.style, "split_seed": self.split_seed, **options})
            weights[label] = float(weight)
        object.__setattr__(self, "_made", made)
        object.__setattr__(self, "_weights", weights)
        object.__setattr__(self, "_reward_names", {})  # label -> names, read off the first row of each task

    def task_of(self, row: Row) -> Task:
        return self._made[row["task"]]

    def generate(self, split: str, count: int, seed: int) -> list[Row]:
        """`count` rows of all tasks by their weights, in an order of the seed. Raises ValueError, and DataError of a source."""
        from d1jax.tasks import read_source

        labels = [label for label, given in self.tasks.items() if split in given]
        if not labels:
            raise ValueError(f"mixture: no task has {split}: SOURCE")
        total = sum(self._weights[label] for label in labels)
        rows: list[Row] = []
        for label in labels:
            wanted = max(round(count * self._weights[label] / total), 1)
            task, source = self._made[label], self.tasks[label][split]
            found = task.generate(split, wanted, seed) if source == "generated" else read_source(source, task)
            found = [row for row in found if task.has_reference(row)]
            if not found:
                raise DataError(f"{source}: has no row that {label} can use")
            self._note_rewards(label, found[0])
            order = np.random.default_rng([seed, len(rows)]).permutation(len(found))
            # A task with fewer rows than its share comes round again, so that the weights hold.
            chosen = np.resize(order, wanted) if split == "train" else order[:wanted]
            rows += [{"task": label, "row": found[place]} for place in chosen]
        mixed = np.random.default_rng(seed).permutation(len(rows))
        return [rows[place] for place in mixed][:count]

    def parse(self, record: dict[str, Any], where: str) -> Row | None:
        """Reads {"task": label, "row": {...}} or a record of a task with its label under "task". Raises DataError."""
        label = record.get("task")
        if label not in self._made:
            raise DataError(f"{where}: task = {label!r:.40} is not one of {', '.join(self._made)}")
        inside = (
            record["row"] if isinstance(record.get("row"), dict) else {k: v for k, v in record.items() if k != "task"}
        )
        row = self._made[label].parse(inside, where)
        if row is None:
            return None
        self._note_rewards(label, row)
        return {"task": label, "row": row}

    def _note_rewards(self, label: str, row: Row) -> None:
        """A batch may have no row of a task, and its rewards must still have their names there."""
        if label not in self._reward_names:
            self._reward_names[label] = tuple(self._made[label].rewards(row, ""))

    def prompt(self, row: Row) -> Any:
        return self.task_of(row).prompt(row["row"])

    def target(self, row: Row) -> str | None:
        return self.task_of(row).target(row["row"])

    def rewards(self, row: Row, text: str) -> dict[str, float | None]:
        return self.rewards_many([row], [text])[0]

    def rewards_many(self, rows: Sequence[Row], texts: Sequence[str]) -> list[dict[str, float | None]]:
        """The rewards of each row's task under their own names, and again as task/name; None where a row's task lacks one."""
        named = {
            name for label, names in self._reward_names.items() for one in names for name in (one, f"{label}/{one}")
        }
        return [dict.fromkeys(named) | values for values in self._by_task(rows, texts, "rewards")]

    def grade(self, row: Row, text: str) -> dict[str, float]:
        """`grade_many` of one text."""
        return self.grade_many([row], [text])[0]

    def grade_many(self, rows: Sequence[Row], texts: Sequence[str]) -> list[dict[str, float]]:
        """`solved`, by the row's task, and the same again as task/solved: NaN for the rows of other tasks."""
        judged = self._by_task(rows, texts, "grade")
        return [
            {"solved": one["solved"]}
            | {f"{label}/solved": one["solved"] if row["task"] == label else nan for label in self._made}
            for row, one in zip(rows, judged, strict=True)
        ]

    def _by_task(self, rows: Sequence[Row], texts: Sequence[str], what: str) -> list[dict[str, Any]]:
        judged: list[dict[str, Any]] = [{} for _ in rows]
        for label, task in self._made.items():
            places = [place for place, row in enumerate(rows) if row["task"] == label]
            inside = [rows[place]["row"] for place in places]
            many = getattr(task, f"{what}_many", None)
            some = [texts[place] for place in places]
            one = getattr(task, what)
            found = (
                many(inside, some)
                if many and places
                else [one(row, text) for row, text in zip(inside, some, strict=True)]
            )
            for place, values in zip(places, found, strict=True):
                judged[place] = {**values, **{f"{label}/{name}": value for name, value in values.items()}}
        every = {name for values in judged for name in values}
        return [{name: values.get(name) for name in sorted(every)} for values in judged]

    def columns_of(self, row: Row) -> Row:
        """The fields of the row of its task, and `task`, its label."""
        (columns,) = columns_of(self.task_of(row), [row["row"]])
        return {**columns, "task": row["task"]}

    def has_reference(self, row: Row) -> bool:
        return self.task_of(row).has_reference(row["row"])

    def problem_key(self, row: Row) -> str:
        """By the name of the task and not by its label, so that a problem is the same in another mixture that labels it otherwise."""
        task = self.task_of(row)
        return f"{task.name}: {task.problem_key(row['row'])}"

    def posed(self, row: Row) -> str:
        """The problem's key in its own task, which rows of no mixture have."""
        return self.task_of(row).problem_key(row["row"])

    def solution_key(self, row: Row) -> str | None:
        return self.task_of(row).solution_key(row["row"])

    def baselines(self, row: Row) -> dict[str, str]:
        return {"empty": ""}
