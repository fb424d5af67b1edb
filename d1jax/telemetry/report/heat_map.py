"""A heat map: one path a shade, so that a thousand cells stay a few kilobytes."""

from collections.abc import Sequence
from dataclasses import dataclass

from d1jax.telemetry.report.axes import Frame, Mark, ticks
from d1jax.telemetry.report.line_chart import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH

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
        None  # the share of the darkest shade, given where pictures must be comparable; else the largest
    )
    spoken: str = ""  # what the picture shows, for those who cannot see it


@dataclass(frozen=True)
class HeatDrawing:
    """A heat map, ready for `figures.heat_map` of figures.jinja."""

    title: str
    peak: float
    shades: list[tuple[int, str]]  # (how dark, in twelfths; path of the cells)
    frame: Frame
    spoken: str


def heat_map(chart: HeatMap) -> HeatDrawing | None:
    """The drawing of a heat map; None when no cell has a share."""
    largest = largest_share(chart.share)
    if not largest > 0:
        return None
    peak = chart.peak or largest
    across, down = (RIGHT - LEFT) / chart.x_extent, (BOTTOM - TOP) / chart.y_extent
    x_marks = tuple(Mark(round(LEFT + (at - 0.5) * across, 1), f"{at:,}") for at in _whole(chart.x_extent))
    y_marks = tuple(Mark(round(TOP + (at - 0.5) * down, 1), f"{at:,}") for at in _whole(chart.y_extent))
    return HeatDrawing(
        title=chart.title,
        peak=peak,
        shades=_shades(chart, peak, across, down),
        frame=Frame(WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM, chart.x_label, chart.y_label, x_marks, y_marks),
        spoken=f"{chart.title}. {chart.spoken}".strip(),
    )


def largest_share(share: Sequence[Sequence[float]]) -> float:
    """The largest number of a table; 0 of an empty one."""
    return max((value for row in share for value in row), default=0.0)


def _shades(chart: HeatMap, peak: float, across: float, down: float) -> list[tuple[int, str]]:
    wide, tall = -(-chart.x_extent // len(chart.share[0])), -(-chart.y_extent // len(chart.share))
    cells: dict[int, str] = {}
    for row, values in enumerate(chart.share):
        for column, value in enumerate(values):
            shade = round(SHADES * min(max(value, 0.0) / peak, 1.0))
            if shade == 0 and value > 0:
                shade = 1  # what happened seldom is still seen
            if not shade:
                continue
            width, height = min(wide, chart.x_extent - column * wide), min(tall, chart.y_extent - row * tall)
            x, y = LEFT + column * wide * across, TOP + row * tall * down
            cell = f"M{x:.1f} {y:.1f}h{width * across:.1f}v{height * down:.1f}h-{width * across:.1f}z"
            cells[shade] = cells.get(shade, "") + cell
    return sorted(cells.items())


def _whole(extent: int) -> list[int]:
    return [int(at) for at in ticks(0, extent, 5) if at == int(at) and at >= 1] or [1]
