"""Advantages against plain loops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.rl.advantages import ADVANTAGES, group_advantages

groups = st.integers(2, 6).flatmap(
    lambda g: st.lists(st.lists(st.floats(-5, 5, width=32), min_size=g, max_size=g), min_size=1, max_size=5)
)


def oracle(kind: str, group: list[float]) -> list[float]:
    mean = sum(group) / len(group)
    if kind == "center":
        return [r - mean for r in group]
    if kind == "leave_one_out":
        return [r - (sum(group) - r) / (len(group) - 1) for r in group]
    std = (sum((r - mean) ** 2 for r in group) / (len(group) - 1)) ** 0.5
    return [(r - mean) / (std + 1e-4) for r in group]


@pytest.mark.parametrize("kind", ADVANTAGES)
@given(rewards=groups)
def test_equals_plain_loop(kind, rewards):
    expected = [oracle(kind, group) for group in rewards]
    np.testing.assert_allclose(group_advantages(kind, np.array(rewards)), expected, rtol=1e-4, atol=1e-4)


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
