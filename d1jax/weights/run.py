"""The directory of one run: its paths, and what a reader asks of it. `weights/source.py` opens it like a checkpoint.

config.yaml  data.json  init_from.json  adapter.json  source/  metrics.jsonl  checkpoints/<stage>/<step>/
evaluations/<stage>.json  evaluations/<stage>.reward_model.json  evaluations/<stage>.sampled.json  .sampled.jsonl
exports/<stage>/  generated/<stage>.jsonl  generated/<stage>.json  samples.jsonl
profiles/<stage>/  redone/<n>/  summary.json  report.html  collapsed/<stage>/<step>/  damaged/<stage>/<step>/
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d1jax.config import Config, UserError
from d1jax.config.stored import from_yaml
from d1jax.files import distinct


@dataclass(frozen=True)
class RunDirectory:
    path: Path

    @property
    def begun(self) -> bool:
        """Whether anything that was learnt, sampled, measured or exported is saved: it belongs to the configuration that made it."""
        left = ("checkpoints/*/[0-9]*", "generated/*.jsonl", "evaluations/*.sampled.json", "exports/*.json")
        return any(path for pattern in left for path in self.path.glob(pattern))

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def source(self) -> Path:
        """What is not weights: tokenizer, config.json, remote code. Exporting copies it."""
        return self.path / "source"

    @property
    def origin(self) -> Path:
        return self.path / "init_from.json"

    @property
    def adapter(self) -> Path:
        """Says of a LoRA run that its stages share one adapter."""
        return self.path / "adapter.json"

    @property
    def data(self) -> Path:
        """Which rows the run began with."""
        return self.path / "data.json"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    def profile(self, stage: str) -> Path:
        """What JAX's profiler has recorded of a stage."""
        return self.path / "profiles" / stage

    def streams(self, stage: str) -> Path:
        """Where a stage that reads a stream had come to in it, by step."""
        return self.path / "streams" / stage

    def text_measured(self, stage: str) -> Path:
        """Bits per byte of held-out text before and after a stage that learns from text."""
        return self.path / "evaluations" / f"{stage}.text.json"

    def checkpoints(self, stage: str) -> Path:
        return self.path / "checkpoints" / stage

    def collapsed(self, stage: str) -> Path:
        """Checkpoints of a policy that had collapsed; nothing reads them."""
        return self.path / "collapsed" / stage

    def damaged(self, stage: str) -> Path:
        """Checkpoints that were not what had been saved; nothing reads them."""
        return self.path / "damaged" / stage

    def kept(self, stage: str) -> Path:
        """The rows that a generate stage has kept."""
        return self.path / "generated" / f"{stage}.jsonl"

    def sampled(self, stage: str) -> Path:
        """The numbers of an evaluate stage; its samples are beside them in a .jsonl."""
        return self.path / "evaluations" / f"{stage}.sampled.json"

    def measured(self, stage: str) -> Path:
        """What a reward model is worth on held-out pairs."""
        return self.path / "evaluations" / f"{stage}.reward_model.json"

    def exported(self, stage: str) -> Path:
        """The checkpoint that an export stage writes where it names no directory."""
        return self.path / "exports" / stage

    def saved_steps(self, stages: Sequence[str]) -> dict[str, int]:
        """How far each stage that has begun is saved (0: not yet)."""
        begun = [stage for stage in stages if self.checkpoints(stage).is_dir()]
        names = {stage: [path.name for path in self.checkpoints(stage).iterdir()] for stage in begun}
        return {stage: max((int(n) for n in found if n.isdigit()), default=0) for stage, found in names.items()}

    def selected(self, stage: str) -> int | None:
        """The step that `evaluation.select` has chosen for a finished stage; None where the last one counts."""
        path = self.evaluation(stage)
        chosen = read_record(path).get("selected") if path.exists() else None
        step = chosen.get("step") if isinstance(chosen, dict) else None
        return step if isinstance(step, int) else None

    def evaluation(self, stage: str) -> Path:
        return self.path / "evaluations" / f"{stage}.json"

    def evaluation_samples(self, stage: str) -> Path:
        return self.path / "evaluations" / f"{stage}.samples.jsonl"


def read_record(path: Path) -> dict[str, Any]:
    """A JSON object that a run has left. Raises UserError that names the file where it is cut or changed."""
    return _parsed(path, lambda text: [text])[0]


def read_records(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file with one a line. Raises UserError that names the file where it is cut or changed."""
    return _parsed(path, lambda text: [line for line in text.split("\n") if line])


def _parsed(path: Path, parts: Callable[[str], list[str]]) -> list[dict[str, Any]]:
    try:
        values = [json.loads(part, object_pairs_hook=distinct) for part in parts(path.read_text(encoding="utf-8"))]
        if not all(isinstance(value, dict) for value in values):
            raise ValueError("it holds something else")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: not readable as JSON objects ({error}); move it away, and the same command makes it again"
        ) from None
    return values


def run_and_step(path: Path) -> tuple[Path, str | None, int | None]:
    """(run directory, stage, step) of RUN/checkpoints/STAGE/STEP; of a run, whose stage and step are open, (path, None, None)."""
    parts = Path(os.path.abspath(path)).parts  # not resolved: a name that no file can have would raise
    if not is_run(path) and len(parts) > 3 and parts[-3] == "checkpoints" and parts[-1].isdigit():
        return Path(*parts[:-3]), parts[-2], int(parts[-1])
    return path, None, None


def is_run(path: Path) -> bool:
    return os.path.isfile(RunDirectory(path).config)  # False also for a name that no file can have


def run_above(path: Path) -> Path | None:
    """The run that a path is, or lies in as RUN/checkpoints/STAGE/STEP; None where it is neither."""
    return next((parent for parent in (path, *path.absolute().parents[:3]) if is_run(parent)), None)


def open_run(path: str | Path) -> tuple[RunDirectory, Config]:
    """An existing run and its resolved configuration. Raises UserError where there is none."""
    run = RunDirectory(Path(path))
    if not is_run(run.path):
        raise UserError(f"{str(path)!r} is no run directory: it has no config.yaml")
    return run, from_yaml(run.config)
