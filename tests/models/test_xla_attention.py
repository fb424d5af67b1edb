"""Attention in plain products, and its gradient, against JAX's own function and against finite facts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.config import MeshConfig
from d1jax.models.sharding import make_mesh
from d1jax.models.xla_attention import attend_by_xla


def draw(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def arrays(rows, queries, keys, heads, groups, size, dtype=jnp.float32):
    shapes = ((rows, queries, heads, size), (rows, keys, groups, size), (rows, keys, groups, size))
    return [draw(seed, *shape, dtype=dtype) for seed, shape in enumerate(shapes)]


def jax_s(q, k, v, length_B, visible_BTS=None):
    mask = (
        None if visible_BTS is None else jnp.broadcast_to(visible_BTS[:, None], (q.shape[0], 1, *visible_BTS.shape[1:]))
    )
    return jax.nn.dot_product_attention(q, k, v, mask=mask, key_value_seq_lengths=length_B, implementation="xla")


def both(of, given, *rest):
    """Value and gradients under one random weight of the outputs."""
    value, back = jax.vjp(lambda *x: of(*x, *rest), *given)
    return [value, *back(draw(9, *value.shape, dtype=value.dtype))]


OURS, JAX_S = (jax.jit(lambda q, k, v, *rest, of=of: both(of, [q, k, v], *rest)) for of in (attend_by_xla, jax_s))
SHARED = [(4, 4), (4, 2), (3, 1)]  # query heads, key heads


@pytest.mark.parametrize(("heads", "key_heads"), SHARED)
@given(st.lists(st.integers(1, 9), min_size=3, max_size=3), st.none() | st.sampled_from([1, 3]), st.integers(0, 99))
def test_value_and_gradient_are_jax_s_own(heads, key_heads, length_B, mask_rows, seed):
    """Lengths, query heads that share a key head, no mask, one for all rows or one of each."""
    visible = None
    if mask_rows is not None:
        visible = np.random.default_rng(seed).random((mask_rows, 9, 9)) < 0.5
        visible[:, :, 0] = True  # each query sees a key, whatever the length
        visible = jnp.asarray(visible)
    given_arrays = (*arrays(3, 9, 9, heads, key_heads, 4), jnp.array(length_B, jnp.int32), visible)
    for ours, theirs in zip(OURS(*given_arrays), JAX_S(*given_arrays), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)


def test_fewer_queries_than_keys():
    given_arrays = arrays(2, 3, 7, 2, 2, 4)
    length_B = jnp.array([7, 5])
    for ours, theirs in zip(
        both(attend_by_xla, given_arrays, length_B), both(jax_s, given_arrays, length_B), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("sharper", "shift"), [(1, 0), (4, 0), (4, 3)])
def test_bfloat16_is_about_as_near_to_the_truth_as_jax_s_own(sharper, shift):
    """Also where attention is sharp and values lie around another number than 0: gradients of scores are small differences there."""
    q, k, v = arrays(2, 64, 64, 4, 2, 32, dtype=jnp.bfloat16)
    given_arrays, length_B = [q * sharper, k, v + shift], jnp.array([64, 40])
    right = both(jax_s, [x.astype(jnp.float32) for x in given_arrays], length_B)
    found, other = both(attend_by_xla, given_arrays, length_B), both(jax_s, given_arrays, length_B)

    def far(x, y):
        return float(jnp.linalg.norm(x.astype(jnp.float32) - y) / jnp.linalg.norm(y))

    for ours, theirs, true in zip(found, other, right, strict=True):
        assert ours.dtype == jnp.bfloat16
        assert far(ours, true) < 1.25 * far(theirs, true)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_query_that_sees_no_key_gets_the_mean_and_tells_scores_nothing(dtype):
    """By its length, by the mask; as JAX's own."""
    given_arrays = arrays(2, 4, 4, 2, 1, 4, dtype=dtype)
    visible = jnp.ones((2, 4, 4), bool).at[1, 2].set(False)
    length_B = jnp.array([0, 3])
    ours, theirs = both(attend_by_xla, given_arrays, length_B, visible), both(jax_s, given_arrays, length_B, visible)
    close = {"atol": 1e-6} if dtype == jnp.float32 else {"atol": 3e-2}
    for found, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(found.astype(jnp.float32), expected.astype(jnp.float32), **close)
    mean_Kh = given_arrays[2].astype(jnp.float32)[0].mean(axis=0)
    np.testing.assert_allclose(ours[0].astype(jnp.float32)[0, 2, 0], mean_Kh[0], **close)
    assert not ours[1][0].any() and not ours[1][1, 2].any() and not ours[2][0].any()


def test_what_a_hidden_key_holds_does_not_reach_the_value():
    q, k, v = arrays(1, 4, 4, 1, 1, 4)
    mixed = attend_by_xla(q, k.at[0, 3].set(jnp.nan), v, jnp.array([3]))
    np.testing.assert_array_equal(mixed, attend_by_xla(q, k, v, jnp.array([3])))


def test_the_way_back_keeps_no_scores():
    """Of 32 columns and heads of 4, nothing of [.., 32, 32]."""
    given_arrays = arrays(2, 32, 32, 2, 2, 4)
    _, back = jax.vjp(lambda *x: attend_by_xla(*x, jnp.array([32, 20])), *given_arrays)
    assert max(x.size for x in jax.tree.leaves(back)) == 2 * 32 * 2 * 4


@pytest.mark.parametrize("mesh", [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=1, fsdp=2, tensor=4)])
def test_over_a_mesh_it_is_the_same(mesh):
    given_arrays = arrays(4, 16, 16, 4, 2, 8)
    length_B = jnp.array([16, 9, 1, 4])
    alone = both(attend_by_xla, given_arrays, length_B)
    with jax.set_mesh(make_mesh(mesh)):
        found = jax.device_get(jax.jit(lambda *x: both(attend_by_xla, x, length_B))(*given_arrays))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), found, jax.device_get(alone))
