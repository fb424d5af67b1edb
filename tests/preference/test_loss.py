"""Which completions make a pair, and DPO's loss against a plain loop."""

import math

import numpy as np

from d1jax.preference.loss import dpo, pairs_of
from d1jax.rollouts.rewards import equal_groups


def test_of_ties_the_first_is_chosen():
    pairs = pairs_of(np.array([[0.1 + 0.2, 0.3, 0.0, 0.1 + 0.2 - 0.3]]))
    assert pairs.rows_B.tolist() == [0, 2] and pairs.tied_Q.tolist() == [False]
    pairs = pairs_of(np.array([[0.3, 0.1 + 0.2, 0.1 + 0.2 - 0.3, 0.0]]))
    assert pairs.rows_B.tolist() == [0, 2]


def test_pairs_are_the_best_and_the_worst_and_ties_say_nothing():
    pairs = pairs_of(np.array([[0.5, 2.0, 0.1], [1.0, 1.0, 1.0], [0.0, 1.0, 1.0]]))
    assert pairs.rows_B.tolist() == [1, 3, 7, 2, 3, 6]
    assert pairs.tied_Q.tolist() == [False, True, False]
    assert equal_groups(np.array([[1.0, 1.0], [1.0, 0.0]])).tolist() == [True, False]


def test_the_loss_equals_a_plain_loop():
    """DPO, eq. 7: -log sigmoid(beta x [(chosen - its reference) - (rejected - its reference)]) of sums over texts."""
    rng = np.random.default_rng(0)
    logp, reference = (-rng.exponential(1.0, (6, 5)).astype(np.float32) for _ in range(2))
    mask = np.arange(5)[None, :] < np.array([5, 1, 3, 2, 4, 5])[:, None]
    loss, margin = dpo(logp, reference, mask, 0.1)
    for pair in range(3):
        gains = [sum(logp[row, k] - reference[row, k] for k in range(5) if mask[row, k]) for row in (pair, pair + 3)]
        expected = 0.1 * (gains[0] - gains[1])
        np.testing.assert_allclose(margin[pair], expected, rtol=1e-5)
        np.testing.assert_allclose(loss[pair], math.log1p(math.exp(-expected)), rtol=1e-5)


def test_at_the_reference_the_loss_is_log_two():
    logp = -np.ones((4, 3), np.float32)
    loss, margin = dpo(logp, logp, np.ones((4, 3), bool), 0.1)
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
    assert margin.tolist() == [0.0, 0.0]
