"""What a task is: the one protocol that training and evaluation know about a dataset.

A task makes or reads rows, writes a prompt and an SFT target for a row, and judges an answer text. Judging is plain
Python on the host: it is bounded in time and memory and does not raise on any text, because a model under RL finds
every text sooner or later.
"""

from typing import Any, ClassVar, Protocol

Row = dict[str, Any]
UNDECIDED = "_"
"""Stands for a token that is not decided yet, where a task judges the text of an unfinished decoding (process supervision)."""


class DataError(ValueError):
    """The user's data is wrong. The message begins with `file:line` when the row comes from a file, and ends with the
    cure.
    """


class Task(Protocol):
    """Everything d1jax asks of a task. Implementations are frozen dataclasses whose fields are the task's
    configuration.

    A task may also have `rewards_many(rows, texts)` and `grade_many(rows, texts)`, lists of what `rewards` and `grade` give, where judging
    many texts together is faster; `offer(row, text)`, the answer in one spelling, for majority votes; `from_stored(record, where)`, the
    row of a stored generation; `pair(row)`, the better and the worse text of a row of preferences; `steps(row)`, (text, right) pairs of a
    row whose steps are labelled; `judge_lines(row, text)`, whether each line of a text is right (None: nothing is said of it);
    `self_test(rows)`, (place, what went wrong) of rows whose own solution does not pass; and `unique_field`, the field of which no two
    rows of one source may have the same value.
    """

    name: ClassVar[str]
    alphabet: ClassVar[str]
    """Every character that a bare prompt or target of this task can contain (for the character tokenizer)."""

    @property
    def columns(self) -> int | None:
        """How many cells wide an answer is shown, or None for text."""
        ...

    def generate(self, split: str, count: int, seed: int) -> list[Row]:
        """`count` rows of `"train"` or `"test"`. The splits are disjoint for all seeds; a longer list begins with the
        shorter one.
        """
        ...

    def parse(self, record: dict[str, Any], where: str) -> Row | None:
        """One JSONL record as a row; None for a good record that this configuration leaves out. Raises
        `DataError(f"{where}: ...")`.
        """
        ...

    def prompt(self, row: Row) -> str:
        """The text that the model is given (before any chat template)."""
        ...

    def target(self, row: Row) -> str | None:
        """The SFT completion, or None when the row stores no solution."""
        ...

    def rewards(self, row: Row, text: str) -> dict[str, float]:
        """Named rewards, to be weighted by the configuration: in [0, 1], but for those that carry a paper's own points. None: does not
        apply to this row.
        """
        ...

    def grade(self, row: Row, text: str) -> dict[str, float]:
        """Named scores in [0, 1] for evaluation. Always contains `"solved"`, which is 0.0 or 1.0."""
        ...

    def has_reference(self, row: Row) -> bool:
        """Whether any text can be `solved`: False where the row lacks the answer that texts are compared with."""
        ...

    def problem_key(self, row: Row) -> str:
        """Equal exactly for rows that pose the same problem: train and test must not share one."""
        ...

    def solution_key(self, row: Row) -> str | None:
        """Equal exactly for rows with the same solution; None where a solution identifies nothing."""
        ...

    def baselines(self, row: Row) -> dict[str, str]:
        """Answer texts that need no model, by name, to be graded like a model's: the floor that a result has to
        clear.
        """
        ...
