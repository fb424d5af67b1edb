"""Predictions, their confidence and the sampling distribution against plain Python."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.special import softmax

from d1jax.config import LowConfidence, LowEntropy, SamplerConfig, TopkMargin
from d1jax.data.tokenizers import SpecialTokens
from d1jax.diffusion.predictions import highest, inverse_cdf, keep_top, predict

SPECIAL = SpecialTokens(mask=6, end=4, turn_end=5)


def ALL(logits, ids):
    return logits


LOWEST = np.finfo(np.float32).min


def propose(logits_BSV, config, temperature=0.0, gumbel_BSV=None, special=SPECIAL):
    def gumbel_max(logits, logits_mask, draws):
        return jnp.argmax(logits_mask(logits, jnp.arange(logits.shape[-1])[None, None]) + draws, axis=-1)

    return predict(
        jnp.asarray(logits_BSV),
        gumbel_BSV if temperature else None,
        gumbel_max,
        temperature=temperature,
        special=special,
        config=config,
    )


def plain_filter(logits_V, top_k, top_p):
    """top_p, then top_k, one token after the other."""
    values = list(np.asarray(logits_V, np.float64))
    if top_p < 1:
        p, order = softmax(np.array(values)), sorted(range(len(values)), key=lambda v: -values[v])
        before = 0.0
        for token in order:
            if before > top_p:
                values[token] = -np.inf
            before += p[token]
    if top_k:
        border = sorted(values, reverse=True)[min(top_k, len(values)) - 1]
        values = [value if value >= border else -np.inf for value in values]
    return np.array(values)


def plain_prediction(logits_V, gumbel_V, temperature, config):
    """(token, log-probability of drawing it, confidence, confidence score) of one position, from the words of the docstring."""
    logits_V = np.asarray(logits_V, np.float64).copy()
    ends = [SPECIAL.end, SPECIAL.turn_end]
    if config.end_token in ("forbidden", "all_forbidden"):
        logits_V[ends if config.end_token == "all_forbidden" else SPECIAL.end] = -np.inf
    unfiltered_V = logits_V / temperature if temperature else logits_V
    sampled_V = plain_filter(unfiltered_V, config.top_k, config.top_p)
    if not np.isfinite(np.delete(sampled_V, SPECIAL.mask)).any():  # only the mask is left
        sampled_V = unfiltered_V
    values = [
        -np.inf if token == SPECIAL.mask else value + (gumbel_V[token] if temperature else 0)
        for token, value in enumerate(sampled_V)
    ]
    token = max(range(len(values)), key=lambda index: (values[index], -index))
    scored_V = (sampled_V if config.remasking.confidence_of == "sampling" else logits_V).copy()
    if config.end_token == "last":
        scored_V[ends] = -np.inf
    p_V = softmax(scored_V) if np.isfinite(scored_V).any() else np.zeros(len(scored_V))
    best = sorted(p_V, reverse=True)
    score = {
        "topk_margin": best[0] - best[1],
        "entropy": sum(p * np.log(p + 1e-10) for p in p_V),
    }.get(config.remasking.name, p_V[token])
    if config.end_token == "last" and token in ends:
        score = LOWEST
    allowed_V = np.where(np.arange(len(sampled_V)) == SPECIAL.mask, -np.inf, sampled_V)
    return token, np.log(softmax(allowed_V)[token]) if temperature else 0.0, p_V[token], score


@pytest.mark.parametrize("end_token", ["allowed", "forbidden", "all_forbidden", "last"])
@pytest.mark.parametrize("temperature", [0.0, 0.6])
@pytest.mark.parametrize("remasking", [LowConfidence, TopkMargin, LowEntropy])
@pytest.mark.parametrize("changes", [{}, {"top_k": 5, "top_p": 0.9}], ids=str)
def test_predictions_and_their_confidence_equal_a_plain_loop(end_token, temperature, remasking, changes):
    order = remasking(confidence_of="sampling" if changes else "model")
    config = SamplerConfig(end_token=end_token, remasking=order, **changes)
    rng = np.random.default_rng(0)
    logits_BSV = rng.standard_normal((3, 8, 9)).astype(np.float32) * 2
    logits_BSV[:, ::2, SPECIAL.mask] += 4  # the model likes the mask, an end token, a closing token
    logits_BSV[:, 1::4, SPECIAL.end] += 5
    logits_BSV[:, 3::4, SPECIAL.turn_end] += 5
    gumbel_BSV = rng.gumbel(size=logits_BSV.shape).astype(np.float32)
    found = propose(logits_BSV, config, temperature, gumbel_BSV)
    for b in range(3):
        for s in range(8):
            expected = plain_prediction(logits_BSV[b, s], gumbel_BSV[b, s], temperature, config)
            values = (found.token_BS, found.token_logp_BS, found.confidence_BS, found.confidence_score_BS)
            assert np.isfinite(expected).all()
            np.testing.assert_allclose([value[b, s] for value in values], expected, rtol=1e-4, atol=1e-5)
    tokens = np.asarray(found.token_BS)
    assert found.token_BS.dtype == jnp.int32 and not (tokens == SPECIAL.mask).any()
    assert (tokens == SPECIAL.end).any() == (end_token not in ("forbidden", "all_forbidden"))
    assert (tokens == SPECIAL.turn_end).any() == (end_token != "all_forbidden")


@given(st.integers(1, 12), st.floats(0.05, 1.0), st.integers(0, 10_000))
def test_filters_keep_what_a_plain_loop_keeps(top_k, top_p, seed):
    logits = np.random.default_rng(seed).permutation(np.linspace(-4, 4, 9)).astype(np.float32)
    found = np.asarray(keep_top(jnp.asarray(logits), top_k, top_p))
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(plain_filter(logits, top_k, top_p)))
    assert np.isfinite(found).any()


@pytest.mark.parametrize(
    ("name", "top_k", "top_p"), [("topp0.5", 0, 0.5), ("topp0.9", 0, 0.9), ("topk5", 5, 1.0), ("topk50", 50, 1.0)]
)
def test_filters_keep_what_dreams_keep(golden_dream, name, top_k, top_p):
    kept = np.isfinite(keep_top(jnp.asarray(golden_dream.io["filter/logits"]), top_k, top_p))
    np.testing.assert_array_equal(kept, golden_dream.io[f"filter/{name}_keep"])


def test_the_mask_token_keeps_its_share_of_the_confidence():
    logits = np.zeros((1, 1, 7), np.float32)
    logits[0, 0, SPECIAL.mask] = np.log(10.0)
    found = propose(logits, SamplerConfig())
    assert found.token_BS[0, 0] == 0  # ties go to the lowest index
    np.testing.assert_allclose(found.confidence_BS[0, 0], 1 / 16, rtol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [{"top_k": 1}, {"top_p": 0.3}, {"top_k": 1, "remasking": LowConfidence(confidence_of="sampling")}],
    ids=str,
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_filter_that_leaves_only_the_mask_is_not_applied(temperature, changes):
    logits = np.random.default_rng(0).standard_normal((2, 3, 9)).astype(np.float32)
    logits[:, :, SPECIAL.mask] = 12.0
    gumbel_BSV = np.zeros(logits.shape, np.float32)
    found = propose(logits, SamplerConfig(**changes), temperature, gumbel_BSV)
    np.testing.assert_array_equal(
        found.token_BS, np.where(np.arange(9) == SPECIAL.mask, -np.inf, logits).argmax(axis=2)
    )
    for values in found[1:4]:
        assert np.isfinite(values).all()


def test_without_a_second_closing_token_no_ordinary_token_is_put_last():
    logits = np.zeros((1, 1, 7), np.float32)
    logits[0, 0, 6] = 3.0
    found = propose(logits, SamplerConfig(end_token="last"), special=SpecialTokens(mask=5, end=4))
    assert found.token_BS[0, 0] == 6 and found.confidence_BS[0, 0] > 0.5


def test_ids_beyond_the_tokenizer_are_never_predicted():
    special = dataclasses.replace(SPECIAL, vocab_size=7)
    logits_BSV = np.zeros((1, 3, 9), np.float32)
    logits_BSV[:, :, 7:] = 9.0
    found = propose(logits_BSV, SamplerConfig(), special=special)
    assert (np.asarray(found.token_BS) < 7).all()


# -- the sampling distribution -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [1, 2, 3, 7, 50])
def test_the_inverse_cdf_has_the_distribution_of_softmax(vocabulary):
    rng = np.random.default_rng(vocabulary)
    logits_V = rng.standard_normal(vocabulary).astype(np.float32)
    logits_V[::5] = -np.inf if vocabulary > 5 else logits_V[::5]
    uniform_N2 = jax.random.uniform(jax.random.key(0), (40_000, 2))
    tokens = np.asarray(
        jax.jit(inverse_cdf, static_argnums=1)(jnp.broadcast_to(logits_V, (40_000, vocabulary)), ALL, uniform_N2)
    )
    counts, p_V = np.bincount(tokens, minlength=vocabulary), softmax(logits_V.astype(np.float64))
    assert (counts[p_V == 0] == 0).all()
    if vocabulary > 1:
        assert stats.chisquare(counts[p_V > 0], 40_000 * p_V[p_V > 0]).pvalue > 1e-3


@given(
    st.integers(1, 40),
    st.integers(0, 1000),
    st.sampled_from([0.0, 0.5, 1 - 2**-23]),
    st.sampled_from([0.0, 1 - 2**-23]),
)
def test_the_inverse_cdf_returns_an_allowed_token_for_any_draw(vocabulary, seed, run, inside):
    rng = np.random.default_rng(seed)
    logits_V = (rng.standard_normal(vocabulary) * 30).astype(np.float32)
    logits_V[rng.random(vocabulary) < 0.6] = -np.inf
    logits_V[rng.integers(vocabulary)] = 1.0
    draw = jax.jit(inverse_cdf, static_argnums=1)
    token = int(draw(jnp.asarray(logits_V), ALL, jnp.array([run, inside], jnp.float32)))
    assert 0 <= token < vocabulary and np.isfinite(logits_V[token])


@pytest.mark.parametrize("temperature", [0.7])
def test_over_a_wide_vocabulary_the_entropy_of_the_draws_is_that_of_the_distribution(temperature):
    """10^5 draws over 32,000 tokens of which about 600 matter: bf16 noise or a cut tail would show here."""
    logits_V = -1.05 * np.log(np.arange(1, 32_001)) * 1.6
    draws, chunk, seen = 100_000, 2_000, np.zeros(32_000)
    draw = jax.jit(
        lambda key, z: inverse_cdf(jnp.broadcast_to(z, (chunk, 32_000)), ALL, jax.random.uniform(key, (chunk, 2)))
    )
    tempered = jnp.asarray(np.random.default_rng(0).permutation(logits_V) / temperature, jnp.float32)
    for index in range(draws // chunk):
        seen += np.bincount(np.asarray(draw(jax.random.key(index), tempered)), minlength=32_000)
    p_V = softmax(np.asarray(tempered, np.float64))
    exact = -np.sum(p_V * np.log(p_V))
    # The plug-in estimate is too low by about (distinct tokens - 1) / (2 draws) (Miller and Madow): put back.
    p = seen[seen > 0] / draws
    found = -np.sum(p * np.log(p)) + (len(p) - 1) / (2 * draws)
    assert abs(found / exact - 1) < 0.02
    assert seen[p_V < 1e-6].sum() == pytest.approx(draws * p_V[p_V < 1e-6].sum(), rel=0.5, abs=10)  # the tail is there


@given(st.integers(1, 60), st.integers(0, 1000))
def test_highest_is_the_first_of_the_largest_allowed(vocabulary, seed):
    rng = np.random.default_rng(seed)
    logits_NV = rng.integers(0, 4, (5, vocabulary)).astype(np.float32)
    barred = int(rng.integers(vocabulary)) if vocabulary > 1 else -1

    def logits_mask(logits, ids):
        return jnp.where(ids == barred, -jnp.inf, logits)

    logits_NV[:, barred] = 9 if barred >= 0 else logits_NV[:, barred]
    expected = np.where(np.arange(vocabulary) == barred, -np.inf, logits_NV).argmax(axis=1)
    np.testing.assert_array_equal(highest(jnp.asarray(logits_NV), logits_mask), expected)
