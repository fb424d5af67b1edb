"""How many positions each step unmasks: LLaDA's even shares, Dream's times."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.config import SamplerConfig, Time
from d1jax.diffusion.schedule import step_schedule, time_schedule, tokens_per_step, unmask_probability


@given(st.integers(1, 64), st.data())
def test_an_even_schedule_fills_the_block_with_the_remainder_first(block, data):
    steps = data.draw(st.integers(1, block))
    counts = tokens_per_step(block, steps)
    assert len(counts) == steps and sum(counts) == block
    assert list(counts) == sorted(counts, reverse=True) and max(counts) - min(counts) <= 1
    # LLaDA's get_num_transfer_tokens: everyone gets the quotient, the first `remainder` steps one more.
    expected = [block // steps] * steps
    for step in range(block % steps):
        expected[step] += 1
    assert list(counts) == expected


def test_the_example_of_the_docstring():
    assert tokens_per_step(8, 3) == (3, 3, 2)


def test_dreams_schedules_are_the_published_ones_to_the_last_bit(golden_dream):
    names = [name for name in golden_dream.io if name.startswith("schedule/")]
    assert len(names) == 10
    for name in names:
        length, steps = map(int, name.removeprefix("schedule/N").split("_S"))
        np.testing.assert_array_equal(time_schedule(length, steps), golden_dream.io[name], err_msg=name)


@given(st.integers(1, 300), st.data())
def test_dreams_time_unmasks_everything_and_the_probability_ends_at_one(length, data):
    steps = data.draw(st.integers(1, length))
    counts, probability = time_schedule(length, steps), unmask_probability(steps)
    assert len(counts) == len(probability) == steps and counts.sum() == length and (counts >= 0).all()
    assert probability[-1] == 1 and (probability > 0).all() and (np.diff(probability) > 0).all()


def test_steps_that_unmask_nothing_are_left_out_and_keep_their_numbers():
    config = SamplerConfig(completion_length=32, block_length=32, steps=32, schedule=Time())
    counts = time_schedule(32, 32)
    assert counts[0] == 0
    np.testing.assert_array_equal(step_schedule(config).number_K, np.flatnonzero(counts))
    assert step_schedule(config).count_K.sum() == 32


@pytest.mark.parametrize(("block", "steps"), [(8, 8), (4, 6), (8, 3), (2, 4)])
def test_an_even_schedule_walks_the_blocks_in_order(block, steps):
    made = step_schedule(SamplerConfig(completion_length=8, block_length=block, steps=steps))
    assert [int(n) for n in made.number_K] == list(range(steps))
    for start in range(0, 8, block):
        assert made.count_K[made.start_K == start].sum() == block
    assert (np.diff(made.start_K) >= 0).all()
