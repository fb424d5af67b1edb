"""Two charts that an audit needs beside those of a run: points on logarithmic axes, and rows of bars on one axis."""

from collections.abc import Sequence
from dataclasses import dataclass

from d1jax.telemetry.report.axes import Frame, Mark, Scale, log_axis, tick_labels, ticks
from d1jax.telemetry.report.wording import compact

WIDTH, HEIGHT = 720, 400
LEFT, TOP, RIGHT, BOTTOM = 80, 12, WIDTH - 16, HEIGHT - 58  # room for the larger letters on a phone
NAMES, VALUES, ROW, AXIS = (
    210,
    120,
    21,
    20,
)  # of bars: columns for names and for values, height of a row and of the axis
COLOURS, DASHES = 5, ("", "5 2.5", "1.5 2")


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


@dataclass(frozen=True)
class Dot:
    """A point in units of the picture, and what is shown under the pointer."""

    x: float
    y: float
    told: str


@dataclass(frozen=True)
class Points:
    """A group in units of the picture, its dots from left to right."""

    name: str
    colour: int
    dash: str
    dots: list[Dot]


@dataclass(frozen=True)
class PointDrawing:
    """Points on logarithmic axes, ready for `figures.points` of figures.jinja."""

    title: str
    frame: Frame
    groups: list[Points]
    spoken: str


@dataclass(frozen=True)
class DrawnBar:
    """One row in units of the picture: (left, width) of its bars, and the ends of the whisker."""

    name: str
    told: str
    top: int
    bars: list[tuple[float, float]]
    whisker: tuple[float, float] | None


@dataclass(frozen=True)
class BarDrawing:
    """Rows of bars, ready for `figures.bars` of figures.jinja."""

    title: str
    width: int
    left: int
    right: int
    bottom: int
    axis: int  # its height
    row: int  # the height of one
    zero: float
    marks: tuple[Mark, ...]
    rows: list[DrawnBar]
    value_names: Sequence[str]
    spoken: str


def log_log(title: str, x_label: str, y_label: str, groups: Sequence[Group]) -> PointDrawing | None:
    """Groups of points on two logarithmic axes; None where there is no point."""
    groups = [group for group in groups if group.points]
    if not groups:
        return None
    x_scale, x_marks = log_axis([x for group in groups for x, _, _ in group.points], LEFT, RIGHT)
    y_scale, y_marks = log_axis([y for group in groups for _, y, _ in group.points], BOTTOM, TOP)
    drawn = []
    for number, group in enumerate(groups):
        dots = [Dot(x_scale.place(x), y_scale.place(y), f"{name}: {compact(y)}") for x, y, name in sorted(group.points)]
        drawn.append(Points(group.name, number % COLOURS + 1, DASHES[number // COLOURS % len(DASHES)], dots))
    spoken = "; ".join(f"{name} {compact(y)}" for group in groups for _, y, name in group.points)
    frame = Frame(WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM, x_label, y_label, x_marks, y_marks)
    return PointDrawing(title, frame, drawn, f"{title}: {spoken}")


def bars(title: str, rows: Sequence[Bar], value_names: Sequence[str] = ()) -> BarDrawing | None:
    """Horizontal bars, one row a name; None without rows. `value_names` makes the legend of several values."""
    if not rows:
        return None
    ends = [value + side * row.error for row in rows for value in row.values for side in (-1, 1)]
    low, high = min(0.0, *ends), max(0.0, *ends)
    scale = Scale(low, high if high > low else 1.0, NAMES, WIDTH - VALUES)
    at = ticks(scale.low, scale.high, 6)
    return BarDrawing(
        title=title,
        width=WIDTH,
        left=NAMES,
        right=WIDTH - VALUES,
        bottom=ROW * len(rows),
        axis=AXIS,
        row=ROW,
        zero=scale.place(0.0),
        marks=scale.marks(at, tick_labels(at)),
        rows=[_drawn(row, number * ROW, scale) for number, row in enumerate(rows)],
        value_names=value_names,
        spoken=f"{title}: " + "; ".join(f"{row.name} {row.told}" for row in rows),
    )


def _drawn(row: Bar, top: int, scale: Scale) -> DrawnBar:
    zero = scale.place(0.0)
    placed = [scale.place(value) for value in row.values]
    error = (scale.place(row.values[0] - row.error), scale.place(row.values[0] + row.error)) if row.error else None
    return DrawnBar(row.name, row.told, top, [(min(zero, x), round(abs(x - zero), 1)) for x in placed], error)
