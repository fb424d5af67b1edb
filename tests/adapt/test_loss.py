"""Which tokens are masked and what each counts, against loops."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.adapt.loss import cart_weights, corrupt, next_tokens, token_logps, weighted_loss
from d1jax.config import AdaptConfig, CartWeighting
from d1jax.models.transformer import Transformer

MASK = 12


def tokens(rows=4, columns=9, seed=0):
    return jnp.array(np.random.default_rng(seed).integers(0, 11, (rows, columns)), jnp.int32)


def masked(config=None, rows=4, columns=9, key=0):
    return corrupt(jax.random.key(key), tokens(rows, columns), config or AdaptConfig(), MASK)


@given(
    st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=3), st.sampled_from([0.1, 0.5, 0.8])
)
def test_cart_weighs_by_the_clean_tokens_near_by(hidden, p):
    hidden = np.array(hidden)
    there = np.arange(7)[None, :] < np.arange(7, 7 - len(hidden), -1)[:, None]
    expected = np.zeros(hidden.shape)
    for row in range(len(hidden)):
        for n in range(7):
            for i in range(7):
                if i != n and there[row, i] and not hidden[row, i]:
                    expected[row, n] += 0.5 * p * (1 - p) ** (abs(n - i) - 1)
    np.testing.assert_allclose(cart_weights(jnp.array(hidden), jnp.array(there), p), expected, rtol=1e-5, atol=1e-7)


def test_cart_of_what_is_all_masked_is_zero_and_one_neighbour_weighs_most():
    assert not np.any(cart_weights(jnp.ones((1, 6), bool), jnp.ones((1, 6), bool), 0.3))
    near = np.asarray(cart_weights(jnp.array([[True, True, False, True, True]]), jnp.ones((1, 5), bool), 0.3))[0]
    assert near[1] == near[3] > near[0] == near[4] > 0


def test_a_masked_token_counts_the_inverse_of_its_chance():
    config = AdaptConfig(low=0.4, high=0.6)
    found = masked(config, rows=64)
    hidden = np.asarray(found.shown_BT) == MASK
    weight = np.asarray(found.weight_BT) * 64 * 9
    assert np.all((weight > 0) == hidden) and not hidden[:, 0].any()
    assert np.all((1 / 0.6 - 1e-4 <= weight[hidden]) & (weight[hidden] <= 1 / 0.4 + 1e-4))
    per_row = [set(np.round(row[row > 0], 4)) for row in weight]
    assert all(len(found) <= 1 for found in per_row) and len(set.union(*per_row)) > 32
    assert np.array_equal(np.where(hidden, MASK, np.asarray(found.tokens_BT)), found.shown_BT)


def test_weights_of_a_token_are_one_on_average():
    weights = [np.asarray(masked(AdaptConfig(low=0.2), rows=64, key=key).weight_BT) * 64 * 9 for key in range(30)]
    mean = np.mean(weights, axis=(0, 1))
    assert mean[0] == 0
    np.testing.assert_allclose(mean[1:], 1, atol=0.12)  # about three standard errors


def test_diffullama_divides_by_what_is_masked():
    by_tokens, by_masked = (masked(AdaptConfig(normalizer=name)) for name in ("tokens", "masked"))
    hidden = np.sum(np.asarray(by_tokens.weight_BT) > 0)
    np.testing.assert_allclose(by_masked.weight_BT, np.asarray(by_tokens.weight_BT) * 4 * 9 / hidden, rtol=1e-6)


def test_cart_replaces_the_inverse():
    found = masked(AdaptConfig(weighting=CartWeighting(p=0.3)))
    hidden = np.asarray(found.shown_BT) == MASK
    expected = np.where(hidden, cart_weights(jnp.array(hidden), jnp.ones((4, 9), bool), 0.3), 0) / 36
    np.testing.assert_allclose(found.weight_BT, expected, rtol=1e-6)


def test_a_clean_beginning_is_never_masked():
    config = AdaptConfig(low=0.98, high=0.99, clean_prefix=1.0)
    hidden = np.asarray(masked(config, rows=256).shown_BT) == MASK
    first = np.where(hidden.any(axis=1), hidden.argmax(axis=1), 9)
    assert set(range(1, 9)) <= set(first.tolist())
    none = np.asarray(masked(dataclasses.replace(config, clean_prefix=0.0), rows=256).shown_BT) == MASK
    assert none[:, 1].mean() > 0.95


def test_a_cut_window_is_neither_seen_nor_scored_behind_its_end(tiny):
    found = masked(AdaptConfig(truncated=1.0), rows=128)
    length = np.asarray(found.length_B)
    assert set(length.tolist()) == set(range(2, 10))
    behind = np.arange(9)[None, :] >= length[:, None]
    assert not np.asarray(found.weight_BT)[behind].any()
    model, variables = tiny()
    changed = found._replace(
        tokens_BT=jnp.where(behind, 3, found.tokens_BT), shown_BT=jnp.where(behind, 5, found.shown_BT)
    )
    np.testing.assert_allclose(
        weighted_loss(model, variables, changed)[0], weighted_loss(model, variables, found)[0], rtol=1e-6
    )


@pytest.mark.parametrize("alignment", ["same_position", "shifted"])
def test_the_loss_is_the_sum_over_a_plain_forward_pass(tiny, oracle, alignment):
    model, variables = tiny(alignment=alignment)
    windows = masked()
    forward, total = oracle(model, variables), 0.0
    for shown, true, weight in zip(windows.shown_BT, windows.tokens_BT, windows.weight_BT, strict=True):
        logits = forward(shown.tolist())[1]
        logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        for place in range(1, 9):
            row = place - 1 if alignment == "shifted" else place
            total -= float(weight[place]) * logp[row, int(true[place])]
    np.testing.assert_allclose(weighted_loss(model, variables, windows)[0], total, rtol=2e-5)


def test_next_tokens_count_alike_and_do_not_see_what_follows(tiny):
    model, variables = tiny(alignment="shifted", attention_mask="causal")
    windows = next_tokens(tokens())
    assert np.asarray(windows.weight_BT).sum() == pytest.approx(1) and not np.asarray(windows.weight_BT)[:, 0].any()
    lengths = jnp.full(4, 9)
    before = token_logps(model, variables, tokens(), tokens(), lengths)
    later = tokens().at[:, 6:].set(1)
    np.testing.assert_allclose(
        token_logps(model, variables, later, later, lengths)[:, :5], before[:, :5], rtol=1e-6, atol=1e-6
    )
    bidirectional = Transformer(dataclasses.replace(model.config, attention_mask="full"))
    assert np.abs(token_logps(bidirectional, variables, later, later, lengths) - before)[:, :5].max() > 1e-3
