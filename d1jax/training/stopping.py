"""SIGTERM and Ctrl-C ask a run to save and leave; a second one does not ask."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from types import FrameType, TracebackType

from d1jax.config.errors import Stopped
from d1jax.models import processes


class StopRequest:
    """`with StopRequest() as stop:` ... `stop.signum` is set once a signal has come; a second signal ends the process at once.

    A thread of its own hears the signals: the main one may sit in the compiler, where Python's handlers do not run, and an
    exception that a handler raises on the way back from there is one that XLA does not survive.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        self._previous = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        heard, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        self._previous_wake = signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        threading.Thread(target=_listen, args=(heard, self.SIGNALS), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._previous_wake)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.close(self._wake)  # which ends the thread

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum

    def heard(self) -> int | None:
        """The signal that has come, to any of several processes that train together; all of them must ask."""
        return next((signum for signum in processes.gathered(self.signum) if signum is not None), None)

    def check(self, where: str) -> None:
        """Raises Stopped if a signal has come; for places where everything is saved."""
        stop_for(self.heard(), where)


def stop_for(signum: int | None, where: str) -> None:
    """Raises Stopped for a signal; everything is saved here."""
    if signum is not None:
        raise Stopped(signum, f"{where}: stopped, everything saved; the same command continues")


def _listen(heard: int, signals: Sequence[int]) -> None:
    """Reads the numbers of signals as they come: says so at the first of `signals`, and ends the process at the second."""
    come = 0
    while numbers := os.read(heard, 64):
        for number in numbers:
            come += number in signals
            if come == 2:
                # Not sys.exit: threads of XLA may be at work in what an orderly end would tear down. Every file is whole or not there.
                os._exit(128 + number)
            if number in signals:
                # os.write, because the main thread may be in the middle of a print.
                os.write(2, b"\nstopping after this step; once more to quit at once\n")
    os.close(heard)
