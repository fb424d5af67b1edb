"""The gated activation and its gradient against autodiff of the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.models.swiglu import swiglu


def plain(gate, up):
    return gate / (1 + jnp.exp(-gate)) * up


@given(st.lists(st.tuples(*[st.floats(-60, 60, width=32)] * 3), min_size=1, max_size=20))
def test_value_and_gradient_are_those_of_the_formula(rows):
    gate, up, weight = (jnp.asarray(column, jnp.float32) for column in zip(*rows, strict=True))
    found = jax.vjp(swiglu, gate, up)
    right = jax.vjp(plain, gate, up)
    np.testing.assert_allclose(found[0], right[0], rtol=2e-6, atol=1e-6)
    for ours, theirs in zip(found[1](weight), right[1](weight), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("value", [-1e30, -200.0, 200.0, 1e30])
def test_far_out_nothing_overflows(value):
    """sigmoid is 0 or 1 there, and the slope of silu with it."""
    gradient, _ = jax.vjp(swiglu, jnp.float32(value), jnp.float32(2.0))[1](jnp.float32(1.0))
    assert float(gradient) == (2.0 if value > 0 else 0.0)


def test_dtype_stays_and_the_way_back_keeps_two_arrays():
    gate, up = jnp.ones((3, 5), jnp.bfloat16), jnp.ones((3, 5), jnp.bfloat16)
    value, back = jax.vjp(swiglu, gate, up)
    assert value.dtype == jnp.bfloat16
    assert [x.shape for x in jax.tree.leaves(back)] == [(3, 5)] * 2
    assert {x.dtype for x in back(value)} == {jnp.dtype(jnp.bfloat16)}
