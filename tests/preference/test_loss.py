"""Which completions make a pair, and the losses of DPO and KTO against plain loops."""

import math

import numpy as np

from d1jax.config import Kto
from d1jax.preference.loss import dpo, gains, kto, pairs_of
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


def texts(seed=0, rows=6):
    rng = np.random.default_rng(seed)
    logp, reference = (-rng.exponential(1.0, (rows, 5)).astype(np.float32) for _ in range(2))
    mask = np.arange(5)[None, :] < rng.integers(1, 6, rows)[:, None]
    return logp, reference, mask


def plain_gains(logp, reference, mask):
    return [
        sum(float(logp[row, k]) - float(reference[row, k]) for k in range(5) if mask[row, k])
        for row in range(len(logp))
    ]


def test_dpo_equals_a_plain_loop_over_texts_of_different_lengths():
    """DPO, eq. 7: -log sigmoid(beta x [(chosen - its reference) - (rejected - its reference)]) of sums over texts."""
    arrays = texts()
    gain = gains(*arrays)
    expected = plain_gains(*arrays)
    np.testing.assert_allclose(gain, expected, rtol=1e-5)
    loss = dpo(gain[:3], gain[3:], 0.1)
    for pair in range(3):
        margin = 0.1 * (expected[pair] - expected[pair + 3])
        np.testing.assert_allclose(loss[pair], math.log1p(math.exp(-margin)), rtol=1e-5)


def test_kto_equals_a_plain_loop():
    """KTO: weight x (1 - sigmoid of the gain over the mean gain of the batch), turned round for what is not wanted."""
    arrays = texts(1)
    gain, expected = gains(*arrays), plain_gains(*arrays)
    mean = sum(expected) / len(expected)
    found = kto(gain[:3], gain[3:], np.float32(mean), Kto(beta=0.5, desirable=1.5, undesirable=0.75))
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    for pair in range(3):
        wanted = 1.5 * (1 - sigmoid(0.5 * (expected[pair] - mean)))
        unwanted = 0.75 * (1 - sigmoid(0.5 * (mean - expected[pair + 3])))
        np.testing.assert_allclose(found[pair], (wanted + unwanted) / 2, rtol=1e-5)


def test_at_the_reference_nothing_is_better():
    logp = -np.ones((4, 3), np.float32)
    gain = gains(logp, logp, np.ones((4, 3), bool))
    np.testing.assert_allclose(dpo(gain[:2], gain[2:], 0.1), math.log(2), rtol=1e-6)
    np.testing.assert_allclose(kto(gain[:2], gain[2:], 0.0, Kto()), 0.5, rtol=1e-6)
