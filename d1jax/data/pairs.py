"""Stored pairs of texts, of which one is better, or texts that are wanted or not, as token arrays.

R rows, P prompt columns, C completion columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from d1jax.config import UserError
from d1jax.data.examples import Problems
from d1jax.data.tokenizers import Tokenizer, pad_rows
from d1jax.tasks.task import Row, Task


@dataclass(frozen=True)
class StoredPairs:
    """What is better and what is worse. Their targets are whole completions, padded with end tokens.

    matched: row i of both belongs to one prompt. Otherwise they are two sets of single texts, which may have other sizes.
    """

    better: Problems
    worse: Problems
    matched: bool

    def prompts(self) -> set[bytes]:
        """The prompts of all rows, as their tokens."""
        return {key for side in (self.better, self.worse) for key in prompt_keys(side)}

    def without(self, prompts: set[bytes]) -> StoredPairs:
        """The rows whose prompts are not among these."""
        return self.where(lambda key: key not in prompts)

    def where(self, wanted: Callable[[bytes], bool]) -> StoredPairs:
        """The rows whose prompts are wanted. Of matched pairs both sides have the same prompts, so they stay matched."""
        sides = (
            side.at(np.array([place for place, key in enumerate(prompt_keys(side)) if wanted(key)], int))
            for side in (self.better, self.worse)
        )
        return StoredPairs(*sides, self.matched)


def prompt_keys(problems: Problems) -> list[bytes]:
    """Of each row what tells its prompt from others."""
    return [
        prompt_P[:length].tobytes()
        for prompt_P, length in zip(problems.prompt_RP, problems.prompt_length_R, strict=True)
    ]


def split_by_prompt(pairs: StoredPairs, share: float, seed: int) -> tuple[StoredPairs, StoredPairs]:
    """(the pairs of most prompts, those of a `share` of them, one at least), by the seed. Raises UserError for a single prompt."""
    keys = sorted(pairs.prompts())
    if len(keys) < 2:
        raise UserError("config: reward_model.data has texts of one prompt only, so none can be held out; bring more")
    count = min(max(round(share * len(keys)), 1), len(keys) - 1)
    held = {keys[place] for place in np.random.default_rng(seed).permutation(len(keys))[:count]}
    return pairs.without(held), pairs.where(held.__contains__)


def pairs_of_rows(
    task: Task, tokenizer: Tokenizer, rows: Problems, columns: int, too_long: str, setting: str
) -> tuple[StoredPairs, int]:
    """(the pairs that a task's rows hold, how many rows were left out as too long).

    A row holds a better and a worse text, or one of them. All rows have both, or they count as single texts. Raises UserError for a task
    or rows without pairs, for equal texts, and where one is too long and too_long is "fail".
    """
    pair = getattr(task, "pair", None)
    found = [pair(row) for row in rows.rows] if pair else []
    if not any(better is not None or worse is not None for better, worse in found):
        raise UserError(
            f"config: {setting} = task, but the rows of task {task.name!r} hold no preferences; task jsonl reads chosen and rejected, or "
            "completion and label"
        )
    equal = next((place for place, (better, worse) in enumerate(found) if better is not None and better == worse), None)
    if equal is not None:
        raise UserError(
            f"config: {setting}: row {equal} ({_shown(task, rows.rows[equal])}) has equal texts as chosen and rejected; take it out"
        )
    matched = all(better is not None and worse is not None for better, worse in found)
    left_out: set[int] = set()
    sides = []
    for side in (0, 1):
        ids = {
            place: _ids(task, tokenizer, texts[side], rows.rows[place])
            for place, texts in enumerate(found)
            if texts[side] is not None
        }
        longest = max(ids, key=lambda place: len(ids[place]), default=0)
        if ids and len(ids[longest]) > columns and too_long == "fail":
            raise UserError(
                f"config: {setting}: row {longest} ({_shown(task, rows.rows[longest])}): a text has {len(ids[longest])} tokens, more than "
                f"the {columns} of sampler.completion_length; raise it, or leave such rows out (task.too_long: drop)"
            )
        left_out |= {place for place, tokens in ids.items() if len(tokens) > columns}
        sides.append(ids)
    kept = [[place for place in ids if place not in left_out] for ids in sides]
    if not all(kept):
        raise UserError(
            f"config: {setting}: of {len(found)} rows {len(kept[0])} better and {len(kept[1])} worse texts are left; both are needed"
        )
    better, worse = (
        completed(rows, places, [ids[place] for place in places], columns, tokenizer.special.end)
        for places, ids in zip(kept, sides, strict=True)
    )
    return StoredPairs(better, worse, matched), len(left_out)


def completed(rows: Problems, places: Sequence[int], tokens: Sequence[list[int]], columns: int, end: int) -> Problems:
    """The rows at `places` with these tokens as their targets."""
    picked = rows.at(np.array(places, int))
    target_RC, _ = pad_rows(tokens, columns, end)
    return Problems(picked.rows, picked.prompt_RP, picked.prompt_length_R, target_RC, np.ones(len(picked.rows), bool))


def _ids(task: Task, tokenizer: Tokenizer, text: str, row: Row) -> list[int]:
    try:
        return tokenizer.answer(text)
    except ValueError as error:
        raise UserError(
            f"config: a preference of task {task.name!r} ({_shown(task, row)}) cannot be written: {error}"
        ) from None


def _shown(task: Task, row: Row) -> str:
    return repr(task.problem_key(row)[:60])
