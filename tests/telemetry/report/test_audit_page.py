"""The page of an audit: everything is escaped, nothing is fetched, and its charts hold what the numbers say."""

import re
from xml.etree import ElementTree

from d1jax.telemetry.report.audit_page import audit_html

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
    assert "<script" not in page and "alert(&#34;1&#34;)" in page and "http://" not in page and "https://" not in page
    assert "default-src &#x27;none&#x27;" in page or "default-src 'none'" in page
    variance, bias, clipped = figures(page)
    assert len(variance.findall("circle")) == 2  # what has no variance is named, not drawn
    assert "Without variance: one_step p=0." in page
    assert len(bias.findall("rect")) == 3 and len(clipped.findall("rect")) == 2 * 3 + 1
    assert "31.0\u202f%" in page and "–" in page


def test_a_page_without_any_variance_has_no_such_chart():
    assert len(figures(audit_html(result(("a",), (0.0,))))) == 2
