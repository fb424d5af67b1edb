"""The statistics beside plain ones, the measurements beside an enumerated ELBO, and what must hold exactly."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.special import log_softmax

from d1jax.config import Coupled, Elbo, OneStep, SamplerConfig
from d1jax.data.tokenizers import SpecialTokens
from d1jax.diffusion.canvas import Canvas
from d1jax.diffusion.estimators import views_of
from d1jax.diffusion.likelihood import score
from d1jax.evaluation import estimator_stats as audit
from d1jax.evaluation import estimators as bench_rules
from d1jax.evaluation.estimators import Bench, Candidate, RolloutBatch, candidates

MASK, END = 3, 2
TEXTS = [(0, 1, 1, 0), (1, 1, 0, 2), (0, 0, 2, 2), (1, 0, 1, 1), (2, 0, 1, 0), (0, 1, 0, 1)]  # to the first 2, included
LENGTHS = [4, 4, 3, 4, 1, 4]
PROMPT = (1, 0)
SAMPLER = SamplerConfig(completion_length=4, block_length=2, steps=4)
KEY = jax.random.key(7)


@pytest.fixture(scope="module")
def tiny_model(tiny):
    return tiny(seed=3, vocab_size=4)


def bench_of(model, variables, cuts=((0, 6, 6),)):
    """The texts in batches of (first row, end, rows that count)."""
    batches = []
    for first, end, kept in cuts:
        ids = np.arange(first, end)
        completion_BC = jnp.asarray([TEXTS[i % len(TEXTS)] for i in ids])
        canvas = Canvas(completion_BC, jnp.tile(jnp.array([PROMPT]), (len(ids), 1)), jnp.full(len(ids), 2))
        batches.append(RolloutBatch(canvas, jnp.asarray(ids), jnp.zeros_like(completion_BC), kept))
    return Bench(model, variables, SAMPLER, SpecialTokens(mask=MASK, end=END), tuple(batches))


@pytest.fixture(scope="module")
def bench(tiny_model):
    return bench_of(*tiny_model)


@pytest.fixture(scope="module")
def exact_B(tiny_model, oracle):
    """The ELBO of every text, all maskings enumerated: the mean over n of L / n x the mean over subsets of n tokens."""
    forward, found = oracle(*tiny_model), []
    for text, length in zip(TEXTS, LENGTHS, strict=True):
        total = 0.0
        for n in range(1, length + 1):
            sums = []
            for hidden in itertools.combinations(range(length), n):
                seen = [MASK if at in hidden or at >= length else token for at, token in enumerate(text)]
                logp = log_softmax(forward([*PROMPT, *seen])[1][len(PROMPT) :], axis=-1)
                sums.append(sum(logp[at, text[at]] for at in hidden))
            total += np.mean(sums) / n
        found.append(total)
    return np.array(found)


# -- statistics --------------------------------------------------------------------------------------------------------


def plain_pearson(x, y):
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    together = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return together / math.sqrt(sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y))


def plain_ranks(values):
    """Equal values share the mean of their ranks."""
    return [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3), st.integers(-3, 3)), min_size=3, max_size=12))
def test_correlations_are_means_over_the_draws(rows):
    *draws, truth = np.array(rows, float).T
    found = [audit.mean_correlation(of, np.stack(draws), truth) for of in (stats.pearsonr, stats.spearmanr)]
    if any(len(set(values)) == 1 for values in (*draws, truth)):
        assert all(map(math.isnan, found))
        return
    for value, seen in zip(found, (list, plain_ranks), strict=True):
        plain = [plain_pearson(seen(draw.tolist()), seen(truth.tolist())) for draw in draws]
        assert value == pytest.approx(np.mean(plain), abs=1e-9)


def test_bias_and_variance_of_known_draws():
    rng = np.random.default_rng(0)
    truth_B, scale_B = np.array([-3.0, -5.0, -9.0]), np.array([1.0, 2.0, 0.5])
    score_SB = truth_B + 0.25 + scale_B * rng.normal(size=(20000, 3))
    off, error = audit.bias(score_SB, truth_B, np.full(3, 0.03))
    assert error == pytest.approx(math.sqrt((scale_B**2 / 20000 + 0.03**2).sum()) / 3, rel=0.02)
    assert off == pytest.approx(0.25, abs=4 * error)
    spread, error = audit.variance(score_SB)
    assert spread == pytest.approx(score_SB.var(axis=0, ddof=1).mean())
    assert error == pytest.approx(math.sqrt(2 * (scale_B**4).sum() / 9 / 20000), rel=0.05)  # a normal's fourth moment


def test_the_clip_range_is_that_of_the_ratio_and_nothing_overflows():
    edges = np.log([1.19, 1.21, 0.81, 0.79, 1.49, 1.51, 0.51, 0.49, 1.0])
    valid_BC = np.ones((1, 9), bool)
    found = audit.log_ratio(edges[None, None], np.zeros((1, 1, 9)), valid_BC)
    assert found["outside_0.2"] == pytest.approx(6 / 9) and found["outside_0.5"] == pytest.approx(2 / 9)
    assert found["rms"] == pytest.approx(math.sqrt((edges**2).mean())) and found["std"] == pytest.approx(edges.std())
    far = audit.log_ratio(np.array([[[1e5, -1e5, 7.0]]]), np.zeros((1, 1, 3)), np.array([[True, True, False]]))
    assert far["outside_0.5"] == 1 and far["largest"] == 1e5  # and padding does not count


# -- the table ---------------------------------------------------------------------------------------------------------


def test_every_coupled_estimator_has_a_decoupled_one_of_equal_cost(bench):
    table = {candidate.name: candidate for candidate in candidates(4)}
    assert len(table) == len(candidates(4)) and "autoregressive" not in {c.name for c in candidates(65)}
    coupled = [candidate for candidate in table.values() if candidate.estimator.name == "coupled"]
    assert len(coupled) == 8
    for one in coupled:
        assert bench_rules.passes_of(bench, one) == bench_rules.passes_of(bench, table[one.decoupled])
    assert bench_rules.passes_of(bench, table["autoregressive"]) == 4


# -- measurements ------------------------------------------------------------------------------------------------------


def test_the_large_sample_elbo_is_the_enumerated_one(bench, exact_B):
    truth_B, error_B = bench_rules.large_sample_elbo(bench, KEY, 1024)
    assert (error_B < 0.15).all() and (np.abs(truth_B - exact_B) < 4.5 * error_B + 1e-5).all()


@pytest.mark.parametrize("estimator", [Elbo(samples=2), Coupled(), Coupled(samples=2)])
def test_unbiased_estimators_have_no_bias_and_shared_masks_no_ratio(bench, exact_B, estimator):
    row = audit.measure(bench, Candidate("one", estimator), exact_B, np.zeros(6), KEY, 200)
    assert abs(row["bias"]) < 4 * row["bias_error"]
    assert row["shared"] == {"std": 0, "rms": 0, "largest": 0, "outside_0.2": 0, "outside_0.5": 0}
    assert row["unshared"]["outside_0.2"] > 0 and row["variance"] > 0


def test_an_estimator_that_draws_nothing_differs_from_the_elbo_by_what_it_is(bench, exact_B):
    one_step = Candidate("one_step", OneStep())
    row = audit.measure(bench, one_step, exact_B, np.zeros(6), KEY, 200, gradient_samples=2)
    assert row["variance"] == row["token_variance"] == row["unshared"]["largest"] == row["gradient_noise"] == 0
    expected = np.mean(bench_rules.scores(bench, one_step, KEY).sum(axis=1) - exact_B)
    assert row["bias"] == pytest.approx(expected, abs=1e-6)
    assert not one_step.drawn and one_step._replace(prompt_mask=0.1).drawn


def test_scores_do_not_depend_on_the_batches(tiny_model, bench):
    """The rows that fill the last batch up count nowhere."""
    cut = bench_of(*tiny_model, cuts=((0, 4, 4), (4, 8, 2)))
    np.testing.assert_array_equal(cut.valid_BC, bench.valid_BC)
    assert bench.valid_BC.sum(axis=1).tolist() == LENGTHS
    one = Candidate("elbo", Elbo(samples=2))
    np.testing.assert_allclose(bench_rules.scores(cut, one, KEY), bench_rules.scores(bench, one, KEY), atol=1e-5)


def test_the_gradients_noise_is_its_variance_over_its_squared_mean(tiny_model, bench):
    one, samples = Candidate("elbo", Elbo(samples=2)), 6
    batch = bench.batches[0]

    @jax.jit
    def gradient(key):
        views = views_of(key, batch.canvas, batch.row_ids_B, batch.unmask_step_BC, **bench.settings(one))

        def signed(variables):
            logp_BC = score(bench.model, variables, batch.canvas, views).logp
            return jnp.sum(logp_BC[::2]) - jnp.sum(logp_BC[1::2])

        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(jax.grad(signed)(bench.variables))])

    rows = [np.asarray(gradient(jax.random.fold_in(KEY, s)), float) for s in range(samples)]
    spread = np.var(rows, axis=0, ddof=1).sum()
    signal = np.square(np.mean(rows, axis=0)).sum() - spread / samples
    # cut into batches whose last rows only fill up
    cut = bench_of(*tiny_model, cuts=((0, 4, 4), (4, 8, 2)))
    assert bench_rules.gradient_noise(cut, one, KEY, samples) == pytest.approx(spread / signal, rel=1e-3)
    assert signal > 0


# -- comparisons and words ---------------------------------------------------------------------------------------------


def row(name, variance, **more):
    ratios = {"rms": 0.5, "outside_0.2": 0.3, "outside_0.5": 0.1}
    estimator = {"name": "elbo", "samples": 1}
    values = {"passes": 2, "bias": 0.1, "bias_error": 0.05, "variance": variance, "variance_error": variance / 10}
    values |= {
        "token_variance": variance / 2,
        "pearson": 0.9,
        "spearman": None,
        "decoupled": "",
        "estimator": estimator,
    }
    return {"name": name, **values, "unshared": ratios, "shared": dict.fromkeys([*ratios, "largest"], 0.0), **more}


def test_pairs_compare_at_equal_passes():
    rows = [
        row("elbo K=1", 8.0, gradient_noise=4.0),
        row("elbo K=2", 3.0, gradient_noise=0.0, estimator={"name": "elbo", "samples": 2}),
        row("coupled", 1.5, decoupled="elbo K=2", gradient_noise=1.0, estimator={"name": "coupled", "samples": 1}),
        row("alone", 1.5, decoupled="nothing"),
    ]
    (pair,) = audit.coupled_against_decoupled(rows)
    error = math.hypot(0.1, 0.1)
    assert pair["spread"] == pytest.approx(
        {"variance": 0.5, "token_variance": 0.5, "gradient": None, "variance_error": 0.5 * error}
    )
    # two masks drawn freely have half the variance of one
    assert pair["free"] == pytest.approx(
        {"variance": 0.375, "token_variance": 0.375, "gradient": 0.5, "variance_error": 0.375 * error}
    )
    words = audit.findings(rows, [pair])
    assert "30.0% (elbo K=1) to 30.0%" in words[0] and "all ratios are exactly 1" in words[1]
    assert words[2].startswith(
        "coupled, 2 passes: 0.50 ± 0.07 of the variance of elbo K=2 (0.50 of it a token), and 0.38 ±"
    )
    assert len(words) == 3  # no rank correlation is known
    lines = audit.table(rows).split("\n")
    assert len(lines) == 5 and "+0.100 ± 0.050" in lines[1] and "–" in lines[4]


def test_a_score_that_is_not_a_function_of_its_key_is_told():
    shared = {"rms": 0.01, "outside_0.2": 0.02, "outside_0.5": 0.0, "largest": 0.3}
    words = audit.findings([row("elbo", 1.0, shared=shared, spearman=0.5)], [])
    assert "not a function of its key" in words[1] and "0.50 (elbo)" in words[2]


def test_complements_beat_free_masks_where_a_tokens_own_masking_is_the_noise(bench, exact_B):
    """On this model most of the variance is which token is scored; a pair scores each once."""
    distribution = Elbo(counts="independent", low=0.2, high=0.8)
    coupled = Coupled(counts="independent", low=0.2, high=0.8)
    table = [Candidate("one", distribution), Candidate("two", dataclasses.replace(distribution, samples=2))]
    table.append(Candidate("pair", coupled, decoupled="two"))
    rows = [audit.measure(bench, one, exact_B, np.zeros(6), KEY, 200) for one in table]
    (pair,) = audit.coupled_against_decoupled(rows)
    for other in (pair["spread"], pair["free"]):
        assert other["variance"] + 3 * other["variance_error"] < 1 and other["token_variance"] < 1
