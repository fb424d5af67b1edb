"""The data of the denoising player, which shows step by step how a completion came out of its masks (viewer.jinja, viewer.js).

The address may name the state to open with: `#sample=2&step=3`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from d1jax.telemetry.report.run_data import mapping
from d1jax.telemetry.report.samples import columns_of
from d1jax.telemetry.report.wording import set_name, stage_name


def trajectories(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the player needs of these lines of `samples.jsonl`; lines without `pieces` and `reveal_step` are left out."""
    return [found for found in map(trajectory, samples) if found is not None]


def trajectory(sample: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the player needs of one sample, or None when the sample holds no usable trajectory.

    `steps` is the number of denoising steps that committed something: max(reveal_step) + 1.
    """
    pieces, reveal = sample.get("pieces"), sample.get("reveal_step")
    if not isinstance(pieces, list) or not isinstance(reveal, list) or len(pieces) != len(reveal) or not pieces:
        return None
    if not all(isinstance(step, int) for step in reveal):
        return None
    confidence = sample.get("confidence")
    if not isinstance(confidence, list) or len(confidence) != len(pieces):
        confidence = [None] * len(pieces)
    return {
        "stage": stage_name(str(sample.get("stage", ""))),
        "set": set_name(str(sample.get("set", ""))),
        "index": sample.get("index") if isinstance(sample.get("index"), int) else None,
        "prompt": str(sample.get("prompt", "")),
        "pieces": [str(piece) for piece in pieces],
        "reveal": reveal,
        "confidence": [_unit(value) for value in confidence],
        "columns": columns_of(sample),
        "solved": _unit(mapping(sample.get("grade")).get("solved")),
        "steps": max(0, max(reveal)) + 1,
    }


def _unit(value: Any) -> float | None:
    """A number in [0, 1] to four digits, or None (JSON has no NaN)."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return round(min(1.0, max(0.0, float(value))), 4)
