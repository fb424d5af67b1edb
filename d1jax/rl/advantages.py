"""Rewards -> the advantage of every token, on the host in float64.

Q problems, G completions of each, B = Q G rows, C completion columns, K most steps of a row.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from d1jax.config import RlConfig
from d1jax.config.advantage import Advantage
from d1jax.data.steps import text_steps
from d1jax.data.tokenizers import Tokenizer
from d1jax.diffusion.rollout import Rollout
from d1jax.rl import gae, supervision
from d1jax.rollouts.generate import Graded
from d1jax.rollouts.rewards import TIE, equal_groups, tolerance


def center(rewards_QG: np.ndarray) -> np.ndarray:
    """r - mean of the group (d1, Dr. GRPO)."""
    return rewards_QG - rewards_QG.mean(axis=1, keepdims=True)


def zscore(rewards_QG: np.ndarray, eps: float = 1e-4) -> np.ndarray:
    """(r - mean) / (std + eps) of the group, std with G - 1 (DeepSeekMath, arXiv 2402.03300, eq. 10; TRL's eps)."""
    return center(rewards_QG) / (rewards_QG.std(axis=1, ddof=1, keepdims=True) + eps)


def rloo(rewards_QG: np.ndarray) -> np.ndarray:
    """r - mean of the others = G / (G - 1) (r - mean of the group) (RLOO; DiffuCoder)."""
    group = rewards_QG.shape[1]
    return center(rewards_QG) * (group / (group - 1))


def softmax(rewards_QG: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """G (softmax(psi A) - softmax(-psi A)) over the group, with A = r - mean (wd1, arXiv 2507.08838, lambda = 1).

    Times G, because aggregation takes the mean over rows and wd1 the sum over a group.
    """
    scaled_QG = scale * center(rewards_QG)
    good_QG, bad_QG = (np.exp(sign * scaled_QG - (sign * scaled_QG).max(axis=1, keepdims=True)) for sign in (1, -1))
    weights = good_QG / good_QG.sum(axis=1, keepdims=True) - bad_QG / bad_QG.sum(axis=1, keepdims=True)
    return rewards_QG.shape[1] * weights


def reward(rewards_QG: np.ndarray) -> np.ndarray:
    """The reward itself: with rewards of 0 and 1 what is right is imitated (DeepSeekMath's gradient coefficient of online RFT)."""
    return rewards_QG


def decoupled(parts_NQG: np.ndarray, weights_N: np.ndarray, eps: float = 1e-4) -> np.ndarray:
    """[Q, G]: sum over rewards n of w_n (r_n - mean_group) / (std_group + eps), then minus its mean and / (std + eps) of the batch.

    So a reward that varies little inside of groups (a format that nearly all keep) weighs as much as one that varies much, which the
    z-score of their sum would lose. NaN: a reward does not apply, and adds nothing. std with G - 1.

    Source: GDPO, arXiv 2601.05242.
    """
    known_NQG = ~np.isnan(parts_NQG)
    count_NQ1 = np.maximum(known_NQG.sum(axis=2, keepdims=True), 1)
    mean_NQ1 = np.where(known_NQG, parts_NQG, 0.0).sum(axis=2, keepdims=True) / count_NQ1
    away_NQG = np.where(known_NQG, parts_NQG - mean_NQ1, 0.0)
    std_NQ1 = np.sqrt((away_NQG**2).sum(axis=2, keepdims=True) / np.maximum(count_NQ1 - 1, 1))
    largest = np.abs(np.where(known_NQG, parts_NQG, 0.0)).max(axis=(1, 2), keepdims=True)
    equal_NQ1 = np.abs(away_NQG).max(axis=2, keepdims=True) <= TIE * largest
    normal_NQG = np.where(equal_NQ1, 0.0, away_NQG / (std_NQ1 + eps))
    summed_QG = np.tensordot(weights_N, normal_NQG, axes=1)
    if not summed_QG.any():
        return summed_QG
    return (summed_QG - summed_QG.mean()) / (summed_QG.std(ddof=1) + eps)


def decoupled_alone(rewards_QG: np.ndarray) -> np.ndarray:
    """`decoupled` of one reward: its z-score, normalised over the batch."""
    return decoupled(rewards_QG[None], np.ones(1))


ADVANTAGES = {
    "decoupled": decoupled_alone,
    "center": center,
    "zscore": zscore,
    "rloo": rloo,
    "softmax": softmax,
    "reward": reward,
}


def group_advantages(advantage: Advantage, rewards_QG: np.ndarray) -> np.ndarray:
    """[Q, G] fp32: the advantages of completions, by the function of that name with its parameters.

    A group of equal rewards has advantages of exactly zero, which the rounding of its mean would not give; `reward` compares
    completions with nothing, so there it is the reward.
    """
    rewards_QG = np.asarray(rewards_QG, np.float64)
    advantages_QG = ADVANTAGES[advantage.name](rewards_QG, **dataclasses.asdict(advantage))
    if advantage.name != "reward":
        advantages_QG = np.where(equal_groups(rewards_QG)[:, None], 0.0, advantages_QG)
    return advantages_QG.astype(np.float32)


def compute_advantages(
    config: RlConfig,
    rollout: Rollout,
    reward_QG: np.ndarray,
    graded: Graded,
    value_BC: np.ndarray | None,
    tokenizer: Tokenizer,
    seed: tuple[int, int],
) -> np.ndarray:
    """[B, C] fp32: the advantage of every token of a rollout batch.

    `reward_QG` are the rewards of the texts, a KL taken off where the method does so; `graded` has the single rewards, which the decoupled
    advantage normalises, and what process supervision asks about steps; `value_BC` are those of the value model, which gae needs.
    Negative controls: "shuffled_rewards" gives rewards to the wrong
    completions (by `seed`), "zero_advantages" gives none.
    """
    rows, columns = rollout.tokens_BC.shape
    if config.negative_control == "zero_advantages":
        return np.zeros((rows, columns), np.float32)
    if config.advantage.name == "gae":
        text_BC = np.arange(columns)[None, :] < rollout.length_B[:, None]
        step_BC, text_BC = gae.steps_of(rollout.unmask_step_BC, text_BC, config.advantage.shrink)
        rule = (config.advantage.discount, config.advantage.trace)
        return gae.advantages(reward_QG.reshape(-1), value_BC, step_BC, text_BC, *rule).astype(np.float32)
    weights = config.reward_weights
    parts_NQG = np.stack([graded.parts_B[name].reshape(reward_QG.shape) for name in weights])
    if config.negative_control == "shuffled_rewards":
        order_B = np.random.default_rng(seed).permutation(reward_QG.size)
        reward_QG = reward_QG.reshape(-1)[order_B].reshape(reward_QG.shape)
        parts_NQG = parts_NQG.reshape(len(weights), -1)[:, order_B].reshape(parts_NQG.shape)
    if config.advantage.name == "decoupled":
        advantage_B = decoupled(parts_NQG, np.array(list(weights.values()))).astype(np.float32).reshape(-1)
        return np.repeat(advantage_B[:, None], columns, axis=1)
    if config.supervision.name == "outcome":
        advantage_B = group_advantages(config.advantage, reward_QG).reshape(-1)
        return np.repeat(advantage_B[:, None], columns, axis=1)
    if config.supervision.name == "commit_steps":
        step_BC = supervision.commit_steps(rollout.unmask_step_BC, rollout.length_B, config.supervision.parts)
    else:
        step_BC = text_steps(rollout.tokens_BC, rollout.length_B, tokenizer)
    if config.supervision.name == "model_steps":
        gains_BK, steps_B = supervision.by_model(
            graded.token_score_BC, step_BC, rollout.length_B, reward_QG.reshape(-1)
        )
    else:
        gains_BK, steps_B = supervision.gains(step_BC, rollout.tokens_BC, tokenizer, graded.judge)
    shape_QG = reward_QG.shape
    advantage_QGC = process_advantages(
        config.advantage.name,
        gains_BK.reshape(*shape_QG, -1),
        step_BC.reshape(*shape_QG, -1),
        steps_B.reshape(shape_QG),
        by_place=config.supervision.against == "place",
    )
    return advantage_QGC.reshape(rows, columns)


def process_advantages(
    kind: str,
    gains_QGK: np.ndarray,
    step_QGC: np.ndarray,
    steps_QG: np.ndarray,
    eps: float = 1e-4,
    by_place: bool = False,
) -> np.ndarray:
    """[Q, G, C] fp32: A of a token = sum of the normalised rewards of its step and all later ones (DeepSeekMath, section 4.1.3).

    gains [Q, G, K] are the rewards of steps 0 .. steps - 1 of each completion; `step` says to which step a token belongs. Normalised
    over all steps of all completions of the group: minus the mean ("center"), and / (std + eps) ("zscore").

    by_place, which is ours: minus the mean of the group's steps at the same place. Where some places earn more than others (tags that are
    always right, results that often are not), the mean over all would push every completion's tokens up or down by their place alone.
    """
    real_QGK = np.arange(gains_QGK.shape[2])[None, None, :] < steps_QG[:, :, None]
    out_QGC = np.zeros(step_QGC.shape)
    for q, (gains_GK, real_GK) in enumerate(zip(gains_QGK, real_QGK, strict=True)):
        values = gains_GK[real_GK]
        if values.max() - values.min() <= tolerance(values):
            continue
        mean_1K = values.mean()
        if by_place:
            mean_1K = np.where(real_GK, gains_GK, 0.0).sum(axis=0) / np.maximum(real_GK.sum(axis=0), 1)
        away_GK = np.where(real_GK, gains_GK - mean_1K, 0.0)
        scale = away_GK[real_GK].std(ddof=1) + eps if kind == "zscore" else 1.0
        normal_GK = away_GK / scale
        later_GK = normal_GK[:, ::-1].cumsum(axis=1)[:, ::-1]
        out_QGC[q] = np.take_along_axis(later_GK, step_QGC[q], axis=1)
    return out_QGC.astype(np.float32)
