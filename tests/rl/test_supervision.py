"""Steps of a completion, and what each of them gains."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from d1jax.data.steps import text_steps
from d1jax.data.tokenizers import ByteTokenizer, CharacterTokenizer
from d1jax.rl.supervision import by_model, commit_steps, gains, unfinished
from d1jax.tasks.sudoku import Sudoku, as_lines

TOKENIZER = ByteTokenizer()
END, MASK = TOKENIZER.special.end, TOKENIZER.special.mask


def encoded(text, columns):
    ids = [*TOKENIZER.encode(text), END]
    return np.array([(ids + [END] * columns)[:columns]]), np.array([min(len(ids), columns)])


def test_a_line_break_ends_its_line_and_what_stands_behind_the_text_starts_none():
    tokens, length = encoded("ab\nc\n\nd", 12)
    assert text_steps(tokens, length, TOKENIZER)[0].tolist() == [0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 3, 3]
    tokens, length = encoded("ab\n", 3)  # no end token: a break in the last place ends nothing that follows
    assert text_steps(tokens, length, TOKENIZER)[0].tolist() == [0, 0, 0]


def test_parts_of_the_decoding_are_of_equal_length():
    reveal = np.array([[0, 7, 3, 4, 2, 1, 6, 5], [0, 1, 1, 0, -1, -1, -1, -1]])
    parts = commit_steps(reveal, np.array([8, 4]), 4)
    assert parts[0].tolist() == [0, 3, 1, 2, 1, 0, 3, 2]
    assert parts[1].tolist() == [0, 1, 1, 0, 1, 1, 1, 1]  # two steps make two parts; what is behind comes last


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(1, 6))
def test_every_part_has_a_step_and_parts_follow_the_order(reveal, parts):
    reveal = np.unique(reveal, return_inverse=True)[1].reshape(1, -1)  # as a sampler leaves them: no step is empty
    found = commit_steps(reveal, np.array([reveal.shape[1]]), parts)
    assert sorted(set(found[0].tolist())) == list(range(min(parts, reveal.max() + 1)))
    assert (np.diff(found[0][np.argsort(reveal[0], kind="stable")]) >= 0).all()


def test_what_is_not_there_yet_is_a_hole_that_keeps_the_places_behind_it():
    tokens, _ = encoded("abcd", 6)
    assert unfinished(tokens[0], np.array([0, 1, 0, 1, 0, 0], bool), TOKENIZER) == "_b_d"
    assert unfinished(tokens[0], np.zeros(6, bool), TOKENIZER) == ""
    assert unfinished(tokens[0], np.ones(6, bool), TOKENIZER) == "abcd"
    assert (
        unfinished(tokens[0], np.array([1, 0, 0, 0, 1, 1], bool), TOKENIZER) == "a___"
    )  # the end is there, three letters are not


def test_a_text_that_lacks_only_its_end_has_no_hole_behind_it():
    """Or the whole reward would go to the part that commits the end token."""
    tokens, length = encoded("abcd", 8)
    reveal = np.array([[0, 1, 2, 3, 4, -1, -1, -1]])
    part = commit_steps(reveal, length, 5)[0]
    texts = [unfinished(tokens[0], part <= step, TOKENIZER) for step in range(5)]
    assert texts == ["a", "ab", "abc", "abcd", "abcd"]


def test_gains_of_a_completion_add_up_to_its_reward():
    def reward(texts):
        return np.array([float(len(text.replace("_", ""))) for text in texts])

    tokens = np.concatenate([encoded("ab\ncd", 6)[0], encoded("a", 6)[0]])
    step = np.array([[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
    found, steps = gains(step, tokens, TOKENIZER, reward)
    assert steps.tolist() == [2, 1]
    np.testing.assert_allclose(found, [[3, 2], [1, 0]])


def test_a_model_rewards_lines_and_the_reward_of_the_text_comes_last():
    score = np.array([[1.0, 3.0, -2.0, 9.0], [0.5, 0.5, 4.0, 4.0]])
    step, length = np.array([[0, 0, 1, 1], [0, 0, 0, 0]]), np.array([3, 2])
    found, steps = by_model(score, step, length, np.array([10.0, 20.0]))
    chance = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    assert steps.tolist() == [2, 1]
    np.testing.assert_allclose(found[0], [chance(2.0), chance(-2.0) + 10], rtol=1e-6)
    np.testing.assert_allclose(found[1, 0], chance(0.5) + 20, rtol=1e-6)


def test_sudoku_judges_a_grid_with_holes_in_its_place():
    task = Sudoku()
    row = task.generate("train", 1, 0)[0]
    tokenizer = CharacterTokenizer("01234\n")
    text = as_lines(row["solution"])
    tokens = np.array([[*tokenizer.encode(text), tokenizer.special.end]])
    late = np.array([[0] * 10 + [1] * (tokens.shape[1] - 10)])[:, ::-1]  # the second half of the grid comes first
    names = {"cells": 1.0}
    judge = lambda texts: np.array([task.rewards(row, text)["cells"] * names["cells"] for text in texts])  # noqa: E731
    found, steps = gains(late, tokens, tokenizer, judge)
    assert steps.tolist() == [2] and found.sum() == 1.0 and (found > 0).all()
