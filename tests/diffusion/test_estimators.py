"""Plans of views: their expectation over all draws, enumerated, against the exact likelihood bounds; and what they mask."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import log_softmax

from d1jax.config import (
    Autoregressive,
    Block,
    Coupled,
    Elbo,
    KlInLoss,
    OneStep,
    Ppo,
    Quadrature,
    RlConfig,
    Rloo,
    SamplerConfig,
    Strata,
    Threshold,
    Trajectory,
)
from d1jax.data.tokenizers import SpecialTokens
from d1jax.diffusion import likelihood
from d1jax.diffusion.canvas import Canvas
from d1jax.diffusion.decoding import Prompts
from d1jax.diffusion.estimators import PLANS, Text, views_of
from d1jax.diffusion.likelihood import Views
from d1jax.diffusion.noise import KeyedNoise
from d1jax.diffusion.sampler import Sampler
from d1jax.models.families import FAMILIES
from d1jax.rl.advantages import group_advantages
from d1jax.rl.loss import AGGREGATIONS, token_terms
from d1jax.weights.names import to_published

MASK, END = 3, 2
SPECIAL = SpecialTokens(mask=MASK, end=END)
LENGTH, PROMPT, COMPLETION = 4, (1, 0), (0, 1, 1, 0)
SAMPLER = SamplerConfig(completion_length=4, block_length=2, steps=4)
score = jax.jit(likelihood.score, static_argnums=(0, 4))  # a program, and not one for every operation


@pytest.fixture(scope="module")
def world(tiny, oracle):
    """A model with three tokens and the mask, and logp(masked positions) -> [L] log p(completion token | the others)."""
    model, variables = tiny(seed=3, vocab_size=4)
    forward, known = oracle(model, variables), {}

    def logp(masked):
        if masked not in known:
            seen = [MASK if place in masked else token for place, token in enumerate(COMPLETION)]
            z = forward([*PROMPT, *seen])[1][len(PROMPT) :]
            known[masked] = log_softmax(z, axis=-1)[np.arange(LENGTH), COMPLETION]
        return known[masked]

    return model, variables, lambda masked: logp(frozenset(masked))


def exact_elbo(logp, places=range(LENGTH), also_masked=()):
    """E over n ~ U{1..L} and subsets of n places of (L / n) x the sum of their scores."""
    places = list(places)
    total = 0.0
    for n in range(1, len(places) + 1):
        subsets = list(itertools.combinations(places, n))
        total += np.mean([logp((*subset, *also_masked))[list(subset)].sum() for subset in subsets]) / n
    return total


class Prescribed(Text):
    """Numbers from a table instead of a key: table[number] is [B, columns]."""

    def uniforms(self, number, columns):
        return jnp.asarray(self.key[number], jnp.float32)


def scores(world, name, tables, estimator, probability=None, unmask_step=None, valid=LENGTH):
    """[L]: the mean over rows (one a draw) of the score of every position."""
    model, variables, _ = world
    rows = len(next(iter(tables.values()))) if tables else 1
    completion_BC = jnp.tile(jnp.array([COMPLETION]), (rows, 1))
    valid_BC = jnp.broadcast_to(jnp.arange(LENGTH)[None, :] < valid, (rows, LENGTH))
    reveal_BC = jnp.zeros((rows, LENGTH), jnp.int32) if unmask_step is None else jnp.array([unmask_step])
    mask_samples = PLANS[name](Prescribed(tables, jnp.arange(rows), valid_BC, reveal_BC, None), estimator, SAMPLER)
    canvas = Canvas(completion_BC, jnp.tile(jnp.array([PROMPT]), (rows, 1)), jnp.full(rows, 2))
    views = Views(
        jnp.stack([jnp.where(one.masked_BC, MASK, completion_BC) for one in mask_samples]),
        jnp.broadcast_to(canvas.prompt_BP[None], (len(mask_samples), rows, 2)),
        jnp.stack([jnp.asarray(one.weight_BC, jnp.float32) for one in mask_samples]),
    )
    found_BC = np.asarray(score(model, variables, canvas, views).logp, np.float64)
    return np.average(found_BC, axis=0, weights=probability)


def draws(values, permutations):
    """Every value with every permutation: tables of number 0 ([B, 1]) and of the permutation as uniforms ([B, L])."""
    pairs = list(itertools.product(values, permutations))
    first = np.array([[value] for value, _ in pairs])
    return first, (np.array([order for _, order in pairs]) + 0.5) / LENGTH


PERMUTATIONS = list(itertools.permutations(range(LENGTH)))


def test_one_step_scores_every_position_with_all_masked(world):
    found = scores(world, "one_step", None, OneStep())
    np.testing.assert_allclose(found, world[2](range(LENGTH)), atol=1e-5)


@pytest.mark.parametrize("samples", [1, 2, 4])
def test_exact_counts_are_unbiased_for_the_elbo(world, samples):
    parts = LENGTH // samples  # (u + k) / K meets each of the L counts once
    first, orders = draws([(part + 0.5) / parts for part in range(parts)], PERMUTATIONS)
    tables = {0: first, **{k + 1: orders for k in range(samples)}}
    found = scores(world, "elbo", tables, Elbo(samples=samples))
    np.testing.assert_allclose(found.sum(), exact_elbo(world[2]), atol=1e-5)


def test_independent_masks_are_unbiased_for_the_elbo(world):
    nodes, weights = np.polynomial.legendre.leggauss(8)  # exact for polynomials in t of degree 15
    rows = [
        ((1 + node) / 2, masked, weight / 2)
        for node, weight in zip(nodes, weights, strict=True)
        for masked in itertools.product([False, True], repeat=LENGTH)
    ]
    probability = [w * np.prod([t if hit else 1 - t for hit in masked]) for t, masked, w in rows]
    tables = {0: np.array([[t] for t, _, _ in rows]), 1: 1.0 - np.array([masked for _, masked, _ in rows])}
    tables[1] = np.where(tables[1] == 0, 0.0, 0.999999)
    found = scores(world, "elbo", tables, Elbo(counts="independent"), probability)
    np.testing.assert_allclose(found.sum(), exact_elbo(world[2]), atol=1e-4)


def test_coupled_pairs_of_exact_counts_are_unbiased_for_the_elbo(world):
    first, orders = draws([(n + 0.5) / (LENGTH + 1) for n in range(LENGTH + 1)], PERMUTATIONS)
    found = scores(world, "coupled", {0: first, 1: orders}, Coupled())
    np.testing.assert_allclose(found.sum(), exact_elbo(world[2]), atol=1e-5)


def test_diffucoders_pair_is_half_the_full_view_and_half_the_weighted_masks(world):
    ratio, uniform = 0.4, np.array([[0.1, 0.5, 0.39, 0.9]])
    settings = Coupled(counts="independent", low=0.2, high=0.8, full_mask=True)
    found = scores(world, "coupled", {0: np.array([[(ratio - 0.2) / 0.6]]), 1: uniform}, settings)
    logp = world[2]
    first, second = (0, 2), (1, 3)
    expected = logp(range(LENGTH)) / 2
    expected[list(first)] += logp(first)[list(first)] / ratio / 2
    expected[list(second)] += logp(second)[list(second)] / (1 - ratio) / 2
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_quadrature_masks_the_share_of_its_nodes(world, samples):
    nodes, weights = np.polynomial.legendre.leggauss(samples)
    order = [0.1, 0.7, 0.3, 0.9]
    tables = {k + 1: np.array([order]) for k in range(samples)}
    found = scores(world, "quadrature", tables, Quadrature(samples=samples))
    expected = np.zeros(LENGTH)
    for node, weight in zip(nodes, weights, strict=True):
        t = (1 + node) / 2
        masked = sorted(range(LENGTH), key=lambda place: order[place])[: max(int(t * LENGTH), 1)]
        expected[masked] += weight / 2 / t * world[2](masked)[masked]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_blocks_are_unbiased_for_the_sum_of_their_elbos(world):
    pairs = [(b, n) for b in range(2) for n in range(2)]
    rows = list(itertools.product(pairs, PERMUTATIONS))
    # The order of the two blocks, and the share inside the first of them.
    first = np.array([[b, 1 - b, (n + 0.5) / 2] for (b, n), _ in rows])
    orders = (np.array([order for _, order in rows]) + 0.5) / LENGTH
    found = scores(world, "block", {0: first, 1: orders}, Block())
    expected = exact_elbo(world[2], (0, 1), also_masked=(2, 3)) + exact_elbo(world[2], (2, 3))
    np.testing.assert_allclose(found.sum(), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["elbo", "block"])
def test_uniform_weights_average_the_views_that_score_a_position(world, name):
    settings = {"elbo": Elbo, "block": Block}[name](samples=2, weight="uniform")
    tables = {
        0: np.array([[0.1, 0.9, 0.9, 0.2]]),  # block 0, then block 1
        1: np.array([[0.1, 0.2, 0.8, 0.9]]),
        2: np.array([[0.1, 0.9, 0.8, 0.2]]),
    }
    if name == "elbo":
        tables[0] = np.array([[0.9]])  # ratios 0.45 and 0.95: counts 2 and 4
        expected = world[2](range(4)) / 1
        expected[:2] = (world[2]((0, 1))[:2] + world[2](range(4))[:2]) / 2
    else:  # both positions of block 0, then the second one of block 1
        expected = np.zeros(LENGTH)
        expected[:2] = world[2](range(4))[:2]
        expected[3] = world[2]((3,))[3]
    np.testing.assert_allclose(scores(world, name, tables, settings), expected, atol=1e-5)


REVEAL = (2, 0, 3, 1)


def replayed(logp, boundaries):
    """Each position in the state at the start of its segment of the recorded order REVEAL."""
    expected = np.zeros(LENGTH)
    for start, stop in itertools.pairwise([*boundaries, 99]):
        state = [place for place in range(LENGTH) if REVEAL[place] >= start]
        inside = [place for place in state if REVEAL[place] < stop]
        expected[inside] = logp(state)[inside]
    return expected


@pytest.mark.parametrize(
    ("settings", "boundaries"),
    [
        (Trajectory(samples=4), [0, 1, 2, 3]),  # exact along the order
        (Trajectory(samples=2), [0, 2]),
        (Trajectory(samples=3), [0, 1, 2]),  # 4 s / 3, rounded down
        (Trajectory(samples=1), [0]),
        (Trajectory(shrink=1), [0, 1, 2, 3]),
        (Trajectory(shrink=3), [0, 3]),
    ],
    ids=str,
)
def test_trajectories_score_a_position_in_the_state_at_the_start_of_its_segment(world, settings, boundaries):
    found = scores(world, "trajectory", None, settings, unmask_step=REVEAL)
    np.testing.assert_allclose(found, replayed(world[2], boundaries), atol=1e-5)


SAMPLERS = {
    "one block": {},
    "two blocks": {"block_length": 4},
    "several tokens a step": {"steps": 4},
    "by chance": {"schedule": "chance", "remasking": "random"},
    "by threshold": {"schedule": Threshold(0.3), "block_length": 4},
    "no early exit": {"early_exit": False},
}


@pytest.mark.parametrize("alignment", ["same_position", "shifted"])
@pytest.mark.parametrize("changes", SAMPLERS.values(), ids=SAMPLERS)
def test_a_segment_a_step_gives_the_log_probabilities_that_the_sampler_drew_with(
    tiny, random_prompts, towards_end, changes, alignment
):
    """On texts of all lengths, whose ends the sampler has often unmasked before the text."""
    special = SpecialTokens(mask=12, end=10, turn_end=11)
    sampler = dataclasses.replace(SamplerConfig(completion_length=8, block_length=8, steps=8), **changes)
    model, variables = tiny(seed=1, alignment=alignment)
    prompts = random_prompts(0, 24, 3)
    variables = towards_end(variables, 1.5 if alignment == "same_position" else 0.6)
    rollout = Sampler(model, sampler, special, temperature=1.0).sample(
        variables, Prompts(*prompts), KeyedNoise(jax.random.key(0), jnp.arange(24))
    )
    estimator = Trajectory(shrink=1)
    views = views_of(
        jax.random.key(1), Canvas(rollout.tokens_BC, *prompts), jnp.arange(24), rollout.unmask_step_BC,
        estimator=estimator, sampler=sampler, special=special, prompt_mask=0.0,
    )  # fmt: skip
    found_BC = score(model, variables, Canvas(rollout.tokens_BC, *prompts), views).logp
    length_B, reveal_BC = np.asarray(rollout.length_B), np.asarray(rollout.unmask_step_BC)
    text_BC = np.arange(8)[None, :] < length_B[:, None]
    assert len(set(length_B.tolist())) >= 4
    early_B = (
        (reveal_BC >= 0) & ~text_BC & (reveal_BC < np.where(text_BC, reveal_BC, 0).max(axis=1, keepdims=True))
    ).any(axis=1)
    assert early_B.sum() >= 4, "rows with tokens behind the end that were there before the text"
    np.testing.assert_allclose(found_BC, np.where(text_BC, rollout.token_logp_BC, 0.0), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("samples", "steps", "views"), [(8, 2, 2), (8, 8, 8), (3, 8, 3), (8, 1, 1)])
def test_no_more_segments_than_steps(samples, steps, views):
    sampler = SamplerConfig(completion_length=8, block_length=8, steps=steps)
    reveal_BC = jnp.arange(8)[None, :] * steps // 8
    canvas = Canvas(jnp.zeros((1, 8), jnp.int32), jnp.zeros((1, 2), jnp.int32), jnp.array([2]))
    plan = views_of(
        jax.random.key(0), canvas, jnp.arange(1), reveal_BC, estimator=Trajectory(samples=samples),
        sampler=sampler, special=SPECIAL, prompt_mask=0.0,
    )  # fmt: skip
    assert plan.weight_NBC.shape[0] == views
    assert (np.asarray(plan.weight_NBC).sum(axis=2) > 0).all(), "no view is empty"
    assert (np.asarray(plan.weight_NBC).sum(axis=0) == 1).all()


def test_autoregressive_scores_each_position_with_all_later_ones_masked(world):
    found = scores(world, "autoregressive", None, Autoregressive())
    np.testing.assert_allclose(found, [world[2](range(k, LENGTH))[k] for k in range(LENGTH)], atol=1e-5)


# -- what every plan keeps ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 2, 3, 4, 6])
def test_a_token_is_scored_with_a_stratum_masked_and_every_other_token_seen(world, samples):
    """Over all ways to deal four positions: a token's stratum has n of them with probability n / 4, and any others beside it alike."""
    tables = {0: (np.array(PERMUTATIONS) + 0.5) / LENGTH}
    found = scores(world, "strata", tables, Strata(samples))
    sizes = [len(range(one, LENGTH, samples)) for one in range(samples)]
    expected = np.zeros(LENGTH)
    for k, size in itertools.product(range(LENGTH), sizes):
        others = itertools.combinations([place for place in range(LENGTH) if place != k], size - 1) if size else ()
        with_k = [world[2]((k, *beside))[k] for beside in others]
        expected[k] += size / LENGTH * np.mean(with_k) if size else 0.0
    np.testing.assert_allclose(found, expected, atol=1e-5)


EVERY = [
    OneStep(),
    Elbo(samples=2),
    Elbo(samples=2, counts="independent"),
    Elbo(samples=3, weight="uniform"),
    Coupled(samples=2),
    Coupled(counts="independent", low=0.2, high=0.8, full_mask=True),
    Quadrature(samples=3),
    Block(samples=2),
    Trajectory(samples=2),
    Trajectory(shrink=2),
    Autoregressive(),
    Strata(samples=3),
]


def test_every_estimator_is_covered():
    assert {estimator.name for estimator in EVERY} == set(PLANS)


@pytest.mark.parametrize("estimator", EVERY, ids=str)
def test_plans_mask_what_they_score_and_nothing_behind_the_text_counts(estimator):
    rng = np.random.default_rng(0)
    rows, columns = 40, 4
    completion_BC = jnp.asarray(rng.integers(0, 3, (rows, columns)), jnp.int32)  # END is 2: texts of all lengths
    lengths = [row.index(END) + 1 if END in row else columns for row in np.asarray(completion_BC).tolist()]
    canvas = Canvas(completion_BC, jnp.zeros((rows, 3), jnp.int32), jnp.full(rows, 2))
    reveal_BC = jnp.asarray(rng.permuted(np.tile(np.arange(columns), (rows, 1)), axis=1))
    settings = {"estimator": estimator, "sampler": SAMPLER, "special": SPECIAL, "prompt_mask": 0.5}
    ids = jnp.arange(rows) // 2
    views = views_of(jax.random.key(0), canvas, ids, reveal_BC, **settings)
    seen, weight = np.asarray(views.completion_NBC), np.asarray(views.weight_NBC)
    behind = np.arange(columns)[None, :] >= np.array(lengths)[:, None]
    assert np.isfinite(weight).all() and (weight >= 0).all() and weight.dtype == np.float32
    assert (weight[:, behind] == 0).all()
    if estimator.name == "trajectory":  # it shows what the sampler had unmasked there by then
        assert 0 < (seen[:, behind] == MASK).mean() < 1 and (seen[0][behind] == MASK).all()
    else:
        assert (seen[:, behind] == MASK).all()
    assert (seen[weight > 0] == MASK).all(), "a token that is seen is not scored"
    assert ((seen == MASK) | (seen == np.asarray(completion_BC))).all()
    prompts = np.asarray(views.prompt_NBP)
    assert (prompts[:, :, 2] == 0).all(), "padding is never masked"
    assert (prompts == prompts[:1]).all() and 0.2 < (prompts[0, :, :2] == MASK).mean() < 0.8
    # Rows of one id draw the same numbers; another key draws others.
    again = views_of(jax.random.key(0), canvas, ids, reveal_BC, **settings)
    np.testing.assert_array_equal(again.completion_NBC, seen)
    np.testing.assert_array_equal(prompts[:, 0::2], prompts[:, 1::2])
    other = views_of(jax.random.key(1), canvas, ids, reveal_BC, **settings)
    fixed = estimator.name in ("one_step", "trajectory", "autoregressive")
    assert (np.asarray(other.completion_NBC) != seen).any() == (not fixed)


def recorded_pair(reference):
    """(canvas, views) of the pair and the full mask that a golden folder records."""
    io = reference.io
    ids, ratio = io["coupled/ids"], 0.35
    width = ids.shape[1] - io["coupled/logp_full"].shape[1]
    rows, columns = io["coupled/logp_full"].shape
    completion_BC = jnp.asarray(ids[:, width:])
    masks = [np.ones((rows, columns), bool), *(io[f"coupled/mask{n}"][:, width:] for n in (1, 2))]
    weights = [np.full((rows, columns), 0.5), masks[1] / ratio / 2, masks[2] / (1 - ratio) / 2]
    canvas = Canvas(completion_BC, jnp.asarray(ids[:, :width]), jnp.full(rows, width))
    return canvas, Views(
        jnp.stack([jnp.where(mask, reference.special.mask, completion_BC) for mask in masks]),
        jnp.broadcast_to(canvas.prompt_BP[None], (3, rows, width)),
        jnp.asarray(np.stack(weights), jnp.float32),
        head_group_N=(0, 1, 1),
    )


def test_golden_coupled_scores(golden, golden_dream):
    """DiffuCoder's pair on recorded masks: log-probabilities of the PyTorch code, shifted and not."""
    for reference in (golden, golden_dream):
        canvas, views = recorded_pair(reference)
        found = score(reference.model, reference.variables, canvas, views).logp
        np.testing.assert_allclose(found, reference.io["coupled/per_token_logps"], atol=1e-4)


def test_golden_coupled_grpo_loss_and_gradients(golden_dream):
    """DiffuCoder's step on a shifted model: leave-one-out advantages, clip, KL, loss, gradients of the PyTorch code."""
    io, (canvas, views) = golden_dream.io, recorded_pair(golden_dream)
    eps, beta = map(float, io["coupled/eps_beta"])
    advantage_1G = group_advantages(Rloo(), io["coupled/rewards"][None])
    np.testing.assert_allclose(advantage_1G[0], io["coupled/advantages_leave_one_out"], atol=1e-6)
    advantage_BC = np.repeat(advantage_1G.T, canvas.completion_BC.shape[1], axis=1)
    mask_BC = jnp.asarray(io["coupled/completion_mask"], bool)
    everywhere_BC = jnp.ones(mask_BC.shape, bool)  # the fixture has terms behind the text too
    config = RlConfig(policy_loss=Ppo(clip_low=eps, clip_high=eps), kl=KlInLoss(beta))

    def loss(variables):
        logp_BC = score(golden_dream.model, variables, canvas, views).logp
        terms = token_terms(
            logp_BC, io["coupled/old_logps"], io["coupled/ref_logps"], advantage_BC, everywhere_BC, config
        )
        weight_BC = AGGREGATIONS["bnpo"](mask_BC.astype(jnp.float32), 2)
        return jnp.sum(weight_BC * terms.loss_BC), terms.loss_BC

    (value, loss_BC), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(golden_dream.variables)
    np.testing.assert_allclose(loss_BC, io["coupled/per_token_loss"], atol=1e-4)
    np.testing.assert_allclose(value, io["coupled/loss"], atol=1e-4)
    tensors = to_published(gradient, golden_dream.model.config, FAMILIES["dream"])
    # PyTorch's embedding gives its padding row, which is Dream's end token, no gradient.
    words = np.array(tensors["model.embed_tokens.weight"])
    words[golden_dream.special.end] = 0.0
    norm = optax.tree.norm({**tensors, "model.embed_tokens.weight": words})
    np.testing.assert_allclose(norm, io["coupled/grad_global_norm"], rtol=1e-5)
    checked = [name for name in io if name.startswith("coupled/grad/")]
    assert len(checked) == 4
    for name in checked:
        np.testing.assert_allclose(tensors[name.removeprefix("coupled/grad/")], io[name], atol=1e-4)


# -- groups and bounds --------------------------------------------------------------------------------------------------


EVERY = [
    OneStep(),
    Elbo(samples=2),
    Coupled(samples=2),
    Coupled(counts="independent", full_mask=True),
    Quadrature(samples=3),
    Block(samples=2),
    Trajectory(samples=3),
    Trajectory(shrink=1),
    Autoregressive(),
    Strata(samples=3),
]


@pytest.mark.parametrize("estimator", EVERY, ids=repr)
def test_views_of_a_group_are_disjoint_and_share_the_head_without_changing_a_score(tiny, estimator):
    model, variables = tiny(seed=3, vocab_size=8)
    rng = np.random.default_rng(0)
    canvas = Canvas(
        jnp.asarray(rng.integers(0, 6, (3, 4))), jnp.asarray(rng.integers(0, 6, (3, 5))), jnp.array([5, 2, 3])
    )
    reveal_BC = jnp.asarray(rng.permuted(np.tile(np.arange(4), (3, 1)), axis=1))
    views = views_of(
        jax.random.key(0), canvas, jnp.arange(3), reveal_BC,
        estimator=estimator, sampler=SAMPLER, special=SpecialTokens(mask=7, end=6), prompt_mask=0.3,
    )  # fmt: skip
    groups = np.array(views.head_group_N)
    for group in set(groups.tolist()):
        assert ((np.asarray(views.weight_NBC)[groups == group] != 0).sum(axis=0) <= 1).all()
    pairs = getattr(estimator, "samples", 1) + getattr(estimator, "full_mask", False)
    heads = {"coupled": groups.max() + 1 == pairs, "elbo": groups.max() == 1}
    assert heads.get(estimator.name, True) and (groups.max() == 0) == (
        estimator.name in ("one_step", "trajectory", "autoregressive", "strata")
    )

    def total(variables, views):
        scores = score(model, variables, canvas, views)
        return (scores.logp**2).sum() + scores.entropy.sum()

    apart = dataclasses.replace(views, head_group_N=())
    together, alone = (jax.jit(jax.value_and_grad(total))(variables, which) for which in (views, apart))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), together, alone)


def test_the_upper_bound_is_the_power_mean_of_the_views_that_score(tiny):
    """SPG: (1/b) log of the mean over mask_samples of p^b / share; tokens that no view scores have none; its gradient is finite."""
    model, variables = tiny(seed=3, vocab_size=8)
    canvas = Canvas(jnp.array([[0, 1, 2, 3]]), jnp.array([[4, 5]]), jnp.array([2]))
    masked_NC = np.array([[1, 1, 0, 0], [0, 1, 1, 0]], bool)
    views = Views(
        jnp.where(masked_NC[:, None], 7, canvas.completion_BC[None]), jnp.tile(canvas.prompt_BP[None], (2, 1, 1)),
        jnp.asarray(masked_NC[:, None] / 0.5 / 2, jnp.float32), (0, 1),
    )  # fmt: skip
    one_by_one = [
        score(
            model, variables, canvas, Views(views.completion_NBC[n : n + 1], views.prompt_NBP[:1], jnp.ones((1, 1, 4)))
        )
        for n in range(2)
    ]
    p_NC = np.exp(np.concatenate([np.asarray(one.logp, np.float64) for one in one_by_one]))
    for exponent in (1.0, 2.0):
        found = score(model, variables, canvas, views, exponent)
        for k in range(4):
            power = sum(p_NC[n, k] ** exponent / 0.5 / 2 for n in range(2) if masked_NC[n, k])
            assert float(found.upper[0, k]) == pytest.approx(np.log(power) / exponent if power else 0.0, abs=1e-5)
        lower = float(found.logp[0, 1])
        assert float(found.upper[0, 1]) >= lower / 2  # both views: the weights of token 1 sum to 2
    gradient = jax.jit(jax.grad(lambda v: score(model, v, canvas, views, 1.5).upper.sum()))(variables)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_the_positions_of_highest_entropy_are_scored_as_all_would_be(tiny):
    model, variables = tiny(seed=3, vocab_size=8)
    rng = np.random.default_rng(0)
    completion_BC = jnp.array([[0, 1, 2, 3], [4, 6, 1, 1]])  # the second text ends after two tokens
    canvas = Canvas(completion_BC, jnp.asarray(rng.integers(0, 6, (2, 5))), jnp.array([5, 2]))
    entropy_BC = jnp.array([[0.1, 0.9, 0.3, 0.5], [0.2, 0.1, 9.0, 9.0]])
    found = {}
    for subset in (1.0, 0.4):
        views = views_of(
            jax.random.key(0), canvas, jnp.arange(2), jnp.zeros((2, 4), jnp.int32), entropy_BC=entropy_BC,
            estimator=Autoregressive(subset=subset), sampler=SAMPLER,
            special=SpecialTokens(mask=7, end=6), prompt_mask=0.0,
        )  # fmt: skip
        found[subset] = views, np.asarray(score(model, variables, canvas, views).logp)
    views, scores_BC = found[0.4]
    assert views.weight_NBC.shape[0] == 2
    scored_BC = np.asarray(views.weight_NBC.sum(0)) > 0
    assert scored_BC.tolist() == [[False, True, False, True], [True, True, False, False]]
    np.testing.assert_allclose(scores_BC, np.where(scored_BC, found[1.0][1], 0.0), atol=1e-5)
