"""Tasks: where problems come from and how answers are judged. One file each; `task.py` says what a task is.

The table maps the name used in a config to the dataclass whose fields that config fills.
"""

import difflib
import importlib.util
from pathlib import Path
from typing import Any

from d1jax.tasks.countdown import Countdown
from d1jax.tasks.hub import HUB, read_hub
from d1jax.tasks.jsonl import read_rows
from d1jax.tasks.sudoku import Sudoku
from d1jax.tasks.task import Row, Task
from d1jax.tasks.traces import Traces

TASKS: dict[str, Any] = {"sudoku": Sudoku, "countdown": Countdown, "traces": Traces}

# What a task of a user's own must have; see Task.
METHODS = (
    "name", "alphabet", "columns", "generate", "parse", "prompt", "target", "rewards", "grade", "has_reference", "problem_key",
    "solution_key", "baselines",
)  # fmt: skip


def make(name: str, **options: Any) -> Task:
    """The task of a name in TASKS, or of `my/file.py:Mine`: the class Mine in a file of the user's own, which is executed.

    `options` are its fields. Raises ValueError where there is no such task, file or class, or it does not take these options.
    """
    if name in TASKS:
        return TASKS[name](**options)
    file, _, class_name = name.rpartition(":")
    if not file.endswith(".py"):
        near = difflib.get_close_matches(name, TASKS, n=1)
        suggestion = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(
            f"task.name = {name!r} is not one of {', '.join(TASKS)}{suggestion}, and not of the form my/file.py:Mine"
        )
    if not Path(file).is_file():
        raise ValueError(f"task.name = {name!r}: there is no file {file!r}")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a user's own code; whatever it raises concerns that file
        raise ValueError(f"task.name = {name!r}: {file} raised {type(error).__name__}: {error}") from error
    made = getattr(module, class_name, None)
    if made is None:
        raise ValueError(f"task.name = {name!r}: {file} has no class {class_name!r}")
    missing = [part for part in METHODS if not hasattr(made, part)]
    if missing:
        raise ValueError(
            f"task.name = {name!r}: {class_name} lacks {', '.join(missing)}; d1jax/tasks/task.py says what a task is"
        )
    try:
        return made(**options)
    except TypeError as error:
        raise ValueError(
            f"task.name = {name!r}: {class_name} takes other fields than {', '.join(options)}: {error}"
        ) from error


def read_source(source: str, task: Task) -> list[Row]:
    """The rows of `hub:NAME[:SPLIT]`, or of a JSONL file where the source does not begin so. Raises DataError."""
    return read_hub(source, task) if source.startswith(HUB) else read_rows(source, task)
