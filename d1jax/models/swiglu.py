"""The gated activation of every MLP, with a way back of its own.

Any leading shape x, F hidden units.
"""

from __future__ import annotations

import jax
from jax import Array


@jax.custom_vjp
def swiglu(gate_xF: Array, up_xF: Array) -> Array:
    """silu(gate) * up, with silu(x) = x sigmoid(x), in the dtype of its arguments. Source: arXiv 2002.05202.

    The way back keeps the two arguments alone and computes the sigmoid again; autodiff would keep 5 arrays of this size.
    """
    return jax.nn.silu(gate_xF) * up_xF


def _forward(gate_xF: Array, up_xF: Array) -> tuple[Array, tuple[Array, Array]]:
    return swiglu(gate_xF, up_xF), (gate_xF, up_xF)


def _backward(kept: tuple[Array, Array], gradient_xF: Array) -> tuple[Array, Array]:
    gate_xF, up_xF = kept
    sigmoid_xF = jax.nn.sigmoid(gate_xF)
    slope_xF = sigmoid_xF * (1 + gate_xF * (1 - sigmoid_xF))  # of silu
    return gradient_xF * up_xF * slope_xF, gradient_xF * gate_xF * sigmoid_xF


swiglu.defvjp(_forward, _backward)
