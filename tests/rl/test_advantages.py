"""Advantages against plain loops."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.rl.advantages import ADVANTAGES, group_advantages

groups = st.integers(2, 6).flatmap(
    lambda g: st.lists(st.lists(st.floats(-5, 5, width=32), min_size=g, max_size=g), min_size=1, max_size=5)
)


def oracle(kind: str, group: list[float], every: list[list[float]]) -> list[float]:
    if max(group) == min(group):
        return [0.0] * len(group)
    mean = sum(group) / len(group)
    if kind == "center":
        return [r - mean for r in group]
    if kind == "leave_one_out":
        return [r - (sum(group) - r) / (len(group) - 1) for r in group]
    if kind == "softmax":
        good, bad = ([math.exp(sign * (r - mean)) for r in group] for sign in (1, -1))
        return [len(group) * (g / sum(good) - b / sum(bad)) for g, b in zip(good, bad, strict=True)]
    if kind == "batch":
        rewards = [r for row in every for r in row]
        centre = sum(rewards) / len(rewards)
        std = (sum((r - centre) ** 2 for r in rewards) / (len(rewards) - 1)) ** 0.5
        return [(r - mean) / (std + 1e-4) for r in group]
    std = (sum((r - mean) ** 2 for r in group) / (len(group) - 1)) ** 0.5
    return [(r - mean) / (std + 1e-4) for r in group]


@pytest.mark.parametrize("kind", ADVANTAGES)
@given(rewards=groups)
def test_equals_plain_loop(kind, rewards):
    expected = [oracle(kind, group, rewards) for group in rewards]
    np.testing.assert_allclose(group_advantages(kind, np.array(rewards)), expected, rtol=1e-4, atol=1e-4)


def test_the_scale_of_wd1_sharpens_its_weights():
    rewards = np.array([[0.0, 0.5, 1.0]])
    mild, sharp = (group_advantages("softmax", rewards, scale=scale)[0] for scale in (1.0, 50.0))
    np.testing.assert_allclose(sharp, [-3, 0, 3], atol=1e-6)  # the best one against the worst
    assert 0 < mild[2] < sharp[2] and abs(mild.sum()) < 1e-6


@pytest.mark.parametrize("kind", ADVANTAGES)
@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3, 1e8])
def test_group_of_equal_rewards_is_exactly_zero(kind, reward):
    advantage = group_advantages(kind, np.array([[reward] * 7, [0, 1, 0, 1, 0, 1, 0]]))
    assert np.all(advantage[0] == 0.0) and np.all(advantage[1] != 0.0)


@pytest.mark.parametrize("kind", ["center", "leave_one_out"])
def test_constant_added_to_a_group_changes_nothing(kind):
    rewards = np.random.default_rng(0).random((3, 4))
    shifted = rewards + np.array([[1.0], [-2.0], [5.0]])
    np.testing.assert_allclose(group_advantages(kind, rewards), group_advantages(kind, shifted), atol=1e-6)
