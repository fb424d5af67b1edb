"""Likelihood estimators: what their views mask, and what the shared scorer sums."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d1jax.config import OneStep, SamplerConfig
from d1jax.data.tokenizers import SpecialTokens
from d1jax.diffusion.canvas import Canvas
from d1jax.diffusion.estimators import views_of
from d1jax.diffusion.likelihood import Views, score

MASK = 12


@partial(jax.jit, static_argnames=("mask_id", "prompt_mask"))
def plan(key, which, ids, mask_id, prompt_mask):
    """d1's: no token of these completions is an end token."""
    return views_of(
        key, which, ids, jnp.zeros_like(which.completion_BC), estimator=OneStep(), sampler=SamplerConfig(),
        special=SpecialTokens(mask=mask_id, end=-1), prompt_mask=prompt_mask,
    )  # fmt: skip


run_score = jax.jit(score, static_argnums=0)


def canvas(rows, prompt_width=5, completion_length=4, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.integers(0, 12, shape), jnp.int32)  # noqa: E731
    lengths = jnp.asarray(rng.integers(0, prompt_width + 1, rows), jnp.int32)
    return Canvas(draw(rows, completion_length), draw(rows, prompt_width), lengths)


# -- the plan of d1 ----------------------------------------------------------------------------------------------------


def masked_prompt(key, which, ids, prompt_mask=0.3):
    views = plan(key, which, ids, mask_id=MASK, prompt_mask=prompt_mask)
    return np.asarray(views.prompt_NBP[0] == MASK)


def test_one_view_hides_all_of_the_completion_and_only_real_prompt_tokens():
    clean = canvas(200)
    views = plan(jax.random.key(0), clean, jnp.arange(200), mask_id=MASK, prompt_mask=0.5)
    assert (np.asarray(views.completion_NBC) == MASK).all() and views.completion_NBC.shape == (1, 200, 4)
    assert (np.asarray(views.weight_NBC) == 1).all() and views.weight_NBC.dtype == jnp.float32
    seen, real = np.asarray(views.prompt_NBP[0]), np.asarray(clean.prompt_mask_BP)
    assert ((seen == MASK) <= real).all()
    np.testing.assert_array_equal(seen[seen != MASK], np.asarray(clean.prompt_BP)[seen != MASK])


@pytest.mark.parametrize("probability", [0.0, 0.15, 0.7])
def test_every_prompt_token_is_masked_at_the_given_rate(probability):
    rows = 4000
    clean = canvas(rows)
    masked = masked_prompt(jax.random.key(5), clean, jnp.arange(rows), probability)
    for column in range(5):
        real = np.asarray(clean.prompt_mask_BP)[:, column]
        margin = 4 * np.sqrt(probability * (1 - probability) / real.sum())
        assert abs(masked[real, column].mean() - probability) <= margin, column


def test_the_same_key_gives_the_same_masks_and_another_key_others():
    clean, ids = canvas(64), jnp.arange(64)
    first = masked_prompt(jax.random.key(0), clean, ids)
    np.testing.assert_array_equal(masked_prompt(jax.random.key(0), clean, ids), first)
    assert (masked_prompt(jax.random.key(1), clean, ids) != first).any()


def test_masks_are_keyed_by_global_row_id_whatever_the_batch_and_the_padding():
    clean, ids = canvas(6), jnp.array([30, 2, 11, 4, 8, 0])
    whole = masked_prompt(jax.random.key(2), clean, ids, 0.5)
    pick = jnp.array([5, 1])
    part = jax.tree.map(lambda x: x[pick], clean)
    np.testing.assert_array_equal(masked_prompt(jax.random.key(2), part, ids[pick], 0.5), whole[np.array(pick)])
    wider = clean._replace(prompt_BP=jnp.pad(clean.prompt_BP, ((0, 0), (0, 3)), constant_values=11))
    padded = masked_prompt(jax.random.key(2), wider, ids, 0.5)
    np.testing.assert_array_equal(padded[:, :5], whole)
    assert not padded[:, 5:].any()
    assert (masked_prompt(jax.random.key(2), clean, ids + 100, 0.5) != whole).any()


# -- the scorer --------------------------------------------------------------------------------------------------------


def plain_scores(row_alone, model, clean, views):
    """(logp, entropy) summed over views: one float64 pass over a row and view at a time, in natural order."""
    logp_BC, entropy_BC = (np.zeros(clean.completion_BC.shape) for _ in range(2))
    for view in range(views.weight_NBC.shape[0]):
        for row, n in enumerate(np.asarray(clean.prompt_length_B)):
            prompt = np.asarray(views.prompt_NBP)[view, row, :n].tolist()
            _, z = row_alone(prompt + np.asarray(views.completion_NBC)[view, row].tolist())
            if model.config.alignment == "shifted":
                z = np.concatenate([z[:1], z[:-1]])
            logp_CV = z[n:] - np.log(np.exp(z[n:]).sum(axis=-1, keepdims=True))
            weight_C = np.asarray(views.weight_NBC)[view, row]
            targets_C = np.asarray(clean.completion_BC)[row]
            logp_BC[row] += weight_C * logp_CV[np.arange(len(targets_C)), targets_C]
            entropy_BC[row] -= weight_C * (np.exp(logp_CV) * logp_CV).sum(axis=-1)
    return logp_BC, entropy_BC


def three_views(clean):
    rng = np.random.default_rng(3)
    shape = (3, *clean.completion_BC.shape)
    masked_NBC, masked_NBP = rng.random(shape) < 0.5, rng.random((3, *clean.prompt_BP.shape)) < 0.3
    return Views(
        completion_NBC=jnp.where(masked_NBC, MASK, clean.completion_BC[None]),
        prompt_NBP=jnp.where(masked_NBP, MASK, clean.prompt_BP[None]),
        weight_NBC=jnp.asarray(rng.standard_normal(shape), jnp.float32),
    )


@pytest.mark.parametrize("alignment", ["same_position", "shifted"])
@pytest.mark.parametrize("estimator", ["one_step", "three_views"])
def test_scores_are_weighted_sums_of_plain_log_softmax(tiny, oracle, alignment, estimator):
    model, variables = tiny(seed=2, alignment=alignment)
    clean = canvas(4, seed=1)
    views = three_views(clean)
    if estimator == "one_step":
        views = plan(jax.random.key(0), clean, jnp.arange(4), mask_id=MASK, prompt_mask=0.3)
    found = run_score(model, variables, clean, views)
    logp_BC, entropy_BC = plain_scores(oracle(model, variables), model, clean, views)
    assert found.logp.dtype == jnp.float32
    np.testing.assert_allclose(found.logp, logp_BC, atol=5e-5, rtol=0)
    np.testing.assert_allclose(found.entropy, entropy_BC, atol=5e-5, rtol=0)
