"""What ends a command in a way that a user can do something about; telemetry/command_line.py has their exit codes."""

from __future__ import annotations


class UserError(ValueError):
    """The user's configuration is wrong; the message says where and what to write instead."""


class Stopped(Exception):
    """The run was asked to stop, has saved its state, and may be continued by the same command."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum  # the shell's convention, so that scripts and schedulers see an unfinished run


class Diverged(Exception):
    """The run cannot learn any more: updates that are not finite, a policy that has collapsed, an invariant that does not hold."""


class CannotSave(Exception):
    """What the run leaves behind cannot be written any more; what was saved before is good, and the same command continues."""
