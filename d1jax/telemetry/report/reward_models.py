"""The section of reward models: what each is worth on texts that were held out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from d1jax.telemetry.report.run_data import RunData, mapping
from d1jax.telemetry.report.wording import finite, stage_name


def reward_model_rows(run: RunData) -> list[Mapping[str, Any]]:
    """[{"stage", "held_out", "accuracy", "low", "high", "ranked", "margin", "calibration"}] of the reward models, in their order.

    A model of pairs has no `ranked`: its accuracy is that already. A number that is missing or damaged is None.
    """
    rows = []
    for name, one in mapping(run.summary.get("reward_models")).items():
        one = mapping(one)
        unit = "lines" if "steps" in one else "pairs"
        count = finite(one.get("steps" if unit == "lines" else "pairs"))
        ends = one.get("ci95")
        low, high = ends if isinstance(ends, list) and len(ends) == 2 else (None, None)
        rows.append(
            {
                "stage": stage_name(str(name)),
                "held_out": "–" if count is None else f"{count:,.0f} {unit}",
                "low": finite(low),
                "high": finite(high),
                "calibration": finite(one.get("calibration_error")),
                **{key: finite(one.get(key)) for key in ("accuracy", "ranked", "margin")},
            }
        )
    return rows
