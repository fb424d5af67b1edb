"""Protects: rows are tokenised once, kept or left out whole, and padded to the columns that there are."""

import numpy as np
import pytest

from d1jax.config import UserError
from d1jax.data.examples import tokenise
from d1jax.data.tokenizers import ByteTokenizer
from d1jax.tasks.traces import Traces

ROWS = [
    {"question": "a", "reasoning": "because", "attempt": "1", "answer": "1"},
    {"question": "bbbb", "reasoning": None, "attempt": None, "answer": "2"},
    {"question": "cc", "reasoning": "it follows from this", "attempt": "3", "answer": "3"},
]


class Counting(ByteTokenizer):
    texts: list = []

    def prompt(self, text):
        self.texts.append(text)
        return super().prompt(text)


def test_a_row_is_tokenised_once_whatever_is_asked_of_it_later():
    Counting.texts.clear()
    examples = tokenise(Traces(style="bare"), Counting(), ROWS, targets=True)
    examples.that_fit(3, 100).padded((examples.longest_prompt, 100), 0, "rows")
    assert len(Counting.texts) == len(ROWS) and examples.longest_prompt == max(map(len, examples.prompts))


def test_rows_are_kept_whole_or_left_out():
    examples = tokenise(Traces(style="bare"), ByteTokenizer(), ROWS, targets=True)
    longest = max(len(ids or []) for ids in examples.targets)
    kept = examples.that_fit(examples.longest_prompt, longest - 1)
    assert kept.rows == ROWS[:2] and kept.prompts == examples.prompts[:2] and kept.targets == examples.targets[:2]
    assert examples.that_fit(examples.longest_prompt - 1, longest).rows == [ROWS[0], ROWS[2]]


def test_padding_says_which_rows_have_a_target():
    problems = tokenise(Traces(style="bare"), ByteTokenizer(), ROWS, targets=True).padded((6, 80), 7, "rows")
    assert problems.has_target_R.tolist() == [True, False, True] and problems.target_RC.shape == (3, 80)
    assert (problems.target_RC[1] == 7).all() and problems.prompt_length_R.tolist() == [1, 4, 2]
    assert np.array_equal(problems.prompt_RP[1, :4], [ord("b")] * 4)


def test_a_target_that_is_too_long_is_named_with_its_cure():
    with pytest.raises(
        UserError, match=r"a target of the rows has \d+ tokens, more than the 9 of sampler.completion_length"
    ):
        tokenise(Traces(style="bare"), ByteTokenizer(), ROWS, targets=True).padded((6, 9), 0, "the rows")
