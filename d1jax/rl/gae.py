"""Generalised advantage estimation over denoising steps, on the host in float64.

A step is what the sampler unmasked at once; its value and its reward are the means over its tokens. The reward of a text is earned by the
step that unmasked the last of it.

B rows, C completion columns, K steps.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def steps_of(unmask_step_BC: np.ndarray, text_BC: np.ndarray, shrink: int) -> tuple[np.ndarray, np.ndarray]:
    """(the step of each token, `shrink` of the sampler's being one; the tokens of the text that some step has unmasked)."""
    decoded_BC = np.asarray(text_BC) & (unmask_step_BC >= 0)
    return np.where(decoded_BC, unmask_step_BC // shrink, 0), decoded_BC


def returns(reward_B: np.ndarray, step_BC: np.ndarray, text_BC: np.ndarray, discount: float) -> np.ndarray:
    """[B, C] float64: R_j = r_j + discount R*_(t + 1) of every token of the text, 0 elsewhere; what a value head learns.

    `step_BC` is the step that unmasked each token (never below 0 inside of `text_BC`); steps without a token of the text do not count.
    With discount = 1 it is the reward of the text, at every token.

    Source: TraceRL, arXiv 2509.06949, and its released code (Gen-Verse/dLLM-RL).
    """
    zero_BC = np.zeros(step_BC.shape)
    return _backwards(reward_B, zero_BC, step_BC, text_BC, lambda r, value, later: r + discount * later[0])


def advantages(
    reward_B: np.ndarray,
    value_BC: np.ndarray,
    step_BC: np.ndarray,
    text_BC: np.ndarray,
    discount: float,
    trace: float,
) -> np.ndarray:
    """[B, C] float64: A_j = r_j - V_j + discount V*_(t + 1) + discount trace A*_(t + 1) of every token of the text, 0 elsewhere.

    V*_t and A*_t are the value and the advantage of step t, V_j the value of token j in it. With discount = trace = 1 it is the return
    minus V_j; with discount = 1 and trace = 0 the temporal difference of one step (Schulman et al., arXiv 1506.02438, eq. 16, for tokens
    that are unmasked together).

    Source: TraceRL, arXiv 2509.06949, and its released code. Arguments as in `returns`.
    """

    def advantage(r: np.ndarray, value: np.ndarray, later: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        return r - value + discount * later[1] + discount * trace * later[0]

    return _backwards(reward_B, value_BC, step_BC, text_BC, advantage)


def _backwards(
    reward_B: np.ndarray,
    value_BC: np.ndarray,
    step_BC: np.ndarray,
    text_BC: np.ndarray,
    rule: Callable[[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]], np.ndarray],
) -> np.ndarray:
    """[B, C]: `rule(reward, value, (its own result, value) of the step behind)`, from the last step to the first, of tokens and of steps.

    The last step that holds a token of the text earns the reward, and nothing is behind it.
    """
    value_BC = np.asarray(value_BC, np.float64)
    out_BC = np.zeros(step_BC.shape)
    later_2B = np.zeros((2, len(step_BC)))
    earned_B = np.zeros(len(step_BC), bool)
    for step in range(int(step_BC.max(initial=-1)), -1, -1):
        here_BC = text_BC & (step_BC == step)
        count_B = here_BC.sum(axis=1)
        here_B = count_B > 0
        reward_now_B = np.where(here_B & ~earned_B, reward_B, 0.0)
        earned_B |= here_B
        mean_B = np.where(here_BC, value_BC, 0.0).sum(axis=1) / np.maximum(count_B, 1)
        later = (later_2B[0][:, None], later_2B[1][:, None])
        out_BC = np.where(here_BC, rule(reward_now_B[:, None], value_BC, later), out_BC)
        of_step_2B = np.stack([rule(reward_now_B, mean_B, (later_2B[0], later_2B[1])), mean_B])
        later_2B = np.where(here_B, of_step_2B, later_2B)
    return out_BC
