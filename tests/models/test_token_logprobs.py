"""Chunked log-probabilities: the plain formula at every chunk size, and never an array of all logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d1jax.models.token_logprobs import token_logprobs

run = jax.jit(token_logprobs, static_argnums=3)


def draw(seed, shape, width, vocabulary):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.standard_normal((*shape, width)), jnp.float32)
    head_DV = jnp.asarray(rng.standard_normal((width, vocabulary)), jnp.float32)
    return hidden, head_DV, jnp.asarray(rng.integers(0, vocabulary, shape))


def plain(hidden, head_DV, targets):
    """log softmax and its entropy in float64."""
    logits = np.asarray(hidden, np.float64) @ np.asarray(head_DV, np.float64)
    logp = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    chosen = np.take_along_axis(logp, np.asarray(targets)[..., None], axis=-1)[..., 0]
    return chosen, -(np.exp(logp) * logp).sum(axis=-1)


@settings(max_examples=10)
@given(chunk=st.one_of(st.none(), st.integers(1, 15)), seed=st.integers(0, 99))
def test_every_chunk_size_equals_log_softmax_and_entropy(chunk, seed):
    hidden, head_DV, targets = draw(seed, (3, 4), 6, 9)
    scores = run(hidden, head_DV, targets, chunk)
    logp, entropy = plain(hidden, head_DV, targets)
    assert scores.logp.dtype == scores.entropy.dtype == jnp.float32
    np.testing.assert_allclose(scores.logp, logp, atol=2e-5, rtol=0)
    np.testing.assert_allclose(scores.entropy, entropy, atol=2e-5, rtol=0)


@pytest.mark.parametrize("shape", [(5,), (2, 3), (1, 2, 4)])
def test_any_leading_shape_is_kept(shape):
    hidden, head_DV, targets = draw(1, shape, 4, 7)
    logp, _ = plain(hidden, head_DV, targets)
    np.testing.assert_allclose(token_logprobs(hidden, head_DV, targets, 2).logp, logp, atol=1e-5, rtol=0)


@pytest.mark.parametrize("chunk", [None, 2])
def test_several_tokens_of_a_position_are_scored_from_one_row_of_logits(chunk):
    hidden, head_DV, _ = draw(4, (2, 3), 4, 7)
    targets = jnp.asarray(np.random.default_rng(0).integers(0, 7, (2, 3, 5)))
    each = [run(hidden, head_DV, targets[..., one], chunk) for one in range(5)]
    for found, expected in zip(run(hidden, head_DV, targets, chunk), zip(*each, strict=True), strict=True):
        np.testing.assert_allclose(found, jnp.stack(expected, axis=-1), atol=1e-6)


def test_large_logits_do_not_overflow():
    hidden, head_DV, targets = draw(2, (4,), 3, 5)
    scores = run(300 * hidden, head_DV, targets, 2)
    assert np.isfinite(scores.logp).all() and np.isfinite(scores.entropy).all()


def test_bfloat16_hidden_states_are_scored_in_float32():
    hidden, head_DV, targets = draw(3, (6,), 8, 50)
    rounded = hidden.astype(jnp.bfloat16)
    head = head_DV.astype(jnp.bfloat16)
    logp, entropy = plain(rounded, head, targets)
    scores = run(rounded, head_DV, targets, 4)
    assert scores.logp.dtype == jnp.float32
    np.testing.assert_allclose(scores.logp, logp, atol=1e-4, rtol=0)
    np.testing.assert_allclose(scores.entropy, entropy, atol=1e-4, rtol=0)


def gradients(chunk, hidden, head_DV, targets):
    def loss(hidden, head_DV):
        logp, entropy = token_logprobs(hidden, head_DV, targets, chunk)
        return jnp.sum(jnp.cos(logp)) + jnp.sum(entropy**2)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(hidden, head_DV)


def test_gradients_do_not_depend_on_the_chunk():
    inputs = draw(4, (3, 4), 6, 9)
    inputs = (inputs[0] / 2, *inputs[1:])
    whole = gradients(12, *inputs)
    assert min(float(np.abs(g).max()) for g in whole[1]) > 0.1
    for chunk in (1, 5, 6):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=2e-6), gradients(chunk, *inputs), whole
        )


def test_gradients_equal_those_of_log_softmax():
    hidden, head_DV, targets = draw(5, (4,), 6, 9)

    def loss(hidden, head_DV):
        logp_NV = jax.nn.log_softmax(hidden @ head_DV)
        entropy_N = -jnp.sum(jnp.exp(logp_NV) * logp_NV, axis=-1)
        return jnp.sum(jnp.cos(logp_NV[jnp.arange(4), targets])) + jnp.sum(entropy_N**2)

    expected = jax.jit(jax.grad(loss, argnums=(0, 1)))(hidden, head_DV)
    _, found = gradients(3, hidden, head_DV, targets)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), found, expected)


def sizes(jaxpr):
    """The number of elements of every array that a program makes, sub-programs included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars if hasattr(variable.aval, "size"))
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=is_program):
            if is_program(value):
                yield from sizes(getattr(value, "jaxpr", value))


def is_program(value):
    return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")


@pytest.mark.parametrize("differentiated", [False, True], ids=["forward", "backward"])
def test_no_array_of_all_logits_exists_when_chunked(differentiated):
    rows, columns, width, vocabulary = 4, 16, 4, 64
    hidden, head_DV, targets = draw(6, (rows, columns), width, vocabulary)

    def largest(chunk):
        def loss(hidden, head_DV):
            logp, entropy = token_logprobs(hidden, head_DV, targets, chunk)
            return jnp.sum(logp + entropy)

        function = jax.grad(loss, argnums=(0, 1)) if differentiated else loss
        return max(sizes(jax.make_jaxpr(function)(hidden, head_DV).jaxpr))

    everything = rows * columns * vocabulary
    assert largest(rows * columns) >= everything  # the search finds such an array where there is one
    assert largest(4) <= max(4 * vocabulary, rows * columns * width, width * vocabulary) < everything / 8


def test_the_default_chunk_bounds_the_logits_alive_at_once(monkeypatch):
    monkeypatch.setattr("d1jax.models.token_logprobs.LOGITS_PER_CHUNK", 3 * 64 + 1)
    hidden, head_DV, targets = draw(7, (4, 16), 4, 64)
    program = jax.make_jaxpr(lambda h, w: token_logprobs(h, w, targets))(hidden, head_DV).jaxpr
    assert max(sizes(program)) <= max(66 * 4, 4 * 64)  # 22 chunks of 3 positions; the head itself is 4 x 64
    np.testing.assert_allclose(
        token_logprobs(hidden, head_DV, targets).logp, plain(hidden, head_DV, targets)[0], atol=1e-5
    )
