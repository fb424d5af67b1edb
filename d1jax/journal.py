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
from typing import Any, NoReturn

from d1jax.config import Config
from d1jax.runtime.checkpoint import Checkpoints
from d1jax.runtime.run_directory import RunDirectory
from d1jax.runtime.stopping import Diverged, StopRequest
from d1jax.telemetry.metrics import MetricsLog, read_metrics
from d1jax.telemetry.progress import Progress

RECENT = 100  # steps that a guard may look back


class Journal:
    def __init__(
        self, run: RunDirectory, metrics: MetricsLog, stop: StopRequest, stage: str, steps: int, config: Config
    ) -> None:
        self.stage, self.steps = stage, steps
        self._config, self._metrics, self._stop = config, metrics, stop
        self._checkpoints, self._collapsed = Checkpoints(run.checkpoints(stage), owner=True), run.collapsed(stage)
        self._progress: Progress | None = None
        self._began = time.perf_counter()
        self.recent: list[Mapping[str, float]] = []  # metrics of the last steps, those before a stop included

    def note(self, line: str) -> None:
        """A line for the log."""
        if self._progress is None:
            print(f"{self.stage}: {line}", file=sys.stderr)
        else:
            self._progress.note(f"{self.stage}: {line}")

    def resume(self, items: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """(items, first step to do): as given, or as the last checkpoint has them."""
        saved = self._checkpoints.latest()
        if saved is not None:
            items = self._checkpoints.load(saved, items)
        first = saved or 0
        self.recent = [row for row in read_metrics(self._metrics.path) if row["stage"] == self.stage][-RECENT:]
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
        self.recent = [*self.recent, values][-RECENT:]
        self._progress.update({name: values[name] for name in watch if name in values})
        in_a_row = int(values["nonfinite/in_a_row"])
        if in_a_row >= self._config.max_bad_updates:
            good = self._checkpoints.latest()
            advice = f"start a new run_dir with a lower {self.stage}.optimizer.learning_rate"
            raise Diverged(
                f"{self.stage} step {step}: the last {in_a_row} updates were NaN or infinite and were skipped; "
                + (f"the last good checkpoint is step {good}; {advice} and init_from this one" if good else advice)
            )

    def roll_back(self, step: int, steps: int, signs: Sequence[str]) -> NoReturn:
        """Sets aside what was saved in the last `steps` steps, which were bad, and raises Diverged with what was seen."""
        # The first bad step decoded with the weights of the checkpoint before it, so that one is not good either.
        good = max((saved for saved in self._checkpoints.steps() if saved < step - steps), default=0)
        moved = self._checkpoints.set_aside(good, self._collapsed)
        raise Diverged(
            f"{self.stage} step {step}: the policy has collapsed; for {steps} steps in a row it showed {', '.join(signs)}. "
            + (f"The last good checkpoint is step {good}" if good else f"No checkpoint of {self.stage} is from before")
            + (f"; steps {moved} are now in {self._collapsed}" if moved else "")
            + f". In a new run_dir, with init_from this one, try a lower {self.stage}.optimizer.learning_rate, a KL term, or "
            f"{self.stage}.guard.patience = 0"
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
