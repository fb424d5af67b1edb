"""Where metrics are mirrored to, if asked: TensorBoard, Weights & Biases, trackio. Nothing depends on them, and none ends a run.

The names are those of metrics.jsonl with the stage before them, `rl/reward` at step `rl/step`. Weights & Biases works offline with
WANDB_MODE=offline; trackio keeps its data on this machine unless it is told otherwise.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from d1jax.config import UserError
from d1jax.telemetry.terminal import printable

LIBRARIES = {"tensorboard": ("tensorboardX", "torch"), "wandb": ("wandb",), "trackio": ("trackio",)}
PROJECT = "d1jax"


class Tracker(Protocol):
    """Takes the metrics of one step at a time."""

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        module = "tensorboardX" if importlib.util.find_spec("tensorboardX") else "torch.utils.tensorboard"
        self._writer = importlib.import_module(module).SummaryWriter(str(run_dir / "tensorboard"))

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(f"{stage}/{key}", value, step)

    def close(self) -> None:
        self._writer.close()


class WandbLike:
    """Weights & Biases, or trackio, which has the same calls. A continued run goes on under its name."""

    def __init__(self, run_dir: Path, config: Mapping[str, Any], library: str) -> None:
        self._library = importlib.import_module(library)
        name = run_dir.resolve().name
        settings: dict[str, Any] = {"project": PROJECT, "name": name, "config": dict(config), "resume": "allow"}
        if library == "wandb":
            settings |= {"dir": str(run_dir), "id": name}
        self._library.init(**settings)

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        self._library.log({f"{stage}/step": step, **{f"{stage}/{key}": value for key, value in values.items()}})

    def close(self) -> None:
        self._library.finish()


class Trackers:
    """Several trackers; one that fails is named once and left out from then on."""

    def __init__(self, names: Sequence[str], run_dir: Path, config: Mapping[str, Any]) -> None:
        self._open: dict[str, Tracker] = {}
        for name in names:
            self._guarded(name, "start", lambda name=name: self._open.__setitem__(name, _made(name, run_dir, config)))

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        for name, tracker in list(self._open.items()):
            self._guarded(name, "log", lambda tracker=tracker: tracker.log(stage, step, values))

    def close(self) -> None:
        for name, tracker in list(self._open.items()):
            self._guarded(name, "close", tracker.close)
        self._open = {}

    def _guarded(self, name: str, what: str, call: Any) -> None:
        try:
            call()
        except Exception as error:  # of a library, a server, a network: the record is metrics.jsonl
            self._open.pop(name, None)
            print(
                printable(
                    f"note: {name} could not {what} ({type(error).__name__}: {error}); the run goes on without it"
                ),
                file=sys.stderr,
            )


def _made(name: str, run_dir: Path, config: Mapping[str, Any]) -> Tracker:
    return TensorBoard(run_dir, config) if name == "tensorboard" else WandbLike(run_dir, config, name)


def check_trackers(names: Sequence[str]) -> None:
    """Raises UserError for a tracker whose library is not installed, before anything is built."""
    for name in names:
        if not any(importlib.util.find_spec(library) for library in LIBRARIES[name]):
            raise UserError(
                f"config: track names {name}, and {LIBRARIES[name][0]} is not installed; pip install 'd1jax[{name}]'"
            )
