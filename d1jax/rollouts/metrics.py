"""What a rollout batch reports, under TRL's names where it has one.

Q problems, G completions of each, B = Q G rows, C completion columns.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from d1jax.config.reward_model import MODEL
from d1jax.diffusion.rollout import Rollout
from d1jax.evaluation import decoding_order
from d1jax.rollouts.generate import Graded
from d1jax.rollouts.rewards import equal_groups

# Words by which a text takes back or tests what it has said: those that DeepSeek-R1 (arXiv 2501.12948) counts over training.
REFLECTION = ("wait", "mistake", "however", "but", "retry", "error", "verify", "wrong", "evaluate", "check")
REFLECTION_WORD = re.compile(rf"\b(?:{'|'.join(REFLECTION)})\b", re.IGNORECASE)


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
        if name.startswith(MODEL) and "solved" in graded.parts_B:
            shape = reward_QG.shape
            agreed = agreement(rewards_B.reshape(shape), graded.parts_B["solved"].reshape(shape))
            values |= {} if agreed is None else {f"rewards/agreement/{name.removeprefix(MODEL)}": agreed}
    return {name: float(value) for name, value in values.items()}


def agreement(score_QG: np.ndarray, solved_QG: np.ndarray) -> float | None:
    """Share of the pairs of a problem's completions, one solved and one not, of which a reward model scores the solved one higher; a tie is
    half. None where no problem has such a pair (a NaN is in none).

    1: it is as good as the verifier. 0.5: it says nothing any more about what is right, so what it still rewards is something else.
    """
    pairs_QGG = solved_QG[:, :, None] > solved_QG[:, None, :]
    higher_QGG = score_QG[:, :, None] > score_QG[:, None, :]
    equal_QGG = score_QG[:, :, None] == score_QG[:, None, :]
    return float((higher_QGG + 0.5 * equal_QGG)[pairs_QGG].mean()) if pairs_QGG.any() else None


def of_completions(
    rollout: Rollout, texts: Sequence[str], group: int, end_ids: tuple[int, ...], grids: bool = False
) -> dict[str, float]:
    """Lengths, distinct texts, repetition, forward passes and decoding order. grids: the answers are grids, whose lines each end
    with a line break.
    """
    distinct = [len(set(texts[i : i + group])) for i in range(0, len(texts), group)]
    reflection = {} if grids else {"completions/reflection_words": reflection_words(texts)}
    return {
        **reflection,
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


def reflection_words(texts: Sequence[str]) -> float:
    """Words of REFLECTION in a text, in any case, mean over the texts."""
    return sum(len(REFLECTION_WORD.findall(text)) for text in texts) / max(len(texts), 1)


def repeated_tokens(tokens_BC: np.ndarray, length_B: np.ndarray) -> float:
    """Share of the tokens behind the first of a text that equal the token before them; 0 where there are none."""
    inside_BC = np.arange(1, tokens_BC.shape[1])[None, :] < length_B[:, None]
    same_BC = (tokens_BC[:, 1:] == tokens_BC[:, :-1]) & inside_BC
    return float(same_BC.sum() / max(inside_BC.sum(), 1))
