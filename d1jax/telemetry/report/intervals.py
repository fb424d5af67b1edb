"""Rows of a forest plot: each an interval with its estimate, on an axis that all rows share."""

from dataclasses import dataclass

from d1jax.telemetry.report.axes import Mark, Scale, ticks
from d1jax.telemetry.report.wording import percent

LEFT, RIGHT = 18, 222  # of 240: room for half a label at either end


@dataclass(frozen=True)
class Interval:
    """One row, ready for `figures.interval` of figures.jinja; `kind` is the class that colours it."""

    kind: str
    low: float
    at: float
    high: float
    rules: list[float]
    spoken: str


def interval(low: float, rate: float, high: float, span: tuple[float, float], kind: str, spoken: str) -> Interval:
    """The interval from `low` to `high` around `rate`, on the axis over `span`. A `baseline` gets a hollow mark."""
    scale = _scale(span)
    rules = [scale.place(value) for value in ticks(*span, 4)]
    return Interval(kind, scale.place(low), scale.place(rate), scale.place(high), rules, spoken)


def interval_axis(span: tuple[float, float]) -> tuple[Mark, ...]:
    """The marks of the axis under the rows."""
    at = ticks(*span, 4)
    return _scale(span).marks(at, [percent(value, 0) for value in at])


def _scale(span: tuple[float, float]) -> Scale:
    return Scale(*span, LEFT, RIGHT)
