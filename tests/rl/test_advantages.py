"""Advantages against plain loops."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.config import Softmax
from d1jax.config.advantage import Advantage
from d1jax.config.values import alternatives
from d1jax.rl.advantages import ADVANTAGES, decoupled, group_advantages, process_advantages
from d1jax.rollouts.rewards import TIE, equal_groups, total_rewards

groups = st.integers(2, 6).flatmap(
    lambda g: st.lists(st.lists(st.floats(-5, 5, width=32), min_size=g, max_size=g), min_size=1, max_size=5)
)


def named(kind: str) -> Advantage:
    return alternatives(Advantage)[kind]()


def oracle(kind: str, group: list[float], every: list[list[float]]) -> list[float]:
    if kind == "reward":
        return group
    if kind == "decoupled":
        return plain_decoupled({"r": every}, {"r": 1.0})[every.index(group)]
    if max(group) - min(group) <= TIE * max(abs(r) for row in every for r in row):
        return [0.0] * len(group)
    mean = sum(group) / len(group)
    if kind == "center":
        return [r - mean for r in group]
    if kind == "rloo":
        return [r - (sum(group) - r) / (len(group) - 1) for r in group]
    if kind == "softmax":
        good, bad = ([math.exp(sign * (r - mean)) for r in group] for sign in (1, -1))
        return [len(group) * (g / sum(good) - b / sum(bad)) for g, b in zip(good, bad, strict=True)]
    std = (sum((r - mean) ** 2 for r in group) / (len(group) - 1)) ** 0.5
    return [(r - mean) / (std + 1e-4) for r in group]


@pytest.mark.parametrize("kind", ADVANTAGES)
@given(rewards=groups)
def test_equals_plain_loop(kind, rewards):
    expected = [oracle(kind, group, rewards) for group in rewards]
    np.testing.assert_allclose(group_advantages(named(kind), np.array(rewards)), expected, rtol=1e-4, atol=1e-4)


def test_the_scale_of_wd1_sharpens_its_weights():
    rewards = np.array([[0.0, 0.5, 1.0]])
    mild, sharp = (group_advantages(Softmax(scale), rewards)[0] for scale in (1.0, 50.0))
    np.testing.assert_allclose(sharp, [-3, 0, 3], atol=1e-6)  # the best one against the worst
    assert 0 < mild[2] < sharp[2] and abs(mild.sum()) < 1e-6


@pytest.mark.parametrize("kind", sorted(set(ADVANTAGES) - {"reward"}))
@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3, 1e8])
def test_group_of_equal_rewards_is_exactly_zero(kind, reward):
    advantage = group_advantages(named(kind), np.array([[reward] * 7, [0, 1, 0, 1, 0, 1, 0]]))
    assert np.all(advantage[0] == 0.0) and np.all(advantage[1] != 0.0)


@pytest.mark.parametrize("kind", ["center", "rloo"])
def test_constant_added_to_a_group_changes_nothing(kind):
    rewards = np.random.default_rng(0).random((3, 4))
    shifted = rewards + np.array([[1.0], [-2.0], [5.0]])
    np.testing.assert_allclose(
        group_advantages(named(kind), rewards), group_advantages(named(kind), shifted), atol=1e-6
    )


def test_the_reward_itself_is_compared_with_nothing():
    assert group_advantages(named("reward"), np.array([[1.0, 1.0], [0.0, 0.5]])).tolist() == [[1, 1], [0, 0.5]]


@pytest.mark.parametrize("scale", [1.0, 2.0**-27, 2.0**27])
def test_rewards_that_differ_by_rounding_are_ties(scale):
    """0.1 + 0.2 and 0.3 as weighted sums of the same worth, at any scale of rewards."""
    parts = {"a": np.array([1.0, 0.0]), "b": np.array([1.0, 0.0]), "c": np.array([0.0, 1.0])}
    rewards_QG = total_rewards(parts, {"a": 0.1 * scale, "b": 0.2 * scale, "c": 0.3 * scale})[None]
    assert rewards_QG[0, 0] != rewards_QG[0, 1]
    assert equal_groups(rewards_QG).tolist() == [True]
    for kind in ADVANTAGES:
        if kind != "reward":
            assert (group_advantages(named(kind), rewards_QG) == 0).all()
    gains_QGK = rewards_QG.reshape(1, 2, 1)
    steps = process_advantages("zscore", gains_QGK, np.zeros((1, 2, 3), int), np.ones((1, 2), int))
    assert (steps == 0).all()
    # A real difference is none of rounding.
    assert equal_groups(rewards_QG * np.array([1.0, 1.000001])).tolist() == [False]


@pytest.mark.parametrize("kind", ["center", "zscore"])
@pytest.mark.parametrize("by_place", [False, True])
def test_process_advantages_equal_a_plain_loop(kind, by_place):
    """DeepSeekMath, section 4.1.3: normalise all step rewards of a group, then sum those from a token's step on. By place: less the mean
    of the steps at the same place."""
    rng = np.random.default_rng(0)
    steps = np.array([[3, 1], [2, 4], [2, 2]])
    gains = rng.random((3, 2, 4))
    gains[2] = 0.25  # a group whose steps all gain the same
    step = np.array([[np.sort(rng.integers(0, steps[q, g], 5)) for g in range(2)] for q in range(3)])
    found = process_advantages(kind, gains, step, steps, by_place=by_place)
    for q in range(3):
        every = {(g, j): gains[q, g, j] for g in range(2) for j in range(steps[q, g])}
        alike = {key: [r for other, r in every.items() if not by_place or other[1] == key[1]] for key in every}
        away = {key: r - sum(alike[key]) / len(alike[key]) for key, r in every.items()}
        middle = sum(away.values()) / len(away)
        std = (sum((r - middle) ** 2 for r in away.values()) / (len(away) - 1)) ** 0.5
        scale = std + 1e-4 if kind == "zscore" else 1.0
        for g in range(2):
            for c in range(5):
                later = [away[g, j] / scale for j in range(step[q, g, c], steps[q, g])]
                assert found[q, g, c] == pytest.approx(0.0 if q == 2 else sum(later), abs=1e-5)


def plain_decoupled(parts, weights):
    """arXiv 2601.05242 in plain Python: {name: [[reward of a completion, None where it does not apply] of a group]}."""
    groups, size = len(next(iter(parts.values()))), len(next(iter(parts.values()))[0])
    summed = [[0.0] * size for _ in range(groups)]
    for name, rewards in parts.items():
        for q, group in enumerate(rewards):
            known = [r for r in group if r is not None]
            if len(known) < 2 or max(known) == min(known):
                continue
            mean = sum(known) / len(known)
            std = (sum((r - mean) ** 2 for r in known) / (len(known) - 1)) ** 0.5
            for g, r in enumerate(group):
                summed[q][g] += 0.0 if r is None else weights[name] * (r - mean) / (std + 1e-4)
    flat = [value for group in summed for value in group]
    mean = sum(flat) / len(flat)
    std = (sum((value - mean) ** 2 for value in flat) / (len(flat) - 1)) ** 0.5
    return [[(value - mean) / (std + 1e-4) if any(flat) else 0.0 for value in group] for group in summed]


@given(st.data(), st.integers(1, 3), st.integers(2, 5))
def test_decoupled_equals_the_papers_equations(data, groups, size):
    value = st.one_of(st.none(), st.sampled_from([0.0, 0.5, 1.0, 2.0]))
    row = st.lists(st.lists(value, min_size=size, max_size=size), min_size=groups, max_size=groups)
    parts = {"solved": data.draw(row), "format": data.draw(row)}
    weights = {"solved": 1.0, "format": 0.25}
    found = decoupled(np.array([parts[name] for name in weights], float), np.array(list(weights.values())))
    np.testing.assert_allclose(found, plain_decoupled(parts, weights), rtol=1e-6, atol=1e-6)


def test_a_reward_that_varies_little_keeps_its_weight():
    solved, form = np.array([[0.0, 0, 1, 1]]), np.array([[0.9, 1.0, 0.9, 1.0]])
    found = decoupled(np.stack([solved, form]), np.array([1.0, 1.0]))
    assert abs(found[0, 0] + found[0, 3]) < 1e-9 and abs(found[0, 1] - found[0, 2]) < 0.01, (
        "both rewards weigh the same"
    )
