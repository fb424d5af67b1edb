"""Ticks are round and inside; scales say where values lie."""

import pytest

from d1jax.telemetry.report import axes


def test_ticks_are_round_and_inside():
    for low, high in ((0, 1), (0.35, 0.5), (-3, 7.5), (0, 1e-6), (1, 12345), (0.107, 0.197)):
        found = axes.ticks(low, high)
        assert 2 <= len(found) <= 7 and len(axes.ticks(low, high, 2)) >= 2
        assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)


def test_a_scale_says_where_values_lie():
    assert axes.Scale(0, 10, 100, 0).places([0, 5, 10]).tolist() == [100, 50, 0]
    assert axes.Scale(0, 2, 0, 100, log=True).places([1, 10, 100]).tolist() == [0, 50, 100]


def test_a_path_breaks_where_a_value_is_not_finite():
    nan = float("nan")
    assert axes.path([(0, 1), (1, nan), (2, 3), (4, 5)]) == "M0.0 1.0M2.0 3.0L4.0 5.0"


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0, 0.5, 1.0], ["0", "0.5", "1.0"]),
        ([0, 1e5], ["0", "1e5"]),
        ([1000, 2000], ["1,000", "2,000"]),
        ([0.15], ["0.150"]),
    ],
)
def test_labels_tell_marks_apart(values, labels):
    assert axes.tick_labels(values) == labels
