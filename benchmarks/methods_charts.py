"""Pictures of docs/experiments.md: the report's charts (d1jax/telemetry/charts.py) as SVG files that stand alone."""

from __future__ import annotations

import re
from collections.abc import Sequence

from d1jax.telemetry.charts import HEIGHT, WIDTH, Chart, interval_axis, interval_plot, line_chart
from d1jax.telemetry.markup import esc

# A file that a README shows has no page around it: its own colours and ground.
STYLE = """<style>
text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;fill:#5b6470}
.tick,.label{font-size:10.5px}.name{font-size:12px;fill:#1d2126}.rule{stroke:#ebe9e3}.axis{stroke:#5b6470}
.bar{stroke:#6d7580;stroke-width:2.2}.mark{fill:#6d7580}.bar.last{stroke:#1f4f8f}.mark.last{fill:#1f4f8f}
.line{fill:none;stroke-width:2}.raw{opacity:.35}.dot{stroke:none}.cross{display:none}
.s1{stroke:#1f5fa8}.s2{stroke:#b4540f}.s3{stroke:#2a7a55}.s4{stroke:#7a4a9e}.s5{stroke:#5b6470}
.dot.s1{fill:#1f5fa8}.dot.s2{fill:#b4540f}.dot.s3{fill:#2a7a55}.dot.s4{fill:#7a4a9e}.dot.s5{fill:#5b6470}
</style>"""
NAMES, ZOOM = (
    170,
    1.3,
)  # `interval_plot` draws in 240 columns: rows and axis keep its proportions, so that they stay in line
PLOT, ROW, AXIS = 240 * ZOOM, 22 * ZOOM, 16 * ZOOM


def forest(title: str, rows: Sequence[tuple[str, float, float, float]]) -> str:
    """One line a method, (name, low, mean, high) as fractions: the interval as a bar on an axis that all share."""
    low = min([0.0, *(row[1] for row in rows)])
    high = max([0.0, *(row[3] for row in rows)])
    pad = 0.04 * ((high - low) or 1.0)
    span = (low - pad, high + pad)
    top = 28
    parts = [f'<text class="name" x="8" y="17">{esc(title)}</text>']
    for number, (name, one, mean, other) in enumerate(rows):
        y = top + number * ROW
        kind = "last" if one > 0 else "before"  # in colour where the interval leaves zero behind
        plot = interval_plot(one, mean, other, span, kind, f"{name}: {100 * mean:+.1f} points")
        parts.append(f'<text class="name" x="8" y="{y + ROW / 2 + 4:.1f}">{esc(name)}</text>{_placed(plot, y, ROW)}')
    bottom = top + len(rows) * ROW
    parts.append(_placed(interval_axis(span), bottom, AXIS))
    return _svg(NAMES + PLOT, bottom + AXIS + 8, parts)


def lines(chart: Chart) -> str:
    """A line chart with its title and, where there are several series, their names."""
    figure = line_chart(chart)
    found = re.search(rf'<svg viewBox="0 0 {WIDTH} {HEIGHT}".*?</svg>', figure, re.DOTALL)
    if found is None:
        return ""
    parts, top = [f'<text class="name" x="8" y="17">{esc(chart.title)}</text>'], 26
    if len(chart.series) > 1:
        apart = min(150, (WIDTH - 8) // len(chart.series))
        for number, one in enumerate(chart.series):
            x = 8 + apart * number
            parts.append(f'<line class="line s{number % 5 + 1}" x1="{x}" x2="{x + 14}" y1="31" y2="31"/>')
            parts.append(f'<text class="tick" x="{x + 19}" y="35">{esc(one.name)}</text>')
        top = 42
    inner = found[0].replace("<svg ", f'<svg x="0" y="{top}" width="{WIDTH}" height="{HEIGHT}" ', 1)
    return _svg(WIDTH, HEIGHT + top + 4, [*parts, inner])


def _placed(svg: str, y: float, height: float) -> str:
    return svg.replace("<svg ", f'<svg x="{NAMES}" y="{y:.1f}" width="{PLOT:.1f}" height="{height:.1f}" ', 1)


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{1.5 * width:.0f}">{STYLE}'
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="#fff"/>{"".join(parts)}</svg>\n'
    )
