"""The section of reward models: what each is worth on texts that were held out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from d1jax.telemetry.report.run_data import RunData, mapping
from d1jax.telemetry.report.wording import finite, stage_name


def reward_model_rows(run: RunData) -> list[Mapping[str, Any]]:
    """[{"stage", "held_out", "accuracy", "low", "high", "ranked", "margin", "calibration"}] of the reward models, in their order.

    A model of pairs has no `ranked`: its accuracy is that already. A model of lines has a row for them, and one for each kind of pairs of
    whole texts. A number that is missing or damaged is None.
    """
    rows = []
    for name, one in mapping(run.summary.get("reward_models")).items():
        one = mapping(one)
        unit = "lines" if "steps" in one else "pairs"
        rows.append(_row(str(name), one, one.get("steps" if unit == "lines" else "pairs"), unit))
        for which, texts in mapping(one.get("texts")).items():
            texts = mapping(texts)
            rows.append(_row(str(name), texts, texts.get("pairs"), f"pairs of texts, {which}"))
    return rows


def _row(name: str, one: Mapping[str, Any], count: Any, unit: str) -> Mapping[str, Any]:
    held_out = finite(count)
    ends = one.get("ci95")
    low, high = ends if isinstance(ends, list) and len(ends) == 2 else (None, None)
    return {
        "stage": stage_name(name),
        "held_out": "–" if held_out is None else f"{held_out:,.0f} {unit}",
        "low": finite(low),
        "high": finite(high),
        "calibration": finite(one.get("calibration_error")),
        **{key: finite(one.get(key)) for key in ("accuracy", "ranked", "margin")},
    }
