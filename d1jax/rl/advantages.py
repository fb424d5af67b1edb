"""Rewards of a group -> advantages, on the host in float64.

Q problems, G completions of each.
"""

from __future__ import annotations

import numpy as np


def center(rewards_QG: np.ndarray) -> np.ndarray:
    """r - mean of the group (d1, Dr. GRPO)."""
    return rewards_QG - rewards_QG.mean(axis=1, keepdims=True)


def zscore(rewards_QG: np.ndarray, eps: float = 1e-4) -> np.ndarray:
    """(r - mean) / (std + eps) of the group, std with G - 1 (DeepSeekMath, arXiv 2402.03300, eq. 10; TRL's eps)."""
    return center(rewards_QG) / (rewards_QG.std(axis=1, ddof=1, keepdims=True) + eps)


def leave_one_out(rewards_QG: np.ndarray) -> np.ndarray:
    """r - mean of the others = G / (G - 1) (r - mean of the group) (RLOO; DiffuCoder)."""
    group = rewards_QG.shape[1]
    return center(rewards_QG) * (group / (group - 1))


def batch(rewards_QG: np.ndarray, eps: float = 1e-4) -> np.ndarray:
    """(r - mean of the group) / (std of the whole batch + eps): groups keep their relative sizes (TRL's scale_rewards: batch)."""
    return center(rewards_QG) / (rewards_QG.std(ddof=1) + eps)


def softmax(rewards_QG: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """G (softmax(psi A) - softmax(-psi A)) over the group, with A = r - mean (wd1, arXiv 2507.08838, lambda = 1).

    Times G, because pooling takes the mean over rows and wd1 the sum over a group.
    """
    scaled_QG = scale * center(rewards_QG)
    good_QG, bad_QG = (np.exp(sign * scaled_QG - (sign * scaled_QG).max(axis=1, keepdims=True)) for sign in (1, -1))
    weights = good_QG / good_QG.sum(axis=1, keepdims=True) - bad_QG / bad_QG.sum(axis=1, keepdims=True)
    return rewards_QG.shape[1] * weights


ADVANTAGES = {"center": center, "zscore": zscore, "leave_one_out": leave_one_out, "batch": batch, "softmax": softmax}


def group_advantages(kind: str, rewards_QG: np.ndarray, **settings: float) -> np.ndarray:
    """[Q, G] fp32. A group of equal rewards gets exactly zero, which rounding of its mean would not give."""
    rewards_QG = np.asarray(rewards_QG, np.float64)
    equal_Q1 = rewards_QG.max(axis=1, keepdims=True) == rewards_QG.min(axis=1, keepdims=True)
    return np.where(equal_Q1, 0.0, ADVANTAGES[kind](rewards_QG, **settings)).astype(np.float32)
