"""Stored generations graded again, without a model: what d1's evaluation writes, or plain rows of prompt, answer and completion."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from d1jax.config import UserError
from d1jax.tasks import TASKS, make
from d1jax.tasks.grading import d1_rules
from d1jax.tasks.grading.offers import without_end_tokens
from d1jax.tasks.jsonl import records_of
from d1jax.tasks.judging import grade_all
from d1jax.tasks.task import DataError

TEXT_KEYS = ("generations", "completion", "generation")


def regrade(path: str, task_name: str) -> list[dict[str, Any]]:
    """One result a generated length: {"task", "gen_length", "n", "correct", "accuracy"}, and the task's other grades as means.

    Rows are {"question", "ground_truth", "generations", "gen_length"?} (d1's), or {"prompt", "answer", "completion"}; a file is JSON
    Lines (.jsonl, .jsonl.gz) or one JSON object with them under "generations". What tokenizers write at the end of a text is taken off.
    Of Sudoku `correct` counts grids, any valid completion being right; "cells_correct" and "cell_accuracy" are d1's figure: blank
    cells that agree with the stored solution, by its rule of reading them. Raises UserError and DataError with file, line and cure.
    """
    names = [name for name, cls in TASKS.items() if hasattr(cls, "from_stored")]
    if task_name not in names:
        raise UserError(f"--task {task_name!r} cannot grade stored generations; choices: {', '.join(names)}")
    task = make(task_name, style="instruct", split_seed=0)
    by_length: dict[Any, list[tuple[Any, str, dict[str, Any]]]] = {}
    for where, record in _records(Path(path)):
        key = next((name for name in TEXT_KEYS if isinstance(record.get(name), str)), None)
        if key is None:
            raise DataError(
                f'{where}: has no text as "generations" or "completion", only {", ".join(record)[:80] or "nothing"}; a row is '
                '{"question": ..., "ground_truth": ..., "generations": "..."} or {"prompt": ..., "answer": ..., "completion": "..."}'
            )
        length = record.get("gen_length")
        if not isinstance(length, int | None) or isinstance(length, bool):
            raise DataError(f"{where}: gen_length = {length!r:.40} must be a whole number, or be left out")
        row = task.from_stored(record, where)
        by_length.setdefault(length, []).append((row, record[key], record))
    if not by_length:
        raise DataError(f"{path}: holds no rows; write one JSON object a line")
    lengths = sorted(by_length, key=lambda length: (length is None, length))
    return [_result(task, task_name, length, by_length[length]) for length in lengths]


def _result(task: Any, name: str, length: Any, found: list[tuple[Any, str, dict[str, Any]]]) -> dict[str, Any]:
    rows = [row for row, _, _ in found]
    grades = grade_all(task, rows, [without_end_tokens(text) for _, text, _ in found])
    correct = sum(grade["solved"] == 1.0 for grade in grades)
    result = {"task": name, "gen_length": length, "n": len(rows), "correct": correct, "accuracy": correct / len(rows)}
    for key in grades[0]:
        if key != "solved":
            result[key] = sum(grade[key] for grade in grades) / len(grades)
    return result | (_sudoku_cells(found) if name == "sudoku" else {})


def _sudoku_cells(found: list[tuple[Any, str, dict[str, Any]]]) -> dict[str, Any]:
    """d1's figure: over all rows, the blank cells that agree with the stored solution."""
    right = blank = 0
    for row, text, _ in found:
        if row["solution"] is None:
            return {}
        cells = d1_rules.sudoku_cells(text)
        places = [place for place, cell in enumerate(row["puzzle"]) if cell == "0"]
        blank += len(places)
        right += sum(cells[place] == row["solution"][place] for place in places)
    return {"cells_correct": right, "cells": blank, "cell_accuracy": right / max(blank, 1)}


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, record) of JSON Lines, or of one JSON object with a list under "generations"."""
    if path.name.removesuffix(".gz").endswith(".json"):
        whole = _whole(path)
        if whole is not None:
            for index, record in enumerate(whole, start=1):
                if not isinstance(record, dict):
                    raise DataError(f"{path}: generation {index} is no object; write objects as d1's evaluation does")
                yield f"{path}: generation {index}", record
            return
    yield from records_of(path)


def _whole(path: Path) -> list[Any] | None:
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError, RecursionError):
        return None  # not one object: read, or complained about, line by line
    rows = found.get("generations") if isinstance(found, dict) else found
    return rows if isinstance(rows, list) else None
