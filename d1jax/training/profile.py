"""A window of the steps of a stage, recorded by JAX's profiler for a look with xprof or Perfetto."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import jax

from d1jax.config.profile import ProfileConfig


class Profile:
    """`done(step)` at the end of every step; the trace of the steps after `start` goes to `directory`."""

    def __init__(self, config: ProfileConfig, directory: Path, first_step: int) -> None:
        self._config, self._directory = config, directory
        self._runs = False
        self._begin_after(first_step)

    def is_edge(self, step: int) -> bool:
        """Whether the window begins or ends behind this step: what the devices have not done by then is on its wrong side."""
        return self._config.steps > 0 and step in (self._config.start, self._config.start + self._config.steps)

    def done(self, step: int) -> str:
        """Begins or ends the trace behind this step; returns a line for the log where it ended."""
        told = self.stop() if self._runs and step >= self._config.start + self._config.steps else ""
        self._begin_after(step)
        return told

    def stop(self) -> str:
        """Ends the trace where one runs; returns a line for the log."""
        if not self._runs:
            return ""
        self._runs = False
        jax.profiler.stop_trace()
        return f"profile: steps {self._config.start + 1} on are in {self._directory}; look at it with xprof or Perfetto"

    def _begin_after(self, step: int) -> None:
        # A run that goes on within the window records the rest of it.
        if self._runs or not self._config.start <= step < self._config.start + self._config.steps:
            return
        with suppress(RuntimeError):  # one that someone else has begun goes on
            jax.profiler.start_trace(str(self._directory), create_perfetto_trace=True)
            self._runs = True
