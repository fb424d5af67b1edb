"""The compiled inner loop: DESIGN's invariants 1, 2, 5, 9 and 10."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from d1jax.config import (
    Coupled,
    Elbo,
    KlInLoss,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    NoKl,
    OneStep,
    OptimizerConfig,
    PolicyGradient,
    Ppo,
    RlConfig,
    SamplerConfig,
)
from d1jax.config.errors import Diverged
from d1jax.data.tokenizers import SpecialTokens
from d1jax.diffusion.canvas import Canvas, through_first_end
from d1jax.diffusion.estimators import views_of
from d1jax.diffusion.likelihood import score
from d1jax.models.sharding import make_mesh, shard_batch
from d1jax.models.transformer import Transformer, initialize
from d1jax.rl.diagnostics import check_start, make_start_scores
from d1jax.rl.loss import AGGREGATIONS, token_terms
from d1jax.rl.update import Batch, make_update, rows_alike, view_keys
from d1jax.training.likelihood import RolloutBatch, Scorer
from d1jax.training.optimizer import TrainState, make_optimizer, new_state
from d1jax.training.setup import split

SPECIAL = SpecialTokens(mask=9, end=8)
MODEL = ModelConfig(width=16, layers=2, heads=2, kv_heads=2, mlp_width=24, vocab_size=16, rope_theta=100)
CONFIG = RlConfig(
    prompts_per_step=4, num_generations=4, num_iterations=3, prompt_mask=0.3, kl=KlInLoss(0.04),
    optimizer=OptimizerConfig(learning_rate=1e-2, clip_norm=1.0),
)  # fmt: skip
SAMPLER = SamplerConfig(completion_length=8, block_length=4, steps=4)
ROWS = 16
FULL = LoraConfig(rank=0)


def setup(config=CONFIG, lora=FULL, mesh=None):
    mesh = mesh or make_mesh(MeshConfig())
    model = Transformer(MODEL, lora)
    collections = ("params", "lora") if lora.rank else ("params",)
    trainable, frozen = split(initialize(model, jax.random.key(0), mesh, collections))
    optimizer = make_optimizer(config.optimizer, 100)
    return model, optimizer, new_state(optimizer, trainable, mesh), frozen


def batch(advantage=None, rows=ROWS):
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 7, rows // 4).repeat(4).astype(np.int32)
    prompts = rng.integers(0, 8, (rows // 4, 6)).repeat(4, axis=0).astype(np.int32)
    completions = rng.integers(0, 9, (rows, 8)).astype(np.int32)
    advantage = rng.standard_normal(rows).astype(np.float32) if advantage is None else advantage
    reveal = rng.permuted(np.tile(np.arange(8, dtype=np.int32) // 2, (rows, 1)), axis=1)
    advantage_BC = np.repeat(np.asarray(advantage, np.float32)[:, None], 8, axis=1)
    ids = (np.arange(rows) // 4).astype(np.int32)
    return Batch(RolloutBatch(Canvas(completions, prompts, lengths), ids, reveal), advantage_BC)


def plan(key, rows, config=CONFIG, **changes):
    settings = {
        "estimator": config.estimator,
        "sampler": SAMPLER,
        "special": SPECIAL,
        "prompt_mask": config.prompt_mask,
    }
    rollout = rows.rollout
    return views_of(key, rollout.canvas, rollout.mask_ids_B, rollout.unmask_step_BC, **(settings | changes))


def made(model, optimizer, config, state):
    """The compiled update of a section."""
    return make_update(scorer_of(model, config), optimizer, config, state)


def scorer_of(model, config):
    return Scorer(model, config.estimator, SAMPLER, SPECIAL, config.prompt_mask, config.grad_accumulation_steps)


def with_completions(rows, completion_BC):
    canvas = rows.rollout.canvas._replace(completion_BC=completion_BC)
    return rows._replace(rollout=rows.rollout._replace(canvas=canvas))


def copied(tree):
    return jax.tree.map(jnp.copy, tree)


def test_equals_a_plain_python_loop():
    """Old and reference scores first, then one optimizer update after the other, each under its own views."""
    model, optimizer, state, frozen = setup()
    key, rows = jax.random.key(3), jax.tree.map(jnp.asarray, batch())
    reference = jax.tree.map(lambda x: x * 1.05, state.trainable)
    start = copied(state.trainable)

    got, metrics, _ = made(model, optimizer, CONFIG, state)(copied(state), frozen, reference, rows, key)

    weight = AGGREGATIONS["bnpo"](
        through_first_end(rows.rollout.canvas.completion_BC, SPECIAL.end_ids).astype(jnp.float32), 4
    )
    expected, losses = TrainState(start, optimizer.init(start)), []

    @jax.jit
    def scores(variables, views):
        return score(model, variables, rows.rollout.canvas, views).logp

    @jax.jit
    @jax.value_and_grad
    def value_and_grad(trainable, views, old, ref):
        terms = token_terms(scores(trainable, views), old, ref, rows.advantage_BC, weight > 0, CONFIG)
        return jnp.sum(weight * terms.loss_BC)

    for u in range(CONFIG.num_iterations):
        views = plan(jax.random.fold_in(key, u), rows)
        old, ref = (scores(variables, views) for variables in (start, reference))
        value, gradient = value_and_grad(expected.trainable, views, old, ref)
        change, optimizer_state = optimizer.update(gradient, expected.optimizer, expected.trainable)
        expected = TrainState(optax.apply_updates(expected.trainable, change), optimizer_state)
        losses.append(float(value))
    np.testing.assert_allclose(metrics["loss"], losses, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), got.trainable, expected.trainable)


@pytest.mark.smoke
@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(rank=2)])
def test_ratio_is_exactly_one_at_the_first_inner_update(lora):
    model, optimizer, state, frozen = setup(lora=lora)
    reference = frozen or copied(state.trainable)
    _, metrics, _ = made(model, optimizer, CONFIG, state)(state, frozen, reference, batch(), jax.random.key(0))
    assert float(metrics["ratio/mean"][0]) == 1.0 and float(metrics["ratio/log_rms"][0]) == 0.0
    assert float(metrics["kl"][0]) == pytest.approx(0.0, abs=1e-7)
    assert float(metrics["ratio/log_rms"][1]) > 0 and float(metrics["kl"][2]) > 0


def test_old_scores_equal_the_policy_under_the_same_views():
    """The shortcut of the first update is no fiction: scoring twice gives the same number."""
    model, _, state, _ = setup()
    rows = jax.tree.map(jnp.asarray, batch())
    views = plan(jax.random.key(1), rows)
    scored = jax.jit(lambda v: score(model, v, rows.rollout.canvas, views).logp)
    np.testing.assert_array_equal(scored(state.trainable), scored(copied(state.trainable)))


@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(rank=2)])
def test_zero_advantages_leave_the_parameters_unchanged(lora):
    """Also with a KL term: at the reference its gradient is exactly zero."""
    model, optimizer, state, frozen = setup(lora=lora)
    before, reference = copied(state.trainable), frozen or copied(state.trainable)
    state, metrics, _ = made(model, optimizer, CONFIG, state)(
        state, frozen, reference, batch(np.zeros(ROWS, np.float32)), jax.random.key(0)
    )
    jax.tree.map(np.testing.assert_array_equal, state.trainable, before)
    assert np.all(metrics["grad_norm"] == 0.0)


def test_group_of_equal_rewards_contributes_nothing():
    """Whatever its completions are, rows of advantage zero change the loss and the update by exactly nothing."""
    config = dataclasses.replace(CONFIG, kl=NoKl())
    rows = batch()
    rows = rows._replace(advantage_BC=np.where(np.arange(ROWS)[:, None] < 4, 0.0, rows.advantage_BC).astype(np.float32))
    other = np.array(rows.rollout.canvas.completion_BC)
    other[:4] = np.where(other[:4] == SPECIAL.end, SPECIAL.end, (other[:4] + 3) % 8)
    results = []
    for completion in (rows.rollout.canvas.completion_BC, other):
        model, optimizer, state, frozen = setup(config)
        changed = with_completions(rows, completion)
        results.append(made(model, optimizer, config, state)(state, frozen, {}, changed, jax.random.key(0))[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *(r.trainable for r in results))


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_inner_updates_meet_different_prompt_masks_for_every_accumulation(micro_batches):
    """mu = 3 inner updates: three masks, the same ones whatever the accumulation; d1's released code fails this."""
    config = dataclasses.replace(CONFIG, grad_accumulation_steps=micro_batches)
    model, optimizer, state, frozen = setup(config)
    key, rows = jax.random.key(5), jax.tree.map(jnp.asarray, batch())
    masks = []
    for k in view_keys(key, config.num_iterations, fresh_masks=True):
        views = plan(k, rows)
        masks.append(np.asarray(views.prompt_NBP[0] == SPECIAL.mask))
    assert len({mask.tobytes() for mask in masks}) == config.num_iterations
    _, metrics, _ = made(model, optimizer, config, state)(state, frozen, copied(state.trainable), rows, key)
    tokens = np.asarray(rows.rollout.canvas.prompt_length_B).sum()
    np.testing.assert_allclose(metrics["mask/prompt_frac"], [mask.sum() / tokens for mask in masks], rtol=1e-6)


def test_fixed_masks_are_one_mask():
    keys = view_keys(jax.random.key(5), 3, fresh_masks=False)
    assert len({jax.random.key_data(k).tobytes() for k in keys}) == 1


@pytest.mark.parametrize("micro_batches", [2, 8])
def test_update_does_not_depend_on_micro_batches(micro_batches):
    results = []
    for parts in (1, micro_batches):
        config = dataclasses.replace(CONFIG, grad_accumulation_steps=parts)
        model, optimizer, state, frozen = setup(config)
        results.append(
            made(model, optimizer, config, state)(state, frozen, copied(state.trainable), batch(), jax.random.key(0))
        )
    (a, metrics_a, _), (b, metrics_b, _) = results
    np.testing.assert_allclose(metrics_a["loss"], metrics_b["loss"], atol=1e-5)
    np.testing.assert_allclose(metrics_a["grad_norm"], metrics_b["grad_norm"], rtol=1e-4)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4), a.trainable, b.trainable)


@pytest.mark.parametrize("axes", [(2, 2, 2), (1, 2, 4)])
def test_update_does_not_depend_on_the_mesh(axes):
    results = []
    for shape in ((8, 1, 1), axes):
        mesh = make_mesh(MeshConfig(*shape))
        with jax.set_mesh(mesh):
            model, optimizer, state, frozen = setup(mesh=mesh)
            update = made(model, optimizer, CONFIG, state)
            results.append(
                update(state, frozen, copied(state.trainable), shard_batch(mesh, batch()), jax.random.key(0))
            )
    one_device = jax.device_put(jax.device_get(setup()[2]), jax.devices()[0])
    update = made(Transformer(MODEL), make_optimizer(CONFIG.optimizer, 100), CONFIG, one_device)
    results.append(update(one_device, {}, copied(one_device.trainable), batch(), jax.random.key(0)))
    for _, metrics, _ in results[1:]:
        np.testing.assert_allclose(metrics["loss"], results[0][1]["loss"], atol=1e-5)
        np.testing.assert_allclose(metrics["grad_norm"], results[0][1]["grad_norm"], rtol=1e-4)


@pytest.mark.parametrize(
    "estimator, micro_batches, axes",
    [
        (OneStep(), 1, (1, 1, 1)),
        (OneStep(), 2, (1, 1, 1)),
        (OneStep(), 2, (2, 1, 2)),
        (Coupled(full_mask=True), 2, (1, 1, 1)),
        (Elbo(samples=2, full_mask=True), 1, (2, 1, 1)),
    ],
    ids=["one device", "micro-batches", "mesh", "coupled", "elbo"],
)
def test_completions_that_are_shown_alike_are_scored_by_one_pass(estimator, micro_batches, axes):
    config = dataclasses.replace(CONFIG, estimator=estimator, grad_accumulation_steps=micro_batches)
    mesh = make_mesh(MeshConfig(*axes), jax.devices()[: math.prod(axes)])
    assert rows_alike(config, mesh) == 4
    results, flops = [], []
    with jax.set_mesh(mesh):
        rows = shard_batch(mesh, batch())
        for alike in (4, 1):
            model, optimizer, state, frozen = setup(config, mesh=mesh)
            scorer = dataclasses.replace(scorer_of(model, config), rows_alike=alike)
            update = make_update(scorer, optimizer, config, state)
            arguments = state, frozen, copied(state.trainable), rows, jax.random.key(0)
            flops.append(update.lower(*arguments).cost_analysis()["flops"])
            results.append(jax.device_get(update(*arguments)))
    if estimator == OneStep():  # of a loop over several views XLA counts one turn
        assert flops[0] < flops[1] / 2, flops
    for name, value in results[0][1].items():
        np.testing.assert_allclose(value, results[1][1][name], atol=2e-5, rtol=2e-4, err_msg=name)
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-4), results[0][0].trainable, results[1][0].trainable)
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5), results[0][2], results[1][2])


def test_the_check_of_the_start_needs_no_more_memory_than_an_update():
    config = dataclasses.replace(CONFIG, prompts_per_step=2, num_generations=16, num_iterations=1)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        model, optimizer, state, frozen = setup(config, mesh=mesh)
        scorer = dataclasses.replace(scorer_of(model, config), rows_alike=rows_alike(config, mesh))
        key, rows = jax.random.key(0), jax.tree.map(jnp.asarray, batch(rows=32))
        update = make_update(scorer, optimizer, config, state).lower(state, frozen, state.trainable, rows, key)
        check = make_start_scores(scorer, config).lower(state.trainable, rows, key)
    assert scorer.rows_alike == 16
    update, check = (one.compile().memory_analysis().temp_size_in_bytes for one in (update, check))
    assert check <= update


@pytest.mark.parametrize(
    "changes, devices, expected",
    [
        ({}, 1, 4),
        ({}, 4, 4),
        ({}, 8, 1),  # two devices would share the completions of a problem
        ({"grad_accumulation_steps": 4}, 1, 4),
        ({"grad_accumulation_steps": 8}, 1, 1),  # two micro-batches would
        ({"mask_sharing": "row"}, 1, 1),
        ({"mask_sharing": "row", "prompt_mask": 0.0}, 1, 4),
        ({"estimator": Coupled()}, 1, 1),
        ({"estimator": Coupled(full_mask=True)}, 1, 4),
    ],
    ids=str,
)
def test_only_whole_sets_of_completions_are_shown_alike(changes, devices, expected):
    config = dataclasses.replace(CONFIG, **changes)
    assert rows_alike(config, make_mesh(MeshConfig(), jax.devices()[:devices])) == expected


def test_compiles_once():
    model, optimizer, state, frozen = setup()
    update, reference = made(model, optimizer, CONFIG, state), copied(state.trainable)
    for step in range(3):
        state, *_ = update(state, frozen, reference, batch(), jax.random.fold_in(jax.random.key(0), step))
    assert update._cache_size() == 1


def test_tokens_behind_the_end_token_do_not_count():
    """They are not in the loss, and the scored view hides them like all of the completion."""
    rows = batch()
    completion = np.array(rows.rollout.canvas.completion_BC)
    completion[:, 4] = SPECIAL.end
    other = completion.copy()
    other[:, 5:] = (other[:, 5:] + 1) % 8
    losses = []
    for tokens in (completion, other):
        model, optimizer, state, frozen = setup()
        changed = with_completions(rows, tokens)
        losses.append(
            made(model, optimizer, CONFIG, state)(state, frozen, copied(state.trainable), changed, jax.random.key(0))[
                1
            ]["loss"]
        )
    np.testing.assert_array_equal(*losses)


# -- the check at the start of a run ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy_loss", [Ppo(), PolicyGradient()], ids=lambda one: one.name)
def test_the_check_compares_two_programs_and_masks_that_are_not_shared(policy_loss):
    config = dataclasses.replace(CONFIG, policy_loss=policy_loss)
    model, optimizer, state, frozen = setup(config)
    rows, key, start = jax.tree.map(jnp.asarray, batch()), jax.random.key(2), copied(state.trainable)
    scores = make_start_scores(scorer_of(model, config), config)
    start_2BC = np.asarray(scores(start, rows, key))
    update = made(model, optimizer, config, state)
    _, _, first = jax.device_get(update(state, frozen, copied(start), rows, key))
    assert update._cache_size() == 1

    under = [plan(k, rows, config) for k in view_keys(key, 3, fresh_masks=True)[::2]]
    expected = [jax.jit(score, static_argnums=0)(model, start, rows.rollout.canvas, views).logp for views in under]
    np.testing.assert_allclose(start_2BC, expected, atol=1e-5)
    np.testing.assert_allclose(first.logp_BC, expected[0], atol=1e-5)
    text = np.asarray(through_first_end(rows.rollout.canvas.completion_BC, SPECIAL.end_ids))
    np.testing.assert_array_equal(first.counted_BC, text)

    checked, *apart = check_start(first, start_2BC, np.asarray(rows.advantage_BC), config, "float32")
    assert checked.startswith("checked: ratio is one")
    difference = np.asarray(expected[1] - expected[0])[text]
    outside = (np.exp(difference) < 0.8) | (np.exp(difference) > 1.2)
    spread = f"spreads by {np.sqrt((difference**2).mean()):.2f} (rms), and {outside.mean():.0%} of tokens"
    assert [spread in line for line in apart] == ([True] if policy_loss.name == "ppo" else [])
    with pytest.raises(Diverged, match="differ from the same policy's old scores"):
        check_start(first, start_2BC[::-1], np.asarray(rows.advantage_BC), config, "float32")


# -- metrics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", [Coupled(full_mask=True, counts="independent"), Elbo()], ids=lambda one: one.name)
def test_the_entropy_does_not_depend_on_the_weights_of_the_views(estimator):
    """A prediction of 16 tokens has at most log 16 nats; DiffuCoder's weights sum to 1.5 a token, an ELBO's to much more."""
    config = dataclasses.replace(CONFIG, estimator=estimator)
    model, optimizer, state, frozen = setup(config)
    _, metrics, _ = made(model, optimizer, config, state)(
        state, frozen, copied(state.trainable), batch(), jax.random.key(0)
    )
    assert 0 < float(metrics["entropy"][0]) < np.log(16)
