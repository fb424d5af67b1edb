"""The figures of the report's section on the order of decoding, from what `analysis.autoregressiveness.summary` left behind.

Summaries of older or broken runs lack parts of it: whatever cannot be read is left out.
"""

from collections.abc import Mapping
from typing import Any

from d1jax.telemetry.charts import Chart, Series, line_chart
from d1jax.telemetry.heat_map import HeatMap, heat_map, largest_share
from d1jax.telemetry.markup import finite
from d1jax.telemetry.run_data import primary_set, stage_name, stages


def figures_of(summary: Mapping[str, Any]) -> str:
    """A heat map of each stage, then curves with a line a stage, on the primary set; "" where no stage has any of it."""
    found = {stage_name(str(stage["name"])): _order_of(stage, primary_set(summary)) for stage in stages(summary)}
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
    return _heat_maps(found) + "".join(line_chart(chart) for chart in charts)


def _order_of(stage: Mapping[str, Any], set_key: str) -> Mapping[str, Any]:
    return _mapping(_mapping(_mapping(stage.get("sets")).get(set_key)).get("decoding_order"))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _by_k(key: str):
    """order -> {k: value} of a curve whose keys JSON has made text."""
    return lambda order: {int(k): finite(v) for k, v in _mapping(order.get(key)).items() if str(k).isdecimal()}


def _by_position(key: str):
    """order -> {position: value} of a list over the completion columns."""

    def points(order: Mapping[str, Any]) -> dict[int, float | None]:
        values = _mapping(order.get("first_step")).get(key)
        return {at: finite(v) for at, v in enumerate(values, start=1)} if isinstance(values, list) else {}

    return points


def _series(found: Mapping[str, Mapping[str, Any]], points_of) -> tuple[Series, ...]:
    lines = []
    for name, order in found.items():
        points = {at: value for at, value in sorted(points_of(order).items()) if value is not None}
        if points:
            lines.append(Series(name, tuple(map(float, points)), tuple(points.values())))
    return tuple(lines)


def _readable(value: Any) -> bool:
    """Whether this is a heat map: a table of numbers with its extents."""
    value = _mapping(value)
    share, extents = value.get("share"), (value.get("steps"), value.get("columns"))
    if not isinstance(share, list) or not all(isinstance(row, list) for row in share):
        return False
    if len({len(row) for row in share}) != 1 or not all(isinstance(n, int) for n in extents):
        return False
    numbers = all(finite(one) is not None for row in share for one in row)
    return numbers and 0 < len(share) <= extents[0] and 0 < len(share[0]) <= extents[1]


def _heat_maps(found: Mapping[str, Mapping[str, Any]]) -> str:
    """One a stage, on a scale that they share, so that shades compare."""
    maps = {name: order["heat_map"] for name, order in found.items() if _readable(order.get("heat_map"))}
    peak = max((largest_share(one["share"]) for one in maps.values()), default=0.0)
    return "".join(_heat_map(name, one["share"], one["steps"], one["columns"], peak) for name, one in maps.items())


def _heat_map(stage: str, share: list[list[float]], steps: int, columns: int, peak: float) -> str:
    tall = -(-steps // len(share))
    first, last = (max(range(len(share)), key=lambda row: share[row][column]) * tall + 1 for column in (0, -1))
    spoken = f"The first position was most often committed near step {first}, the last one near step {last}."
    title = f"Order of decoding, {stage}"
    return heat_map(HeatMap(title, "completion position", "denoising step", share, columns, steps, peak, spoken))
