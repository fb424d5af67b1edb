"""Where the time of a run went: seconds of each phase of each stage, and what of the wall time no phase explains."""

from __future__ import annotations

import re
from dataclasses import dataclass

from d1jax.telemetry.report.run_data import RunData, mapping
from d1jax.telemetry.report.wording import finite


@dataclass(frozen=True)
class Phase:
    """One row of the table. `mean` is of a step, None where that says nothing."""

    stage: str
    name: str
    seconds: float
    mean: float | None
    share: float  # of its stage


def wall_seconds(run: RunData) -> dict[str, float]:
    """{stage: seconds}, in the order of training; empty where none were recorded."""
    told = mapping(run.summary.get("wall_seconds"))
    order = dict.fromkeys((*(stage.name for stage in run.stages), *map(str, told)))
    return {name: seconds for name in order if (seconds := finite(told.get(name)))}


def phases(run: RunData) -> list[Phase]:
    """The rows of all stages, in the order of training."""
    wall = wall_seconds(run)
    names = dict.fromkeys((*(stage.name for stage in run.stages), *wall))
    return [row for name in names for row in _phases(run, name, wall.get(name))]


def _phases(run: RunData, stage: str, wall: float | None) -> list[Phase]:
    found: dict[str, list[float]] = {}
    for row in run.metrics_of(stage):
        for key, value in row.items():
            match = re.fullmatch(r"time/(.+)_s", key)
            if match and match[1] != "step" and finite(value) is not None:  # a step is all of its phases
                found.setdefault(match[1], []).append(float(value))
    measured = sum(sum(values) for values in found.values())
    total = wall or measured
    rows = [
        Phase(
            stage, name.replace("_", " "), sum(values), sum(values) / len(values), sum(values) / total if total else 0.0
        )
        for name, values in found.items()
    ]
    if wall and wall - measured > 0.005 * wall:
        rest = "everything else" if found else "whole stage"
        rows.append(Phase(stage, rest, wall - measured, None, 1 - measured / wall))
    return rows
