"""Every file of configs/methods: it loads, it lowers, and DESIGN's invariants 1, 2, 5, 9 and 10 hold for it."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d1jax.config import MeshConfig, RlConfig
from d1jax.config.parse import parse
from d1jax.config.values import alternatives, hints_of
from d1jax.diffusion.estimators import PLANS, views_of
from d1jax.models.sharding import make_mesh
from d1jax.models.transformer import Transformer, initialize
from d1jax.rl.advantages import ADVANTAGES
from d1jax.rl.diagnostics import check_start, make_start_scores
from d1jax.rl.loss import AGGREGATIONS, KL, LEVELS
from d1jax.rl.update import make_update, rows_alike, view_keys
from d1jax.training.likelihood import Scorer
from d1jax.training.optimizer import make_optimizer, new_state

DOCS = Path(__file__).parents[2] / "docs"


class Built:
    """The compiled update of a method, with random weights and an optional reference."""

    def __init__(self, toy, config, parts=1, **sizes):
        self.toy, self.config = toy, dataclasses.replace(config, grad_accumulation_steps=parts)
        model, self.mesh = Transformer(dataclasses.replace(toy.model, **sizes)), make_mesh(MeshConfig())
        self.variables = initialize(model, jax.random.key(0), self.mesh)
        self.optimizer = make_optimizer(config.optimizer, 100)
        alike = rows_alike(self.config, make_mesh(MeshConfig(), jax.devices()[:1]))
        self.scorer = Scorer(model, config.estimator, toy.sampler, toy.special, config.prompt_mask, parts, alike)
        self.update = make_update(self.scorer, self.optimizer, self.config, self.state())

    def state(self):
        return new_state(self.optimizer, self.variables, self.mesh)

    def __call__(self, advantage, reference_scale=1.0):
        """(weights, metrics, raw scores of the first inner update) after the inner updates of one batch."""
        reference = {}
        if self.config.needs_reference:
            reference = jax.tree.map(lambda x: x * reference_scale, self.variables)
        after, metrics, first = self.update(self.state(), {}, reference, self.toy.batch(advantage), jax.random.key(0))
        return after.trainable, jax.device_get(metrics), jax.device_get(first)


@pytest.fixture(scope="module")
def built(toy, method):
    return Built(toy, method)


def test_names_of_the_files_are_those_that_the_guide_lists(toy):
    guide = (DOCS / "methods.md").read_text(encoding="utf-8")
    assert len(toy.files) >= 21 and [path.stem for path in toy.files if f"`{path.stem}`" not in guide] == []


def test_the_ratio_is_one_at_the_first_inner_update(toy, method, built):
    advantage = toy.advantages(method, np.random.default_rng(1).random((2, 4)))
    _, metrics, _ = built(advantage, reference_scale=1.05)
    assert float(metrics["ratio/mean"][0]) == 1.0 and float(metrics["ratio/log_rms"][0]) == 0.0
    assert np.isfinite(metrics["loss"]).all() and (metrics["grad_norm"] > 0).all()
    if method.num_iterations > 1:
        assert ((metrics["ratio/log_rms"][1:] > 0) == (method.policy_loss.name != "policy_gradient")).all()


# At least one method of every estimator, aggregation, policy loss, level and KL.
SPLIT = (
    "d1",
    "coupled_grpo",
    "spg",
    "stable_drl",
    "espo",
    "gdsd",
    "rspo",
    "strata",
    "gdpo",
    "d2",
    "just_grpo",
    "unigrpo",
    "ppo_kl",
    "cispo",
    "wd1",
)


def test_the_methods_whose_batches_are_split_are_of_every_kind(toy):
    used = {path.stem: parse(["--config", str(toy.quickstart), "--rl", str(path)]).rl for path in toy.files}
    for kind in (
        lambda rl: rl.estimator.name,
        lambda rl: rl.loss_aggregation,
        lambda rl: (rl.policy_loss.name, rl.policy_loss.level),
        lambda rl: (rl.kl.name, getattr(rl.kl, "estimator", "")),
    ):
        assert {kind(used[name]) for name in SPLIT} == {kind(rl) for rl in used.values()}


@pytest.mark.parametrize("name", SPLIT)
def test_any_split_of_a_batch_gives_the_same_update(toy, name):
    method = toy.small(toy.named(name))
    advantage = toy.advantages(method, np.random.default_rng(1).random((2, 4)))
    built = [Built(toy, method, parts)(advantage, reference_scale=1.05) for parts in (1, 2)]
    (whole, metrics, _), (parts, others, _) = built
    np.testing.assert_allclose(metrics["loss"], others["loss"], atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), whole, parts)


def test_groups_of_equal_rewards_leave_the_weights_as_they_are(toy, method, built):
    advantage = toy.advantages(method, np.ones((2, 4)))
    after, metrics, _ = built(advantage)
    assert (metrics["grad_norm"] == 0).all() and built.update._cache_size() == 1
    jax.tree.map(np.testing.assert_array_equal, after, built.variables)


def test_inner_updates_meet_other_masks_unless_the_method_says_one(toy, method):
    rows = jax.tree.map(jnp.asarray, toy.batch(np.zeros(8))).rollout
    settings = {
        "estimator": method.estimator,
        "sampler": toy.sampler,
        "special": toy.special,
        "prompt_mask": method.prompt_mask,
    }
    seen = set()
    for key in view_keys(jax.random.key(0), method.num_iterations, method.fresh_masks):
        views = views_of(key, rows.canvas, rows.mask_ids_B, rows.unmask_step_BC, **settings)
        seen.add((np.asarray(views.completion_NBC).tobytes(), np.asarray(views.prompt_NBP).tobytes()))
    drawn = method.prompt_mask > 0 or method.estimator.draws_masks
    assert len(seen) == (method.num_iterations if method.fresh_masks and drawn else 1)


def test_the_files_use_every_choice_of_every_axis(toy):
    """A choice that no method uses is one too many; a method that loses its file would show here."""
    used = [parse(["--config", str(toy.quickstart), "--rl", str(path)]).rl for path in toy.files]
    assert set(PLANS) == {config.estimator.name for config in used}
    assert set(LEVELS) == {config.policy_loss.level for config in used}
    assert {*ADVANTAGES, "gae"} == {config.advantage.name for config in used}
    assert set(AGGREGATIONS) == {config.loss_aggregation for config in used}
    assert set(KL) == {"k1", *(config.kl.estimator for config in used if config.kl.name == "loss")}
    elsewhere = {"model_steps"}  # names a stage of the run, which no method file knows
    for axis in ("policy_loss", "kl", "supervision"):
        offered = set(alternatives(hints_of(RlConfig)[axis]))
        assert offered - elsewhere == {getattr(config, axis).name for config in used}


@pytest.mark.parametrize("name", ["d1", "coupled_grpo", "spg", "espo", "online_rft", "d2"])
def test_a_run_in_bf16_with_rematerialisation_passes_its_own_start_check(toy, name):
    """Scores carry weights up to the length of a text, and bf16 rounds: the check must tell that from masks that are not shared."""
    method = toy.small(toy.named(name), num_iterations=2)
    built = Built(toy, method, dtype="bfloat16", remat="full")
    advantage = toy.advantages(method, np.random.default_rng(1).random((2, 4)))
    batch = toy.batch(advantage)
    start_2BC = jax.device_get(make_start_scores(built.scorer, method)(built.variables, batch, jax.random.key(0)))
    _, _, first = built(advantage)
    lines = check_start(first, start_2BC, batch.advantage_BC, method, "bfloat16")
    assert lines[0].startswith("checked: ratio is one")
