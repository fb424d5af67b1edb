"""The report of a run: one self-contained HTML file, written from whatever the run directory holds.

The page is a pure function of the directory (report.html.jinja has its order), asks the network for nothing (its
Content-Security-Policy forbids it), and opens from disk.
"""

from __future__ import annotations

import os
from pathlib import Path

from d1jax.files import atomic_write
from d1jax.telemetry.report.curves import curves
from d1jax.telemetry.report.decoding_order import heat_maps, order_curves
from d1jax.telemetry.report.rendering import render
from d1jax.telemetry.report.results import primary_stages, results, selections, verdict
from d1jax.telemetry.report.reward_models import reward_model_rows
from d1jax.telemetry.report.run_data import RunData, by_sample, mapping, read_run
from d1jax.telemetry.report.sampled import sampled_charts, sampled_rows
from d1jax.telemetry.report.samples import card
from d1jax.telemetry.report.texts import text_rows
from d1jax.telemetry.report.timing import phases, wall_seconds
from d1jax.telemetry.report.viewer import trajectories

SAMPLES_SHOWN, SAMPLES_FOLDED, SAMPLES_PLAYED = 8, 24, 32


def write_report(run_dir: str | os.PathLike) -> Path:
    """Write `run_dir/report.html` (beside, then renamed) from the files that exist, and return its path."""
    run_dir = Path(run_dir)
    path = run_dir / "report.html"
    atomic_write(path, report_html(read_run(run_dir)))
    return path


def report_html(run: RunData) -> str:
    """The whole HTML document of a run that `read_run` has read."""
    samples = by_sample(run.samples)
    shown = samples[: SAMPLES_SHOWN + SAMPLES_FOLDED]
    return render(
        "report.html.jinja",
        run=run,
        verdict=verdict(run),
        stages=[score.owner for score in primary_stages(run)],
        decoding=mapping(run.summary.get("decoding")),
        results=results(run),
        selections=selections(run),
        sampled_charts=sampled_charts(run),
        sampled_rows=sampled_rows(run),
        reward_models=reward_model_rows(run),
        texts=text_rows(run),
        curves=curves(run),
        cards=[card(group) for group in shown],
        unfolded=SAMPLES_SHOWN,
        left_out=len(samples) - len(shown),
        grids=all(group[0].get("columns") for group in samples),
        trajectories=trajectories(run.samples[:SAMPLES_PLAYED]),
        heat_maps=heat_maps(run),
        order_curves=order_curves(run),
        phases=phases(run),
        wall_seconds=wall_seconds(run),
        environment=mapping(run.summary.get("environment")),
    )
