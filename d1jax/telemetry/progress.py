"""Progress of a stage: a tqdm bar on a terminal, a plain line now and then in a log file."""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Self, TextIO

from tqdm import tqdm

from d1jax.telemetry.metrics import format_metrics


class Progress:
    """`with Progress("sft", total=90) as progress: progress.update({"loss": 1.2})` once a step.

    `initial` is the number of steps done before (a resumed run). `every` is the least number of seconds between two
    plain lines; the first and the last step are always printed. Values given to `update` are shown in full, so pass
    the few that a person watches. `stream` defaults to standard error, `clock` is there for tests.
    """

    def __init__(
        self,
        label: str,
        total: int,
        initial: int = 0,
        every: float = 5.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.label, self.total, self.done = label, total, initial
        self._every, self._clock = every, clock
        self._stream = sys.stderr if stream is None else stream  # looked up now: it may have been redirected
        self._bar = None
        self._values: Mapping[str, float] = {}
        self._start = (clock(), initial)  # where the rate counts from
        self._updates = 0
        self._printed_at: float | None = None
        self._printed_step: int | None = None

    def __enter__(self) -> Self:
        if self._stream.isatty():
            self._bar = tqdm(
                total=self.total, initial=self.done, desc=self.label, file=self._stream, dynamic_ncols=True, unit="it"
            )
        self._start = (self._clock(), self.done)
        return self

    def __exit__(self, *_exc) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._updates and self._printed_step != self.done:
            self._print()

    def update(self, values: Mapping[str, float]) -> None:
        self.done += 1
        self._updates += 1
        self._values = dict(values)
        if self._bar is not None:
            self._bar.set_postfix_str(format_metrics(self._values), refresh=False)
            self._bar.update(1)
            return
        now = self._clock()
        if self._printed_at is None or self.done == self.total or now - self._printed_at >= self._every:
            self._print()
        if self._updates == 1:
            self._start = (now, self.done)  # the first step compiles; it says nothing about the rate

    def note(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def _print(self) -> None:
        self._printed_at, self._printed_step = self._clock(), self.done
        width = len(str(self.total))
        parts = [f"{self.label}  {self.done:>{width}}/{self.total}", *self._pace(), format_metrics(self._values)]
        print("  ".join(part for part in parts if part), file=self._stream, flush=True)

    def _pace(self) -> list[str]:
        since, first = self._start
        steps, seconds = self.done - first, self._clock() - since
        if self._updates < 2 or steps <= 0 or seconds <= 0:
            return []
        rate = steps / seconds
        pace = f"{rate:.1f} it/s" if rate >= 1 else f"{1 / rate:.1f} s/it"
        return [pace, f"eta {tqdm.format_interval(max(0, self.total - self.done) / rate)}"]
