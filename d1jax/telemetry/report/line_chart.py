"""One panel of curves: the raw values thin, their moving mean bold, and the numbers behind them for the read-out (hover.js)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from d1jax.telemetry.report.axes import Frame, Mark, Scale, padded, path, round_multiples, tick_labels, ticks
from d1jax.telemetry.report.wording import compact

WIDTH, HEIGHT = 352, 204
LEFT, TOP, RIGHT, BOTTOM = 52, 10, WIDTH - 12, HEIGHT - 38
MAX_POINTS = 800  # about twice the pixels of a panel: more would only make the file larger
FEW_POINTS = 24  # up to here each gets a dot, and a mean says nothing
COLOURS, DASHES = 5, ("", "5 2.5", "1.5 2", "7 2 1.5 2", "3 3")


@dataclass(frozen=True)
class Series:
    """One curve. `y` may hold NaN and infinity, which are drawn as a gap."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True)
class Chart:
    """What a panel shows. `x_range` and `y_range` are given where panels must be comparable."""

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    smooth: bool = True
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    x_name: str = "step"  # what a value of x is called where a value is read out


@dataclass(frozen=True)
class Line:
    """A curve in units of the picture: its raw values and, where that says more, their mean."""

    name: str
    colour: int
    dash: str
    raw: str
    mean: str
    dots: list[list[float]]


@dataclass(frozen=True)
class LineDrawing:
    """A panel, ready for `figures.line_chart` of figures.jinja."""

    title: str
    window: int | None  # of the mean
    frame: Frame
    lines: list[Line]
    spoken: str
    data: dict[str, Any]


def line_chart(chart: Chart) -> LineDrawing | None:
    """The drawing of a chart; None when no value is finite."""
    series = [one for one in chart.series if np.isfinite(np.asarray(one.y, float)).any()]
    if not series:
        return None
    x_scale, y_scale = _x_scale(chart, series), _y_scale(chart, series)
    window = _window(series) if chart.smooth else None
    y_label = chart.y_label + (" (log scale)" if y_scale.log else "")
    x_at = [value for value in ticks(x_scale.low, x_scale.high, 5) if value == int(value)]  # steps are whole numbers
    return LineDrawing(
        title=chart.title,
        window=window,
        frame=Frame(
            WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM, chart.x_label, y_label,
            x_scale.marks(x_at, [f"{int(value):,}" for value in x_at]), _y_marks(y_scale),
        ),
        lines=[_line(one, number, x_scale, y_scale, chart.smooth) for number, one in enumerate(series)],
        spoken=_spoken(chart, series),
        data={
            "box": [LEFT, TOP, RIGHT, BOTTOM], "x": [x_scale.low, x_scale.high], "at": chart.x_name,
            "series": [_numbers(one) for one in series],
        },
    )  # fmt: skip


def moving_mean(y: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` values, shorter at the ends; non-finite values are left out of the mean."""
    good = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(good, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(good)])
    low = np.maximum(np.arange(len(y)) - window // 2, 0)
    high = np.minimum(np.arange(len(y)) + window // 2 + 1, len(y))
    n = counts[high] - counts[low]
    return np.where(n > 0, (sums[high] - sums[low]) / np.maximum(n, 1), np.nan)


def thin(x: np.ndarray, y: np.ndarray, most: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` points, keeping the lowest and the highest of each bucket, so that spikes stay visible."""
    if len(x) <= most:
        return x, y
    keep = {0, len(x) - 1}
    for bucket in np.array_split(np.arange(len(x)), most // 2 - 1):
        values = np.where(np.isfinite(y[bucket]), y[bucket], np.nan)
        if not np.all(np.isnan(values)):
            keep |= {int(bucket[np.nanargmin(values)]), int(bucket[np.nanargmax(values)])}
    index = np.array(sorted(keep))
    return x[index], y[index]


def _x_scale(chart: Chart, series: Sequence[Series]) -> Scale:
    every = [x for one in series for x in one.x]
    low, high = chart.x_range or (float(min(every)), float(max(every)))
    if low == high:
        low, high = low - 1, high + 1
    return Scale(low, high, LEFT, RIGHT)


def _y_scale(chart: Chart, series: Sequence[Series]) -> Scale:
    values = np.concatenate([np.asarray(one.y, float) for one in series])
    values = values[np.isfinite(values)]
    # One spike of a ratio or a KL would flatten everything else; a logarithm shows both.
    if chart.y_range is None and values.min() > 0 and values.max() > 20 * np.median(values):
        return Scale(math.log10(values.min()) - 0.05, math.log10(values.max()) + 0.05, BOTTOM, TOP, log=True)
    return Scale(*(chart.y_range or padded(values)), BOTTOM, TOP)


def _y_marks(scale: Scale) -> tuple[Mark, ...]:
    if scale.log:
        at = round_multiples(scale.low, scale.high, (1, 2, 5) if scale.high - scale.low < 2.5 else (1,))
        return scale.marks(at, [f"{value:g}" for value in at])
    at = ticks(scale.low, scale.high, 4)
    return scale.marks(at, tick_labels(at))


def _mean_of(count: int) -> int | None:
    """Over how many values a curve of `count` is smoothed."""
    return max(5, count // 10) | 1 if count > FEW_POINTS else None


def _window(series: Sequence[Series]) -> int | None:
    return max((window for one in series if (window := _mean_of(len(one.x)))), default=None)


def _line(series: Series, number: int, x_scale: Scale, y_scale: Scale, smooth: bool) -> Line:
    x, y = np.asarray(series.x, float), np.asarray(series.y, float)

    def placed(y: np.ndarray) -> np.ndarray:
        shown_x, shown_y = thin(x, y)
        return np.stack([x_scale.places(shown_x), y_scale.places(shown_y)], axis=1)

    window, raw = _mean_of(len(x)) if smooth else None, placed(y)
    few = len(x) <= FEW_POINTS
    return Line(
        name=series.name,
        colour=number % COLOURS + 1,
        dash=DASHES[number % len(DASHES)],
        raw=path(raw),
        mean=path(placed(moving_mean(y, window))) if window else "",
        dots=raw[np.isfinite(raw[:, 1])].round(1).tolist() if few else [],
    )


def _numbers(series: Series) -> dict[str, Any]:
    """What the read-out knows of a curve, to six digits."""
    x, y = thin(np.asarray(series.x, float), np.asarray(series.y, float))
    told = [float(f"{value:.6g}") if np.isfinite(value) else None for value in y.tolist()]
    return {"name": series.name, "x": x.tolist(), "y": told}


def _spoken(chart: Chart, series: Sequence[Series]) -> str:
    ends = []
    for one in series:
        points = [(x, y) for x, y in zip(one.x, one.y, strict=True) if math.isfinite(y)]
        (x0, y0), (x1, y1) = points[0], points[-1]
        at = chart.x_name
        ends.append(f"{one.name} from {compact(y0)} at {at} {x0:,.0f} to {compact(y1)} at {at} {x1:,.0f}")
    return f"{chart.title}: {'; '.join(ends)}"
