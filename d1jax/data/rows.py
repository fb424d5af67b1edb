"""Which rows a run works with: read, generated or shared out, and no problem both learnt and evaluated."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from d1jax.config import Config, TaskConfig, UserError
from d1jax.tasks import read_source
from d1jax.tasks.answers import question_key
from d1jax.tasks.task import Row, Task

SHARE = "share:"
MAX_GENERATED = 5_000_000  # rows: some gigabytes of Python objects


def read_rows(
    task: Task, config: Config, log: Callable[[str], None], training: bool
) -> tuple[list[Row], dict[str, list[Row]], dict[str, dict[str, Any]]]:
    """(training rows, rows of every evaluation set, which rows each source gave) that the section `task` names.

    Training rows that pose a problem of an evaluation set are left out; without `training` all of them are.
    """
    shared = any(source.startswith(SHARE) for source in config.task.eval_sets.values())
    train_rows = _rows(task, config, config.task.train, "train", config.task.train_rows) if training or shared else []
    eval_rows = {
        name: _share(task, train_rows, source, config.task)
        if source.startswith(SHARE)
        else _rows(task, config, source, "test", config.task.eval_rows)
        for name, source in config.task.eval_sets.items()
    }
    if config.evaluation.select:
        eval_rows = _without_reported(task, config.evaluation.select, eval_rows, log)
    sources = {f"task.eval_sets.{name}": (source, eval_rows[name]) for name, source in config.task.eval_sets.items()}
    if training:
        sources |= {"task.train": (config.task.train, train_rows)}
    data = {setting: identity_of_rows(*found) for setting, found in sources.items()}
    if not training:
        return [], eval_rows, data
    return _without_overlap(task, config.task, train_rows, eval_rows, log), eval_rows, data


def read_training_rows(
    task: Task,
    config: Config,
    reported: dict[str, list[Row]],
    run_task: Task,
    run_config: TaskConfig,
    log: Callable[[str], None],
) -> tuple[list[Row], dict[str, dict[str, Any]]]:
    """(training rows, which rows the source gave) of a stage with a task of its own, without the problems of the `reported` sets.

    The sets are rows of `run_task`, the task of the run; `run_config`, its section, says of which sets solutions are held out, too.
    """
    rows = _rows(task, config, config.task.train, "train", config.task.train_rows)
    data = {"task.train": identity_of_rows(config.task.train, rows)}
    return _without_overlap(task, run_config, rows, reported, log, run_task), data


def identity_of_file(path: Path) -> dict[str, Any]:
    """Of a task of the user's own: its code grades every row, so an edit within a run would change what its numbers mean."""
    content = path.read_bytes()
    return {"source": str(path), "rows": content.count(b"\n"), "sha256": hashlib.sha256(content).hexdigest()}


def identity_of_rows(source: str, rows: list[Row]) -> dict[str, Any]:
    """What tells these rows from others of the same name; of rows and not of bytes, so that a file may be packed or moved."""
    text = "\n".join(json.dumps(row, sort_keys=True, default=repr) for row in rows)
    return {"source": source, "rows": len(rows), "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _rows(task: Task, config: Config, source: str, split: str, count: int) -> list[Row]:
    if source == "generated":
        if count > MAX_GENERATED:
            raise UserError(
                f"config: {count} rows to generate (task.train_rows or task.eval_rows) are more than {MAX_GENERATED}, which is "
                "what fits into memory; generate fewer, or write them into a file"
            )
        try:
            return task.generate(split, count, config.task.seed)
        except ValueError as error:
            raise UserError(f"config: task: {error}") from None
    rows = read_source(source, task)
    return rows[:count] if count else rows


def _share(task: Task, rows: list[Row], source: str, config: TaskConfig) -> list[Row]:
    """A part of the training rows, always the same one; the overlap rule then takes them out of training."""
    try:
        fraction = float(source.removeprefix(SHARE))
    except ValueError:
        fraction = -1.0
    if not 0 < fraction < 1:
        raise UserError(f"config: task.eval_sets: {source!r} is not of the form share:0.01, between 0 and 1")
    order = np.random.default_rng(config.seed).permutation(len(rows))
    picked = [rows[index] for index in order[: max(round(len(rows) * fraction), 1)]]
    return picked[: config.eval_rows] if config.eval_rows else picked


def _without_reported(
    task: Task, select: str, eval_sets: dict[str, list[Row]], log: Callable[[str], None]
) -> dict[str, list[Row]]:
    """The evaluation sets; of the one that selects without the problems of the others. Raises UserError where none is left."""
    others = {task.problem_key(row) for name, rows in eval_sets.items() if name != select for row in rows}
    rows = eval_sets[select]
    kept = [row for row in rows if task.problem_key(row) not in others]
    if not kept:
        raise UserError(
            f"config: evaluation.select = {select!r}: all of its {len(rows)} problems are in another set of task.eval_sets; "
            "cut it from training: 'share:0.02'"
        )
    if len(kept) < len(rows):
        log(
            f"data: dropped {len(rows) - len(kept)} of {len(rows)} problems of {select}, which selects, because another set has them"
        )
    return {**eval_sets, select: kept}


def _without_overlap(
    task: Task,
    config: TaskConfig,
    train: list[Row],
    eval_sets: dict[str, list[Row]],
    log: Callable[[str], None],
    evaluated: Task | None = None,
) -> list[Row]:
    """Training rows that pose no problem of an evaluation set (and, where asked, share no solution with it).

    `evaluated` is the task that the sets are rows of (None: `task`). It may be another one, whose keys are then compared as texts.
    """
    asking = evaluated or task
    key = _as_text if asking.name != task.name else _as_keyed
    for name, rows in eval_sets.items():
        problems = {key(asking, row) for row in rows}
        held_out = name in config.held_out_by_solution
        solutions = {asking.solution_key(row) for row in rows} - {None} if held_out else set()
        kept = [row for row in train if key(task, row) not in problems and task.solution_key(row) not in solutions]
        if len(kept) < len(train):
            why = "problem or solution" if solutions else "problem"
            log(f"data: dropped {len(train) - len(kept)} of {len(train)} training rows whose {why} occurs in {name}")
        train = kept
    if not train:
        raise UserError(
            "config: every training row occurs in an evaluation set; use other files or fewer of task.held_out_by_solution"
        )
    return train


def _as_keyed(task: Task, row: Row) -> str:
    return task.problem_key(row)


def _as_text(task: Task, row: Row) -> str:
    """What a problem asks, whatever its spacing and capitals, in a mixture or not: so GSM8K's rows are the same in a file of one's own."""
    posed = getattr(task, "posed", task.problem_key)
    return question_key(posed(row))


def check_references(task: Task, setting: str, rows: list[Row], wanted: bool, log: Callable[[str], None]) -> None:
    """Names the rows that no answer can solve. Raises UserError where that is all of them and the answer is `wanted`."""
    without = [index for index, row in enumerate(rows) if not task.has_reference(row)]
    if not without:
        return
    first = f"row {without[0]}, {task.problem_key(rows[without[0]])[:60]!r}"
    if wanted and len(without) == len(rows):
        raise UserError(
            f"config: {setting}: none of its {len(rows)} rows has a reference answer that can be read, so every text would count as "
            f"wrong (the first: {first}); the task's docstring says where an answer may stand"
        )
    log(
        f"data: {len(without)} of {len(rows)} rows of {setting} have no reference answer that can be read; no text solves them "
        f"(the first: {first})"
    )
