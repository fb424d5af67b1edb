"""Losses of reward models, and how good one is on pairs that it has not seen.

Q pairs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

BINS = 10  # of the calibration


def pairwise(better_Q: Array, worse_Q: Array) -> Array:
    """[Q]: -log sigmoid(score of the better text - score of the worse one) (Bradley-Terry; DeepSeek-V2, arXiv 2405.04434, section 4.2)."""
    return -jax.nn.log_sigmoid(better_Q - worse_Q)


def pointwise(better_Q: Array, worse_Q: Array) -> Array:
    """[Q]: the mean of -log sigmoid(score) of the better text and -log(1 - sigmoid(score)) of the worse one: each text by itself."""
    return -(jax.nn.log_sigmoid(better_Q) + jax.nn.log_sigmoid(-worse_Q)) / 2


def quality(better_Q: np.ndarray, worse_Q: np.ndarray) -> dict[str, float]:
    """{"accuracy", "margin", "calibration_error"} of scores of held-out pairs.

    accuracy: share of pairs whose better text scores higher, a tie being half. margin: mean difference. calibration_error: the expected
    difference between how sure the model is, sigmoid of the larger score minus the smaller, and how often it is right, in BINS bins of
    equal width over [0.5, 1] (Guo et al., arXiv 1706.04599, eq. 3).
    """
    margin_Q = better_Q - worse_Q
    right_Q = np.where(margin_Q > 0, 1.0, np.where(margin_Q < 0, 0.0, 0.5))
    sure_Q = 1 / (1 + np.exp(-np.abs(margin_Q)))
    bin_Q = np.minimum(((sure_Q - 0.5) * 2 * BINS).astype(int), BINS - 1)
    error = sum(
        abs(sure_Q[bin_Q == place].sum() - right_Q[bin_Q == place].sum())
        for place in range(BINS)
        if (bin_Q == place).any()
    )
    return {
        "accuracy": float(right_Q.mean()),
        "margin": float(margin_Q.mean()),
        "calibration_error": float(error / len(margin_Q)),
    }


LOSSES = {"pairwise": pairwise, "pointwise": pointwise}


def accuracy(better_Q: Array, worse_Q: Array) -> Array:
    """Share of pairs whose better text scores higher; a tie is half."""
    return jnp.mean((better_Q > worse_Q) + 0.5 * (better_Q == worse_Q))
