"""Rows as tokens. Every row is tokenised once; what fits is chosen, and padded, after that.

R rows, P prompt columns, C target columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from d1jax.config import UserError
from d1jax.data.tokenizers import Tokenizer, pad_rows
from d1jax.tasks.task import Row, Task


@dataclass(frozen=True)
class Problems:
    """Rows of a task, and their prompts and targets as token arrays. R rows, P prompt columns, C completion columns."""

    rows: list[Row]
    prompt_RP: np.ndarray
    prompt_length_R: np.ndarray
    target_RC: np.ndarray  # padded with end tokens; a row without a target is all end tokens
    has_target_R: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, places: np.ndarray) -> Problems:
        """The rows at these places, in this order; one may come several times."""
        return Problems(
            [self.rows[place] for place in places],
            self.prompt_RP[places],
            self.prompt_length_R[places],
            self.target_RC[places],
            self.has_target_R[places],
        )


def joined(parts: Sequence[Problems], end: int) -> Problems:
    """The rows of several, one after the other; prompts and targets are padded to the longest columns with the token `end`."""
    if len(parts) == 1:
        return parts[0]
    columns = [max(one.prompt_RP.shape[1] for one in parts), max(one.target_RC.shape[1] for one in parts)]

    def widened(array_RX: np.ndarray, width: int) -> np.ndarray:
        return np.pad(array_RX, ((0, 0), (0, width - array_RX.shape[1])), constant_values=end)

    return Problems(
        [row for one in parts for row in one.rows],
        np.concatenate([widened(one.prompt_RP, columns[0]) for one in parts]),
        np.concatenate([one.prompt_length_R for one in parts]),
        np.concatenate([widened(one.target_RC, columns[1]) for one in parts]),
        np.concatenate([one.has_target_R for one in parts]),
    )


@dataclass(frozen=True)
class Examples:
    """Rows of a task with the token ids of their prompts and of their targets (None: the row has none, or none is read)."""

    rows: Sequence[Row]
    prompts: Sequence[list[int]]
    targets: Sequence[list[int] | None]

    @property
    def longest_prompt(self) -> int:
        return max(map(len, self.prompts), default=0)

    def that_fit(self, prompt: int, target: int) -> Examples:
        """Those of at most `prompt` and `target` tokens."""
        kept = [
            index
            for index, (ids, answer) in enumerate(zip(self.prompts, self.targets, strict=True))
            if len(ids) <= prompt and len(answer or []) <= target
        ]
        return Examples(*([column[index] for index in kept] for column in (self.rows, self.prompts, self.targets)))

    def padded(self, columns: tuple[int, int], end: int, name: str) -> Problems:
        """As arrays of `columns` = (P, C), padded with the token `end`. Raises UserError for a target that is longer."""
        longest = max((len(ids) for ids in self.targets if ids), default=0)
        if longest > columns[1]:
            raise UserError(
                f"config: a target of {name} has {longest} tokens, more than the {columns[1]} of sampler.completion_length "
                "(or sft.completion_length); raise it, or leave such rows out (task.too_long: drop)"
            )
        prompt_RP, prompt_length_R = pad_rows(self.prompts, columns[0], end)
        target_RC, _ = pad_rows([ids or [] for ids in self.targets], columns[1], end)
        has_target_R = np.array([ids is not None for ids in self.targets])
        return Problems(list(self.rows), prompt_RP, prompt_length_R, target_RC, has_target_R)


def tokenise(task: Task, tokenizer: Tokenizer, rows: Sequence[Row], targets: bool) -> Examples:
    """The rows as `Examples`; without `targets` none is read. Raises UserError for a text that the tokenizer cannot write."""
    prompts = [_prompt_ids(task, tokenizer, row) for row in rows]
    return Examples(rows, prompts, [_target_ids(task, tokenizer, row) if targets else None for row in rows])


def _prompt_ids(task: Task, tokenizer: Tokenizer, row: Row) -> list[int]:
    try:
        return tokenizer.prompt(task.prompt(row))
    except ValueError as error:
        raise UserError(f"config: a prompt of task {task.name!r} cannot be written: {error}") from None


def _target_ids(task: Task, tokenizer: Tokenizer, row: Row) -> list[int] | None:
    """The SFT completion; None where the row has none."""
    target = task.target(row)
    try:
        return None if target is None else tokenizer.answer(target)
    except ValueError as error:
        raise UserError(f"config: a target of task {task.name!r} cannot be written: {error}") from None
