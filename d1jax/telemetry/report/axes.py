"""Where values lie on a picture: scales, round marks, and the frame that the kinds of charts share."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from d1jax.telemetry.report.wording import compact

MIN_MARKS = 3
DENSITIES = ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7))  # round numbers of a logarithmic axis, the sparsest first


@dataclass(frozen=True)
class Mark:
    """A place on an axis, in units of the picture, and what is written there."""

    place: float
    label: str


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` on the stretch from `start` to `end`. With `log`, `low` and `high` are exponents of ten."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def places(self, values: Sequence[float] | np.ndarray) -> np.ndarray:
        """Where values lie; NaN or infinity where a value is not finite."""
        with np.errstate(all="ignore"):
            values = np.asarray(values, float)
            values = np.log10(values) if self.log else values
            return self.start + (values - self.low) / (self.high - self.low) * (self.end - self.start)

    def place(self, value: float) -> float:
        """Where one value lies, to a tenth of a unit."""
        return round(float(self.places(value)), 1)

    def marks(self, values: Sequence[float], labels: Sequence[str]) -> tuple[Mark, ...]:
        """The values with their labels, at their places."""
        return tuple(Mark(self.place(value), label) for value, label in zip(values, labels, strict=True))


@dataclass(frozen=True)
class Frame:
    """A picture of `width` x `height` with the edges of the part that is drawn in, and its two axes."""

    width: int
    height: int
    left: int
    top: int
    right: int
    bottom: int
    x_label: str
    y_label: str
    x_marks: tuple[Mark, ...] = ()
    y_marks: tuple[Mark, ...] = ()


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) inside [low, high], at most about `most` of them, and two at least where there are."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    steps = [m * power for m in (0.5, 1, 2, 5, 10)]
    wanted = next(place for place, step in enumerate(steps) if step >= rough * 0.999)
    found: list[float] = []
    for step in (steps[wanted], steps[wanted - 1]):  # one mark alone would give no scale
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        found = [round(i * step, 12) for i in range(first, last + 1)]
        if len(found) > 1:
            break
    return found


def tick_labels(values: Sequence[float]) -> list[str]:
    """The numbers beside evenly spaced marks, with as many decimals as tell them apart."""
    if len(values) == 1:
        return ["0" if values[0] == 0 else compact(values[0])]
    step = values[1] - values[0] if values else 1.0
    return [_tick_label(value, step) for value in values]


def _tick_label(value: float, step: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1e5 or step < 1e-4:
        return compact(value)
    return f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def padded(values: np.ndarray) -> tuple[float, float]:
    """The range of the values with a little air; it starts at zero when they come near zero anyway."""
    low, high = float(values.min()), float(values.max())
    if low == high:
        pad = abs(low) * 0.1 or 1.0
        return (0.0, 1.0) if low == 0 else (low - pad, high + pad)
    if 0 <= low < 0.4 * high:
        return 0.0, high * 1.05
    pad = 0.06 * (high - low)
    return low - pad, high + pad


def round_multiples(low: float, high: float, factors: Sequence[float]) -> list[float]:
    """`factors` times the powers of ten whose logarithms lie in [low, high]."""
    every = [factor * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for factor in factors]
    return [value for value in every if low <= math.log10(value) <= high]


def log_axis(values: Sequence[float], start: float, end: float) -> tuple[Scale, tuple[Mark, ...]]:
    """A logarithmic scale with a little air at both ends, and at least three round marks on it."""
    low, high = math.log10(min(values)), math.log10(max(values))
    pad = 0.06 * (high - low) or 0.3
    scale = Scale(low - pad, high + pad, start, end, log=True)
    found = (round_multiples(scale.low, scale.high, factors) for factors in DENSITIES)
    at = next((values for values in found if len(values) >= MIN_MARKS), [])
    # A range so narrow that it holds no three of them: the round numbers of a linear axis.
    at = at or [v for v in ticks(10**scale.low, 10**scale.high, 5) if scale.low <= math.log10(v) <= scale.high]
    return scale, scale.marks(at, [f"{value:g}" for value in at])


def path(points: np.ndarray) -> str:
    """The path data of a line through (x, y) rows, broken where y is not finite."""
    commands, pen_up = [], True
    for x, y in points:
        if not np.isfinite(y):
            pen_up = True
            continue
        commands.append(f"{'M' if pen_up else 'L'}{x:.1f} {y:.1f}")
        pen_up = False
    return "".join(commands)
