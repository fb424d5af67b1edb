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
from d1jax.diffusion.reveal import choose, propose, tokens_per_step

SPECIAL = SpecialTokens(mask=6, end=4, turn_end=5)


# -- schedule ----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 64), st.data())
def test_a_schedule_fills_the_block_evenly_with_the_remainder_first(block, data):
    steps = data.draw(st.integers(1, block))
    counts = tokens_per_step(block, steps)
    assert len(counts) == steps and sum(counts) == block
    assert list(counts) == sorted(counts, reverse=True) and max(counts) - min(counts) <= 1
    # LLaDA's get_num_transfer_tokens: everyone gets the quotient, the first `remainder` steps one more.
    expected = [block // steps] * steps
    for step in range(block % steps):
        expected[step] += 1
    assert list(counts) == expected


def test_the_example_of_the_docstring():
    assert tokens_per_step(8, 3) == (3, 3, 2)


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


def plain_proposal(logits_V, gumbel_V, temperature, end_token):
    """(token, confidence) of one position."""
    logits_V = np.asarray(logits_V, np.float64).copy()
    if end_token == "forbidden":
        logits_V[SPECIAL.end] = -np.inf
    values = [
        -np.inf if token == SPECIAL.mask else value if temperature == 0 else value / temperature + gumbel_V[token]
        for token, value in enumerate(logits_V)
    ]
    token = max(range(len(values)), key=lambda index: (values[index], -index))
    if end_token == "last":
        logits_V[[SPECIAL.end, SPECIAL.turn_end]] = -np.inf
    return token, softmax(logits_V)[token]


@pytest.mark.parametrize("end_token", ["allowed", "forbidden", "last"])
@pytest.mark.parametrize("temperature", [0.0, 0.6])
@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
def test_candidates_and_confidence_equal_a_plain_loop(end_token, temperature, remasking):
    rng = np.random.default_rng(0)
    logits_BSV = rng.standard_normal((5, 8, 9)).astype(np.float32) * 2
    logits_BSV[:, ::2, SPECIAL.mask] += 9  # the model is sure of the mask, of an end token, of a closing token
    logits_BSV[:, 1::4, SPECIAL.end] += 5
    logits_BSV[:, 3::4, SPECIAL.turn_end] += 5
    gumbel_BSV, uniform_BS = rng.gumbel(size=logits_BSV.shape), rng.random((5, 8)).astype(np.float32)
    found = propose(
        jnp.asarray(logits_BSV),
        jnp.asarray(gumbel_BSV, jnp.float32) if temperature else None,
        jnp.asarray(uniform_BS) if remasking == "random" else None,
        temperature,
        SPECIAL,
        SamplerConfig(end_token=end_token, remasking=remasking),
    )
    for b in range(5):
        for s in range(8):
            token, confidence = plain_proposal(logits_BSV[b, s], gumbel_BSV[b, s], temperature, end_token)
            assert found.token_BS[b, s] == token
            np.testing.assert_allclose(found.confidence_BS[b, s], confidence, atol=1e-5)
    expected_BS = uniform_BS if remasking == "random" else found.confidence_BS
    if end_token == "last":
        expected_BS = np.where(np.isin(found.token_BS, [SPECIAL.end, SPECIAL.turn_end]), 0.0, expected_BS)
    np.testing.assert_array_equal(found.priority_BS, expected_BS)
    tokens = np.asarray(found.token_BS)
    assert found.token_BS.dtype == jnp.int32 and not (tokens == SPECIAL.mask).any()
    assert (tokens == SPECIAL.end).any() == (end_token != "forbidden")
    assert (tokens == SPECIAL.turn_end).any()
    if end_token == "last":
        confidence = np.asarray(found.confidence_BS)
        ends = (tokens == SPECIAL.end) | (tokens == SPECIAL.turn_end)
        assert (confidence[ends] == 0).all() and (confidence[~ends] > 0).all()


def test_the_mask_token_keeps_its_share_of_the_confidence():
    logits = np.zeros((1, 1, 7), np.float32)
    logits[0, 0, SPECIAL.mask] = np.log(10.0)
    found = propose(jnp.asarray(logits), None, None, 0.0, SPECIAL, SamplerConfig())
    assert found.token_BS[0, 0] == 0  # ties go to the lowest index
    np.testing.assert_allclose(found.confidence_BS[0, 0], 1 / 16, rtol=1e-5)


def test_without_a_second_closing_token_no_ordinary_token_is_put_last():
    logits = np.zeros((1, 1, 7), np.float32)
    logits[0, 0, 6] = 3.0
    found = propose(jnp.asarray(logits), None, None, 0.0, SpecialTokens(mask=5, end=4), SamplerConfig(end_token="last"))
    assert found.token_BS[0, 0] == 6 and found.confidence_BS[0, 0] > 0.5


def test_ids_beyond_the_tokenizer_are_never_candidates():
    special = dataclasses.replace(SPECIAL, vocab_size=7)
    logits_BSV = np.zeros((1, 3, 9), np.float32)
    logits_BSV[:, :, 7:] = 9.0
    found = propose(jnp.asarray(logits_BSV), None, None, 0.0, special, SamplerConfig())
    assert (np.asarray(found.token_BS) < 7).all()
