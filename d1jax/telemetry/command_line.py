"""What all commands share: their exit codes, and the line that a user reads where one fails."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import jax

from d1jax.config import UserError
from d1jax.config.errors import CannotSave, Diverged, Stopped
from d1jax.models import joining
from d1jax.tasks.task import DataError
from d1jax.telemetry.terminal import printable

FAILED, USER_MISTAKE, INTERRUPTED = 1, 2, 130
# Of an operating system's errors, those about a path that a user has named.
NAMED_WRONGLY = (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


def told(problem: object, code: int) -> int:
    """Says on standard error what the problem was; returns the code."""
    print(f"error: {printable(str(problem))}", file=sys.stderr)
    return code


def exit_code(command: Callable[[], int], keeps: bool = False, tell: Callable[[object, int], int] = told) -> int:
    """What `command()` returns; where it raises what a user can do something about, that in one line on standard error, and
    1 (diverged, out of memory, a disk that is full), 2 (a mistake in the arguments, the configuration or the data), 130 (Ctrl-C)
    or 128 + n (stopped by signal n).

    keeps: the command saves as it goes, and the same one continues: then no error of the operating system is a mistake in an
    argument, and a reader of its output that has gone is a failure. tell: what says it, and returns the code. Every other exception is a
    fault of d1jax and passes.
    """
    try:
        return command()
    except BrokenPipeError:  # the reader has gone: `d1jax convert inspect ... | head`
        if tell is not told:  # others wait for this process
            return tell("the reader of its output has gone", FAILED)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the last flush has somewhere to go
        return FAILED if keeps else 0
    except (UserError, DataError) as error:
        return tell(error, USER_MISTAKE)
    except (Diverged, CannotSave) as error:
        return tell(error, FAILED)
    except OSError as error:
        if keeps:
            return tell(f"{error}; what was saved is good, and the same command continues", FAILED)
        return tell(error, USER_MISTAKE if isinstance(error, NAMED_WRONGLY) else FAILED)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).partition("\n")[0]
        return tell(
            f"out of memory ({reason}); shard by mesh.fsdp, lower the batch, or in training raise grad_accumulation_steps",
            FAILED,
        )
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return stopped.exit_code
    except KeyboardInterrupt:
        if tell is not told:
            return tell("interrupted", INTERRUPTED)
        print(file=sys.stderr)
        return INTERRUPTED


def exit_code_of_all(command: Callable[[], int], keeps: bool = False) -> int:
    """As `exit_code`, of a command that several processes run together (--distributed): one that fails ends all with its code."""

    def join() -> int:
        joining.start()
        return 0

    return exit_code(join) or joining.together(lambda tell: exit_code(command, keeps, tell))


@contextmanager
def in_all_processes() -> Iterator[None]:
    """What is done in here is done as by `exit_code_of_all`, where a program has joined several processes by itself: one writes and speaks,
    and one that fails ends all. Nothing is changed in one process, and in a command, which ends them by itself."""
    if not joining.is_joined_by_hand():
        yield
        return
    try:
        with joining.taking_part():
            yield
    except Stopped:  # in all of them
        raise
    except BaseException as error:
        problem, trace = error, traceback.format_exc()

        def again() -> int:
            raise problem

        with suppress(BaseException):
            exit_code(again, keeps=True, tell=joining.fail)
        joining.fail(trace, FAILED)


def output_file(flag: str, text: str) -> Path:
    """The file that a flag names. Raises UserError for one that could not be written, before the work that it will hold."""
    path = Path(text)
    if path.is_dir():
        raise UserError(f"{flag} {text!r} is a directory; name a file in it")
    if not path.parent.is_dir():
        raise UserError(f"{flag} {text!r}: there is no directory {str(path.parent)!r}; make it first")
    check_writable(flag, path.parent)
    return path


def check_writable(flag: str, folder: Path) -> None:
    """Files are written beside their name and moved there, so what counts is the folder."""
    if not os.access(folder, os.W_OK):
        raise UserError(f"{flag}: the directory {str(folder)!r} may not be written to")
