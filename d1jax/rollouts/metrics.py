"""What a rollout batch reports, under TRL's names where it has one.

Q problems, G completions of each, B = Q G rows, C completion columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from d1jax.diffusion.rollout import Rollout
from d1jax.evaluation import decoding_order
from d1jax.rollouts.generate import Graded
from d1jax.rollouts.rewards import equal_groups


def of_rewards(graded: Graded) -> dict[str, float]:
    """Means and spreads of the rewards, and how many groups teach nothing because all of theirs are equal."""
    reward_QG = graded.reward_QG
    values = {
        "reward": reward_QG.mean(),
        "reward_std": reward_QG.std(axis=1).mean(),
        "rewards/failures": len(graded.judge.failures),
        "frac_reward_zero_std": equal_groups(reward_QG).mean(),
    }
    for name, rewards_B in graded.parts_B.items():
        applies_B = rewards_B[~np.isnan(rewards_B)]  # of several tasks, the rows of those that have it
        if len(applies_B):
            values |= {f"rewards/{name}/mean": applies_B.mean(), f"rewards/{name}/std": applies_B.std()}
    return {name: float(value) for name, value in values.items()}


def of_completions(
    rollout: Rollout, texts: Sequence[str], group: int, end_ids: tuple[int, ...], grids: bool = False
) -> dict[str, float]:
    """Lengths, distinct texts, repetition, forward passes and decoding order. grids: the answers are grids, whose lines each end
    with a line break.
    """
    distinct = [len(set(texts[i : i + group])) for i in range(0, len(texts), group)]
    return {
        "completions/mean_length": float(rollout.length_B.mean()),
        "completions/clipped_ratio": clipped_ratio(rollout.tokens_BC, texts, end_ids, grids),
        "completions/distinct_per_group": float(np.mean(distinct)),
        "completions/repeated_tokens": repeated_tokens(rollout.tokens_BC, rollout.length_B),
        "sampler/nfe": float(rollout.nfe_B.mean()),
        **decoding_order.metrics(rollout),
    }


def clipped_ratio(tokens_BC: np.ndarray, texts: Sequence[str], end_ids: tuple[int, ...], grids: bool) -> float:
    """Share of the completions that the length limit has cut off: they have no token that ends a text.

    A grid that fills the canvas has no room for one; it is whole when its last line is closed.
    """
    endless_B = ~np.isin(tokens_BC, end_ids).any(axis=1)
    closed_B = np.array([grids and text.endswith("\n") for text in texts])
    return float((endless_B & ~closed_B).mean())


def repeated_tokens(tokens_BC: np.ndarray, length_B: np.ndarray) -> float:
    """Share of the tokens behind the first of a text that equal the token before them; 0 where there are none."""
    inside_BC = np.arange(1, tokens_BC.shape[1])[None, :] < length_B[:, None]
    same_BC = (tokens_BC[:, 1:] == tokens_BC[:, :-1]) & inside_BC
    return float(same_BC.sum() / max(inside_BC.sum(), 1))
