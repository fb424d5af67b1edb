"""A heat map as inline SVG: one path a shade, so that a thousand cells stay a few kilobytes."""

from collections.abc import Sequence
from dataclasses import dataclass

from d1jax.telemetry.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, ticks
from d1jax.telemetry.markup import esc, percent

SHADES = 12


@dataclass(frozen=True)
class HeatMap:
    """`share[row][column]` in [0, 1]: the first row on top, the first column on the left.

    A cell is ceil(extent / cells) units wide and tall; the last ones may be cut off. Units are counted from one.
    """

    title: str
    x_label: str
    y_label: str
    share: Sequence[Sequence[float]]
    x_extent: int
    y_extent: int
    peak: float | None = (
        None  # the share of the darkest shade, given when two pictures must be comparable; else the largest
    )
    spoken: str = ""  # what the picture shows, for those who cannot see it


def heat_map(chart: HeatMap) -> str:
    """A <figure> with title, scale and SVG; "" when no cell has a share."""
    largest = largest_share(chart.share)
    if not largest > 0:
        return ""
    peak = chart.peak or largest
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    across, down = (right - LEFT) / chart.x_extent, (bottom - TOP) / chart.y_extent
    wide, tall = -(-chart.x_extent // len(chart.share[0])), -(-chart.y_extent // len(chart.share))
    cells: dict[int, list[str]] = {}
    for row, values in enumerate(chart.share):
        for column, value in enumerate(values):
            shade = round(SHADES * min(max(value, 0.0) / peak, 1.0))
            if shade == 0 and value > 0:
                shade = 1  # what happened seldom is still seen
            if shade:
                width, height = min(wide, chart.x_extent - column * wide), min(tall, chart.y_extent - row * tall)
                x, y = LEFT + column * wide * across, TOP + row * tall * down
                move = f"M{x:.1f} {y:.1f}h{width * across:.1f}v{height * down:.1f}h-{width * across:.1f}z"
                cells.setdefault(shade, []).append(move)
    parts = [
        f'<path class="heat" fill-opacity="{shade / SHADES:.2f}" d="{"".join(moves)}"/>'
        for shade, moves in sorted(cells.items())
    ]
    parts.append(f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{right - LEFT}" height="{bottom - TOP}"/>')
    for mark in _whole(chart.x_extent):
        x = LEFT + (mark - 0.5) * across
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{mark:,}</text>')
    for mark in _whole(chart.y_extent):
        y = TOP + (mark - 0.5) * down
        parts.append(f'<line class="axis" x1="{LEFT - 4}" x2="{LEFT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{y + 3.5:.1f}" text-anchor="end">{mark:,}</text>')
    x, y = (LEFT + right) / 2, (TOP + bottom) / 2
    parts.append(f'<text class="label" x="{x}" y="{HEIGHT - 5}" text-anchor="middle">{esc(chart.x_label)}</text>')
    parts.append(
        f'<text class="label" transform="translate(10 {y}) rotate(-90)" text-anchor="middle">{esc(chart.y_label)}</text>'
    )
    spoken = esc(f"{chart.title}. {chart.spoken}".strip())
    return (
        f'<figure class="picture"><figcaption><span class="name">{esc(chart.title)}</span></figcaption>{_scale(peak)}'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{spoken}">{"".join(parts)}</svg></figure>'
    )


def largest_share(share: Sequence[Sequence[float]]) -> float:
    return max((value for row in share for value in row), default=0.0)


def _whole(extent: int) -> list[int]:
    return [int(mark) for mark in ticks(0, extent, 5) if mark == int(mark) and mark >= 1] or [1]


def _scale(peak: float) -> str:
    steps = "".join(
        f'<rect class="heat" x="{8 * shade}" width="8" height="10" fill-opacity="{(shade + 1) / SHADES:.2f}"/>'
        for shade in range(SHADES)
    )
    svg = f'<svg viewBox="0 0 {8 * SHADES} 10" aria-hidden="true">{steps}</svg>'
    return f'<div class="scale">0{svg}{percent(peak, 0)} of a column</div>'
