"""Means with intervals, and Markdown tables: what the reports of benchmarks share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

# Student's t at 97.5 % by degrees of freedom.
T975 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def mean_and_half(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half of its 95 % interval by Student's t; the interval of a single value is not known (NaN)."""
    n = len(values)
    if n < 2:
        return float(np.mean(values)) if n else math.nan, math.nan
    return float(np.mean(values)), T975[min(n, len(T975)) - 1] * float(np.std(values, ddof=1)) / math.sqrt(n)


def points(values: Iterable[float]) -> str:
    mean, half = mean_and_half([100 * value for value in values])
    return f"{mean:+.1f}" + ("" if math.isnan(half) else f" ± {half:.1f}")


def percent(values: Iterable[float]) -> str:
    return f"{100 * float(np.mean(list(values))):.1f} %"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines_ = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines_ + ["| " + " | ".join(row) + " |" for row in rows])
