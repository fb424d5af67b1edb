"""What a run directory holds, read for people: files may be missing or broken off, and nothing here raises for that."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from d1jax.telemetry.markup import finite, percent
from d1jax.telemetry.metrics import FILE_NAME, read_metrics

STAGE_NAMES = {"sft": "SFT", "rl": "RL", "base": "Base model", "init": "Initial model"}
_NOUNS = {"sudoku": "puzzles", "code": "programs"}
_SCORE_KEYS = ("n", "solved_rate", "solved_rate_ci95", "name", "step", "sets")


@dataclass(frozen=True)
class RunData:
    name: str
    config: str = ""
    summary: Mapping[str, Any] = field(default_factory=dict)
    metrics: tuple[Mapping[str, Any], ...] = ()
    samples: tuple[Mapping[str, Any], ...] = ()
    notices: tuple[str, ...] = ()  # what is missing or unreadable, in sentences


@dataclass(frozen=True)
class Score:
    """One row of the results: `owner` (a stage or a baseline) on one evaluation set."""

    owner: str
    kind: str  # "stage" or "baseline"
    n: int | None
    rate: float | None
    low: float | None
    high: float | None
    others: Mapping[str, float]  # the task's own measures, e.g. cell_accuracy


def read_run(run_dir: Path) -> RunData:
    notices: list[str] = []

    def text(name: str, meaning: str) -> str:
        try:
            return (run_dir / name).read_text(encoding="utf-8", errors="replace")
        except OSError:
            notices.append(f"{name} is missing: {meaning}.")
            return ""

    config = text("config.yaml", "the configuration is not shown")
    summary: Any = {}
    raw = text("summary.json", "the run was interrupted or has not been evaluated yet")
    if raw:
        try:
            summary = json.loads(raw)
        except ValueError as error:
            notices.append(f"summary.json cannot be read ({error}); evaluate the run again.")
    metrics: list[dict[str, Any]] = []
    try:
        metrics = read_metrics(run_dir / FILE_NAME)
    except ValueError as error:
        notices.append(str(error))
    if not (run_dir / FILE_NAME).exists():
        notices.append(f"{FILE_NAME} is missing: there are no learning curves.")
    samples, torn = _json_lines(text("samples.jsonl", "no samples are shown"))
    if torn:
        notices.append(f"samples.jsonl: {torn} unreadable line(s) left out.")
    # A running total of each stage.
    totals = {row.get("stage"): finite(row.get("nonfinite/total")) or 0 for row in metrics}
    diverged = sum(totals.values())
    if diverged:
        notices.append(f"{diverged:,.0f} update(s) were not finite and were skipped (nonfinite/total).")
    return RunData(
        name=run_dir.resolve().name,
        config=config,
        summary=summary if isinstance(summary, dict) else {},
        metrics=tuple(row for row in metrics if finite(row.get("step")) is not None),
        samples=tuple(samples),
        notices=tuple(notices),
    )


def stage_name(name: str) -> str:
    return STAGE_NAMES.get(name, name)


def set_name(name: str) -> str:
    return "held-out" if name == "held_out" else name.replace("_", " ")


def noun(summary: Mapping[str, Any]) -> str:
    return _NOUNS.get(str(summary.get("task")), "problems")


def stages(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found = summary.get("stages")
    return [x for x in found if isinstance(x, dict) and x.get("name")] if isinstance(found, list) else []


def scores(summary: Mapping[str, Any]) -> dict[str, list[Score]]:
    """Per evaluation set, the primary one first: the baselines, then the stages in the order of training."""
    primary = primary_set(summary)
    table: dict[str, list[Score]] = {primary: []}
    for set_key, found in _items(summary.get("baselines")):
        for name, values in _items(found):
            if isinstance(values, dict):
                table.setdefault(set_key, []).append(_score(name.replace("_", " "), "baseline", values))
    for stage in stages(summary):
        # An early or small run may hold only the stage's own numbers: they are those of the primary set.
        for set_key, values in _items(stage.get("sets")) or [(primary, stage)]:
            if isinstance(values, dict):
                table.setdefault(set_key, []).append(_score(stage_name(str(stage["name"])), "stage", values))
    return {key: rows for key, rows in table.items() if rows}


def primary_set(summary: Mapping[str, Any]) -> str:
    return str(summary.get("primary_set") or "held_out")


def primary_stages(summary: Mapping[str, Any]) -> list[Score]:
    """The stages' scores on the primary set, in the order of training, those that have a rate."""
    rows = scores(summary).get(primary_set(summary), [])
    return [row for row in rows if row.kind == "stage" and row.rate is not None]


def verdict(run: RunData) -> str:
    """The run in one sentence with numbers: `27.3 % → 42.1 % of 1,024 held-out puzzles solved ...`."""
    summary = run.summary
    rows = primary_stages(summary)
    if not rows:
        return _verdict_so_far(run)
    first, last = rows[0], rows[-1]
    counts = f"{last.n:,}" if last.n is not None else "the"
    if first.n != last.n and first.n is not None and last.n is not None:
        counts = f"{first.n:,} and {last.n:,}"
    decoding = summary.get("decoding")
    steps = finite(decoding.get("steps")) if isinstance(decoding, dict) else None
    at = f" at {steps:.0f} denoising steps" if steps else ""
    rates = f"{percent(first.rate)} → {percent(last.rate)}" if len(rows) > 1 else percent(last.rate)
    sentence = f"{rates} of {counts} {set_name(primary_set(summary))} {noun(summary)} solved{at}"
    overlap = intervals_overlap(first, last) if len(rows) > 1 else None
    if overlap is not None:
        sentence += "; the 95\u202f% intervals overlap" if overlap else "; the 95\u202f% intervals do not overlap"
    return sentence + "."


def _verdict_so_far(run: RunData) -> str:
    """Without a final evaluation, the last one made while training, if there was any."""
    key = f"eval/{primary_set(run.summary)}/solved"
    seen = [row for row in run.metrics if finite(row.get(key)) is not None]
    if not seen:
        return "No evaluation is recorded for this run."
    last = seen[-1]
    where = f"{stage_name(str(last.get('stage')))} step {last['step']:,}"
    what = f"{set_name(primary_set(run.summary))} {noun(run.summary)}"
    return f"{percent(finite(last[key]))} of {what} solved at {where}; no final evaluation is recorded."


def intervals_overlap(a: Score, b: Score) -> bool | None:
    """Whether two 95 % intervals share a point; None when either is unknown."""
    if None in (a.low, a.high, b.low, b.high):
        return None
    return a.low <= b.high and b.low <= a.high


def by_sample(samples: Iterable[Mapping[str, Any]]) -> dict[tuple[str, Any], list[Mapping[str, Any]]]:
    """Samples of one prompt together, in file order: {(set, index): [after sft, after rl]}."""
    groups: dict[tuple[str, Any], list[Mapping[str, Any]]] = {}
    for sample in samples:
        groups.setdefault((str(sample.get("set", "")), str(sample.get("index", ""))), []).append(sample)
    return groups


def _score(owner: str, kind: str, values: Mapping[str, Any]) -> Score:
    interval = values.get("solved_rate_ci95")
    low, high = interval if isinstance(interval, list) and len(interval) == 2 else (None, None)
    n = finite(values.get("n"))
    return Score(
        owner=owner,
        kind=kind,
        n=None if n is None else int(n),
        rate=finite(values.get("solved_rate")),
        low=finite(low),
        high=finite(high),
        others={k: finite(v) for k, v in values.items() if k not in _SCORE_KEYS and finite(v) is not None},
    )


def _items(value: Any) -> list[tuple[str, Any]]:
    return [(str(k), v) for k, v in value.items()] if isinstance(value, dict) else []


def _json_lines(text: str) -> tuple[list[dict[str, Any]], int]:
    rows, torn = [], 0
    # split("\n"), not splitlines(): model output may hold U+2028, which is no line end in JSON Lines
    for line in text.split("\n"):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            torn += 1
    return rows, torn
