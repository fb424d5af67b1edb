"""Schedules, accumulation and what happens to an update that is not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d1jax.config import OptimizerConfig
from d1jax.runtime.optimizer import TrainState, apply_gradient, bad_updates, gradients, make_optimizer, make_schedule

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
        return jnp.sum(rows["weight"] * jnp.tanh(rows["x"] @ w) ** 2), {"rows": jnp.float32(rows["x"].shape[0])}

    w = jnp.arange(4.0)
    value, sums, gradient = gradients(loss, w, rows, parts)
    np.testing.assert_allclose(value, loss(w, rows)[0], rtol=1e-5)
    np.testing.assert_allclose(gradient, jax.grad(lambda w: loss(w, rows)[0])(w), rtol=1e-4, atol=1e-6)
    assert float(sums["rows"]) == 6
