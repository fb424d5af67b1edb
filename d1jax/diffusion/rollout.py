"""What a sampler returns: the tokens, when and how surely each was unmasked, and what it cost.

B rows, C completion columns.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jax import Array

NEVER_DECODED = -1
NOT_FINITE = (
    "the model's predictions are NaN or infinite; its weights are damaged, or its activations too large for model.dtype"
)


class Rollout(NamedTuple):
    """B completions of C tokens, and how they came about."""

    tokens_BC: Array
    # The step that unmasked the position; NEVER_DECODED behind the end of the text of a row that stopped early.
    unmask_step_BC: Array
    confidence_BC: Array  # the model's probability of the token when it was unmasked
    # Log-probabilities of drawing the token then, at the sampler's temperature and filters, and of taking the position when it
    # was taken, given the predictions (0 where the order is not drawn).
    token_logp_BC: Array
    order_logp_BC: Array
    length_B: Array  # through the first token that ends a text
    nfe_B: Array  # forward passes that the row took part in
    cached_nfe_B: Array  # those of them over a window only
    entropy_BC: Array  # of the prediction that the token was drawn from, in nats; 0 unless the sampler records it


def not_finite(confidence_BC: np.ndarray) -> str | None:
    """What is wrong with decoded rows, from the probabilities of their tokens; None where nothing is.

    Predictions that are not numbers must not pass as a text: the argmax of NaN is a token like any other.
    """
    rows = np.flatnonzero(~np.isfinite(confidence_BC).all(axis=1))
    if not len(rows):
        return None
    return f"row {rows[0]} ({len(rows)} of {len(confidence_BC)} rows): {NOT_FINITE}"
