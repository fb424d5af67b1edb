"""Predictions that are not numbers must not pass as a text: the argmax of NaN is a token like any other."""

from __future__ import annotations

import numpy as np

CURE = (
    "the model's predictions are NaN or infinite; its weights are damaged, or its activations too large for model.dtype"
)


def not_finite(confidence_BC: np.ndarray) -> str | None:
    """What is wrong with decoded rows, from the probabilities of their tokens; None where nothing is."""
    rows = np.flatnonzero(~np.isfinite(confidence_BC).all(axis=1))
    return f"row {rows[0]} ({len(rows)} of {len(confidence_BC)} rows): {CURE}" if len(rows) else None
