"""The page of an audit: one self-contained HTML file from the result of `python -m d1jax.audit`. It fetches nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from d1jax.telemetry.report.audit_charts import Bar, BarDrawing, Group, PointDrawing, bars, log_log
from d1jax.telemetry.report.rendering import render
from d1jax.telemetry.report.wording import percent

Row = Mapping[str, Any]  # the numbers of one estimator


def audit_html(result: Mapping[str, Any]) -> str:
    """The whole HTML document of an audit's result, as `d1jax.audit.run` returns it."""
    rows = result["estimators"]
    return render(
        "audit.html.jinja",
        **{name: result[name] for name in ("setting", "truth", "findings", "environment")},
        estimators=rows,
        silent=[row["name"] for row in rows if not row["variance"] > 0],
        with_gradients=any("gradient_noise" in row for row in rows),
        variance=_variance(rows),
        bias=_bias(rows),
        clipped=_clipped(rows),
    )


def _family(name: str) -> str:
    """`coupled exact K=2 + full` -> `coupled exact + full`: what a line of the chart joins."""
    return " ".join(part for part in name.split() if not part.startswith("K="))


def _variance(rows: Sequence[Row]) -> PointDrawing | None:
    families: dict[str, list[tuple[float, float, str]]] = {}
    for row in rows:
        if row["variance"] > 0:
            families.setdefault(_family(row["name"]), []).append((row["passes"], row["variance"], row["name"]))
    groups = [Group(name, tuple(points)) for name, points in families.items()]
    x_label, y_label = "forward passes of a score (log scale)", "variance, nats² (log scale)"
    return log_log("Variance of the score", x_label, y_label, groups)


def _bias(rows: Sequence[Row]) -> BarDrawing | None:
    shown = [(row["name"], row["bias"], row["bias_error"]) for row in rows]
    return bars("Bias", [Bar(name, (bias,), f"{bias:+.2f} ± {error:.2f}", error) for name, bias, error in shown])


def _clipped(rows: Sequence[Row]) -> BarDrawing | None:
    shares = [(row["name"], row["unshared"]["outside_0.2"], row["unshared"]["outside_0.5"]) for row in rows]
    shown = [Bar(name, (near, far), f"{percent(near)}, {percent(far)}") for name, near, far in shares]
    most = max((row["shared"]["outside_0.2"] for row in rows), default=0.0)
    shown.append(Bar("any, shared masks", (most,), percent(most)))
    return bars("Tokens outside the clip range", shown, ("outside 1 ± 0.2", "outside 1 ± 0.5"))
