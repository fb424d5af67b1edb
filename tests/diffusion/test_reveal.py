"""Schedules, candidates and choices against plain Python."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.config import SamplerConfig
from d1jax.data.tokenizers import SpecialTokens
from d1jax.diffusion.reveal import PRIORITIES, Draws, choose, keep_top, propose

SPECIAL = SpecialTokens(mask=6, end=4, turn_end=5)


# -- choice ------------------------------------------------------------------------------------------------------------

rows_of_priorities = st.lists(
    st.lists(st.tuples(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), st.booleans()), min_size=6, max_size=6),
    min_size=1,
    max_size=3,
)


@given(rows_of_priorities, st.integers(0, 8))
def test_choose_takes_the_highest_open_priorities_lowest_index_first(rows, count):
    priority_BS = jnp.array([[priority for priority, _ in row] for row in rows], jnp.float32)
    open_BS = jnp.array([[is_open for _, is_open in row] for row in rows])
    chosen_BS = np.asarray(jax.jit(choose)(priority_BS, open_BS, jnp.int32(count)))
    for row, chosen in zip(rows, chosen_BS, strict=True):
        candidates = [index for index, (_, is_open) in enumerate(row) if is_open]
        best = sorted(candidates, key=lambda index: (-row[index][0], index))[:count]
        assert sorted(np.flatnonzero(chosen)) == sorted(best)


# -- candidates --------------------------------------------------------------------------------------------------------


def softmax(values):
    weights = np.exp(values - np.max(values))
    return weights / weights.sum()


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


def plain_proposal(logits_V, gumbel_V, uniform, place, temperature, config):
    """(token, confidence, priority) of one position, from the words of the docstring."""
    logits_V = np.asarray(logits_V, np.float64).copy()
    ends = [SPECIAL.end, SPECIAL.turn_end]
    if config.end_token == "forbidden":
        logits_V[SPECIAL.end] = -np.inf
    sampled_V = plain_filter(logits_V / temperature if temperature else logits_V, config.top_k, config.top_p)
    values = [
        -np.inf if token == SPECIAL.mask else value + (gumbel_V[token] if temperature else 0)
        for token, value in enumerate(sampled_V)
    ]
    token = max(range(len(values)), key=lambda index: (values[index], -index))
    scored_V = (sampled_V if config.confidence_of == "sampling" else logits_V).copy()
    if config.end_token == "last":
        scored_V[ends] = -np.inf
    p_V = softmax(scored_V)
    best = sorted(p_V, reverse=True)
    priority = {
        "low_confidence": p_V[token],
        "topk_margin": best[0] - best[1],
        "entropy": sum(p * np.log(p + 1e-10) for p in p_V),
        "random": uniform,
        "left_to_right": -place,
    }[config.remasking]
    if config.remasking_temperature:
        priority = priority / config.remasking_temperature - np.log(-np.log(uniform))
    if config.end_token == "last" and token in ends:
        priority = -np.inf
    return token, p_V[token], priority


def test_every_rule_has_its_oracle():
    assert set(PRIORITIES) == {"low_confidence", "topk_margin", "entropy", "random", "left_to_right"}


@pytest.mark.parametrize("end_token", ["allowed", "forbidden", "last"])
@pytest.mark.parametrize("temperature", [0.0, 0.6])
@pytest.mark.parametrize(
    "changes",
    [
        *({"remasking": name} for name in PRIORITIES),
        *({"remasking": name, "confidence_of": "sampling", "top_k": 5, "top_p": 0.9} for name in PRIORITIES),
        {"remasking": "low_confidence", "remasking_temperature": 0.4},
        {"remasking": "entropy", "remasking_temperature": 2.0, "top_p": 0.7},
    ],
    ids=str,
)
def test_candidates_confidence_and_priority_equal_a_plain_loop(end_token, temperature, changes):
    config = SamplerConfig(end_token=end_token, **changes)
    rng = np.random.default_rng(0)
    logits_BSV = rng.standard_normal((3, 8, 9)).astype(np.float32) * 2
    logits_BSV[:, ::2, SPECIAL.mask] += 4  # the model likes the mask, an end token, a closing token
    logits_BSV[:, 1::4, SPECIAL.end] += 5
    logits_BSV[:, 3::4, SPECIAL.turn_end] += 5
    gumbel_BSV, uniform_BS = rng.gumbel(size=logits_BSV.shape), rng.uniform(0.01, 0.99, (3, 8)).astype(np.float32)
    draws = Draws(jnp.asarray(gumbel_BSV, jnp.float32), jnp.asarray(uniform_BS))
    found = propose(jnp.asarray(logits_BSV), draws, temperature, SPECIAL, config)
    for b in range(3):
        for s in range(8):
            token, confidence, priority = plain_proposal(
                logits_BSV[b, s], gumbel_BSV[b, s], uniform_BS[b, s], s, temperature, config
            )
            assert found.token_BS[b, s] == token
            np.testing.assert_allclose(found.confidence_BS[b, s], confidence, atol=1e-5)
            expected = np.finfo(np.float32).min if priority == -np.inf else priority
            np.testing.assert_allclose(found.priority_BS[b, s], expected, rtol=1e-4, atol=1e-5)
    tokens = np.asarray(found.token_BS)
    assert found.token_BS.dtype == jnp.int32 and not (tokens == SPECIAL.mask).any()
    assert (tokens == SPECIAL.end).any() == (end_token != "forbidden")


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
    found = propose(jnp.asarray(logits), Draws(None, None), 0.0, SPECIAL, SamplerConfig())
    assert found.token_BS[0, 0] == 0  # ties go to the lowest index
    np.testing.assert_allclose(found.confidence_BS[0, 0], 1 / 16, rtol=1e-5)


def test_without_a_second_closing_token_no_ordinary_token_is_put_last():
    logits = np.zeros((1, 1, 7), np.float32)
    logits[0, 0, 6] = 3.0
    found = propose(
        jnp.asarray(logits), Draws(None, None), 0.0, SpecialTokens(mask=5, end=4), SamplerConfig(end_token="last")
    )
    assert found.token_BS[0, 0] == 6 and found.confidence_BS[0, 0] > 0.5


def test_ids_beyond_the_tokenizer_are_never_candidates():
    special = dataclasses.replace(SPECIAL, vocab_size=7)
    logits_BSV = np.zeros((1, 3, 9), np.float32)
    logits_BSV[:, :, 7:] = 9.0
    found = propose(jnp.asarray(logits_BSV), Draws(None, None), 0.0, special, SamplerConfig())
    assert (np.asarray(found.token_BS) < 7).all()
