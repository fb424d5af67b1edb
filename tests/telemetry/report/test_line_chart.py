"""Curves: thinned without losing spikes, smoothed across gaps, inside their panels, and with text that stays text."""

import json
import re

import numpy as np
import pytest

from d1jax.telemetry.report import line_chart as charts


@pytest.fixture
def drawn(macro):
    """The markup of a chart."""
    return lambda chart: macro("figures.jinja", "line_chart", charts.line_chart(chart))


def test_moving_mean_skips_gaps_and_keeps_constants():
    y = np.array([2.0, np.nan, 2.0, 2.0, np.inf, 2.0])
    np.testing.assert_array_equal(charts.moving_mean(y, 3), np.full(6, 2.0))
    np.testing.assert_allclose(charts.moving_mean(np.arange(5.0), 3), [0.5, 1, 2, 3, 3.5])


def test_thinning_keeps_spikes_and_ends():
    y = np.zeros(50_000)
    y[12_345], y[777] = 9.0, np.nan
    x, thinned = charts.thin(np.arange(50_000.0), y)
    assert len(x) <= charts.MAX_POINTS and thinned.max() == 9.0
    assert x[0] == 0 and x[-1] == 49_999


@pytest.mark.parametrize("y", [(1.0,), (0.0, 0.0), (float("nan"), 2.0), (1e-9, 1e9), (-5.0, 5.0), (1.0, float("inf"))])
def test_any_series_draws_inside_its_panel(y, drawn):
    series = charts.Series("s", tuple(range(len(y))), y)
    svg = drawn(charts.Chart("t", "x", "y", (series,)))
    assert "nan" not in svg.lower() and "inf" not in svg.lower()
    points = re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", svg)
    assert points and all(0 <= float(b) <= charts.HEIGHT and 0 <= float(a) <= charts.WIDTH for a, b in points)


def test_a_series_without_a_finite_value_draws_nothing():
    nothing = charts.Series("s", (1.0,), (float("nan"),))
    assert charts.line_chart(charts.Chart("t", "x", "y", (nothing,))) is None


def test_names_stay_text_and_the_numbers_travel_beside_the_picture(drawn):
    nasty = "</script><b>{{ 7*7 }}\"'&"
    one = charts.Series(nasty, (1.0, 2.0), (3.0, 4.5))
    html = drawn(charts.Chart(nasty, nasty, nasty, (one, one)))
    assert "<b>" not in html and "49" not in html.replace("&#34;", "")[: html.index("<svg")]
    data = json.loads(re.search(r'<script type="application/json">(.*?)</script>', html)[1])
    assert data["series"][0] == {"name": nasty, "x": [1.0, 2.0], "y": [3.0, 4.5]}
