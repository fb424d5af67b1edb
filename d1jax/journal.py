"""What a stage leaves behind while it runs: metrics, progress, checkpoints; and where it goes on after a stop.

journal = Journal(run, metrics, stop, "rl", steps, config)
items, first = journal.resume({"trainable": ..., "optimizer": ...})
for step in range(first, steps):
    ...
    journal.record(step + 1, values, watch=("reward",))
    journal.keep(step + 1, {"trainable": ..., "optimizer": ...})
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from d1jax.config import Config
from d1jax.runtime.checkpoint import Checkpoints
from d1jax.runtime.run_directory import RunDirectory
from d1jax.runtime.stopping import Diverged, StopRequest
from d1jax.telemetry.metrics import MetricsLog
from d1jax.telemetry.progress import Progress


class Journal:
    def __init__(
        self, run: RunDirectory, metrics: MetricsLog, stop: StopRequest, stage: str, steps: int, config: Config
    ) -> None:
        self.stage, self.steps = stage, steps
        self._config, self._metrics, self._stop = config, metrics, stop
        self._checkpoints = Checkpoints(run.checkpoints(stage), owner=True)
        self._progress: Progress | None = None
        self._began = time.perf_counter()

    def note(self, line: str) -> None:
        """A line for the log of a stage that has yet to begin."""
        print(f"{self.stage}: {line}", file=sys.stderr)

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
        """Writes the metrics of a step. Raises Diverged when too many updates in a row were skipped.

        time/step_s is all that has passed since the step before: compilation, evaluation and saving too.
        """
        now = time.perf_counter()
        values, self._began = {**values, "time/step_s": now - self._began}, now
        self._metrics.write(self.stage, step, values)
        self._progress.update({name: values[name] for name in watch if name in values})
        in_a_row = int(values["nonfinite/in_a_row"])
        if in_a_row >= self._config.max_bad_updates:
            good = self._checkpoints.latest()
            advice = f"start a new run_dir with a lower {self.stage}.optimizer.learning_rate"
            raise Diverged(
                f"{self.stage} step {step}: the last {in_a_row} updates were NaN or infinite and were skipped; "
                + (f"the last good checkpoint is step {good}; {advice} and init_from this one" if good else advice)
            )

    def keep(self, step: int, items: dict[str, Any]) -> None:
        """Saves a checkpoint when one is due or a signal has come; then, after a signal, raises Stopped."""
        asked = self._stop.signum is not None
        if asked or step % self._config.checkpoint_every == 0 or step == self.steps:
            self._checkpoints.save(step, items)
        self._stop.check(f"{self.stage} step {step}")

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.__exit__(kind, value, trace)
        self._checkpoints.close()
