"""DPO and KTO on estimates of log-likelihoods, and which completions are compared.

Q pairs, G completions of a problem, B rows of texts, C completion columns.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from d1jax.config import Kto
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


def gains(logp_BC: Array, reference_logp_BC: Array, mask_BC: Array) -> Array:
    """[B]: log p - log p_reference of a text, the sum over its tokens."""
    return jnp.sum((logp_BC - reference_logp_BC) * mask_BC, axis=1)


def dpo(chosen_Q: Array, rejected_Q: Array, beta: float) -> Array:
    """[Q]: -log sigmoid(beta x (gain of the chosen - gain of the rejected)).

    Source: DPO, arXiv 2305.18290, eq. 7; with bounds for likelihoods LLaDA 1.5, arXiv 2505.19223, eq. 9.
    """
    return -jax.nn.log_sigmoid(beta * (chosen_Q - rejected_Q))


def kto(wanted_Q: Array, unwanted_Q: Array, baseline: Array, loss: Kto) -> Array:
    """[Q]: the mean of desirable x (1 - sigmoid(beta (gain - baseline))) of a wanted text and of undesirable x
    (1 - sigmoid(beta (baseline - gain))) of an unwanted one. The baseline is the mean gain of the batch, without a gradient.

    Source: KTO, arXiv 2402.01306, eq. 8, whose baseline is an estimate of the KL; ELBO-KTO, arXiv 2510.23658, for the batch mean.
    """
    good_Q = loss.desirable * (1 - jax.nn.sigmoid(loss.beta * (wanted_Q - baseline)))
    bad_Q = loss.undesirable * (1 - jax.nn.sigmoid(loss.beta * (baseline - unwanted_Q)))
    return (good_Q + bad_Q) / 2
