"""Many texts judged at once, where a task has a faster way than one after the other (a pool of processes, a sandbox)."""

from __future__ import annotations

from collections.abc import Sequence

from d1jax.tasks.task import Row, Task


def grade_all(task: Task, rows: Sequence[Row], texts: Sequence[str]) -> list[dict[str, float]]:
    """What `task.grade` says of every (row, text), by `task.grade_many` where the task has that."""
    many = getattr(task, "grade_many", None)
    return many(rows, texts) if many else [task.grade(row, text) for row, text in zip(rows, texts, strict=True)]


def columns_of(task: Task, rows: Sequence[Row]) -> list[Row]:
    """The fields of rows as reward functions see them: `answer` is the reference, whatever the task calls it."""
    found = getattr(task, "columns_of", None)
    return [found(row) for row in rows] if found else list(rows)


def offers(task: Task, rows: Sequence[Row], texts: Sequence[str]) -> list[str | None] | None:
    """The answer that each text offers, in one spelling, for majority votes; None where the task names none."""
    offer = getattr(task, "offer", None)
    return [offer(row, text) for row, text in zip(rows, texts, strict=True)] if offer else None
