"""Tasks: where problems come from and how answers are judged. One file each; `task.py` says what a task is.

The table maps the name used in a config to the dataclass whose fields that config fills.
"""

import dataclasses
import difflib
from typing import Any

from d1jax.tasks.arithmetic import Arithmetic
from d1jax.tasks.code import Code
from d1jax.tasks.countdown import Countdown
from d1jax.tasks.gsm8k import Gsm8k
from d1jax.tasks.hub import HUB, read_hub, read_parquet
from d1jax.tasks.jsonl import read_rows
from d1jax.tasks.maths import Maths
from d1jax.tasks.mixture import Mixture
from d1jax.tasks.own import make_own
from d1jax.tasks.rows import Rows
from d1jax.tasks.sudoku import Sudoku
from d1jax.tasks.task import Row, Task
from d1jax.tasks.traces import Traces

TASKS: dict[str, Any] = {
    "sudoku": Sudoku,
    "countdown": Countdown,
    "arithmetic": Arithmetic,
    "gsm8k": Gsm8k,
    "math": Maths,
    "code": Code,
    "traces": Traces,
    "jsonl": Rows,
    "mixture": Mixture,
}


def make(name: str, **options: Any) -> Task:
    """The task of a name in TASKS, or of `my/file.py:Mine`: the class Mine in a file of the user's own, which is executed.

    `options` are its fields. Raises ValueError where there is no such task, file or class, or it does not take these options.
    """
    if name in TASKS:
        fields = [field.name for field in dataclasses.fields(TASKS[name])]
        unknown = sorted(set(options) - set(fields))
        if unknown:
            near = difflib.get_close_matches(unknown[0], fields, n=1)
            suggestion = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"{name}: has no option {unknown[0]!r}{suggestion}; choices: {', '.join(fields)}")
        try:
            return TASKS[name](**{key: _hashable(value) for key, value in options.items()})
        except TypeError as error:
            raise ValueError(f"{name}: an option has a value of the wrong kind: {error}") from None
    if not name.rpartition(":")[0].endswith(".py"):
        near = difflib.get_close_matches(name, TASKS, n=1)
        suggestion = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(
            f"task.name = {name!r} is not one of {', '.join(TASKS)}{suggestion}, and not of the form my/file.py:Mine"
        )
    return make_own(name, options)


def _hashable(value: Any) -> Any:
    """Lists of a configuration as tuples, which is what fields of tasks are."""
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def read_source(source: str, task: Task) -> list[Row]:
    """The rows of `hub:NAME[:SPLIT]`, of a Parquet file, or of a JSONL file where the source is neither. Raises DataError."""
    if source.endswith(".parquet"):
        return read_parquet(source, task)
    return read_hub(source, task) if source.startswith(HUB) else read_rows(source, task)
