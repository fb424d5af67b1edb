"""Two charts that an audit needs beside those of a run: points on logarithmic axes, and rows of bars on one axis."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from d1jax.telemetry.charts import tick_label, ticks
from d1jax.telemetry.markup import compact, esc

WIDTH, HEIGHT = 720, 400
LEFT, TOP, RIGHT, BOTTOM = 80, 12, 16, 58  # room for the larger letters on a phone
NAMES, ROW, VALUES = 210, 21, 120  # of bars: columns for names and for values, height of a row
COLOURS = 5
LEAST_MARKS = 3
DENSITIES = ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7))  # round numbers of a logarithmic axis, the sparsest first


@dataclass(frozen=True)
class Group:
    """Points of one kind, joined by a line; each has a name that is shown under the pointer."""

    name: str
    points: tuple[tuple[float, float, str], ...]  # x, y, name; x and y above 0


@dataclass(frozen=True)
class Bar:
    """One row: `values` are drawn from zero, one thin bar under the other; `error` is a whisker at the first."""

    name: str
    values: tuple[float, ...]
    told: str  # what stands at the end of the row
    error: float = 0.0


def log_log(title: str, x_label: str, y_label: str, groups: Sequence[Group]) -> str:
    """A <figure> with legend and SVG; "" where there is no point."""
    groups = [group for group in groups if group.points]
    if not groups:
        return ""
    x_marks, x_on = _log_axis([x for g in groups for x, _, _ in g.points], LEFT, WIDTH - RIGHT)
    y_marks, y_on = _log_axis([y for g in groups for _, y, _ in g.points], HEIGHT - BOTTOM, TOP)
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for mark in y_marks:
        y = y_on(mark)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 5:.1f}" text-anchor="end">{esc(f"{mark:g}")}</text>')
    for mark in x_marks:
        x = x_on(mark)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 22}" text-anchor="middle">{esc(f"{mark:g}")}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    middle = (LEFT + right) / 2
    parts.append(f'<text class="label" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{esc(x_label)}</text>')
    parts.append(
        f'<text class="label" transform="translate(18 {(TOP + bottom) / 2}) rotate(-90)" text-anchor="middle">'
        f"{esc(y_label)}</text>"
    )
    for number, group in enumerate(groups):
        places = [(x_on(x), y_on(y), name, y) for x, y, name in sorted(group.points)]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y, _, _ in places)
        parts.append(f'<path class="line {_colour(number)} bold" stroke-dasharray="{_dash(number)}" d="M{path}"/>')
        parts += [
            f'<circle class="dot {_colour(number)}" cx="{x:.1f}" cy="{y:.1f}" r="4">'
            f"<title>{esc(name)}: {esc(compact(value))}</title></circle>"
            for x, y, name, value in places
        ]
    spoken = "; ".join(f"{name} {compact(y)}" for group in groups for _, y, name in group.points)
    legend = "".join(_legend_item(number, group.name) for number, group in enumerate(groups))
    return (
        f'<figure class="picture log"><figcaption><span class="name">{esc(title)}</span></figcaption>'
        f'<ul class="legend">{legend}</ul><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{esc(f"{title}: {spoken}")}">{"".join(parts)}</svg></figure>'
    )


def bars(title: str, rows: Sequence[Bar], value_names: Sequence[str] = ()) -> str:
    """A <figure> of horizontal bars, one row a name; "" without rows. `value_names` makes the legend of several values."""
    if not rows:
        return ""
    ends = [v + side * row.error for row in rows for v in row.values for side in (-1, 1)]
    low, high = min(0.0, *ends), max(0.0, *ends)
    if low == high:
        high = 1.0
    left, right, bottom = NAMES, WIDTH - VALUES, ROW * len(rows)

    def on(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    parts, marks = [], ticks(low, high, 6)
    for mark in marks:
        label = tick_label(mark, marks[1] - marks[0] if len(marks) > 1 else 1.0)
        parts.append(f'<line class="rule" x1="{on(mark):.1f}" x2="{on(mark):.1f}" y1="0" y2="{bottom}"/>')
        parts.append(
            f'<text class="tick" x="{on(mark):.1f}" y="{bottom + 14}" text-anchor="middle">{esc(label)}</text>'
        )
    for number, row in enumerate(rows):
        top = number * ROW
        parts.append(f'<text class="tick" x="{left - 8}" y="{top + 14}" text-anchor="end">{esc(row.name)}</text>')
        tall = (ROW - 7) / len(row.values)
        for index, value in enumerate(row.values):
            x, wide = min(on(0.0), on(value)), abs(on(value) - on(0.0))
            parts.append(
                f'<rect class="heat" x="{x:.1f}" y="{top + 3.5 + index * tall:.1f}" width="{wide:.1f}" '
                f'height="{tall:.1f}" fill-opacity="{1 if index == 0 else 0.45}"/>'
            )
        if row.error:
            ends = on(row.values[0] - row.error), on(row.values[0] + row.error)
            parts.append(
                f'<line class="axis" x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="{top + ROW / 2}" y2="{top + ROW / 2}"/>'
            )
        parts.append(f'<text class="tick" x="{right + 8}" y="{top + 14}">{esc(row.told)}</text>')
    parts.append(f'<line class="axis" x1="{on(0.0):.1f}" x2="{on(0.0):.1f}" y1="0" y2="{bottom}"/>')
    keys = "".join(
        f'<li><svg width="14" height="10" aria-hidden="true"><rect class="heat" width="14" height="10" '
        f'fill-opacity="{1 if index == 0 else 0.45}"/></svg>{esc(name)}</li>'
        for index, name in enumerate(value_names)
    )
    legend = f'<ul class="legend">{keys}</ul>' if keys else ""
    spoken = "; ".join(f"{row.name} {row.told}" for row in rows)
    return (
        f'<figure class="picture"><figcaption><span class="name">{esc(title)}</span></figcaption>{legend}'
        f'<svg viewBox="0 0 {WIDTH} {bottom + 20}" role="img" aria-label="{esc(f"{title}: {spoken}")}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _log_axis(values: Sequence[float], start: float, end: float):
    """(round marks inside, value -> place on the axis), with a little air at both ends."""
    low, high = math.log10(min(values)), math.log10(max(values))
    pad = 0.06 * (high - low) or 0.3
    low, high = low - pad, high + pad
    marks = next((found for found in map(partial(_marks, low, high), DENSITIES) if len(found) >= LEAST_MARKS), [])
    # A range so narrow that it holds no three of them: the round numbers of a linear axis.
    marks = marks or [mark for mark in ticks(10**low, 10**high, 5) if low <= math.log10(mark) <= high]
    return marks, lambda value: start + (math.log10(value) - low) / (high - low) * (end - start)


def _marks(low: float, high: float, between: Sequence[float]) -> list[float]:
    """The multiples `between` of powers of ten whose logarithms lie in the range."""
    every = [m * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for m in between]
    return [mark for mark in every if low <= math.log10(mark) <= high]


def _colour(number: int) -> str:
    return f"s{number % COLOURS + 1}"


def _dash(number: int) -> str:
    return ("", "5 2.5", "1.5 2")[number // COLOURS % 3]


def _legend_item(number: int, name: str) -> str:
    line = (
        f'<line class="line {_colour(number)} bold" stroke-dasharray="{_dash(number)}" x1="0" x2="20" y1="5" y2="5"/>'
    )
    return f'<li><svg width="20" height="10" aria-hidden="true">{line}</svg>{esc(name)}</li>'
