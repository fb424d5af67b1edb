"""Texts as chains of steps, which are their lines; and stored texts whose steps are right or wrong, as token arrays.

R rows, B rows of a batch, C completion columns, K most steps of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from d1jax.config import UserError
from d1jax.data.examples import Problems
from d1jax.data.pairs import completed, prompt_keys
from d1jax.data.tokenizers import Tokenizer
from d1jax.tasks.task import Row, Task


def text_steps(tokens_BC: np.ndarray, length_B: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """[B, C]: the line of each token; a token that holds a line break ends its line. Behind the text: the last line."""
    breaks = np.array([["\n" in piece for piece in tokenizer.pieces(row)] for row in tokens_BC.tolist()])
    breaks &= np.arange(tokens_BC.shape[1])[None, :] < length_B[:, None] - 1
    return np.cumsum(breaks, axis=1) - breaks


@dataclass(frozen=True)
class StoredSteps:
    """Texts and what is said of their steps. The targets are whole completions, padded with end tokens."""

    texts: Problems
    length_R: np.ndarray  # tokens of each text, the one that ends it included
    step_RC: np.ndarray  # the step of each token
    label_RK: np.ndarray  # 1: the step is right, 0: wrong, NaN: nothing is said of it

    def __len__(self) -> int:
        return len(self.texts)

    def prompts(self) -> set[bytes]:
        """The prompts of all rows, as their tokens."""
        return set(prompt_keys(self.texts))

    def without(self, prompts: set[bytes]) -> StoredSteps:
        """The rows whose prompts are not among these."""
        return self.where(lambda key: key not in prompts)

    def where(self, wanted: Callable[[bytes], bool]) -> StoredSteps:
        """The rows whose prompts are wanted."""
        return self.at(np.array([place for place, key in enumerate(prompt_keys(self.texts)) if wanted(key)], int))

    def at(self, places: np.ndarray) -> StoredSteps:
        """The rows at these places, in this order."""
        return StoredSteps(self.texts.at(places), self.length_R[places], self.step_RC[places], self.label_RK[places])


def stored_steps(
    rows: Problems,
    places: Sequence[int],
    tokens: Sequence[list[int]],
    labels: Sequence[Sequence[bool | None]],
    columns: int,
    tokenizer: Tokenizer,
) -> StoredSteps:
    """The rows at `places` with these tokens as their texts, and a label a line of the text (None: nothing is said of it).

    Where one token holds the breaks of several lines these are one step, which is wrong if one of them is.
    """
    texts = completed(rows, places, tokens, columns, tokenizer.special.end)
    is_end_RC = np.isin(texts.target_RC, tokenizer.special.end_ids)
    length_R = np.where(is_end_RC.any(axis=1), is_end_RC.argmax(axis=1) + 1, columns)
    step_RC = text_steps(texts.target_RC, length_R, tokenizer)
    label_RK = np.full((len(tokens), int(step_RC.max(initial=0)) + 1), np.nan)
    for row, of_lines in enumerate(labels):
        line = 0
        for column, piece in enumerate(tokenizer.pieces(texts.target_RC[row, : length_R[row]].tolist())):
            last = line + piece.count("\n")
            touched = of_lines[line : last + (not piece.endswith("\n"))]
            step = step_RC[row, column]
            for label in touched:
                if label is not None:
                    label_RK[row, step] = np.fmin(label_RK[row, step], float(label))
            line = last
    return StoredSteps(texts, length_R, step_RC, label_RK)


def steps_of_rows(
    task: Task, tokenizer: Tokenizer, rows: Problems, columns: int, too_long: str, setting: str
) -> tuple[StoredSteps, int]:
    """(the texts with labelled steps that a task's rows hold, how many rows were left out as too long).

    Raises UserError for a task or rows without such steps, and where a text is too long and too_long is "fail".
    """
    steps = getattr(task, "steps", None)
    found = {place: told for place, row in enumerate(rows.rows) if steps and (told := steps(row))}
    if not found:
        raise UserError(
            f"config: {setting} = task with loss = stepwise, but the rows of task {task.name!r} have no labelled steps; task jsonl reads "
            'TRL\'s {"prompt", "completions": [...], "labels": [...]}'
        )
    ids = {place: _ids(task, tokenizer, told, rows.rows[place]) for place, told in found.items()}
    longest = max(ids, key=lambda place: len(ids[place]))
    if len(ids[longest]) > columns and too_long == "fail":
        raise UserError(
            f"config: {setting}: row {longest} ({task.problem_key(rows.rows[longest])[:60]!r}): its steps have {len(ids[longest])} tokens, "
            f"more than the {columns} of sampler.completion_length; raise it, or leave such rows out (task.too_long: drop)"
        )
    kept = [place for place in ids if len(ids[place]) <= columns]
    if not kept:
        raise UserError(f"config: {setting}: every row is too long; raise sampler.completion_length")
    stored = stored_steps(
        rows, kept, [ids[place] for place in kept], [_of_lines(found[place]) for place in kept], columns, tokenizer
    )
    return stored, len(ids) - len(kept)


def _ids(task: Task, tokenizer: Tokenizer, told: Sequence[tuple[str, bool]], row: Row) -> list[int]:
    try:
        return tokenizer.answer("\n".join(text for text, _ in told))
    except ValueError as error:
        shown = repr(task.problem_key(row)[:60])
        raise UserError(f"config: a step of task {task.name!r} ({shown}) cannot be written: {error}") from None


def _of_lines(told: Sequence[tuple[str, bool]]) -> list[bool | None]:
    """A label a line. A step of several lines is judged by its last one that is not blank, where it is complete."""
    labels: list[bool | None] = []
    for text, right in told:
        lines = text.split("\n")
        last = max(place for place, line in enumerate(lines) if line.strip())
        labels += [right if place == last else None for place in range(len(lines))]
    return labels
