"""The section of evaluate stages: pass@k and maj@k over k, and greedy accuracy over the number of denoising steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from d1jax.telemetry.report.line_chart import Chart, LineDrawing, Series, line_chart
from d1jax.telemetry.report.run_data import RunData, mapping
from d1jax.telemetry.report.wording import finite, stage_name

PANELS = (
    ("Pass@k", "pass", "samples of a row, k"),
    ("Maj@k", "maj", "samples of a row, k"),
    ("Greedy accuracy by denoising steps", "steps", "denoising steps"),
)
OVER_TEMPERATURE = (
    ("One sample right, over temperature", "avg", "share of rows"),
    ("Any of the samples right, over temperature", "pass", "share of rows"),
    ("Left-to-right decoding (local, k = 1), over temperature", "local_ar", "share of tokens"),
    ("Left-to-right decoding (global, k = 1), over temperature", "global_ar", "share of tokens"),
)


def sampled_charts(run: RunData) -> list[LineDrawing]:
    """A drawing for each measure, with a line for each evaluate stage; none where no stage has measured it."""
    found = {str(name): mapping(one) for name, one in mapping(run.summary.get("sampled")).items()}
    charts = [
        Chart(title, x_label, "share of rows", series, smooth=False, x_name=x_label)
        for title, key, x_label in PANELS
        if (series := tuple(one for name, stage in found.items() if (one := _series(name, stage.get(key)))))
    ]
    charts += [
        Chart(title, "temperature", y_label, series, smooth=False, x_name="temperature")
        for title, key, y_label in OVER_TEMPERATURE
        if (series := tuple(one for name, stage in found.items() if (one := _at_temperatures(name, stage, key))))
    ]
    return [drawing for chart in charts if (drawing := line_chart(chart))]


def sampled_rows(run: RunData) -> list[Mapping[str, Any]]:
    """[{"stage", "weights", "rows", "samples", "temperature", "avg", "low", "high", "tokens"}] of the evaluate stages, in their order."""
    rows = []
    for name, one in mapping(run.summary.get("sampled")).items():
        one = mapping(one)
        average = mapping(one.get("avg"))
        ends = average.get("ci95")
        low, high = ends if isinstance(ends, list) and len(ends) == 2 else (None, None)
        counts = {key: "–" if finite(one.get(key)) is None else f"{one[key]:,.0f}" for key in ("rows", "samples")}
        counts |= {key: finite(one.get(key)) for key in ("temperature", "tokens")}
        rows.append(
            {
                "stage": stage_name(str(name)),
                "weights": stage_name(str(one.get("weights"))),
                **counts,
                "avg": finite(average.get("value")),
                "low": finite(low),
                "high": finite(high),
            }
        )
    return rows


def _at_temperatures(name: str, stage: Mapping[str, Any], key: str) -> Series | None:
    """The curve of a stage over temperature: of its largest k for `pass`, else of the number under `key`."""
    points = []
    for temperature, one in mapping(stage.get("temperatures")).items():
        value = mapping(one).get(key)
        if key == "pass":
            value = list(mapping(value).values())[-1:]
            value = mapping(value[0]).get("value") if value else None
        elif key == "avg":
            value = mapping(value).get("value")
        try:
            x = finite(float(temperature))
        except ValueError:
            continue
        if x is not None and (y := finite(value)) is not None:
            points.append((x, y))
    return Series(stage_name(name), *map(tuple, zip(*sorted(points), strict=True))) if points else None


def _series(name: str, values: Any) -> Series | None:
    """The curve of a stage, its x being the keys; None where there is no point."""
    points = {
        float(x): y
        for x, one in mapping(values).items()
        if str(x).isdecimal() and (y := finite(mapping(one).get("value"))) is not None
    }
    ordered = sorted(points.items())
    return Series(stage_name(name), *map(tuple, zip(*ordered, strict=True))) if ordered else None
