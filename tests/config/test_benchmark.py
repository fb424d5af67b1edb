"""Protects: steps follow from the length, and settings of a benchmark that have no meaning together are refused."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.config import UserError
from d1jax.config.benchmark import BenchmarkConfig
from d1jax.evaluation.protocol import Protocol, check_settings


def checked(**given):
    return check_settings(Protocol().settings("gsm8k", given), "here")


def test_the_defaults_are_those_of_d1():
    config = check_settings(BenchmarkConfig(), "here")
    assert (config.length, config.block_length, config.steps, config.temperature) == (256, 32, 128, 0.0)
    assert (config.decoding.completion_length, config.decoding.block_length, config.decoding.steps) == (256, 32, 128)


@given(st.integers(1, 64), st.integers(1, 16), st.floats(0.001, 1))
def test_steps_are_whole_in_every_block_and_close_to_what_is_asked(block, blocks, per_token):
    config = BenchmarkConfig(length=block * blocks, block=block, steps_per_token=per_token)
    assert config.steps % blocks == 0 and 1 <= config.steps // blocks <= block
    assert abs(config.steps - per_token * config.length) <= blocks
    check_settings(config, "here")


def test_block_0_is_the_whole_completion():
    config = checked(length=48, block=0, steps_per_token=1)
    assert (config.block_length, config.steps, config.decoding.block_length) == (48, 48, 48)


def test_an_adaptive_schedule_has_no_steps_of_its_own():
    config = checked(length=48, block=24, sampler={"schedule": "threshold"})
    assert config.decoding.schedule.adaptive and config.decoding.steps == BenchmarkConfig().sampler.steps


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"length": 100}, "here: block = 32 does not divide length = 100; 0 takes the whole completion as one block"),
        ({"samples": 2}, "here: samples = 2 at temperature 0 are all the same; set a temperature"),
        ({"system": "Be brief.", "chat": False}, "here: system: a message needs chat = true; put it into template"),
        ({"sampler": {"steps": 7}}, "here: sampler.steps is set by steps_per_token; give that"),
        ({"sampler": {"completion_length": 64}}, "here: sampler.completion_length is set by length; give that"),
        ({"sampler": {"block_length": 64}}, "here: sampler.block_length is set by block; give that"),
        ({"length": 0}, "length = 0"),
        ({"steps_per_token": 1.5}, "steps_per_token = 1.5"),
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"few_shot": 1001}, "few_shot = 1001"),
        ({"style": "verbose"}, "verbose"),
        ({"limt": 3}, "did you mean 'limit'?"),
        ({"sampler": {"top_p": 2.0}}, "top_p = 2.0"),
    ],
)
def test_what_has_no_meaning_is_refused(given, told):
    with pytest.raises(UserError) as found:
        checked(**given)
    assert told in str(found.value)


def test_samples_at_temperature_0_are_fine_where_the_order_is_drawn():
    config = checked(samples=2, temperature=0.5)
    assert config == dataclasses.replace(config)
    assert checked(samples=2, sampler={"remasking": "random"}).samples == 2
