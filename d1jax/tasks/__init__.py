"""Tasks: where problems come from and how answers are judged. One file each; `task.py` says what a task is.

The table maps the name used in a config to the dataclass whose fields that config fills.
"""

from d1jax.tasks.countdown import Countdown
from d1jax.tasks.hub import HUB, read_hub
from d1jax.tasks.jsonl import read_rows
from d1jax.tasks.sudoku import Sudoku
from d1jax.tasks.task import Row, Task
from d1jax.tasks.traces import Traces

TASKS = {"sudoku": Sudoku, "countdown": Countdown, "traces": Traces}


def read_source(source: str, task: Task) -> list[Row]:
    """The rows of `hub:NAME[:SPLIT]`, or of a JSONL file where the source does not begin so. Raises DataError."""
    return read_hub(source, task) if source.startswith(HUB) else read_rows(source, task)
