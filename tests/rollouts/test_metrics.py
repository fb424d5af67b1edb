"""What a rollout batch reports."""

import numpy as np
import pytest

from d1jax.rollouts.metrics import clipped_ratio, repeated_tokens


def test_repeated_tokens_counts_inside_texts_only():
    tokens = np.array([[5, 5, 5, 9, 9, 9], [1, 2, 1, 2, 2, 9]])
    assert repeated_tokens(tokens, np.array([4, 6])) == pytest.approx(3 / 8)
    assert repeated_tokens(tokens, np.array([1, 1])) == 0.0


def test_clipped_is_what_has_no_end_token():
    tokens_BC = np.array([[1, 9, 9], [1, 2, 3], [1, 2, 9], [4, 5, 6]])
    texts = ["a", "abc", "ab", "de\n"]
    assert clipped_ratio(tokens_BC, texts, (9,), grids=False) == 0.5
    assert clipped_ratio(tokens_BC, texts, (9,), grids=True) == 0.25, "a grid whose last line is closed is whole"
