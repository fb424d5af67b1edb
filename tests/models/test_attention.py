"""Rotary positions and attention against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.config import MeshConfig, ModelConfig, UserError
from d1jax.models import attention
from d1jax.models.attention import annealed, attend, chosen, rotary_angles, rotate, visible
from d1jax.models.sharding import make_mesh

attend, rotate, rotary_angles = (
    jax.jit(attend, static_argnums=4),
    jax.jit(rotate),
    jax.jit(rotary_angles, static_argnums=(1, 2)),
)


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


# -- kernels ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("implementation", "platform", "dtype", "columns", "head_size", "name"),
    [
        ("auto", "cpu", "float32", 4096, 128, "xla"),
        ("auto", "cuda", "bfloat16", 512, 128, "cudnn"),
        ("auto", "cuda", "float32", 512, 128, "xla"),
        ("auto", "cuda", "bfloat16", 512, 256, "xla"),
        ("auto", "tpu", "bfloat16", 512, 128, "xla"),
        ("auto", "tpu", "bfloat16", 2048, 128, "splash"),
        ("auto", "tpu", "bfloat16", 2048, 48, "xla"),
        ("xla", "tpu", "bfloat16", 2048, 128, "xla"),
        ("splash", "cpu", "float32", 10, 128, "splash"),
    ],
)
def test_what_is_chosen(implementation, platform, dtype, columns, head_size, name):
    assert chosen(implementation, platform, dtype, columns, head_size) == name


@pytest.mark.parametrize("mesh", [None, MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=1, fsdp=2, tensor=4)])
@pytest.mark.parametrize("window", [0, 40])
def test_the_splash_kernel_is_xla_s_attention(mesh, window):
    """Forward and gradient, over columns that are no multiple of its tiles, and over a window of the queries."""
    arrays = [jnp.asarray(draw(seed, 4, 200, heads, 64)) for seed, heads in ((0, 4), (1, 2), (2, 2))]
    arrays[0] = arrays[0][:, window:]
    length_B = jnp.array([200, 130, 1, 77])
    weight = jnp.asarray(draw(3, *arrays[0].shape))

    def gradients(name):
        def value(arrays):
            mixed = attend(*arrays, length_B, name)
            return jnp.sum(mixed * weight), mixed

        return jax.jit(jax.grad(value, has_aux=True))(arrays)

    if mesh is None:
        found = gradients("splash")
    else:
        with jax.set_mesh(make_mesh(mesh)):
            found = jax.device_get(gradients("splash"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5), found, gradients("xla"))


def test_a_kernel_that_the_device_lacks_is_refused():
    for name in ("cudnn", "splash"):
        with pytest.raises(UserError, match=f"{name} needs another device than cpu"):
            attention.check(ModelConfig(attention=name), make_mesh(MeshConfig()))
    attention.check(ModelConfig(), make_mesh(MeshConfig()))


def test_a_kernel_that_does_not_run_is_refused(monkeypatch):
    monkeypatch.setattr(attention, "chosen", lambda name, *_: "cudnn" if name == "auto" else name)
    with pytest.raises(
        UserError, match=r"auto is cudnn on this device \(cpu.*does not run there \(.+\); set it to xla"
    ):
        attention.check(ModelConfig(width=16, heads=2, kv_heads=1), make_mesh(MeshConfig()))


@pytest.mark.parametrize("wrong", [False, True])
def test_a_kernel_that_computes_something_else_is_refused(monkeypatch, wrong):
    monkeypatch.setattr(attention, "chosen", lambda name, *_: "kernel" if name == "auto" else name)
    right = attention.attend

    def attend(q_BTHh, k_BTKh, v_BTKh, length_B, how):
        mixed = right(q_BTHh, k_BTKh, v_BTKh, length_B, "xla")
        return mixed * 1.01 if how == "kernel" and wrong else mixed

    monkeypatch.setattr(attention, "attend", attend)
    config, mesh = ModelConfig(width=16, heads=2, kv_heads=1), make_mesh(MeshConfig())
    if not wrong:
        attention.check(config, mesh)
        return
    with pytest.raises(UserError, match="away from XLA's"):
        attention.check(config, mesh)


# -- masks by name --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["full", "causal", "block_causal"])
@given(st.permutations(range(7)), st.integers(1, 8))
def test_a_mask_by_name_is_a_comparison_of_positions(mask, positions, block):
    found = visible(mask, jnp.array([positions], jnp.int32), block)
    expected = [
        [{"full": True, "causal": k <= q, "block_causal": k // block <= q // block}[mask] for k in positions]
        for q in positions
    ]
    assert (found is None and all(map(all, expected))) or np.array_equal(found[0], expected)


@pytest.mark.parametrize("share, opened", [(0.0, 0), (0.5, None), (1.0, 2016)])
def test_the_annealed_mask_opens_a_share_of_what_is_behind(share, opened):
    found = np.asarray(annealed(jax.random.key(3), 64, share))[0]
    upper = np.triu(np.ones((64, 64), bool), k=1)
    assert found[~upper].all()  # what stands before stays open
    count = int(found[upper].sum())
    assert count == opened if opened is not None else abs(count - 1008) < 4 * (2016 * 0.25) ** 0.5


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_attention_under_the_annealed_mask_is_a_plain_loop(share):
    q, k, v = (jax.random.normal(key, (2, 6, 2, 4), jnp.float32) for key in jax.random.split(jax.random.key(0), 3))
    mask, length = np.asarray(annealed(jax.random.key(1), 6, share)), np.array([6, 4])
    found = attend(q, k, v, jnp.array(length), visible_BTT=jnp.array(mask))
    for row in range(2):
        for head in range(2):
            for column in range(6):
                seen = [other for other in range(length[row]) if mask[0, column, other]]
                score = np.array([np.dot(q[row, column, head], k[row, other, head]) / 2 for other in seen])
                weight = np.exp(score - score.max())
                expected = (weight / weight.sum()) @ np.array([v[row, other, head] for other in seen])
                np.testing.assert_allclose(found[row, column, head], expected, atol=1e-5)
