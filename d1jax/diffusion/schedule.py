"""Which block a denoising step works on, and how many positions it commits there. Plain numbers, fixed before anything is compiled."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from d1jax.config import ADAPTIVE, SamplerConfig

TIME_EPS = 1e-3  # where Dream's time ends


class Plan(NamedTuple):
    """K steps that may commit something. Steps that commit nothing are left out: at any temperature they change nothing."""

    number_K: np.ndarray  # the step that the schedule calls it, from 0
    start_K: np.ndarray  # first column of the block
    count_K: np.ndarray  # positions to commit; -1: each by chance, or as many as the adaptive rule accepts
    chance_K: np.ndarray  # of an open position to be committed, where it goes by chance


def plan(config: SamplerConfig) -> Plan:
    """The steps of a completion under `config.schedule`."""
    length, block, steps = config.completion_length, config.block_length, config.steps
    number = np.arange(length if config.schedule in ADAPTIVE else steps)
    if config.schedule in ADAPTIVE:  # one position a step at the least; each row works on its first open block
        made = Plan(number, np.zeros(length, int), np.full(length, -1), np.zeros(length, np.float32))
    elif config.schedule == "even":
        counts = tokens_per_step(block, steps * block // length)
        made = Plan(
            number, number // len(counts) * block, np.array(counts)[number % len(counts)], np.zeros(steps, np.float32)
        )
    elif config.schedule == "time":
        made = Plan(number, np.zeros(steps, int), time_schedule(length, steps), np.zeros(steps, np.float32))
    else:
        made = Plan(number, np.zeros(steps, int), np.full(steps, -1), transfer_chance(steps))
    worked = made.count_K != 0
    number_K, start_K, count_K = (array[worked].astype(np.int32) for array in made[:3])
    return Plan(number_K, start_K, count_K, made.chance_K[worked].astype(np.float32))


def tokens_per_step(block_length: int, steps_per_block: int) -> tuple[int, ...]:
    """How many positions each step of a block commits; the first steps take the remainder: 8 in 3 -> (3, 3, 2)."""
    base, extra = divmod(block_length, steps_per_block)
    return tuple(base + (step < extra) for step in range(steps_per_block))


def transfer_chance(steps: int) -> np.ndarray:
    """Dream's 1 - s/t of each step, fp32: t falls evenly from 1 to TIME_EPS, s is the next t. The last step commits all."""
    time = _linspace(1.0, TIME_EPS, steps + 1)
    chance = np.float32(1) - time[1:] / time[:-1]
    chance[-1] = 1
    return chance


def time_schedule(length: int, steps: int) -> np.ndarray:
    """How many of `length` masks each of Dream's steps commits: the integer part of masks left x (1 - s/t), all in the last one.

    In fp32, as there: with as many steps as tokens the first step commits nothing and the last one two.
    """
    left, counts = length, []
    for chance in transfer_chance(steps):
        counts.append(int(np.float32(left) * chance))
        left -= counts[-1]
    return np.array(counts)


def _linspace(start: float, stop: float, count: int) -> np.ndarray:
    """fp32 linspace from both ends towards the middle, as PyTorch computes it: the last bit decides where an integer part falls."""
    step = np.float32((np.float32(stop) - np.float32(start)) / np.float32(count - 1))
    index = np.arange(count)
    ahead = np.float32(start) + step * index.astype(np.float32)
    behind = np.float32(stop) - step * (count - 1 - index).astype(np.float32)
    return np.where(index < count // 2, ahead, behind).astype(np.float32)
