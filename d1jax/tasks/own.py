"""A task of a user's own, `my/file.py:Mine`: its file is executed, and whatever its code raises is told as a mistake in that file."""

from __future__ import annotations

import functools
import importlib.util
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from d1jax.tasks.task import DataError, Task

# What a task must have; see Task.
METHODS = (
    "name", "alphabet", "columns", "generate", "parse", "prompt", "target", "rewards", "grade", "has_reference", "problem_key",
    "solution_key", "baselines",
)  # fmt: skip
RAISED = (Exception, SystemExit)  # sys.exit() in such a file must not look like a run that has finished


class OwnTask:
    """The user's task. What one of its methods raises becomes a DataError with the method, the file and the line.

    `rewards` is passed on as it is: a stage counts the texts that cannot be rewarded, and one of them ends no run.
    """

    def __init__(self, task: Any, where: str) -> None:
        self._task, self._where = task, where

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._task, name)
        return self._guarded(found) if callable(found) and name in METHODS and name != "rewards" else found

    def __repr__(self) -> str:
        return repr(self._task)

    def _guarded(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*arguments: Any) -> Any:
            try:
                return method(*arguments)
            except DataError:
                raise
            except RAISED as error:
                raise DataError(f"{self._where}: {method.__name__} raised {_told(error)}") from error

        return call

    def grade(self, row: Any, text: str) -> dict[str, float]:
        """The task's own, which must name "solved"."""
        scores = self._guarded(self._task.grade)(row, text)
        if not isinstance(scores, Mapping) or "solved" not in scores:
            raise DataError(
                f"{self._where}: grade returned {scores!r:.80}; return {{'solved': 0.0 or 1.0}}, and further scores"
            )
        return dict(scores)


def make_own(name: str, options: Mapping[str, Any]) -> Task:
    """The task `my/file.py:Mine`. Raises ValueError where the file or the class is missing, raises, or takes other options."""
    file, _, class_name = name.rpartition(":")
    where = f"task.name = {name!r}"
    if not Path(file).is_file():
        raise ValueError(f"{where}: there is no file {file!r}")
    made = getattr(_executed(Path(file), where), class_name, None)
    if made is None:
        raise ValueError(f"{where}: {file} has no class {class_name!r}")
    missing = [part for part in METHODS if not hasattr(made, part)]
    if missing:
        raise ValueError(f"{where}: {class_name} lacks {', '.join(missing)}; d1jax/tasks/task.py says what a task is")
    try:
        return OwnTask(made(**options), where)
    except TypeError as error:
        raise ValueError(f"{where}: {class_name} takes other fields than {', '.join(options)}: {error}") from error
    except RAISED as error:
        raise ValueError(f"{where}: {class_name} raised {_told(error)}") from error


def _executed(file: Path, where: str) -> ModuleType:
    # dataclasses looks its module up by name, so it must be known; not under the file's own name, which may be that of a library.
    called = f"d1jax_own_task_{file.stem}"
    spec = importlib.util.spec_from_file_location(called, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[called] = module
    try:
        spec.loader.exec_module(module)
    except RAISED as error:
        del sys.modules[called]
        raise ValueError(f"{where}: {file} raised {type(error).__name__}: {error}") from error
    return module


def _told(error: BaseException) -> str:
    """The error and the line of the user's file where it came from."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})"
