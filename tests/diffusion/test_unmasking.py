"""The order of unmasking and the rules of parallel decoding against plain Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.config import LowConfidence, SamplerConfig
from d1jax.config.sampler import Schedule
from d1jax.config.values import alternatives
from d1jax.data.tokenizers import SpecialTokens
from d1jax.diffusion.predictions import Predictions
from d1jax.diffusion.unmasking import (
    RULES,
    UnmaskingState,
    accepted,
    bernoulli,
    change,
    in_order,
    top_k,
)

SPECIAL = SpecialTokens(mask=6, end=4, turn_end=5)
QUARTERS = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])
ROWS = st.lists(st.lists(st.tuples(QUARTERS, st.booleans()), min_size=6, max_size=6), min_size=1, max_size=3)


def made(confidence_score_BS, confidence_BS=None, tokens_BS=None):
    confidence_score_BS = jnp.asarray(confidence_score_BS, jnp.float32)
    confidence_BS = confidence_score_BS if confidence_BS is None else jnp.asarray(confidence_BS, jnp.float32)
    tokens_BS = jnp.zeros(confidence_score_BS.shape, jnp.int32) if tokens_BS is None else jnp.asarray(tokens_BS)
    return Predictions(tokens_BS, jnp.zeros(confidence_score_BS.shape), confidence_BS, confidence_score_BS, None, None)


@given(ROWS, st.integers(0, 8))
def test_the_surest_masked_positions_come_first_and_of_equals_the_lowest_index(rows, count):
    confidence_score_BS = jnp.array([[score for score, _ in row] for row in rows], jnp.float32)
    masked_BS = jnp.array([[is_masked for _, is_masked in row] for row in rows])
    order = in_order(made(confidence_score_BS), None, masked_BS, jnp.zeros_like(masked_BS), SPECIAL, SamplerConfig())
    selection = top_k(order, masked_BS, jnp.int32(count))
    assert (np.asarray(selection.order_logp_BS) == 0).all()
    for row, chosen in zip(rows, np.asarray(selection.unmask_BS), strict=True):
        positions = [index for index, (_, is_masked) in enumerate(row) if is_masked]
        best = sorted(positions, key=lambda index: (-row[index][0], index))[:count]
        assert sorted(np.flatnonzero(chosen)) == sorted(best)


def test_forced_positions_come_first_and_end_tokens_last():
    masked_BS, forced_BS = jnp.array([[True, True, True, True]]), jnp.array([[False, False, True, False]])
    tokens_BS = [[SPECIAL.end, 1, 1, 1]]
    config = SamplerConfig(end_token="last")
    order = in_order(made([[0.9, 0.2, 0.1, 0.5]], tokens_BS=tokens_BS), None, masked_BS, forced_BS, SPECIAL, config)
    assert np.asarray(order.rank_BS).tolist() == [[3, 2, 0, 1]]


@pytest.mark.parametrize(
    "config",
    [SamplerConfig(remasking="random"), SamplerConfig(remasking=LowConfidence(temperature=0.5))],
    ids=["random", "drawn"],
)
def test_drawn_orders_have_the_distribution_whose_log_probability_is_returned(config):
    """All orders of three of four positions, 40,000 times: how often each came against exp(sum of its log-probabilities)."""
    rows, score = 40_000, [0.1, 0.9, 0.4, 0.6]
    masked_BS = jnp.broadcast_to(jnp.array([True, True, False, True]), (rows, 4))
    uniform_BS = jax.random.uniform(jax.random.key(0), (rows, 4))
    drawn = in_order(made([score] * rows), uniform_BS, masked_BS, jnp.zeros_like(masked_BS), SPECIAL, config)
    chosen = top_k(drawn, masked_BS, jnp.int32(2))
    ranks = np.asarray(drawn.rank_BS)
    logp = np.asarray(chosen.order_logp_BS).sum(axis=1)
    seen = {}
    for row in range(rows):
        first_two = tuple(int(np.flatnonzero(ranks[row] == rank)[0]) for rank in (0, 1))
        seen.setdefault(first_two, []).append(logp[row])
    assert len(seen) == 6 and not any(2 in pair for pair in seen)
    for values in seen.values():
        assert np.ptp(values) < 1e-5
        p = np.exp(values[0])
        assert abs(len(values) / rows - p) < 4 * np.sqrt(p / rows)


def test_bernoulli_counts_what_stayed_too():
    masked_BS, forced_BS = jnp.array([[True, True, True, False]]), jnp.array([[False, False, True, False]])
    selection = bernoulli(jnp.array([[0.1, 0.9, 0.9, 0.1]]), masked_BS, forced_BS, jnp.float32(0.25))
    assert np.asarray(selection.unmask_BS).tolist() == [[True, False, True, False]]
    np.testing.assert_allclose(selection.order_logp_BS, [[np.log(0.25), np.log(0.75), 0, 0]], rtol=1e-6)


def plainly_accepted(rule, schedule, options):
    """Indices of the options (confidence, entropy, stable) that go together; they come in their order."""
    taken = []
    for n, (confidence, _, stable) in enumerate(options, start=1):
        if rule == "threshold":
            fits = confidence >= schedule.threshold
        elif rule == "klass":
            fits = confidence > schedule.threshold and stable >= 2
        elif rule == "factor":
            fits = confidence >= 1 - schedule.factor / (n + 1) or n == len(options)
        else:
            fits = sum(entropy for _, entropy, _ in options[: n - 1]) <= schedule.bound
        if fits or n == 1:
            taken.append(n - 1)
        elif rule in ("factor", "entropy_bound"):
            break
    return taken


SCHEDULES = alternatives(Schedule)
EIGHTHS = st.integers(0, 8).map(lambda n: n / 8)


@given(
    st.sampled_from(["threshold", "factor", "entropy_bound", "klass"]),
    st.lists(st.tuples(EIGHTHS, EIGHTHS, st.integers(0, 3)), min_size=1, max_size=6),
    st.sampled_from([0.25, 0.5, 1.0]),
)
def test_rules_accept_what_a_plain_loop_accepts(rule, options, setting):
    schedule = SCHEDULES[rule](2 * setting if rule == "factor" else setting)
    if rule == "factor":  # the rule is made for this order
        options = sorted(options, reverse=True)
    confidence, entropy, stable = (jnp.array([values]) for values in zip(*options, strict=True))
    ones = jnp.ones(confidence.shape, bool)
    state = UnmaskingState(made(-entropy, confidence), jnp.arange(len(options))[None], ones, ~ones, stable)
    unmask_BS = np.asarray(accepted(schedule, state).unmask_BS)
    assert np.flatnonzero(unmask_BS[0]).tolist() == plainly_accepted(rule, schedule, options)
    # A forced position goes alone; what is not open is never taken.
    forced = state._replace(forced_BS=ones.at[0, 1:].set(False))
    assert np.flatnonzero(accepted(schedule, forced).unmask_BS[0]).tolist() == [0]
    closed = state._replace(masked_BS=~ones)
    assert not np.asarray(accepted(schedule, closed).unmask_BS).any()


def test_every_adaptive_schedule_has_its_rule():
    assert set(RULES) == {name for name, cls in SCHEDULES.items() if cls.adaptive}


def test_change_is_the_kl_divergence_from_the_step_before():
    now, before = np.array([0.7, 0.3, 0.0]), np.array([0.2, 0.5, 0.3])
    with np.errstate(divide="ignore"):
        found = change(
            jnp.log(jnp.asarray(now, jnp.float32))[None, None], jnp.log(jnp.asarray(before, jnp.float32))[None, None]
        )
    np.testing.assert_allclose(found[0, 0], 0.7 * np.log(0.7 / 0.2) + 0.3 * np.log(0.3 / 0.5), rtol=1e-5)
