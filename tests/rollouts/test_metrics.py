"""What a rollout batch reports."""

import numpy as np
import pytest

from d1jax.rollouts.metrics import agreement, clipped_ratio, reflection_words, repeated_tokens


def test_repeated_tokens_counts_inside_texts_only():
    tokens = np.array([[5, 5, 5, 9, 9, 9], [1, 2, 1, 2, 2, 9]])
    assert repeated_tokens(tokens, np.array([4, 6])) == pytest.approx(3 / 8)
    assert repeated_tokens(tokens, np.array([1, 1])) == 0.0


def test_clipped_is_what_has_no_end_token():
    tokens_BC = np.array([[1, 9, 9], [1, 2, 3], [1, 2, 9], [4, 5, 6]])
    texts = ["a", "abc", "ab", "de\n"]
    assert clipped_ratio(tokens_BC, texts, (9,), grids=False) == 0.5
    assert clipped_ratio(tokens_BC, texts, (9,), grids=True) == 0.25, "a grid whose last line is closed is whole"


def test_agreement_is_over_pairs_of_one_problem_that_differ_in_what_is_right():
    solved = np.array([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, np.nan]])
    score = np.array([[0.5, 0.1, 0.5], [9.0, 8.0, 7.0], [3.0, 2.0, 9.0]])
    assert agreement(score, solved) == pytest.approx((1 + 0.5 + 0) / 3)
    assert agreement(score[1:2], solved[1:2]) is None


def test_reflection_words_are_whole_words_in_any_case():
    assert reflection_words(["Wait, check: 3. Checked; a mistake!", "button, error-free"]) == 2.0
