"""The order of rows is a function of (seed, position)."""

import numpy as np

from d1jax.data.order import RowOrder


def test_every_epoch_is_a_permutation_and_another_one():
    order = RowOrder(13, seed=0)
    epochs = [order.take(13 * epoch, 13) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(13)) and epoch.dtype == np.int32
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert tuple(epochs[0]) != tuple(range(13))


def test_any_window_is_the_same_slice_of_one_endless_order():
    whole = RowOrder(7, seed=3).take(0, 40)
    for start, count in ((0, 7), (5, 4), (6, 1), (13, 20), (39, 1)):
        np.testing.assert_array_equal(RowOrder(7, seed=3).take(start, count), whole[start : start + count])


def test_the_seed_decides_the_order():
    assert not np.array_equal(RowOrder(50, seed=1).take(0, 50), RowOrder(50, seed=2).take(0, 50))


def test_a_single_row_repeats():
    assert RowOrder(1, seed=0).take(5, 3).tolist() == [0, 0, 0]
