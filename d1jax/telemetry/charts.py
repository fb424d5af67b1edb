"""Line charts and interval plots as inline SVG: no JavaScript is needed to read them, and none of it is fetched.

`line_chart` draws one panel: the raw values thin, their moving mean bold. The numbers behind it travel in a JSON
element of the same figure, where a few lines of script (`page_assets.SCRIPT`) find the value under the pointer.
"""

import math
from dataclasses import dataclass

import numpy as np

from d1jax.telemetry.markup import compact, esc, percent, script_json

WIDTH, HEIGHT = 352, 204
LEFT, TOP, RIGHT, BOTTOM = 48, 10, 12, 38
MOST_POINTS = 800  # about twice the pixels of a panel: more would only make the file larger
_DASHES = ("", "5 2.5", "1.5 2", "7 2 1.5 2", "3 3")


@dataclass(frozen=True)
class Series:
    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]  # may hold NaN and infinity: drawn as a gap


@dataclass(frozen=True)
class Chart:
    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    smooth: bool = True
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None  # given when two panels must be comparable
    x_name: str = "step"  # what a value of x is called where a value is read out


def moving_mean(y: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` values, shorter at the ends; non-finite values are left out of the mean."""
    good = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(good, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(good)])
    low = np.maximum(np.arange(len(y)) - window // 2, 0)
    high = np.minimum(np.arange(len(y)) + window // 2 + 1, len(y))
    n = counts[high] - counts[low]
    return np.where(n > 0, (sums[high] - sums[low]) / np.maximum(n, 1), np.nan)


def thin(x: np.ndarray, y: np.ndarray, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
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


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) inside [low, high], at most about `most` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def tick_label(value: float, step: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1e5 or step < 1e-4:
        return compact(value)
    return f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def y_domain(values: np.ndarray) -> tuple[float, float]:
    """Range with a little air; it starts at zero when the values come near zero anyway."""
    low, high = float(values.min()), float(values.max())
    if low == high:
        pad = abs(low) * 0.1 or 1.0
        return (0.0, 1.0) if low == 0 else (low - pad, high + pad)
    if 0 <= low < 0.4 * high:
        return 0.0, high * 1.05
    pad = 0.06 * (high - low)
    return low - pad, high + pad


def line_chart(chart: Chart) -> str:
    """A <figure> with title, legend, SVG and the data for hovering; "" when no value is finite."""
    series = [s for s in chart.series if np.isfinite(np.asarray(s.y, float)).any()]
    if not series:
        return ""
    values = np.concatenate([np.asarray(s.y, float) for s in series])
    values = values[np.isfinite(values)]
    # One spike of a ratio or a KL would flatten everything else; a logarithm shows both.
    log = bool(chart.y_range is None and values.min() > 0 and values.max() > 20 * np.median(values))
    if log:
        low, high = math.log10(values.min()) - 0.05, math.log10(values.max()) + 0.05
        between = (1, 2, 5) if high - low < 2.5 else (1,)
        decades = [m * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for m in between]
        marks = [(math.log10(v), f"{v:g}") for v in decades if low <= math.log10(v) <= high]
    else:
        low, high = chart.y_range or y_domain(values)
        at = ticks(low, high, 4)
        marks = [(v, tick_label(v, at[1] - at[0] if len(at) > 1 else 1.0)) for v in at]
    steps = np.concatenate([np.asarray(s.x, float) for s in series])
    x_low, x_high = chart.x_range or (float(steps.min()), float(steps.max()))
    if x_low == x_high:
        x_low, x_high = x_low - 1, x_high + 1
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def px(x):
        return LEFT + (np.asarray(x, float) - x_low) / (x_high - x_low) * (right - LEFT)

    def py(y):
        with np.errstate(all="ignore"):
            y = np.log10(np.asarray(y, float)) if log else np.asarray(y, float)
        return bottom - (y - low) / (high - low) * (bottom - TOP)

    parts = []
    for mark, label in marks:
        y = bottom - (mark - low) / (high - low) * (bottom - TOP)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{esc(label)}</text>')
    for mark in (t for t in ticks(x_low, x_high, 5) if t == int(t)):  # steps are whole numbers
        x = float(px(mark))
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{int(mark):,}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    middle = (LEFT + right) / 2
    parts.append(f'<text class="label" x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">{esc(chart.x_label)}</text>')
    y_label = chart.y_label + (" (log scale)" if log else "")
    parts.append(
        f'<text class="label" transform="translate(10 {(TOP + bottom) / 2}) rotate(-90)" text-anchor="middle">'
        f"{esc(y_label)}</text>"
    )
    data, windows = [], set()
    for number, one in enumerate(series):
        x, y = np.asarray(one.x, float), np.asarray(one.y, float)
        colour, dash = number % 5 + 1, _DASHES[number % len(_DASHES)]
        raw_x, raw_y = thin(x, y)
        few = len(x) <= 24
        plain = few or not chart.smooth
        parts.append(_path(px(raw_x), py(raw_y), f"line s{colour} {'bold' if plain else 'raw'}", dash if plain else ""))
        if few:
            shown = [(a, b) for a, b in zip(px(raw_x), py(raw_y), strict=True) if np.isfinite(b)]
            parts += [f'<circle class="dot s{colour}" cx="{a:.1f}" cy="{b:.1f}" r="2.4"/>' for a, b in shown]
        if not plain:
            window = max(5, len(x) // 10) | 1
            windows.add(window)
            smooth_x, smooth_y = thin(x, moving_mean(y, window))
            parts.append(_path(px(smooth_x), py(smooth_y), f"line s{colour} bold", dash))
        data.append({
            "name": one.name,
            "x": raw_x.tolist(),
            "y": [float(f"{v:.6g}") if np.isfinite(v) else None for v in raw_y.tolist()],
        })  # fmt: skip
    parts.append(f'<line class="cross" x1="0" x2="0" y1="{TOP}" y2="{bottom}" visibility="hidden"/>')
    payload = {
        "box": [LEFT, TOP, right, bottom], "x": [x_low, x_high], "y": [low, high], "log": log, "at": chart.x_name,
        "series": data,
    }  # fmt: skip
    hint = f' <span class="hint">mean of {max(windows)}</span>' if windows else ""
    return (
        f'<figure class="chart"><figcaption><span class="name">{esc(chart.title)}</span>{hint}'
        f'<output class="readout"></output></figcaption>{_legend(series)}'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-label="{esc(_spoken(chart, series))}">'
        f'{"".join(parts)}</svg><script type="application/json">{script_json(payload)}</script></figure>'
    )


def interval_plot(low: float, rate: float, high: float, span: tuple[float, float], kind: str, label: str) -> str:
    """One row of a forest plot: the interval as a bar, the estimate as a mark, on the axis that all rows share."""
    x = [_on(span, v) for v in (low, rate, high)]
    mark = (
        f'<rect class="mark {kind}" x="{x[1] - 3.2:.1f}" y="7.8" width="6.4" height="6.4" '
        f'transform="rotate(45 {x[1]:.1f} 11)"/>'
        if kind == "baseline"
        else f'<circle class="mark {kind}" cx="{x[1]:.1f}" cy="11" r="4.2"/>'
    )
    rules = "".join(f'<line class="rule" x1="{_on(span, t):.1f}" x2="{_on(span, t):.1f}" y1="0" y2="22"/>'
                    for t in ticks(*span, 4))  # fmt: skip
    return (
        f'<svg class="interval" viewBox="0 0 240 22" role="img" aria-label="{esc(label)}">{rules}'
        f'<line class="bar {kind}" x1="{x[0]:.1f}" x2="{x[2]:.1f}" y1="11" y2="11"/>{mark}</svg>'
    )


def interval_axis(span: tuple[float, float]) -> str:
    """The axis under a column of `interval_plot`s."""
    marks = "".join(
        f'<text class="tick" x="{_on(span, t):.1f}" y="12" text-anchor="middle">{esc(percent(t, 0))}</text>'
        for t in ticks(*span, 4)
    )
    return f'<svg class="interval" viewBox="0 0 240 16" aria-hidden="true">{marks}</svg>'


def _on(span: tuple[float, float], value: float) -> float:
    return 18 + (value - span[0]) / (span[1] - span[0]) * 204


def _path(x: np.ndarray, y: np.ndarray, css: str, dash: str) -> str:
    """An SVG path that breaks where y is not finite."""
    commands, pen_up = [], True
    for a, b in zip(x, y, strict=True):
        if not np.isfinite(b):
            pen_up = True
            continue
        commands.append(f"{'M' if pen_up else 'L'}{a:.1f} {b:.1f}")
        pen_up = False
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<path class="{css}"{dashes} d="{"".join(commands)}"/>'


def _legend(series: list[Series]) -> str:
    if len(series) < 2:
        return ""
    items = []
    for number, one in enumerate(series):
        dash = _DASHES[number % len(_DASHES)]
        line = f'<line class="line s{number % 5 + 1} bold" stroke-dasharray="{dash}" x1="0" x2="20" y1="5" y2="5"/>'
        items.append(f'<li><svg width="20" height="10" aria-hidden="true">{line}</svg>{esc(one.name)}</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


def _spoken(chart: Chart, series: list[Series]) -> str:
    ends = []
    for one in series:
        points = [(x, y) for x, y in zip(one.x, one.y, strict=True) if math.isfinite(y)]
        (x0, y0), (x1, y1) = points[0], points[-1]
        at = chart.x_name
        ends.append(f"{one.name} from {compact(y0)} at {at} {x0:,.0f} to {compact(y1)} at {at} {x1:,.0f}")
    return f"{chart.title}: {'; '.join(ends)}"
