"""The sections that say what is learnt and how it is evaluated: TaskConfig, EvaluationConfig."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from d1jax.config.setting import Rule, setting, with_fields
from d1jax.config.training import MAX_ROWS
from d1jax.config.yaml_text import shown

TASK_NAMES = ("sudoku", "countdown", "arithmetic", "gsm8k", "math", "code", "traces", "jsonl", "mixture")


@with_fields
@dataclass(frozen=True)
class TaskConfig:
    """What is learnt: the rows, the prompts, the rewards."""

    name: str = setting(
        "sudoku",
        "sudoku, countdown, arithmetic, gsm8k, math, traces, code (d1jax/tasks), or a class of your own: my/file.py:Mine",
    )
    style: Literal["bare", "instruct"] = setting(
        "bare", "bare: puzzle in, answer out; instruct: instructions and <answer> tags"
    )
    train: str = setting("generated", "'generated', a file (.jsonl, .jsonl.gz, .parquet), or hub:NAME of a dataset")
    train_rows: int = setting(20000, "rows to generate, or to keep of the file (0 = all)", at_least=0, at_most=10**8)
    eval_sets: dict[str, str] = setting(
        lambda: {"held_out": "generated"},
        "name -> such a source, or 'share:0.01' of task.train; the first is the headline",
    )
    eval_rows: int = setting(1024, "rows of each evaluation set (0 = all of a file)", at_least=0, at_most=10**8)
    held_out_by_solution: tuple[str, ...] = setting(
        (), "evaluation sets whose solutions may not occur in training (all: no problem may)"
    )
    too_long: Literal["fail", "drop"] = setting(
        "fail", "a row whose prompt (in training, or target) has too many tokens: an error, or left out and counted"
    )
    seed: int = setting(0, "seeds the generator and the train/test split", at_least=0, at_most=2**32 - 1)
    options: dict[str, Any] = setting(
        dict, "fields of the task itself, e.g. {numbers: [3, 4]} of countdown or {judge: number} of jsonl (d1jax/tasks)"
    )

    def rules(self) -> Iterator[Rule]:
        near = difflib.get_close_matches(self.name, TASK_NAMES, n=1)
        suggestion = f" (did you mean {near[0]!r}?)" if near else ""
        yield (
            self.name not in TASK_NAMES and not re.fullmatch(r".+\.py:\w+", self.name),
            f"task.name = {shown(self.name)} is not one of {', '.join(TASK_NAMES)}{suggestion}, and not of the form my/file.py:Mine",
        )
        generated_sets = "generated" in self.eval_sets.values()
        yield (
            self.train == "generated" and self.train_rows == 0,
            "task.train_rows = 0 with generated rows; say how many",
        )
        yield (
            self.eval_rows == 0 and generated_sets,
            "task.eval_rows = 0 with a generated evaluation set; say how many",
        )
        yield (
            not set(self.held_out_by_solution) <= set(self.eval_sets),
            f"task.held_out_by_solution = {list(self.held_out_by_solution)} names sets that are not in task.eval_sets",
        )
        for option, ours in (("style", "style"), ("split_seed", "seed")):
            yield (
                option in self.options,
                f"task.options.{option} = {shown(self.options.get(option))} is set by task.{ours}; give that",
            )


@with_fields
@dataclass(frozen=True)
class EvaluationConfig:
    """Greedy decoding with the grader."""

    batch_size: int = setting(256, "rows at a time", above=0, at_most=MAX_ROWS)
    temperature: float = setting(0.0, "0 = greedy", at_least=0)
    every: int = setting(
        0,
        "steps between evaluations of one set during a stage, the headline or `select` (0 = only at its end)",
        at_least=0,
    )
    select: str = setting(
        "",
        "the evaluation set by which the checkpoint of a stage is chosen, e.g. one that is 'share:0.02' ('' = the last checkpoint)",
    )
    samples: int = setting(8, "rows kept for the report", at_least=0, at_most=MAX_ROWS)
