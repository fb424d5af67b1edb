"""Losses and measures of reward models against plain loops."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.reward_model.loss import BINS, accuracy, pairwise, pointwise, quality

SCORES = st.lists(st.tuples(st.floats(-8, 8), st.floats(-8, 8)), min_size=1, max_size=30)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_losses_equal_plain_loops():
    rng = np.random.default_rng(0)
    better, worse = rng.normal(size=(2, 6)).astype(np.float32)
    for place in range(6):
        b, w = float(better[place]), float(worse[place])
        np.testing.assert_allclose(pairwise(better, worse)[place], -math.log(sigmoid(b - w)), rtol=1e-5)
        expected = (-math.log(sigmoid(b)) - math.log(1 - sigmoid(w))) / 2
        np.testing.assert_allclose(pointwise(better, worse)[place], expected, rtol=1e-5)


@given(SCORES)
def test_quality_equals_a_plain_loop(pairs):
    better, worse = np.array(pairs, float).T
    found = quality(better, worse)
    right = [1.0 if b > w else 0.5 if b == w else 0.0 for b, w in pairs]
    assert found["accuracy"] == pytest.approx(sum(right) / len(right))
    assert found["accuracy"] == pytest.approx(float(accuracy(better, worse)), abs=1e-6) or not np.array_equal(
        better.astype(np.float32) > worse.astype(np.float32), better > worse
    )
    assert found["margin"] == pytest.approx(sum(b - w for b, w in pairs) / len(pairs), abs=1e-9)
    bins = [[] for _ in range(BINS)]
    for (b, w), is_right in zip(pairs, right, strict=True):
        sure = sigmoid(abs(b - w))
        bins[min(int((sure - 0.5) * 2 * BINS), BINS - 1)].append((sure, is_right))
    error = sum(abs(sum(s for s, _ in one) - sum(r for _, r in one)) for one in bins if one) / len(pairs)
    assert found["calibration_error"] == pytest.approx(error, abs=1e-9)


def test_a_model_that_knows_nothing_is_as_sure_as_it_is_right():
    found = quality(np.zeros(10), np.zeros(10))
    assert found == {"accuracy": 0.5, "margin": 0.0, "calibration_error": 0.0}
