"""The page of an audit: everything is escaped, nothing is fetched, and its charts hold what the numbers say."""

import re
from xml.etree import ElementTree

import pytest

from d1jax.telemetry.audit_charts import Bar, Group, bars, log_log
from d1jax.telemetry.audit_page import audit_html

EVIL = '<script>alert("1")</script>&'


def result(names=(EVIL, "elbo exact K=2", "one_step p=0"), variances=(4.0, 2.0, 0.0)):
    rows = [
        {
            "name": name, "passes": n + 1, "bias": 0.5 - n, "bias_error": 0.1, "variance": variance, "token_variance": variance / 9,
            "pearson": None, "spearman": 0.25, "unshared": {"rms": 0.3, "outside_0.2": 0.31, "outside_0.5": 0.12},
            "shared": {"outside_0.2": 0.0},
        }
        for n, (name, variance) in enumerate(zip(names, variances, strict=True))
    ]  # fmt: skip
    setting = {"run": EVIL, "stage": "sft", "step": 3, "rows": 8, "samples": 4, "truth_samples": 32, "temperature": 1.0}
    truth = {"mean": -3.0, "error_of_the_mean": 0.1, "tokens": 12.0}
    environment = {"jax": EVIL}
    return {
        "setting": setting,
        "truth": truth,
        "environment": environment,
        "estimators": rows,
        "findings": [EVIL, "fine"],
    }


def figures(page):
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg viewBox=\"0 0 720.*?</svg>", page, re.S)]


def test_the_page_is_safe_and_whole():
    page = audit_html(result())
    assert "<script" not in page and "alert(&quot;1&quot;)" in page and "http://" not in page and "https://" not in page
    assert "default-src &#x27;none&#x27;" in page or "default-src 'none'" in page
    variance, bias, clipped = figures(page)
    assert len(variance.findall("circle")) == 2  # what has no variance is named, not drawn
    assert "Without variance: one_step p=0." in page
    assert len(bias.findall("rect")) == 3 and len(clipped.findall("rect")) == 2 * 3 + 1
    assert "31.0\u202f%" in page and "–" in page


def test_a_page_without_any_variance_has_no_such_chart():
    assert len(figures(audit_html(result(("a",), (0.0,))))) == 2


def test_points_lie_where_logarithms_say():
    chart = log_log("t", "x", "y", [Group("g", ((1, 1.0, "a"), (10, 10.0, "b"), (100, 100.0, "c")))])
    dots = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in figures(chart)[0].findall("circle")]
    assert dots[1][0] == pytest.approx((dots[0][0] + dots[2][0]) / 2, abs=0.2)
    assert dots[1][1] == pytest.approx((dots[0][1] + dots[2][1]) / 2, abs=0.2) and dots[0][1] > dots[2][1]
    assert log_log("t", "x", "y", []) == "" and figures(log_log("t", "x", "y", [Group("g", ((2, 5.0, "one"),))]))


@pytest.mark.parametrize(
    "ends", [(1, 1000), (1, 30), (3, 9), (0.31, 0.95), (5.5, 5.9), (2, 2), (1e-7, 1e7), (119, 131)]
)
def test_logarithmic_axes_have_names_and_at_least_three_marks(ends):
    chart = log_log("t", "passes", "nats²", [Group("g", tuple((value, value, "p") for value in ends))])
    (figure,) = figures(chart)
    ticks = [text for text in figure.findall("text") if text.get("class") == "tick"]
    across = [text for text in ticks if text.get("text-anchor") == "middle"]
    assert len(across) >= 3 and len(ticks) - len(across) >= 3
    assert [text.text for text in figure.findall("text") if text.get("class") == "label"] == ["passes", "nats²"]
    assert len({text.text for text in across}) == len(across)


def test_bars_start_at_zero_on_either_side():
    up, down = figures(bars("t", [Bar("up", (2.0,), "2", 0.5), Bar("down", (-2.0,), "-2")]))[0].findall("rect")
    assert float(up.get("width")) == pytest.approx(float(down.get("width")), abs=0.2)
    assert float(down.get("x")) + float(down.get("width")) == pytest.approx(float(up.get("x")), abs=0.2)
    assert bars("t", []) == "" and figures(bars("t", [Bar("nothing", (0.0,), "0")]))
