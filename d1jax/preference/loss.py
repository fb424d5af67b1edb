"""DPO on estimates of log-likelihoods, and which completions are compared.

Q problems, G completions of each, B = 2 Q rows (chosen, then rejected), C completion columns.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from d1jax.rollouts.rewards import equal_groups, tolerance


class Pairs(NamedTuple):
    """Host arrays."""

    rows_B: np.ndarray  # of the rollout batch: the chosen ones, then the rejected ones in the same order
    tied_Q: np.ndarray  # groups of equal rewards, whose pair says nothing


def pairs_of(reward_QG: np.ndarray) -> Pairs:
    """The best and the worst completion of each group; of ties the first. Rewards closer than `tolerance` are ties."""
    group = reward_QG.shape[1]
    first_Q = np.arange(len(reward_QG)) * group
    best_QG = reward_QG >= reward_QG.max(axis=1, keepdims=True) - tolerance(reward_QG)
    worst_QG = reward_QG <= reward_QG.min(axis=1, keepdims=True) + tolerance(reward_QG)
    rows_B = np.concatenate([first_Q + best_QG.argmax(axis=1), first_Q + worst_QG.argmax(axis=1)])
    return Pairs(rows_B, equal_groups(reward_QG))


def dpo(logp_BC: Array, reference_logp_BC: Array, mask_BC: Array, beta: float) -> tuple[Array, Array]:
    """(loss [Q], margin [Q]) of pairs: the first half of the rows is chosen, the second rejected, in the same order.

    margin = beta [(log p - log p_reference)(chosen) - (log p - log p_reference)(rejected)], of sums over a text;
    loss = -log sigmoid(margin).

    Source: DPO, arXiv 2305.18290, eq. 7; with bounds for likelihoods LLaDA 1.5, arXiv 2505.19223, eq. 9.
    """
    gain_B = jnp.sum((logp_BC - reference_logp_BC) * mask_BC, axis=1)
    pairs = gain_B.shape[0] // 2
    margin_Q = beta * (gain_B[:pairs] - gain_B[pairs:])
    return -jax.nn.log_sigmoid(margin_Q), margin_Q
