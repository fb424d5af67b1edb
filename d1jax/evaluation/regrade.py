"""Stored generations graded again, without a model: `python -m d1jax.evaluate --regrade FILE --task NAME`."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from d1jax.config import UserError
from d1jax.files import distinct
from d1jax.tasks import TASKS, make
from d1jax.tasks.benchmarks import BENCHMARKS
from d1jax.tasks.grading import d1_rules
from d1jax.tasks.grading.offers import without_end_tokens
from d1jax.tasks.grading.stored import text_of
from d1jax.tasks.jsonl import records_of
from d1jax.tasks.judging import grade_all
from d1jax.tasks.task import DataError, Row, Task

OPTIONS: dict[str, dict[str, Any]] = {
    "countdown": {"numbers": (2, 3, 4, 5, 6)},
    "arithmetic": {"terms": (2, 3, 4, 5, 6, 7, 8)},
}
"""What a task is made with beside its style: stored rows may have any number of numbers."""

JUDGED_ALIKE = ("gsm8k", "math", "arithmetic")
"""Tasks whose style changes the prompt alone."""


def regrade(path: str | Path, task_name: str, style: str = "instruct") -> list[dict[str, Any]]:
    """One result for each `gen_length` of the rows of a file, in ascending order; rows without one are under null.

    The file has a row in a line (.jsonl, .jsonl.gz, .gz): {"question", "ground_truth", "generations", "gen_length"} or
    {"prompt", "answer", "completion"}; or it is one JSON object {"generations": [rows], "gen_length"}, as d1 writes it. For code a row
    of the data set with its tests, and "completion" or "generations". End-of-text tokens are taken out before grading.

    `task_name` is a task, or a benchmark: humaneval is graded by code. In `style` "bare" a program needs no
    fence, and an answer of countdown or sudoku no tags.

    A result has "task", "gen_length", "n", "correct" and "accuracy" = correct / n, in rows. Of Sudoku they are blank cells, read
    and compared with the stored solution by d1's rule, so that they are the published accuracy; beside them stand
    "cell_accuracy" (the same number), "own_cell_accuracy" (d1jax's reading, and the nearest valid completion), "puzzles",
    "solved" (puzzles, with any valid completion) and "puzzle_accuracy".
    "without_reference" counts rows whose reference is null: they are in n, and never correct. "undecided" counts answers that
    math-verify did not decide in its time limit: they count as wrong. Both are there only where they are not 0.

    Raises DataError: the file is missing or broken, or a row lacks a field; UserError: no such task.
    """
    task = task_of(task_name, style)
    groups: dict[int | None, list[tuple[Row, str]]] = {}
    for length, row, text in stored_rows(Path(path), task):
        groups.setdefault(length, []).append((row, text))
    if not groups:
        raise DataError(f"{path}:1: the file holds no rows; write one JSON object per line")
    lengths = sorted(groups, key=lambda length: (length is None, length or 0))
    return [{"task": task_name, "gen_length": length, **_graded(task, groups[length])} for length in lengths]


def stored_rows(path: Path, task: Any) -> Iterator[tuple[int | None, Row, str]]:
    """(gen_length, row, text with its end-of-text tokens) of the rows that the task does not leave out. Raises DataError."""
    for where, record in _stored(path):
        row = task.from_stored(record, where)
        if row is not None:
            yield _length(record, where), row, text_of(record, where)


def task_of(name: str, style: str = "instruct") -> Any:
    """What grades stored rows of a task or benchmark. Raises UserError where there is none of that name, or it cannot read them."""
    graded_by = BENCHMARKS[name].task if name in BENCHMARKS else name
    if style == "bare" and graded_by in JUDGED_ALIKE:
        raise UserError(
            f"--style bare: without effect with --task {name}, whose texts are judged alike in both styles; leave it out"
        )
    try:
        task = make(graded_by, style=style, split_seed=0, **OPTIONS.get(graded_by, {}))
    except DataError:
        raise
    except ValueError as error:
        raise UserError(str(error).replace("task.name =", "--task", 1)) from None
    if not hasattr(task, "from_stored"):
        able = ", ".join(known for known, kind in TASKS.items() if hasattr(kind, "from_stored"))
        raise UserError(
            f"--task {name!r} cannot read stored generations; those of {able} can, and a task of your own with "
            "from_stored(record, where) -> row"
        )
    return task


def _stored(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, record) of a file of lines, or of one JSON object."""
    whole = _whole(path) if path.name.endswith((".json", ".json.gz")) else None
    if whole is None:
        yield from records_of(path)
        return
    rows, shared = (whole, {}) if isinstance(whole, list) else (whole["generations"], whole)
    for index, record in enumerate(rows):
        where = f"{path}: row {index}"
        if not isinstance(record, dict):
            raise DataError(f"{where}: a JSON object was expected, not a {type(record).__name__}")
        yield where, {**({"gen_length": shared["gen_length"]} if "gen_length" in shared else {}), **record}


def _whole(path: Path) -> Any:
    """The JSON value of a file; None where it is not one value with a list of rows, and has to be read by lines."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
            value = json.loads(file.read(), object_pairs_hook=distinct)
    except (OSError, EOFError, ValueError, RecursionError):
        return None  # records_of tells what is wrong, with the line
    rows = value.get("generations") if isinstance(value, dict) else value
    return value if isinstance(rows, list) else None


def _length(record: dict[str, Any], where: str) -> int | None:
    length = record.get("gen_length")
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 0):
        raise DataError(
            f"{where}: gen_length = {length!r:.60}: a number of tokens was expected; correct it or leave it out"
        )
    return length


def _graded(task: Task, stored: Sequence[tuple[Row, str]]) -> dict[str, Any]:
    rows = [row for row, _ in stored]
    grades = grade_all(task, rows, [without_end_tokens(text) for _, text in stored])
    solved = int(sum(grade["solved"] for grade in grades))
    counts = {
        "without_reference": sum(not task.has_reference(row) for row in rows),
        "undecided": int(sum(grade.get("undecided", 0.0) for grade in grades)),
    }
    more = {name: count for name, count in counts.items() if count}
    if task.name != "sudoku":
        return {"n": len(rows), "correct": solved, "accuracy": solved / len(rows), **more}
    cells, correct = _published_cells(stored)
    return {
        "n": cells,
        "correct": correct,
        "accuracy": correct / cells,
        "cell_accuracy": correct / cells,
        "own_cell_accuracy": sum(
            grade["cell_accuracy"] * row["puzzle"].count("0") for row, grade in zip(rows, grades, strict=True)
        ) / cells,
        "puzzles": len(rows),
        "solved": solved,
        "puzzle_accuracy": solved / len(rows),
        **more,
    }  # fmt: skip


def _published_cells(stored: Sequence[tuple[Row, str]]) -> tuple[int, int]:
    """(blank cells, those that agree with the stored solution) by d1's rule, which reads the end-of-text tokens too."""
    cells = correct = 0
    for row, text in stored:
        read, solution = d1_rules.sudoku_cells(text), row.get("solution") or " " * 16
        blanks = [cell for cell, given in enumerate(row["puzzle"]) if given == "0"]
        cells += len(blanks)
        correct += sum(read[cell] == solution[cell] for cell in blanks)
    return cells, correct
