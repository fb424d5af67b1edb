"""The section of plain text: bits per byte before and after each stage that learnt from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from d1jax.telemetry.report.run_data import RunData, mapping
from d1jax.telemetry.report.wording import finite, set_name, stage_name


def text_rows(run: RunData) -> list[Mapping[str, Any]]:
    """[{"stage", "when", "set", "by", "bits", "error", "windows", "samples"}], before and after each stage in turn.

    A number that is missing or damaged is None; counts are text.
    """
    return [
        {
            "stage": stage_name(str(name)),
            "when": when,
            "set": set_name(str(which)),
            "by": str(mapping(mapping(record).get(when)).get("by", "")),
            "bits": finite(mapping(value).get("bits_per_byte")),
            "error": finite(mapping(value).get("error")),
            **{key: _count(mapping(value).get(key)) for key in ("windows", "samples")},
        }
        for name, record in mapping(run.summary.get("texts")).items()
        for when in ("before", "after")
        for which, value in mapping(mapping(mapping(record).get(when)).get("sets")).items()
    ]


def _count(value: Any) -> str:
    number = finite(value)
    return "–" if number is None else f"{number:,.0f}"
