"""SIGTERM and Ctrl-C ask a run to save and leave; a second one does not ask."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType


class Stopped(Exception):
    """The run was asked to stop, has saved its state, and may be continued by the same command."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum  # the shell's convention, so that scripts and schedulers see an unfinished run


class Diverged(Exception):
    """The run cannot learn any more: updates that are not finite, a policy that has collapsed, an invariant that does not hold."""


class CannotSave(Exception):
    """What the run leaves behind cannot be written any more; what was saved before is good, and the same command continues."""


class StopRequest:
    """`with StopRequest() as stop:` ... `stop.signum` is set once a signal has come."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        self._previous = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        self._restore()
        # os.write, because a signal may come in the middle of a print.
        os.write(2, b"\nstopping after this step; once more to quit at once\n")

    def check(self, where: str) -> None:
        """Raises Stopped if a signal has come; for places where everything is saved."""
        if self.signum is not None:
            raise Stopped(self.signum, f"{where}: stopped, everything saved; the same command continues")

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
