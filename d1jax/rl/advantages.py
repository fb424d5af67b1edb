"""Rewards of a group -> advantages, on the host in float64.

Q problems, G completions of each.
"""

from __future__ import annotations

import numpy as np

# Rewards are sums of weights x parts, so equal ones may differ by rounding: 0.1 + 0.2 is not 0.3. What is closer than this share of the
# largest reward of the batch is a tie.
TIE = 1e-9


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


def accepted(rewards_QG: np.ndarray) -> np.ndarray:
    """1 where the reward is 1, else 0: imitate what is right (rejection sampling; DeepSeekMath's gradient coefficient of RFT)."""
    return (np.abs(rewards_QG - 1.0) <= TIE).astype(np.float64)


ADVANTAGES = {
    "center": center,
    "zscore": zscore,
    "leave_one_out": leave_one_out,
    "batch": batch,
    "softmax": softmax,
    "accepted": accepted,
}


def group_advantages(kind: str, rewards_QG: np.ndarray, **settings: float) -> np.ndarray:
    """[Q, G] fp32. A group of equal rewards gets exactly zero, which rounding of its mean would not give; accepted compares
    with no group.
    """
    rewards_QG = np.asarray(rewards_QG, np.float64)
    advantages_QG = ADVANTAGES[kind](rewards_QG, **settings)
    if kind != "accepted":
        advantages_QG = np.where(equal_groups(rewards_QG)[:, None], 0.0, advantages_QG)
    return advantages_QG.astype(np.float32)


def equal_groups(rewards_QG: np.ndarray) -> np.ndarray:
    """[Q]: whether all completions of a problem have the same reward (up to TIE), so that nothing is learnt from comparing them."""
    return rewards_QG.max(axis=1) - rewards_QG.min(axis=1) <= tolerance(rewards_QG)


def tolerance(rewards: np.ndarray) -> float:
    """How far apart two rewards of this batch may be and still be a tie: TIE x the largest reward."""
    return TIE * np.abs(rewards).max(initial=0.0)


def pairs(rewards_QG: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows [2 Q] of the flat batch, advantages [2 Q]): the best of each group with 1, then the worst with -1; of ties the first.

    A group of equal rewards has advantage 0: its pair says nothing. Rewards closer than `tolerance` are ties.
    """
    group = rewards_QG.shape[1]
    first_Q = np.arange(len(rewards_QG)) * group
    best_QG = rewards_QG >= rewards_QG.max(axis=1, keepdims=True) - tolerance(rewards_QG)
    worst_QG = rewards_QG <= rewards_QG.min(axis=1, keepdims=True) + tolerance(rewards_QG)
    rows = np.concatenate([first_Q + best_QG.argmax(axis=1), first_Q + worst_QG.argmax(axis=1)])
    differ_Q = (~equal_groups(rewards_QG)).astype(np.float32)
    return rows, np.concatenate([differ_Q, -differ_Q])


def process_advantages(
    kind: str, gains_QGK: np.ndarray, step_QGC: np.ndarray, steps_QG: np.ndarray, eps: float = 1e-4
) -> np.ndarray:
    """[Q, G, C] fp32: A of a token = sum of the normalised rewards of its step and all later ones (DeepSeekMath, section 4.1.3).

    gains [Q, G, K] are the rewards of steps 0 .. steps - 1 of each completion; `step` says to which step a token belongs. Normalised
    over all steps of all completions of the group: minus the mean ("center"), and / (std + eps) ("zscore").
    """
    real_QGK = np.arange(gains_QGK.shape[2])[None, None, :] < steps_QG[:, :, None]
    out_QGC = np.zeros(step_QGC.shape)
    for q, (gains_GK, real_GK) in enumerate(zip(gains_QGK, real_QGK, strict=True)):
        values = gains_GK[real_GK]
        if values.max() - values.min() <= tolerance(values):
            continue
        scale = values.std(ddof=1) + eps if kind == "zscore" else 1.0
        normal_GK = np.where(real_GK, (gains_GK - values.mean()) / scale, 0.0)
        later_GK = normal_GK[:, ::-1].cumsum(axis=1)[:, ::-1]
        out_QGC[q] = np.take_along_axis(later_GK, step_QGC[q], axis=1)
    return out_QGC.astype(np.float32)
