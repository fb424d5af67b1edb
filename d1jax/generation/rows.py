"""Rows that a generate stage has kept: written once with their digest, and read as what SFT and preference stages learn from.

R rows, C target columns.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from d1jax.config import UserError
from d1jax.data.examples import Problems
from d1jax.data.pairs import StoredPairs, completed
from d1jax.data.steps import StoredSteps, stored_steps
from d1jax.files import is_writer, write_json, write_jsonl
from d1jax.models import processes
from d1jax.rollouts.rewards import tolerance
from d1jax.training.context import Context
from d1jax.weights.run import read_record, read_records

AGAIN = "move the file away, and the same command makes it again"


def write(out: Path, rows: Sequence[Mapping[str, Any]], counts: Mapping[str, Any]) -> None:
    """Writes the rows, then beside them {"rows": how many, "sha256", and `counts`}, without which the stage has not finished."""
    if not is_writer():  # whether the file is there yet is another process's matter
        return
    write_jsonl(out, rows)
    write_json(_record(out), {"rows": len(rows), "sha256": _digest(out), **counts})


def is_done(out: Path) -> bool:
    """Whether the rows were written. Raises UserError where they are not those that were written."""
    if not (out.exists() and _record(out).exists()):
        return False
    _check_record(out)
    return True


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _record(out: Path) -> Path:
    return out.with_suffix(".json")


def _check_record(out: Path) -> None:
    then = read_record(_record(out))
    if _digest(out) != then.get("sha256"):
        raise UserError(f"{out}: not the {then.get('rows')} rows that this run has kept; put them back, or {AGAIN}")


def read(context: Context, path: Path) -> list[dict[str, Any]]:
    """The kept rows of a stage, whose context this is. Raises UserError for a file that is not what the stage has written."""
    digest = processes.agreed(lambda: _digest(path) if is_done(path) else None)
    if digest is None:
        raise UserError(f"{path}: is not there, or not whole; run the stage that writes it again")
    processes.wait_until(lambda: path.exists() and _digest(path) == digest, lambda: repr(str(path)))
    records = read_records(path)
    if not records:
        raise UserError(f"{path}: holds no rows; {AGAIN}")
    for number, one in enumerate(records, start=1):
        if not _is_ours(context, one):
            raise UserError(f"{path}:{number}: no row that this run has kept; {AGAIN}")
    return records


def _is_ours(context: Context, one: Mapping[str, Any]) -> bool:
    tokens, place = one.get("tokens"), one.get("row")
    vocabulary = context.model.config.vocab_size
    return (
        isinstance(place, int)
        and 0 <= place < len(context.train)
        and one.get("prompt") == context.task.prompt(context.train.rows[place])
        and isinstance(tokens, list)
        and all(isinstance(token, int) and 0 <= token < vocabulary for token in tokens)
        and isinstance(one.get("reward"), int | float)
    )


def as_pairs(context: Context, path: Path, columns: int, setting: str, most: int = 1) -> StoredPairs:
    """Of each problem the kept completions with the highest and the lowest reward, the second highest and the second lowest, and so on,
    where these differ: `most` pairs, or with 0 as many as there are. No completion is in two pairs of a problem.

    `context` is that of the stage that kept them, `columns` those of a completion here. Raises UserError where no problem has two rewards.
    """
    by_problem: dict[int, list[dict[str, Any]]] = {}
    records = read(context, path)
    _check_columns(path, records, columns, "sampler.completion_length")
    least = tolerance(np.array([one["reward"] for one in records]))
    for one in records:
        by_problem.setdefault(one["row"], []).append(one)
    pairs = []
    for place, kept in by_problem.items():
        by_worth = sorted(kept, key=lambda one: one["reward"]), sorted(kept, key=lambda one: -one["reward"])
        for worst, best in itertools.islice(zip(*by_worth, strict=True), most or None):
            if best["reward"] - worst["reward"] > least:
                pairs.append((place, best["tokens"], worst["tokens"]))
    if not pairs:
        raise UserError(
            f"{setting}: no problem of {path} has completions of different rewards, so there is no pair; keep more of them there "
            "(generate.accept: {}, generate.keep_per_prompt: 0)"
        )
    places = [place for place, *_ in pairs]
    end = context.tokenizer.special.end
    better, worse = (completed(context.train, places, [pair[side] for pair in pairs], columns, end) for side in (1, 2))
    return StoredPairs(better, worse, matched=True)


def as_steps(context: Context, path: Path, columns: int, setting: str) -> StoredSteps:
    """The kept completions, each line labelled by the task of the stage that kept them, whose context this is.

    `columns` are those of a completion here. Raises UserError where the task says nothing of any line, and where a completion does not
    fit.
    """
    records = read(context, path)
    _check_columns(path, records, columns, "sampler.completion_length")
    rows = [context.train.rows[one["row"]] for one in records]
    labels = [context.task.judge_lines(row, one["completion"]) for row, one in zip(rows, records, strict=True)]
    told = [place for place, of_lines in enumerate(labels) if any(label is not None for label in of_lines)]
    if not told:
        raise UserError(
            f"{setting}: task {context.task.name!r} says of no line of {path} whether it is right; train longer before "
            "that stage, or keep more there (generate.num_generations, generate.accept: {})"
        )
    return stored_steps(
        context.train, [records[place]["row"] for place in told], [records[place]["tokens"] for place in told],
        [labels[place] for place in told], columns, context.tokenizer,
    )  # fmt: skip


def _check_columns(path: Path, records: Sequence[Mapping[str, Any]], columns: int, setting: str) -> None:
    longest = max(len(one["tokens"]) for one in records)
    if longest > columns:
        raise UserError(f"{path}: a completion has {longest} tokens, more than the {columns} of {setting}; raise it")


def as_problems(context: Context, path: Path, columns: int) -> Problems:
    """The kept rows of a stage, whose context this is, with their completions as targets of so many columns.

    The file holds what the model wrote; it is read as token ids, never as control text. Raises UserError where a completion does not fit.
    """
    records = read(context, path)
    _check_columns(path, records, columns, "sft.completion_length")
    places, tokens = [one["row"] for one in records], [one["tokens"] for one in records]
    return completed(context.train, places, tokens, columns, context.tokenizer.special.end)
