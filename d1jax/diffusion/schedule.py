"""Which block a denoising step works on, and how many positions it unmasks there. Plain numbers, fixed before anything is compiled."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from d1jax.config import SamplerConfig

TIME_EPS = 1e-3  # where Dream's time ends


class StepSchedule(NamedTuple):
    """K steps that may unmask something. Steps that unmask nothing are left out: at any temperature they change nothing."""

    number_K: np.ndarray  # the step that the schedule calls it, from 0
    start_K: np.ndarray  # first column of the block
    count_K: np.ndarray  # positions to unmask; -1: each by its probability, or as many as the adaptive rule accepts
    probability_K: np.ndarray  # of a masked position to be unmasked, where each goes by chance


def step_schedule(config: SamplerConfig) -> StepSchedule:
    """The steps of a completion under `config.schedule`."""
    length = config.completion_length
    block = config.block_length
    steps = config.max_steps
    number_K = np.arange(steps)
    start_K = np.zeros(steps, int)
    count_K = np.full(steps, -1)
    probability_K = np.zeros(steps)
    if config.schedule.name == "even":
        counts = tokens_per_step(block, steps * block // length)
        start_K = number_K // len(counts) * block
        count_K = np.array(counts)[number_K % len(counts)]
    elif config.schedule.name == "time":
        count_K = time_schedule(length, steps)
    elif config.schedule.name == "chance":
        probability_K = unmask_probability(steps)
    # Else the schedule is adaptive: one position a step at the least, and each row works on its own first block with a mask.
    worked = count_K != 0
    return StepSchedule(
        number_K=number_K[worked].astype(np.int32),
        start_K=start_K[worked].astype(np.int32),
        count_K=count_K[worked].astype(np.int32),
        probability_K=probability_K[worked].astype(np.float32),
    )


def tokens_per_step(block_length: int, steps_per_block: int) -> tuple[int, ...]:
    """How many positions each step of a block unmasks; the first steps take the remainder: 8 in 3 -> (3, 3, 2)."""
    base, extra = divmod(block_length, steps_per_block)
    return tuple(base + (step < extra) for step in range(steps_per_block))


def unmask_probability(steps: int) -> np.ndarray:
    """Dream's 1 - s/t of each step, fp32: t falls evenly from 1 to TIME_EPS, s is the next t. The last step unmasks all."""
    time = _linspace(1.0, TIME_EPS, steps + 1)
    probability = np.float32(1) - time[1:] / time[:-1]
    probability[-1] = 1
    return probability


def time_schedule(length: int, steps: int) -> np.ndarray:
    """How many of `length` masks each of Dream's steps unmasks: the integer part of masks left x (1 - s/t), all in the last one.

    In fp32, as there: with as many steps as tokens the first step unmasks nothing and the last one two.
    """
    left = length
    counts = []
    for probability in unmask_probability(steps):
        counts.append(int(np.float32(left) * probability))
        left -= counts[-1]
    return np.array(counts)


def _linspace(start: float, stop: float, count: int) -> np.ndarray:
    """fp32 linspace from both ends towards the middle, as PyTorch computes it: the last bit decides where an integer part falls."""
    step = np.float32((np.float32(stop) - np.float32(start)) / np.float32(count - 1))
    index = np.arange(count)
    ahead = np.float32(start) + step * index.astype(np.float32)
    behind = np.float32(stop) - step * (count - 1 - index).astype(np.float32)
    return np.where(index < count // 2, ahead, behind).astype(np.float32)
