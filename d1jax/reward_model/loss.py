"""Losses of reward models, and how good one is on pairs that it has not seen.

Q pairs.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy.stats import rankdata

BINS = 10  # of the calibration


def pairwise(better_Q: Array, worse_Q: Array) -> Array:
    """[Q]: -log sigmoid(score of the better text - score of the worse one) (Bradley-Terry; DeepSeek-V2, arXiv 2405.04434, section 4.2)."""
    return -jax.nn.log_sigmoid(better_Q - worse_Q)


def pointwise(better_Q: Array, worse_Q: Array) -> Array:
    """[Q]: the mean of -log sigmoid(score) of the better text and -log(1 - sigmoid(score)) of the worse one: each text by itself."""
    return -(jax.nn.log_sigmoid(better_Q) + jax.nn.log_sigmoid(-worse_Q)) / 2


def stepwise(score_BK: Array, label_BK: Array) -> Array:
    """[B, K]: binary cross-entropy of a step, -log sigmoid(score) where it is right and -log(1 - sigmoid(score)) where it is wrong."""
    return -(label_BK * jax.nn.log_sigmoid(score_BK) + (1 - label_BK) * jax.nn.log_sigmoid(-score_BK))


def quality_of_steps(score_T: np.ndarray, label_T: np.ndarray) -> dict[str, float]:
    """{"steps", "right", "accuracy", "ranked", "margin", "calibration_error"} of scores of held-out steps T.

    right: share of the steps that are right. accuracy: share whose score has the right sign. ranked: chance that a right step scores
    higher than a wrong one, a tie being half. margin: mean score of the right ones minus that of the wrong ones. calibration_error: as
    in `quality`, of sigmoid(|score|). ranked and margin are NaN where all steps are right, or all wrong.
    """
    right_T = label_T == 1
    higher = rankdata(score_T)[right_T].sum() - right_T.sum() * (right_T.sum() + 1) / 2
    pairs = right_T.sum() * (~right_T).sum()
    judged_T = np.where(score_T == 0, 0.5, (score_T > 0) == right_T)
    return {
        "steps": len(score_T),
        "right": float(right_T.mean()),
        "accuracy": float(judged_T.mean()),
        "ranked": float(higher / pairs) if pairs else math.nan,
        "margin": float(score_T[right_T].mean() - score_T[~right_T].mean()) if pairs else math.nan,
        "calibration_error": calibration_error(np.abs(score_T), judged_T),
    }


def quality(better_Q: np.ndarray, worse_Q: np.ndarray) -> dict[str, float]:
    """{"accuracy", "margin", "calibration_error"} of scores of held-out pairs.

    accuracy: share of pairs whose better text scores higher, a tie being half. margin: mean difference. calibration_error: the expected
    difference between how sure the model is, sigmoid of the larger score minus the smaller, and how often it is right, in BINS bins of
    equal width over [0.5, 1] (Guo et al., arXiv 1706.04599, eq. 3).
    """
    margin_Q = better_Q - worse_Q
    right_Q = np.where(margin_Q > 0, 1.0, np.where(margin_Q < 0, 0.0, 0.5))
    return {
        "accuracy": float(right_Q.mean()),
        "margin": float(margin_Q.mean()),
        "calibration_error": calibration_error(np.abs(margin_Q), right_Q),
    }


def calibration_error(logit_T: np.ndarray, right_T: np.ndarray) -> float:
    """Expected difference between how sure a judgement is, sigmoid(logit) of a logit of 0 or more, and how often it is right."""
    sure_T = 1 / (1 + np.exp(-logit_T))
    bin_T = np.minimum(((sure_T - 0.5) * 2 * BINS).astype(int), BINS - 1)
    places = (bin_T == place for place in range(BINS))
    error = sum(abs(sure_T[here_T].sum() - right_T[here_T].sum()) for here_T in places)
    return float(error / len(logit_T))


LOSSES = {"pairwise": pairwise, "pointwise": pointwise}


def accuracy(better_Q: Array, worse_Q: Array) -> Array:
    """Share of pairs whose better text scores higher; a tie is half."""
    return jnp.mean((better_Q > worse_Q) + 0.5 * (better_Q == worse_Q))
