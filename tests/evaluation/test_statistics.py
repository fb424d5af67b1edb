"""Protects: pass@k, majority votes, intervals and McNemar's test are what their formulas say, by counting it out."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.evaluation import statistics


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(right, data):
    k = data.draw(st.integers(1, len(right)))
    subsets = list(itertools.combinations(right, k))
    expected = sum(map(any, subsets)) / len(subsets)
    assert statistics.pass_at_k(sum(right), len(right), k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_of_more_samples_than_there_are_is_refused(k):
    with pytest.raises(ValueError, match=f"pass@{k} needs at least {k} samples of a row, not 4"):
        statistics.pass_at_k(1, 4, k)


def test_pass_at_k_stays_finite_for_many_samples():
    assert statistics.pass_at_k(1, 10_000, 5_000) == pytest.approx(0.5)
    assert statistics.pass_at_k(0, 10_000, 5_000) == 0.0


@given(st.integers(1, 300), st.data())
def test_wilson_holds_the_rates_that_a_score_test_does_not_reject(n, data):
    successes = data.draw(st.integers(0, n))
    low, high = statistics.wilson_interval(successes, n)
    rate = successes / n
    assert 0 <= low <= rate + 1e-12 and rate - 1e-12 <= high <= 1
    for end in (low, high):
        if 1e-9 < end < 1 - 1e-9:  # the ends are where the score test's statistic is 1.96
            assert abs(rate - end) / math.sqrt(end * (1 - end) / n) == pytest.approx(statistics.Z95, rel=1e-6)


def test_wilson_of_nothing_is_everything():
    assert statistics.wilson_interval(0, 0) == (0.0, 1.0)
    assert statistics.wilson_interval(81, 263) == pytest.approx((0.25525, 0.36615), abs=1e-4)


@pytest.mark.parametrize(
    ("answers", "right", "expected"),
    [
        (["1", "1", "2"], [True, True, False], 1.0),
        (["1", "2", "2"], [True, False, False], 0.0),
        (["1", "2"], [True, False], 0.5),
        (["1", "2", "3", None], [True, False, False, False], 1 / 3),
        ([None, None, "7"], [False, False, True], 1.0),
        ([None, None], [False, False], 0.0),
        ([], [], 0.0),
    ],
    ids=[
        "most right",
        "most wrong",
        "two leaders",
        "three leaders",
        "no vote without an answer",
        "no votes",
        "nothing",
    ],
)
def test_a_majority_is_shared_among_its_leaders(answers, right, expected):
    assert statistics.majority_is_right(answers, right) == pytest.approx(expected)


@given(st.permutations(["1", "1", "2", "2", "3", None]))
def test_a_majority_does_not_depend_on_the_order_of_the_samples(answers):
    assert statistics.majority_is_right(answers, [answer == "2" for answer in answers]) == 0.5


def test_one_answer_judged_in_two_ways_counts_by_their_share_in_any_order():
    """math-verify runs under a time limit, so that the same answer may be undecided once."""
    for right in ([True, True, False, True], [True, True, True, False], [False, True, True, True]):
        assert statistics.majority_is_right(["x", "x", "x", "x"], right) == 0.75


def test_a_bootstrap_interval_covers_and_repeats():
    values = np.random.default_rng(3).random(60) < 0.4
    low, high = statistics.bootstrap_interval(values, seed=5)
    assert (low, high) == statistics.bootstrap_interval(values, seed=5)
    assert low < values.mean() < high
    half = statistics.Z95 * values.std() / math.sqrt(len(values))  # of the normal distribution, for comparison
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)
    for rate in (0.0, 0.5, 1.0):  # all rows alike: no interval of width 0
        assert statistics.bootstrap_interval(np.full(5, rate)) == statistics.wilson_interval(5 * rate, 5)
    assert statistics.bootstrap_interval(np.array([])) == (0.0, 1.0)


def test_a_bootstrap_interval_holds_the_truth_about_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr(statistics, "DRAWS", 300)
    rng = np.random.default_rng(0)
    found = [statistics.bootstrap_interval((rng.random(50) < 0.3).astype(float), seed) for seed in range(150)]
    assert 0.88 <= np.mean([low <= 0.3 <= high for low, high in found]) <= 0.99


@pytest.mark.parametrize(("samples", "powers"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_powers_of_two_end_with_all_samples(samples, powers):
    assert statistics.powers_of_two(samples) == powers


def test_numbers_of_several_samples():
    right = np.array([[True, False, False], [True, True, True]])
    found = statistics.of_samples(right, [["4", "5", "5"], ["7", "7", "7"]])
    assert {name: one["value"] for name, one in found.items()} == pytest.approx(
        {"avg@3": 2 / 3, "pass@1": 2 / 3, "pass@2": (2 / 3 + 1) / 2, "pass@3": 1.0, "maj@3": 0.5}
    )
    assert all(0 <= one["ci95"][0] <= one["value"] <= one["ci95"][1] <= 1 for one in found.values())
    assert "maj@3" not in statistics.of_samples(right, None)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=30))
def test_mcnemar_is_the_two_sided_binomial_sum_over_rows_that_differ(pairs):
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    found = statistics.mcnemar(first, second)
    only_first, only_second = pairs.count((True, False)), pairs.count((False, True))
    n = only_first + only_second
    tail = sum(math.comb(n, i) for i in range(min(only_first, only_second) + 1)) / 2**n
    assert (found["only_first"], found["only_second"]) == (only_first, only_second)
    assert found["p"] == pytest.approx(min(1.0, 2 * tail))
    assert statistics.mcnemar(second, first)["p"] == pytest.approx(found["p"])


def test_mcnemar_of_other_rows_is_refused():
    with pytest.raises(ValueError, match="shorter"):
        statistics.mcnemar([True, False], [True])


# -- over k ------------------------------------------------------------------------------------------------------------


def test_maj_at_k_is_the_mean_over_subsets():
    """Against every subset: of 4 samples a, a, b, c with a right, two agree on a in 1 of 6, and ties are shared."""
    answers, right = ["a", "a", "b", "c"], [True, True, False, False]
    every = [
        statistics.majority_is_right([answers[i] for i in some], [right[i] for i in some])
        for some in itertools.combinations(range(4), 2)
    ]
    exact = sum(every) / len(every)
    drawn = np.mean([statistics.majority_at_k(answers, right, 2, seed) for seed in range(40)])
    assert drawn == pytest.approx(exact, abs=0.04)
    assert statistics.majority_at_k(answers, right, 4) == statistics.majority_is_right(answers, right) == 1.0
    assert statistics.majority_at_k(answers, right, 2, seed=3) == statistics.majority_at_k(answers, right, 2, seed=3)


def test_over_k_holds_every_k_and_intervals_that_are_honest_at_the_ends():
    right_RS = np.array([[1, 1, 0], [0, 0, 0], [1, 0, 0]], bool)
    found = statistics.over_k(right_RS, [["1", "1", "2"], ["3", "3", "4"], ["5", "6", "6"]])
    assert list(found["pass"]) == list(found["maj"]) == ["1", "2", "3"]
    assert found["avg"]["value"] == found["pass"]["1"]["value"] == pytest.approx(1 / 3)
    assert found["pass"]["3"]["value"] == pytest.approx(2 / 3) and found["maj"]["3"]["value"] == pytest.approx(1 / 3)
    none = statistics.over_k(np.zeros((20, 2), bool), None)
    assert none["maj"] == {} and none["avg"]["ci95"] == list(statistics.wilson_interval(0, 20)) != [0.0, 0.0]
