"""Pictures of docs/experiments.md: the report's charts (d1jax/telemetry/report) as SVG files that stand alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from d1jax.telemetry.report.intervals import interval, interval_axis
from d1jax.telemetry.report.line_chart import HEIGHT, WIDTH, Chart, line_chart
from d1jax.telemetry.report.rendering import environment

TEMPLATES = Path(__file__).parent / "templates"
# Intervals are drawn in 240 columns: rows and axis keep their proportions, so that they stay in line.
NAMES, ZOOM = 170, 1.3
PLOT, ROW, AXIS = 240 * ZOOM, 22 * ZOOM, 16 * ZOOM


def forest(title: str, rows: Sequence[tuple[str, float, float, float]]) -> str:
    """One line a method, (name, low, mean, high) as fractions: the interval as a bar on an axis that all share."""
    low = min([0.0, *(row[1] for row in rows)])
    high = max([0.0, *(row[3] for row in rows)])
    pad = 0.04 * ((high - low) or 1.0)
    span = (low - pad, high + pad)
    drawn = []
    for name, one, mean, other in rows:
        kind = "last" if one > 0 else "before"  # in colour where the interval leaves zero behind
        spoken = f"{name}: {100 * mean:+.1f} points"
        drawn.append({"name": name, "interval": interval(one, mean, other, span, kind, spoken)})
    sizes = {"names": NAMES, "plot": PLOT, "row_height": ROW, "axis_height": AXIS}
    height = 28 + len(rows) * ROW + AXIS + 8
    return _picture("forest", NAMES + PLOT, height, title=title, rows=drawn, axis=interval_axis(span), **sizes)


def lines(chart: Chart) -> str:
    """A line chart with its title and, where there are several series, their names; "" where no value is finite."""
    drawing = line_chart(chart)
    if drawing is None:
        return ""
    several = len(drawing.lines)
    top, apart = (42, min(150, (WIDTH - 8) // several)) if several > 1 else (26, 0)
    return _picture("lines", WIDTH, HEIGHT + top + 4, title=chart.title, chart=drawing, top=top, apart=apart)


def _picture(name: str, width: float, height: float, **values: Any) -> str:
    template = environment(TEMPLATES).get_template(f"{name}.svg.jinja")
    return template.render(width=width, height=height, **values)
