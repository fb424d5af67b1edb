"""Schedules, accumulation and what happens to an update that is not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.config import MeshConfig, OptimizerConfig
from d1jax.models.sharding import make_mesh, replicated
from d1jax.training.optimizer import (
    TrainState,
    apply_gradient,
    bad_updates,
    compiled_update,
    gradients,
    in_order,
    make_optimizer,
    make_schedule,
    new_state,
    with_sets_together,
)

PARAMS = {"params": {"q": {"kernel": jnp.ones((3, 2))}, "norm": {"scale": jnp.ones(2)}, "wte": jnp.ones((4, 2))}}


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedule(schedule):
    rate = make_schedule(OptimizerConfig(learning_rate=2.0, schedule=schedule, warmup_steps=4), 14)
    assert [float(rate(i)) for i in (0, 2, 4)] == [0.0, 1.0, 2.0]
    np.testing.assert_allclose(float(rate(9)), {"constant": 2.0, "linear": 1.0, "cosine": 1.0}[schedule], rtol=1e-6)
    np.testing.assert_allclose(float(rate(14)), 2.0 if schedule == "constant" else 0.0, atol=1e-6)


def test_weight_decay_spares_norms_and_embeddings():
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1, weight_decay=0.5), 10)
    state = TrainState(PARAMS, optimizer.init(PARAMS))
    state = apply_gradient(optimizer, state, jax.tree.map(jnp.zeros_like, PARAMS), jnp.float32(0.0))
    decayed = state.trainable["params"]
    np.testing.assert_allclose(decayed["q"]["kernel"], 0.95)
    np.testing.assert_array_equal(decayed["norm"]["scale"], 1.0)
    np.testing.assert_array_equal(decayed["wte"], 1.0)


@pytest.mark.parametrize("loss", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_update_that_is_not_finite_is_skipped_and_counted(loss, where):
    optimizer = make_optimizer(OptimizerConfig(), 10)
    state = TrainState(PARAMS, optimizer.init(PARAMS))
    good = jax.tree.map(jnp.ones_like, PARAMS)
    bad = jax.tree.map(lambda x: x.at[0].set(loss), good) if where == "gradient" else good
    value = loss if where == "loss" else 1.0
    for expected in (1, 2):
        state = apply_gradient(optimizer, state, bad, jnp.float32(value))
        assert tuple(map(int, bad_updates(state.optimizer))) == (expected, expected)
    jax.tree.map(np.testing.assert_array_equal, state.trainable, PARAMS)
    state = apply_gradient(optimizer, state, good, jnp.float32(1.0))
    assert tuple(map(int, bad_updates(state.optimizer))) == (0, 2)
    assert not np.array_equal(state.trainable["params"]["wte"], PARAMS["params"]["wte"])


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_gradient_does_not_depend_on_how_rows_are_cut(parts):
    """Rows weigh differently; the weights know the whole batch, so sums of parts are the whole."""
    rng = np.random.default_rng(0)
    rows = {"x": rng.standard_normal((6, 4)).astype(np.float32), "weight": rng.random(6).astype(np.float32)}

    def loss(w, rows):
        return jnp.sum(rows["weight"] * jnp.tanh(rows["x"] @ w) ** 2), rows["x"]

    w = jnp.arange(4.0)
    value, arrays, gradient = gradients(loss, w, rows, parts)
    np.testing.assert_allclose(value, loss(w, rows)[0], rtol=1e-5)
    np.testing.assert_allclose(gradient, jax.grad(lambda w: loss(w, rows)[0])(w), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(arrays, rows["x"])  # put together in the order of the rows


@pytest.mark.parametrize("learning_rate", [1e-6, 3e-6, 1e-4])
def test_bf16_weights_move_as_many_and_as_far_as_fp32_ones(learning_rate):
    """A bf16 step of a weight of 0.02 is 1e-4: an update of 1e-6 added to it is lost. What is trained is fp32, so none is."""
    mesh = make_mesh(MeshConfig())
    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.normal(0, 0.02, (64, 32)), jnp.bfloat16)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=learning_rate), 50)
    slope = jnp.asarray(rng.choice([-1.0, 1.0], (64, 32)), jnp.float32)
    ends = {}
    for dtype in ("bfloat16", "float32"):
        trainable = jax.device_put({"params": {"kernel": weights.astype(dtype)}}, replicated(mesh))
        state = new_state(optimizer, trainable, mesh)
        assert {x.dtype for x in jax.tree.leaves(state) if x.ndim} == {jnp.dtype("float32")}, "weights and both moments"
        step = jax.jit(lambda state: apply_gradient(optimizer, state, {"params": {"kernel": slope}}, jnp.float32(0.0)))
        for _ in range(50):
            state = step(state)
        ends[dtype] = np.asarray(state.trainable["params"]["kernel"])
    np.testing.assert_array_equal(ends["bfloat16"], ends["float32"])
    moved = ends["bfloat16"] - np.asarray(weights, np.float32)
    assert (moved != 0).mean() > 0.99
    np.testing.assert_allclose(np.abs(moved).mean(), 50 * learning_rate, rtol=0.02)


def updated(config, times=3):
    """The state after some updates, compiled as the loops compile them."""
    optimizer = make_optimizer(config, 10)
    mesh = make_mesh(MeshConfig())
    placed = jax.tree.map(lambda x: jax.device_put(x, replicated(mesh)), PARAMS)
    state = new_state(optimizer, placed, mesh, config.offload)

    @compiled_update(state)
    def update(state, scale):
        gradient = jax.tree.map(lambda x: scale * x, state.trainable)
        return apply_gradient(optimizer, state, gradient, jnp.float32(1.0)), scale

    for step in range(times):
        state, _ = update(state, jnp.float32(1 + step))
    return state, update


def test_moments_that_wait_on_the_host_change_no_bit():
    here, _ = updated(OptimizerConfig(weight_decay=0.1))
    away, update = updated(OptimizerConfig(weight_decay=0.1, offload=True))
    jax.tree.map(np.testing.assert_array_equal, here, away)
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(away.optimizer) if x.ndim}
    assert kinds == {"pinned_host"}
    assert {x.sharding.memory_kind for x in jax.tree.leaves(away.trainable)} == {"device"}
    assert update._cache_size() == 1, "what comes out fits what goes in"


def test_the_first_moment_may_be_half_as_large():
    full, _ = updated(OptimizerConfig())
    half, _ = updated(OptimizerConfig(first_moment="bfloat16"))
    dtypes = {str(x.dtype) for x in jax.tree.leaves(half.optimizer) if x.ndim}
    assert dtypes == {"bfloat16", "float32"}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), full.trainable, half.trainable)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_micro_batches_keep_sets_of_rows_together(sets, micro_batches, size):
    """Part m of optax has the rows m, m + micro_batches, ...; here whole sets in their order."""
    row_B = np.arange(sets * micro_batches * size)
    turned_B = np.asarray(with_sets_together(row_B, micro_batches, size))
    for part_B in (turned_B[place::micro_batches] for place in range(micro_batches)) if size > 1 else ():
        assert (np.diff(part_B.reshape(sets, size), axis=1) == 1).all() and (part_B[::size] % size == 0).all()
    np.testing.assert_array_equal(in_order(turned_B, micro_batches, size), row_B)
