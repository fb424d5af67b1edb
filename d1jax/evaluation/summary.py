"""summary.json: the before/after table of a run for programs, made from the evaluations that the stages left."""

from __future__ import annotations

import platform
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from d1jax.config import Config
from d1jax.config.stage import KINDS
from d1jax.config.version import __version__
from d1jax.evaluation.grade import baseline_scores
from d1jax.files import is_writer, write_json, write_jsonl
from d1jax.models import processes
from d1jax.telemetry.metrics import read_metrics
from d1jax.training.context import Context
from d1jax.weights.run import RunDirectory, read_record, read_records


def write(context: Context, run: RunDirectory) -> dict[str, Any]:
    """Writes summary.json and samples.jsonl from the evaluations there are; returns the summary."""
    config = context.config
    left = processes.agreed(lambda: _left(config, run))
    summary = {
        "task": context.task.name if config.answers_task else None,
        "run": run.path.name,
        "primary_set": next(iter(context.eval_sets)),
        "decoding": {
            "steps": config.sampler.steps,
            "completion_length": config.sampler.completion_length,
            "block_length": config.sampler.block_length,
            "temperature": config.evaluation.temperature,
        }
        if config.answers_task
        else {},
        "stages": [stage_entry(stage, found) for stage, found in left["stages"].items()],
        "sampled": left["sampled"],
        "reward_models": left["reward_models"],
        "texts": left["texts"],
        "baselines": {name: baseline_scores(context, problems) for name, problems in context.eval_sets.items()}
        if config.answers_task
        else {},
        "wall_seconds": _wall_seconds(run),
        "environment": environment(),
    }
    if is_writer():
        found = [sample for stage in left["stages"] for sample in read_records(run.evaluation_samples(stage))]
        order = list(context.eval_sets)
        samples = sorted(found, key=lambda sample: (order.index(sample["set"]), sample["index"]))  # stages side by side
        write_jsonl(run.samples, samples)
        write_json(run.summary, summary)
    return summary


def _left(config: Config, run: RunDirectory) -> dict[str, dict[str, Any]]:
    """{"stages", "sampled", "reward_models", "texts": {stage: the record that it has left}}."""

    def records(path_of: Callable[[str], Path], *kinds: str) -> dict[str, Any]:
        names = [stage.name for stage in config.stages if stage.kind in kinds]
        return {name: read_record(path) for name in names if (path := path_of(name)).exists()}

    return {
        "stages": records(run.evaluation, *KINDS),
        "sampled": records(run.sampled, "evaluate"),
        "reward_models": records(run.measured, "reward_model"),
        "texts": records(run.text_measured, "adapt"),
    }


def stage_entry(stage: str, evaluation: dict[str, Any]) -> dict[str, Any]:
    """{"name", "step", "selected" where a checkpoint was chosen, the headline set's scores, "sets": every set's scores, with the order
    of their decoding}."""
    sets = evaluation["sets"]
    headline = {key: value for key, value in next(iter(sets.values())).items() if key != "decoding_order"}
    chosen = {"selected": evaluation["selected"]} if "selected" in evaluation else {}
    return {"name": stage, "step": evaluation["step"], **chosen, **headline, "sets": sets}


def environment() -> dict[str, str]:
    devices = jax.devices()
    return {
        "d1jax": __version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "platform": platform.platform(),
    }


def _wall_seconds(run: RunDirectory) -> dict[str, float]:
    seconds: dict[str, float] = defaultdict(float)
    for line in read_metrics(run.path / "metrics.jsonl"):
        seconds[line["stage"]] += line.get("time/step_s", 0.0)
    return {stage: round(total, 1) for stage, total in seconds.items()}
