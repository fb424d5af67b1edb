"""Rewards -> what every token is credited with, on the host: outcome or process supervision, groups or pairs.

Q problems, G completions of each, B = Q G rows, C completion columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from d1jax.config import RlConfig
from d1jax.data.tokenizers import Tokenizer
from d1jax.diffusion.sampler import Rollout
from d1jax.rl import supervision
from d1jax.rl.advantages import equal_groups, group_advantages, pairs, process_advantages


class Credit(NamedTuple):
    rows_B: np.ndarray  # rows of the rollout that are trained on
    advantage_BC: np.ndarray
    kept_B: np.ndarray  # False: the row is in no mean


def credit(
    config: RlConfig,
    rollout: Rollout,
    reward_QG: np.ndarray,
    tokenizer: Tokenizer,
    judge: Callable[[list[str]], np.ndarray],
    seed: tuple[int, int],
) -> Credit:
    """Advantages of the tokens of a rollout batch. Under advantage "accepted" `reward_QG` is the reward that must be 1.

    `judge` gives the reward of one text a row, for process supervision. Negative controls: "shuffled_rewards" gives rewards to the wrong
    completions (by `seed`), "zero_advantages" gives none.
    """
    rows, columns = rollout.tokens_BC.shape
    if config.negative_control == "shuffled_rewards":
        reward_QG = np.random.default_rng(seed).permutation(reward_QG.reshape(-1)).reshape(reward_QG.shape)
    rows_B, kept_B = np.arange(rows), np.ones(rows, bool)
    if config.advantage == "pairs":
        rows_B, advantage_B = pairs(reward_QG)
        advantage_BC, kept_B = np.repeat(advantage_B[:, None], columns, axis=1), advantage_B != 0
    elif config.supervision == "outcome":
        settings = {"scale": config.softmax_scale} if config.advantage == "softmax" else {}
        advantage_B = group_advantages(config.advantage, reward_QG, **settings).reshape(-1)
        advantage_BC = np.repeat(advantage_B[:, None], columns, axis=1)
        if config.advantage == "accepted":
            kept_B = advantage_B != 0
        elif config.drop_equal_groups:
            kept_B = ~equal_groups(reward_QG).repeat(config.group_size)
    else:
        advantage_BC = _by_steps(config, rollout, reward_QG.shape, tokenizer, judge)
        if config.drop_equal_groups:
            kept_B = (advantage_BC.reshape(len(reward_QG), -1) != 0).any(axis=1).repeat(config.group_size)
    if config.negative_control == "zero_advantages":
        advantage_BC = np.zeros_like(advantage_BC)
    return Credit(rows_B, advantage_BC.astype(np.float32), kept_B)


def _by_steps(
    config: RlConfig,
    rollout: Rollout,
    shape_QG: tuple[int, int],
    tokenizer: Tokenizer,
    judge: Callable[[list[str]], np.ndarray],
) -> np.ndarray:
    if config.supervision == "text_steps":
        step_BC = supervision.text_steps(rollout.tokens_BC, rollout.length_B, tokenizer)
    else:
        step_BC = supervision.commit_steps(rollout.reveal_step_BC, rollout.length_B, config.supervision_steps)
    gains_BK, steps_B = supervision.gains(step_BC, rollout.tokens_BC, tokenizer, judge)
    gains_QGK, step_QGC = gains_BK.reshape(*shape_QG, -1), step_BC.reshape(*shape_QG, -1)
    return process_advantages(config.advantage, gains_QGK, step_QGC, steps_B.reshape(shape_QG)).reshape(step_BC.shape)
