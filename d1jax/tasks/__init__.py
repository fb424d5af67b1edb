"""Tasks: where problems come from and how answers are judged. One file each; `task.py` says what a task is.

The table maps the name used in a config to the dataclass whose fields that config fills.
"""

from d1jax.tasks.countdown import Countdown
from d1jax.tasks.sudoku import Sudoku

TASKS = {"sudoku": Sudoku, "countdown": Countdown}
