"""A matrix product and its gradient against autodiff of the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d1jax.config import MeshConfig
from d1jax.models import sharding
from d1jax.models.products import product
from d1jax.models.sharding import make_mesh


def draw(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def both(of, x, kernel):
    value, back = jax.vjp(of, x, kernel)
    return [value, *back(draw(2, *value.shape, dtype=value.dtype))]


@pytest.mark.parametrize("shape", [(5,), (1, 1, 5), (3, 4, 5), (2, 3, 4, 5)])
def test_value_and_gradient_are_those_of_the_plain_product(shape):
    x, kernel = draw(0, *shape), draw(1, 5, 7)
    for ours, plain in zip(both(product, x, kernel), both(jnp.matmul, x, kernel), strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-5, rtol=1e-5)


def test_on_other_devices_it_is_the_plain_product(monkeypatch):
    x, kernel = draw(0, 3, 4, 5), draw(1, 5, 7)
    assert "custom_vjp" in str(jax.make_jaxpr(product)(x, kernel))
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    for ours, plain in zip(both(product, x, kernel), both(jnp.matmul, x, kernel), strict=True):
        np.testing.assert_array_equal(ours, plain)
    assert "custom_vjp" not in str(jax.make_jaxpr(lambda *given: product(*given))(x, kernel))


@pytest.mark.parametrize("dtype", [None, jnp.float32])
def test_bfloat16_is_added_up_and_returned_as_asked(dtype):
    """And its gradients come back in the dtype of what they are of, from a gradient that is not rounded first."""
    x, kernel = draw(0, 40, 300, dtype=jnp.bfloat16), draw(1, 300, 7, dtype=jnp.bfloat16)
    value, *gradients = both(lambda x, kernel: product(x, kernel, dtype), x, kernel)
    assert value.dtype == (dtype or jnp.bfloat16) and {one.dtype for one in gradients} == {jnp.dtype(jnp.bfloat16)}
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    np.testing.assert_allclose(
        np.asarray(value, np.float64), exact, rtol=1e-5 if dtype else 2**-7, atol=1e-4 if dtype else 0.1
    )
    weight = np.asarray(draw(2, 40, 7, dtype=value.dtype), np.float64)
    np.testing.assert_allclose(
        np.asarray(gradients[1], np.float64), np.asarray(x, np.float64).T @ weight, rtol=2**-7, atol=0.1
    )


@pytest.mark.parametrize("mesh", [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=1, fsdp=2, tensor=4)])
def test_over_a_mesh_nothing_changes(mesh):
    x, kernel = draw(0, 8, 4, 16), draw(1, 16, 32)
    alone = both(product, x, kernel)
    with jax.set_mesh(make_mesh(mesh)):
        of = jax.jit(lambda x, kernel: both(product, sharding.constrain(x, "batch", "sequence", None), kernel))
        found = jax.device_get(of(x, kernel))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), found, jax.device_get(alone))
