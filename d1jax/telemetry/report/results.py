"""The section before and after: scores of baselines and stages with their intervals, and the verdict in one sentence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from d1jax.telemetry.report.axes import Mark
from d1jax.telemetry.report.intervals import Interval, interval, interval_axis
from d1jax.telemetry.report.run_data import RunData, mapping
from d1jax.telemetry.report.texts import text_rows
from d1jax.telemetry.report.wording import compact, finite, percent, set_name, stage_name

_SCORE_KEYS = ("n", "solved_rate", "solved_rate_ci95", "name", "step", "selected", "sets")
_COUNTS = ("nfe",)  # what an evaluation measures beside the grades of the task, which are in [0, 1]


@dataclass(frozen=True)
class Score:
    """What one stage or baseline reached on one evaluation set. `others` are the task's own grades, e.g. cell_accuracy."""

    owner: str
    kind: str  # "stage" or "baseline"
    n: int | None
    rate: float | None
    low: float | None
    high: float | None
    others: Mapping[str, float]


@dataclass(frozen=True)
class Row:
    """A line of the table: a score, the class that colours it, its picture, and its other measures as text."""

    score: Score
    css: str
    plot: Interval | None
    others: list[str]


@dataclass(frozen=True)
class Results:
    """The table: {evaluation set: its rows}, the names of the other measures, and the axis under the pictures."""

    sets: dict[str, list[Row]]
    measures: list[str]
    axis: tuple[Mark, ...]


def results(run: RunData) -> Results | None:
    """The table of a run; None where nothing was evaluated."""
    table = scores(run)
    rows = [row for group in table.values() for row in group]
    if not rows:
        return None
    measures = list(dict.fromkeys(key for row in rows for key in row.others))
    ends = [value for row in rows for value in (row.low, row.high, row.rate) if value is not None]
    span = (max(0.0, min(ends, default=0) - 0.03), min(1.0, max(ends, default=1) + 0.03))
    told = {key: _teller(key, [row.others[key] for row in rows if key in row.others]) for key in measures}
    sets = {}
    for name, group in table.items():
        last = next((row for row in reversed(group) if row.kind == "stage"), None)
        sets[name] = [_row(row, row is last, span, told) for row in group]
    return Results(sets, measures, interval_axis(span))


def scores(run: RunData) -> dict[str, list[Score]]:
    """Per evaluation set, the primary one first: the baselines, then the stages in the order of training."""
    table: dict[str, list[Score]] = {run.primary_set: []}
    for set_key, found in _items(run.summary.get("baselines")):
        for name, values in _items(found):
            if isinstance(values, dict):
                table.setdefault(set_key, []).append(_score(name.replace("_", " "), "baseline", values))
    for stage in run.evaluated:
        # An early or small run may hold only the stage's own numbers: they are those of the primary set.
        for set_key, values in _items(stage.get("sets")) or [(run.primary_set, stage)]:
            if isinstance(values, dict):
                table.setdefault(set_key, []).append(_score(stage_name(str(stage["name"])), "stage", values))
    return {key: rows for key, rows in table.items() if rows}


def primary_stages(run: RunData) -> list[Score]:
    """The stages' scores on the primary set, in the order of training, those that have a rate."""
    rows = scores(run).get(run.primary_set, [])
    return [row for row in rows if row.kind == "stage" and row.rate is not None]


def verdict(run: RunData) -> str:
    """The run in one sentence with numbers: `27.3 % → 42.1 % of 1,024 held-out problems solved ...`."""
    rows = primary_stages(run)
    if not rows:
        return _verdict_so_far(run)
    first, last = rows[0], rows[-1]
    counts = f"{last.n:,}" if last.n is not None else "the"
    if first.n != last.n and first.n is not None and last.n is not None:
        counts = f"{first.n:,} and {last.n:,}"
    steps = finite(mapping(run.summary.get("decoding")).get("steps"))
    at = f" at {steps:.0f} denoising steps" if steps else ""
    rates = f"{percent(first.rate)} → {percent(last.rate)}" if len(rows) > 1 else percent(last.rate)
    sentence = f"{rates} of {counts} {set_name(run.primary_set)} problems solved{at}"
    overlap = intervals_overlap(first, last) if len(rows) > 1 else None
    if overlap is not None:
        sentence += "; the 95\u202f% intervals overlap" if overlap else "; the 95\u202f% intervals do not overlap"
    return sentence + "."


def selections(run: RunData) -> list[str]:
    """A sentence for every stage whose checkpoint was chosen on an evaluation set (`evaluation.select`)."""
    sentences = []
    for stage in run.evaluated:
        chosen = mapping(stage.get("selected"))
        candidates, step = mapping(chosen.get("candidates")), finite(chosen.get("step"))
        if not candidates or step is None:
            continue
        sentences.append(
            f"{stage_name(str(stage['name']))}: step {step:,.0f} goes on, the best of {len(candidates)} checkpoints on "
            f"{set_name(str(chosen.get('set')))} ({percent(finite(chosen.get('solved')))} solved there). The other sets were evaluated "
            "once, at that step."
        )
    return sentences


def intervals_overlap(a: Score, b: Score) -> bool | None:
    """Whether two 95 % intervals share a point; None when either is unknown."""
    if None in (a.low, a.high, b.low, b.high):
        return None
    return a.low <= b.high and b.low <= a.high


def _verdict_so_far(run: RunData) -> str:
    """Without a final evaluation, the last one made while training, if there was any."""
    watched = str(mapping(run.settings.get("evaluation")).get("select") or run.primary_set)
    key = f"eval/{watched}/solved"
    seen = [row for row in run.metrics if finite(row.get(key)) is not None]
    if not seen:
        return _verdict_on_text(run) or "No evaluation is recorded for this run."
    last = seen[-1]
    where = f"{stage_name(str(last.get('stage')))} step {last['step']:,}"
    what = f"{set_name(watched)} problems"
    return f"{percent(finite(last[key]))} of {what} solved at {where}; no final evaluation is recorded."


def _verdict_on_text(run: RunData) -> str:
    """Bits per byte of the first held-out text before the first stage on plain text and after the last; "" where there are none."""
    rows = [row for row in text_rows(run) if row["bits"] is not None]
    if not rows:
        return ""
    rows = [row for row in rows if row["set"] == rows[0]["set"]]
    first, last = rows[0], rows[-1]
    after = f"{last['bits']:.3f} bits per byte of {last['set']} text ({last['by']})"
    return after + "." if first is last else f"{first['bits']:.3f} ({first['by']}) → {after}."


def _row(score: Score, last: bool, span: tuple[float, float], told: Mapping[str, Callable[[float | None], str]]) -> Row:
    css = "baseline" if score.kind == "baseline" else "last" if last else "first"
    plot = None
    if score.rate is not None:
        known = None not in (score.low, score.high)
        low, high = (score.low, score.high) if known else (score.rate, score.rate)
        spoken = f"{score.owner}: {percent(score.rate)}, 95 % interval {percent(low)} to {percent(high)}"
        plot = interval(low, score.rate, high, span, css, spoken)
    return Row(score, css, plot, [tell(score.others.get(key)) for key, tell in told.items()])


def _teller(key: str, values: list[float]) -> Callable[[float | None], str]:
    """How a measure is written: a task's grade is a rate, what is counted or leaves [0, 1] a plain number."""
    return compact if key in _COUNTS or not all(0 <= value <= 1 for value in values) else percent


def _score(owner: str, kind: str, values: Mapping[str, Any]) -> Score:
    ends = values.get("solved_rate_ci95")
    low, high = ends if isinstance(ends, list) and len(ends) == 2 else (None, None)
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
    return [(str(key), item) for key, item in mapping(value).items()]
