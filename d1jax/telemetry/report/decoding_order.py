"""The figures of the report's section on the order of decoding, from what `evaluation/decoding_order.py` left behind.

Summaries of older or broken runs lack parts of it: whatever cannot be read is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from d1jax.telemetry.report.heat_map import HeatDrawing, HeatMap, heat_map, largest_share
from d1jax.telemetry.report.line_chart import Chart, LineDrawing, Series, line_chart
from d1jax.telemetry.report.run_data import RunData, mapping
from d1jax.telemetry.report.wording import finite, set_name, stage_name

Order = Mapping[str, Any]


def heat_maps(run: RunData) -> list[HeatDrawing]:
    """When each position was committed: a map for each stage, on a scale that they share, so that shades compare."""
    maps = {name: order["heat_map"] for name, order in _orders(run).items() if _readable(order.get("heat_map"))}
    peak = max((largest_share(one["share"]) for one in maps.values()), default=0.0)
    drawings = [_heat_map(name, one["share"], one["steps"], one["columns"], peak) for name, one in maps.items()]
    return [drawing for drawing in drawings if drawing]


def order_curves(run: RunData) -> list[LineDrawing]:
    """How much went from left to right, and what the model held likely before the first step: a line for each stage."""
    found = _orders(run)
    ar = {"x_label": "k", "y_label": "share of tokens", "x_name": "k", "y_range": (0.0, 1.02), "smooth": False}
    # One position on: people count columns from one, as the player does.
    first = {"x_label": "completion position", "x_name": "position", "smooth": False}
    charts = (
        Chart("Local autoregressiveness @k", series=_series(found, _by_k("local_ar")), **ar),
        Chart("Global autoregressiveness @k", series=_series(found, _by_k("global_ar")), **ar),
        Chart("Entropy, all masked", y_label="nats", series=_series(found, _by_position("entropy")), **first),
        Chart("Confidence, all masked", y_label="top probability", series=_series(found, _by_position("confidence")),
              y_range=(0.0, 1.02), **first),
    )  # fmt: skip
    return [drawing for chart in charts if (drawing := line_chart(chart))]


def _orders(run: RunData) -> dict[str, Order]:
    """{name of the stage: its decoding order on the primary set}; of a stage on plain text {stage and text: that of its continuation}."""
    texts = {
        f"{stage_name(str(name))}, {set_name(str(which))}": mapping(mapping(value).get("order"))
        for name, record in mapping(run.summary.get("texts")).items()
        for which, value in mapping(mapping(mapping(record).get("after")).get("sets")).items()
        if mapping(value).get("order")
    }
    return texts | {
        stage_name(str(entry["name"])): mapping(
            mapping(mapping(entry.get("sets")).get(run.primary_set)).get("decoding_order")
        )
        for entry in run.evaluated
    }


def _by_k(key: str) -> Callable[[Order], dict[int, float | None]]:
    """order -> {k: value} of a curve whose keys JSON has made text."""
    return lambda order: {int(k): finite(v) for k, v in mapping(order.get(key)).items() if str(k).isdecimal()}


def _by_position(key: str) -> Callable[[Order], dict[int, float | None]]:
    """order -> {position: value} of a list over the completion columns."""

    def points(order: Order) -> dict[int, float | None]:
        values = mapping(order.get("first_step")).get(key)
        return {at: finite(v) for at, v in enumerate(values, start=1)} if isinstance(values, list) else {}

    return points


def _series(found: Mapping[str, Order], points_of: Callable[[Order], dict[int, float | None]]) -> tuple[Series, ...]:
    lines = []
    for name, order in found.items():
        points = {at: value for at, value in sorted(points_of(order).items()) if value is not None}
        if points:
            lines.append(Series(name, tuple(map(float, points)), tuple(points.values())))
    return tuple(lines)


def _readable(value: Any) -> bool:
    """Whether this is a heat map: a table of numbers with its extents."""
    value = mapping(value)
    share, extents = value.get("share"), (value.get("steps"), value.get("columns"))
    if not isinstance(share, list) or not all(isinstance(row, list) for row in share):
        return False
    if len({len(row) for row in share}) != 1 or not all(isinstance(n, int) for n in extents):
        return False
    numbers = all(finite(one) is not None for row in share for one in row)
    return numbers and 0 < len(share) <= extents[0] and 0 < len(share[0]) <= extents[1]


def _heat_map(stage: str, share: list[list[float]], steps: int, columns: int, peak: float) -> HeatDrawing | None:
    tall = -(-steps // len(share))
    first, last = (max(range(len(share)), key=lambda row: share[row][column]) * tall + 1 for column in (0, -1))
    spoken = f"The first position was most often committed near step {first}, the last one near step {last}."
    title = f"Order of decoding, {stage}"
    return heat_map(HeatMap(title, "completion position", "denoising step", share, columns, steps, peak, spoken))
