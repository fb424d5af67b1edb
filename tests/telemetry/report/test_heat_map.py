"""A heat map: its cells stay in the frame and are as dark as their share."""

import re

from d1jax.telemetry.report import line_chart as charts
from d1jax.telemetry.report.heat_map import HeatMap, heat_map


def test_the_cells_of_a_heat_map_stay_in_its_frame_and_are_as_dark_as_their_share(macro):
    share = [[0.5, 0.0, 0.001], [0.25, 0.0, 0.5], [0.25, 0.0, 0.0]]
    drawing = heat_map(
        HeatMap("<b>", "x", "y", share, x_extent=8, y_extent=7)
    )  # 3 x 3 units a cell, the last ones cut off
    svg = macro("figures.jinja", "heat_map", drawing)
    assert "<b>" not in svg
    found = {}
    for opacity, path in re.findall(r'fill-opacity="([\d.]+)" d="(.*?)"', svg):
        for x, y, w, h in re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)v([\d.]+)", path):
            x, y, w, h = map(float, (x, y, w, h))
            assert charts.LEFT <= x <= x + w <= charts.RIGHT + 0.2
            assert charts.TOP <= y <= y + h <= charts.BOTTOM + 0.2
            across, down = (
                (charts.RIGHT - charts.LEFT) / 8,
                (charts.BOTTOM - charts.TOP) / 7,
            )
            found[round((y - charts.TOP) / down / 3), round((x - charts.LEFT) / across / 3)] = float(opacity)
    assert found == {(0, 0): 1.0, (0, 2): 0.08, (1, 0): 0.5, (1, 2): 1.0, (2, 0): 0.5}
