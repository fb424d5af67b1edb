"""What a stage leaves behind while it runs: metrics, progress, checkpoints; and where it goes on after a stop.

journal = Journal(run, metrics, stop, "rl", steps, config)
items, first = journal.resume({"trainable": ..., "optimizer": ...})
for step in range(first, steps):
    ...
    journal.record(step + 1, values, watch=("reward",))
    journal.keep(step + 1, {"trainable": ..., "optimizer": ...})
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from d1jax.config import Config
from d1jax.runtime.checkpoint import Checkpoints
from d1jax.runtime.run_directory import RunDirectory
from d1jax.runtime.stopping import Diverged, Stopped, StopRequest
from d1jax.telemetry.metrics import MetricsLog
from d1jax.telemetry.progress import Progress


def kept_steps(run: RunDirectory, stages: Sequence[str]) -> dict[str, int]:
    """How far each stage that has begun is saved; metrics of later steps will be written again."""
    kept = {}
    for stage in stages:
        if run.checkpoints(stage).is_dir():
            checkpoints = Checkpoints(run.checkpoints(stage))
            kept[stage] = checkpoints.latest() or 0
            checkpoints.close()
    return kept


class Journal:
    def __init__(
        self, run: RunDirectory, metrics: MetricsLog, stop: StopRequest, stage: str, steps: int, config: Config
    ) -> None:
        self.stage, self.steps = stage, steps
        self._config, self._metrics, self._stop = config, metrics, stop
        self._checkpoints = Checkpoints(run.checkpoints(stage))
        self._progress: Progress | None = None

    def resume(self, items: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """(items, first step to do): as given, or as the last checkpoint has them."""
        saved = self._checkpoints.latest()
        if saved is not None:
            items = self._checkpoints.load(saved, items)
        first = saved or 0
        if first < self.steps:
            self._progress = Progress(self.stage, self.steps, initial=first)
            self._progress.__enter__()
            if first:
                self._progress.note(f"{self.stage}: continuing after step {first}")
        return items, first

    def record(self, step: int, values: Mapping[str, float], watch: Sequence[str]) -> None:
        """Writes the metrics of a step. Raises Diverged when too many updates in a row were skipped."""
        self._metrics.write(self.stage, step, values)
        self._progress.update({name: values[name] for name in watch if name in values})
        in_a_row = int(values["nonfinite/in_a_row"])
        if in_a_row >= self._config.max_bad_updates:
            raise Diverged(
                f"{self.stage} step {step}: the last {in_a_row} updates were NaN or infinite and were skipped; the last good "
                f"checkpoint is step {self._checkpoints.latest() or 'none'}. Lower {self.stage}.optimizer.learning_rate"
            )

    def keep(self, step: int, items: dict[str, Any]) -> None:
        """Saves a checkpoint when one is due or a signal has come; then, after a signal, raises Stopped."""
        asked = self._stop.signum
        if asked is not None or step % self._config.checkpoint_every == 0 or step == self.steps:
            self._checkpoints.save(step, items)
        if asked is not None and step < self.steps:
            raise Stopped(
                asked, f"{self.stage}: stopped after step {step}, everything saved; the same command continues"
            )

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.__exit__(kind, value, trace)
        self._checkpoints.close()
