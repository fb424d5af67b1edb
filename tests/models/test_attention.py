"""Rotary positions and attention against loops."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from d1jax.models.attention import attend, rotary_angles, rotate

attend, rotate, rotary_angles = jax.jit(attend), jax.jit(rotate), jax.jit(rotary_angles, static_argnums=(1, 2))


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_angles_are_position_over_theta_to_the_power_of_the_pair():
    cos_BTh, sin_BTh = rotary_angles(jnp.array([[0, 3, 200]]), 6, 100.0)
    for column, position in enumerate((0, 3, 200)):
        for pair in range(3):
            angle = position / 100.0 ** (2 * pair / 6)
            np.testing.assert_allclose(cos_BTh[0, column, pair], np.cos(angle), atol=2e-5)
            np.testing.assert_allclose(sin_BTh[0, column, pair], np.sin(angle), atol=2e-5)


def test_positions_beyond_256_stay_distinct_for_bfloat16_models():
    cos_BTh, _ = rotary_angles(jnp.array([[256, 257]]), 4, 5e5)
    assert cos_BTh.dtype == jnp.float32
    assert abs(cos_BTh[0, 0, 0] - cos_BTh[0, 1, 0]) > 0.1
    x_BTHh = jnp.ones((1, 2, 1, 4), jnp.bfloat16)
    turned = rotate(x_BTHh, *rotary_angles(jnp.array([[256, 257]]), 4, 5e5))
    assert turned.dtype == jnp.bfloat16 and jnp.any(turned[0, 0] != turned[0, 1])


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 30), st.integers(0, 9))
def test_scores_depend_on_the_distance_only(query, key, shift, seed):
    q, k = draw(seed, 1, 1, 1, 8), draw(seed + 100, 1, 1, 1, 8)

    def product(a, b):
        at = [rotate(jnp.asarray(x), *rotary_angles(jnp.array([[p]]), 8, 100.0)) for x, p in ((q, a), (k, b))]
        return float(jnp.sum(at[0] * at[1]))

    np.testing.assert_allclose(product(query, key), product(query + shift, key + shift), atol=2e-4)
    np.testing.assert_allclose(product(key, key), float((q * k).sum()), atol=2e-4)


def test_attention_equals_a_loop_over_heads_rows_and_queries():
    heads, kv_heads, size = 6, 2, 4
    q, k, v = draw(0, 3, 5, heads, size), draw(1, 3, 5, kv_heads, size), draw(2, 3, 5, kv_heads, size)
    length_B = [5, 3, 1]
    out = attend(*map(jnp.asarray, (q, k, v)), jnp.array(length_B))
    for row, length in enumerate(length_B):
        for head in range(heads):
            shared = head * kv_heads // heads
            for t in range(5):  # padding queries too: they attend to the real columns and stay finite
                score = np.array([q[row, t, head] @ k[row, s, shared] for s in range(length)]) / np.sqrt(size)
                weight = np.exp(score) / np.exp(score).sum()
                expected = sum(weight[s] * v[row, s, shared] for s in range(length))
                np.testing.assert_allclose(out[row, t, head], expected, atol=1e-5)


def test_softmax_is_taken_in_float32():
    # 64 keys of nearly equal score: sums in bfloat16 (8 bits) would lose the small differences of v.
    q, k = jnp.ones((1, 1, 1, 2), jnp.bfloat16), jnp.zeros((1, 64, 1, 2), jnp.bfloat16)
    v = jnp.asarray(draw(3, 1, 64, 1, 2), jnp.bfloat16)
    exact = np.asarray(v, np.float64).mean(axis=1)[0, 0]
    out = attend(jnp.broadcast_to(q, k.shape), k, v, jnp.array([64]))
    np.testing.assert_allclose(np.asarray(out[0, 0, 0], np.float64), exact, atol=2**-9, rtol=2**-7)
