"""The order of decoding: every measure beside a plain-Python one, and the first step beside the float64 model."""

import json

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.diffusion.rollout import Rollout
from d1jax.evaluation import decoding_order as ar

ROWS = st.integers(1, 12).flatmap(lambda c: st.lists(st.lists(st.integers(-1, 6), min_size=c, max_size=c), min_size=1))
ROW = st.lists(st.integers(-1, 8), min_size=1, max_size=14)
ALL_K = tuple(range(1, 16))


def plain_order(steps):
    return [column for step in range(max(steps) + 1) for column, at in enumerate(steps) if at == step]


def plain_local(order, k):
    hits = [
        all(order[t - i] == order[t] - i for i in range(1, k + 1)) for t in range(len(order)) if t >= k
    ]  # the first one is number 0
    return sum(hits) / len(hits) if hits else None


def plain_global(order, k):
    masked, hits = sorted(order), []
    for column in order:
        hits.append(column in masked[:k])
        masked.remove(column)
    return sum(hits) / len(hits) if hits else None


def plain_mean(values):
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


@given(ROWS)
def test_the_curves_are_those_of_the_definition(rows):
    orders = [plain_order(row) for row in rows]
    for curve, plain in ((ar.local_curve, plain_local), (ar.global_curve, plain_global)):
        expected = {k: plain_mean([plain(order, k) for order in orders]) for k in ALL_K}
        assert curve(np.array(rows), ALL_K) == pytest.approx({k: v for k, v in expected.items() if v is not None})


@given(ROW)
def test_a_longer_run_is_rarer_and_a_wider_window_catches_more(row):
    order = ar.unmask_order(row)
    local, wide = ar.local_ar(order, ALL_K), ar.global_ar(order, ALL_K)
    local = local[~np.isnan(local)]
    assert len(local) == max(len(order) - 1, 0) and (np.diff(local) <= 1e-12).all()
    assert len(order) == 0 or ((np.diff(wide) >= 0).all() and wide[len(order) - 1] == 1)


@given(ROW)
def test_a_measure_of_what_is_decoded_only(row):
    """A tail that was never decoded changes nothing."""
    longer = np.array([row + [-1] * 5])
    assert ar.local_curve(longer) == ar.local_curve(np.array([row]))
    assert ar.global_curve(longer) == ar.global_curve(np.array([row]))


@pytest.mark.parametrize("steps", [range(12), [0] * 12, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3], [*range(11), -1]])
def test_left_to_right_is_one_for_every_k(steps):
    """Several tokens a step count as unmasked from left to right."""
    rows = np.array([list(steps)] * 3)
    assert ar.local_curve(rows) == dict.fromkeys(ar.LOCAL_K, 1.0)
    assert ar.global_curve(rows) == dict.fromkeys(ar.GLOBAL_K, 1.0)


def test_right_to_left_is_none_of_it():
    rows = np.arange(12)[::-1][None]
    assert ar.local_curve(rows) == dict.fromkeys(ar.LOCAL_K, 0.0)
    # Only the last k find no more than k masks.
    assert ar.global_curve(rows) == pytest.approx({k: k / 12 for k in ar.GLOBAL_K})


def test_a_random_order_is_by_chance():
    """E[local@1] = 1 / T; the rank of an unmasked column among n masks is uniform, so E[global@k] = mean of min(k / n, 1)."""
    rng, length = np.random.default_rng(0), 20
    rows = np.array([rng.permutation(length) for _ in range(2000)])
    assert ar.local_curve(rows)[1] == pytest.approx(1 / length, abs=4e-3)
    for k, value in ar.global_curve(rows).items():
        assert value == pytest.approx(np.mean([min(k / n, 1) for n in range(1, length + 1)]), abs=6e-3)


def test_rows_with_too_few_tokens_are_left_out_and_no_value_is_nan():
    nothing, one, three = [-1, -1, -1, -1], [0, -1, -1, -1], [0, 1, 2, -1]
    assert ar.local_curve(np.array([nothing, one])) == {} and ar.global_curve(np.array([nothing])) == {}
    assert ar.local_curve(np.array([nothing, one, three])) == {1: 1.0, 2: 1.0}
    assert ar.global_curve(np.array([nothing, one])) == dict.fromkeys(ar.GLOBAL_K, 1.0)


def rollout(steps):
    return Rollout(**dict.fromkeys(Rollout._fields))._replace(unmask_step_BC=np.array(steps))


def test_the_metrics_have_names_and_no_gaps():
    assert ar.metrics(rollout([[5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5]])) == {
        "decoding/local_ar_1": 0.5,
        "decoding/local_ar_4": 0.5,
        "decoding/global_ar_1": pytest.approx((1 / 6 + 1) / 2),
        "decoding/global_ar_4": pytest.approx((4 / 6 + 1) / 2),
    }
    assert ar.metrics(rollout([[0, -1]])) == {"decoding/global_ar_1": 1.0, "decoding/global_ar_4": 1.0}
    assert ar.metrics(rollout([[-1, -1]])) == {}


@given(ROWS, st.integers(1, 8))
def test_the_heat_map_counts_what_is_unmasked(rows, most):
    found = ar.heat_map(np.array(rows), most)
    steps, columns = max(map(max, rows)) + 1, len(rows[0])
    assert (found["steps"], found["columns"]) == (steps, columns)
    tall, wide = max(-(-steps // most), 1), -(-columns // most)
    share = np.array(found["share"]).reshape(-(-steps // tall), -(-columns // wide))
    assert max(share.shape) <= most
    unmasked = [(at // tall, column // wide) for row in rows for column, at in enumerate(row) if at >= 0]
    for n, c in np.ndindex(*share.shape):
        total = sum(column == c for _, column in unmasked)
        assert share[n, c] == pytest.approx(unmasked.count((n, c)) / max(total, 1), abs=1e-4)


@pytest.mark.parametrize("at_once", [None, 7])
@pytest.mark.parametrize("alignment", ["same_position", "shifted"])
def test_the_first_step_is_that_of_the_model(tiny, oracle, monkeypatch, alignment, at_once):
    model, variables = tiny(alignment=alignment)
    prompt_BP, length_B = np.array([[1, 2, 3, 4], [5, 6, 0, 0]]), np.array([4, 2])
    if at_once:
        monkeypatch.setattr(ar, "LOGITS_PER_CHUNK", at_once * model.config.vocab_size)
        jax.clear_caches()
    seen = ar.first_step(model, variables, prompt_BP, length_B, completion_length=5, mask_id=12)
    for row, n in enumerate(length_B):
        _, logits = oracle(model, variables)([*prompt_BP[row, :n], *[12] * 5])
        first = n - (alignment == "shifted")
        logits = logits[first : first + 5]
        p = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
        np.testing.assert_allclose(seen.entropy_BC[row], -(p * np.log(p)).sum(axis=1), rtol=2e-4, atol=2e-5)
        np.testing.assert_allclose(seen.confidence_BC[row], p.max(axis=1), rtol=2e-4)


def test_a_certain_model_has_no_entropy_and_not_nan(tiny):
    model, variables = tiny()
    params = variables["params"]
    variables = {**variables, "params": {**params, "ff_out": params["ff_out"] * 1e6}}
    seen = ar.first_step(model, variables, np.array([[1]]), np.array([1]), completion_length=3, mask_id=12)
    assert np.isfinite(seen.entropy_BC).all() and np.allclose(seen.confidence_BC, 1)


def test_an_evaluation_keeps_plain_json(tiny):
    model, variables = tiny()
    seen = ar.first_step(model, variables, np.array([[1, 2]]), np.array([2]), completion_length=4, mask_id=12)
    kept = ar.summary(rollout([[1, 0, 2, -1]]), seen)
    assert json.loads(json.dumps(kept, allow_nan=False)) == kept
    assert kept["local_ar"] == {"1": 0.0, "2": 0.0} and set(kept["global_ar"]) == {"1", "2", "3", "4"}
    assert kept["first_step"]["rows"] == 1
    assert len(kept["first_step"]["entropy"]) == len(kept["first_step"]["confidence"]) == 4
