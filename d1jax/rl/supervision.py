"""Process supervision: a completion as a chain of steps, and what each of them gains.

A step is a line of the text, or a part of the decoding. Its reward is what it adds: the reward of the text with this step minus
that of the text without it and all later ones, by the task's own rules; no model is needed, and the gains of a completion add up to its
reward (less that of nothing). Or a learnt model judges each line, as in DeepSeekMath (arXiv 2402.03300, section 4.1.3).

Q problems, G completions of each, B = Q G rows, C completion columns, K most steps of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from d1jax.data.tokenizers import SpecialTokens, Tokenizer
from d1jax.diffusion.reward_model import step_scores
from d1jax.diffusion.rollout import NEVER_DECODED
from d1jax.tasks.task import UNDECIDED


def commit_steps(unmask_step_BC: np.ndarray, length_B: np.ndarray, parts: int) -> np.ndarray:
    """[B, C]: the part of the decoding, of `parts` of equal length, that unmasked each token of the text. Behind it: the last one."""
    decoded_BC = (np.arange(unmask_step_BC.shape[1])[None, :] < length_B[:, None]) & (unmask_step_BC != NEVER_DECODED)
    steps_B1 = np.where(decoded_BC, unmask_step_BC, 0).max(axis=1, keepdims=True) + 1
    part_BC = np.where(decoded_BC, unmask_step_BC, 0) * parts // np.maximum(steps_B1, parts)
    return np.where(decoded_BC, part_BC, np.minimum(steps_B1, parts) - 1)


def by_model(
    token_score_BC: np.ndarray, step_BC: np.ndarray, length_B: np.ndarray, reward_B: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(reward of each step [B, K], steps of each row [B]): sigmoid of the mean token score of a step, the chance that it is right by a
    process reward model; the reward of the text is added to that of its last step.

    Source: DeepSeekMath, arXiv 2402.03300, section 4.1.3. Ours: the reward of the text, with which rule rewards stand beside the model.
    """
    steps_B = step_BC.max(axis=1) + 1
    score_BK = np.asarray(step_scores(token_score_BC, step_BC, length_B, int(steps_B.max())), np.float64)
    reward_BK = 1 / (1 + np.exp(-score_BK))
    reward_BK[np.arange(len(steps_B)), steps_B - 1] += reward_B
    return reward_BK, steps_B


def gains(
    step_BC: np.ndarray,
    tokens_BC: np.ndarray,
    tokenizer: Tokenizer,
    reward: Callable[[Sequence[str]], np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """(gain of each step [B, K], steps of each row [B]). `reward` maps a text of every row to a reward of every row.

    A token that is not there yet is UNDECIDED in the text, so that what stands behind it stays in its place.
    """
    steps_B = step_BC.max(axis=1) + 1
    before_B, found = reward([""] * len(tokens_BC)), []
    for step in range(int(steps_B.max())):
        after_B = reward(
            [unfinished(row, kept, tokenizer) for row, kept in zip(tokens_BC, step_BC <= step, strict=True)]
        )
        found.append(after_B - before_B)
        before_B = after_B
    return np.stack(found, axis=1), steps_B


def unfinished(tokens_C: np.ndarray, kept_C: np.ndarray, tokenizer: Tokenizer) -> str:
    """The text of the tokens that are there, with UNDECIDED for each that is not and has one that is behind it."""
    special: SpecialTokens = tokenizer.special
    last = int(np.flatnonzero(kept_C)[-1]) + 1 if kept_C.any() else 0
    parts, start = [], 0
    for place in range(last + 1):
        if place == last or not kept_C[place]:
            parts.append(tokenizer.decode(tokens_C[start:place].tolist()))
            parts.append(UNDECIDED if place < last else "")
            start = place + 1
        elif tokens_C[place] in special.end_ids:
            parts.append(tokenizer.decode(tokens_C[start:place].tolist()))
            break
    return "".join(parts)
