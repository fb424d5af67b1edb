"""The charts of an audit: points lie where logarithms say, axes have marks, bars start at zero."""

from xml.etree import ElementTree

import pytest

from d1jax.telemetry.report.audit_charts import Bar, Group, bars, log_log


@pytest.fixture
def figure(macro):
    """The <svg> that a macro of figures.jinja makes of a drawing."""

    def draw(name, drawing):
        html = macro("figures.jinja", name, drawing)
        return ElementTree.fromstring(html[html.index('<svg viewBox="0 0 720') : html.rindex("</svg>") + 6])

    return draw


def test_points_lie_where_logarithms_say(figure):
    chart = log_log("t", "x", "y", [Group("g", ((1, 1.0, "a"), (10, 10.0, "b"), (100, 100.0, "c")))])
    dots = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in figure("points", chart).findall("circle")]
    assert dots[1][0] == pytest.approx((dots[0][0] + dots[2][0]) / 2, abs=0.2)
    assert dots[1][1] == pytest.approx((dots[0][1] + dots[2][1]) / 2, abs=0.2) and dots[0][1] > dots[2][1]
    assert log_log("t", "x", "y", []) is None
    assert figure("points", log_log("t", "x", "y", [Group("g", ((2, 5.0, "one"),))])).find("circle") is not None


@pytest.mark.parametrize(
    "ends", [(1, 1000), (1, 30), (3, 9), (0.31, 0.95), (5.5, 5.9), (2, 2), (1e-7, 1e7), (119, 131)]
)
def test_logarithmic_axes_have_names_and_at_least_three_marks(ends, figure):
    chart = log_log("t", "passes", "nats²", [Group("g", tuple((value, value, "p") for value in ends))])
    svg = figure("points", chart)
    ticks = [text for text in svg.findall("text") if text.get("class") == "tick"]
    across = [text for text in ticks if text.get("text-anchor") == "middle"]
    assert len(across) >= 3 and len(ticks) - len(across) >= 3
    assert [text.text for text in svg.findall("text") if text.get("class") == "label"] == ["passes", "nats²"]
    assert len({text.text for text in across}) == len(across)


def test_bars_start_at_zero_on_either_side(figure):
    up, down = figure("bars", bars("t", [Bar("up", (2.0,), "2", 0.5), Bar("down", (-2.0,), "-2")])).findall("rect")
    assert float(up.get("width")) == pytest.approx(float(down.get("width")), abs=0.2)
    assert float(down.get("x")) + float(down.get("width")) == pytest.approx(float(up.get("x")), abs=0.2)
    assert bars("t", []) is None
    assert figure("bars", bars("t", [Bar("nothing", (0.0,), "0")])).find("rect") is not None
