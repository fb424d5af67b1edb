"""The forward process: what it masks, how often, and that it depends on the row alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from d1jax.diffusion.canvas import Canvas
from d1jax.diffusion.forward_process import apply_mask, corrupt

MASK = 12
masked_by = jax.jit(partial(corrupt, mask_id=MASK), static_argnames="eps")


def canvas(rows, completion_length=8, prompt_length=3):
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 12, (rows, completion_length + prompt_length)), jnp.int32)
    lengths = jnp.asarray(rng.integers(0, prompt_length + 1, rows), jnp.int32)
    return Canvas(tokens[:, :completion_length], tokens[:, completion_length:], lengths)


def test_only_the_completion_is_masked_exactly_where_the_mask_says():
    clean = canvas(50)
    corrupted = masked_by(jax.random.key(0), clean, jnp.arange(50), eps=1e-3)
    np.testing.assert_array_equal(corrupted.canvas.prompt_BP, clean.prompt_BP)
    np.testing.assert_array_equal(corrupted.canvas.prompt_length_B, clean.prompt_length_B)
    masked = np.asarray(corrupted.masked_BC)
    np.testing.assert_array_equal(corrupted.canvas.completion_BC, np.where(masked, MASK, clean.completion_BC))
    assert masked.any() and not masked.all()


def test_a_rows_draw_does_not_depend_on_its_batch():
    clean, ids = canvas(6), jnp.array([4, 0, 77, 5, 9, 1])
    whole = masked_by(jax.random.key(3), clean, ids, eps=1e-3)
    pick = jnp.array([5, 0, 3])
    part = masked_by(jax.random.key(3), jax.tree.map(lambda x: x[pick], clean), ids[pick], eps=1e-3)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[pick]), part, whole)


def test_key_and_row_id_both_decide_the_draw():
    clean, ids = canvas(50), jnp.arange(50)

    def masks(seed, ids):
        return np.asarray(masked_by(jax.random.key(seed), clean, ids, eps=1e-3).masked_BC)

    np.testing.assert_array_equal(masks(0, ids), masks(0, ids))
    assert (masks(0, ids) != masks(1, ids)).any() and (masks(0, ids) != masks(0, ids + 50)).any()


def test_probability_is_uniform_in_eps_to_one_and_masks_follow_it():
    rows, columns, eps = 20_000, 8, 0.2
    drawn = masked_by(jax.random.key(1), canvas(rows), jnp.arange(rows), eps=eps)
    p_B, masked_BC = np.asarray(drawn.probability_B, np.float64), np.asarray(drawn.masked_BC)
    assert p_B.min() >= eps and p_B.max() <= 1
    assert stats.kstest(p_B, "uniform", args=(eps, 1 - eps)).pvalue > 1e-3
    # Given p the draws are Bernoulli(p) in every column, and columns are independent of each other and of t.
    deviation_BC = (masked_BC - p_B[:, None]) / np.sqrt(p_B * (1 - p_B) + 1e-12)[:, None]
    bins = np.digitize(p_B, [0.4, 0.6, 0.8])
    for group in range(4):
        rate_C, mean = masked_BC[bins == group].mean(axis=0), p_B[bins == group].mean()
        np.testing.assert_allclose(rate_C, mean, atol=4 * 0.5 / np.sqrt((bins == group).sum()))
    correlation = np.corrcoef(np.where(p_B[:, None] < 0.98, deviation_BC, 0).T)
    assert np.abs(correlation - np.eye(columns)).max() < 4 / np.sqrt(rows)


def test_given_masks_are_applied_as_they_are():
    clean, masked = canvas(2, completion_length=3), jnp.array([[True, False, True], [False, False, True]])
    applied = apply_mask(clean, masked, jnp.array([0.5, 0.25]), MASK)
    assert applied.canvas.completion_BC.tolist()[0] == [MASK, int(clean.completion_BC[0, 1]), MASK]
    assert applied.probability_B.tolist() == [0.5, 0.25]
