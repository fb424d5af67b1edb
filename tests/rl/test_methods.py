"""Every file of configs/methods: it loads, it lowers, and DESIGN's invariants 1, 2, 5, 9 and 10 hold for it."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d1jax.config import MeshConfig
from d1jax.config.parse import parse
from d1jax.diffusion.estimators import PLANS, views_of
from d1jax.models.sharding import make_mesh
from d1jax.models.transformer import Transformer, initialize
from d1jax.rl.advantages import ADVANTAGES
from d1jax.rl.diagnostics import check_start
from d1jax.rl.loss import KL, LEVELS
from d1jax.rl.update import make_update, view_keys
from d1jax.training.optimizer import make_optimizer, new_state

DOCS = Path(__file__).parents[2] / "docs"


class Built:
    """The compiled update of a method, with random weights and an optional reference."""

    def __init__(self, toy, config, micro_batches, **sizes):
        self.toy, self.config = toy, dataclasses.replace(config, micro_batches=micro_batches)
        model, self.mesh = Transformer(dataclasses.replace(toy.model, **sizes)), make_mesh(MeshConfig())
        self.variables = initialize(model, jax.random.key(0), self.mesh)
        self.optimizer = make_optimizer(config.optimizer, 100)
        self.update = make_update(model, self.optimizer, self.config, toy.sampler, toy.special, self.state())

    def state(self):
        return new_state(self.optimizer, self.variables, self.mesh)

    def __call__(self, advantage, reference_scale=1.0, check=False, kept=None):
        """(weights, metrics) after the inner updates of one batch."""
        reference = {}
        if self.config.needs_reference:
            reference = jax.tree.map(lambda x: x * reference_scale, self.variables)
        rows = self.toy.batch(advantage)
        rows = rows if kept is None else rows._replace(kept_B=np.asarray(kept))
        after, metrics = self.update(self.state(), {}, reference, rows, jax.random.key(0), check)
        return after.trainable, jax.device_get(metrics)


@pytest.fixture(scope="module")
def built(toy, method):
    return Built(toy, method, micro_batches=1)


def test_names_of_the_files_are_those_that_the_guide_lists(toy):
    guide = (DOCS / "methods.md").read_text(encoding="utf-8")
    assert len(toy.files) >= 23 and [path.stem for path in toy.files if f"`{path.stem}`" not in guide] == []


def test_the_ratio_is_one_at_the_first_inner_update(toy, method, built):
    advantage = toy.advantages(method, np.random.default_rng(1).random((2, 4)))
    # A pair is compared with the reference, which is the policy at the start.
    _, metrics = built(advantage, reference_scale=1.0 if method.advantage == "pairs" else 1.05)
    assert float(metrics["ratio/mean"][0]) == 1.0 and float(metrics["ratio/log_rms"][0]) == 0.0
    assert np.isfinite(metrics["loss"]).all() and (metrics["grad_norm"] > 0).all()
    if method.inner_updates > 1:
        assert ((metrics["ratio/log_rms"][1:] > 0) == (method.ratio != "none")).all()


# At least one method of every estimator, pooling, ratio and KL.
SPLIT = ("d1", "coupled_grpo", "spg", "espo", "gdpo", "d2", "just_grpo", "dpo", "ppo_kl", "grpo", "wd1")


def test_the_methods_whose_batches_are_split_are_of_every_kind(toy):
    used = {path.stem: parse(["--config", str(toy.quickstart), "--rl", str(path)]).rl for path in toy.files}
    for kind in (
        lambda rl: rl.estimator.name,
        lambda rl: rl.pooling,
        lambda rl: rl.ratio,
        lambda rl: rl.kl_coefficient and rl.kl,
    ):
        assert {kind(used[name]) for name in SPLIT} == {kind(rl) for rl in used.values()}


@pytest.mark.parametrize("name", SPLIT)
def test_any_split_of_a_batch_gives_the_same_update(toy, name):
    path = next(path for path in toy.files if path.stem == name)
    method = parse(["--config", str(toy.quickstart), "--rl", str(path)]).rl
    small = dataclasses.replace(method, prompts_per_step=2, group_size=4, inner_updates=min(method.inner_updates, 2))
    advantage = toy.advantages(method, np.random.default_rng(1).random((2, 4)))
    apart = 1.0 if method.advantage == "pairs" else 1.05
    (whole, metrics), (parts, others) = (Built(toy, small, count)(advantage, reference_scale=apart) for count in (1, 2))
    np.testing.assert_allclose(metrics["loss"], others["loss"], atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), whole, parts)


def test_groups_of_equal_rewards_leave_the_weights_as_they_are(toy, method, built):
    advantage = toy.advantages(method, np.ones((2, 4)))
    after, metrics = built(advantage)
    assert (metrics["grad_norm"] == 0).all() and built.update._cache_size() == 1
    jax.tree.map(np.testing.assert_array_equal, after, built.variables)


def test_inner_updates_meet_other_masks_unless_the_method_says_one(toy, method):
    rows = jax.tree.map(jnp.asarray, toy.batch(np.zeros(8)))
    settings = {
        "estimator": method.estimator,
        "sampler": toy.sampler,
        "special": toy.special,
        "prompt_mask": method.prompt_mask,
    }
    seen = set()
    for key in view_keys(jax.random.key(0), method.inner_updates, method.fresh_masks):
        views = views_of(key, rows.canvas, rows.mask_ids_B, rows.reveal_step_BC, **settings)
        seen.add((np.asarray(views.completion_NBC).tobytes(), np.asarray(views.prompt_NBP).tobytes()))
    drawn = method.prompt_mask > 0 or method.estimator.name not in ("one_step", "trajectory", "autoregressive")
    assert len(seen) == (method.inner_updates if method.fresh_masks and drawn else 1)


def test_the_files_use_every_kind_of_estimator_ratio_and_advantage_but_a_few(toy):
    """A method that loses its file would show here."""
    used = [parse(["--config", str(toy.quickstart), "--rl", str(path)]).rl for path in toy.files]
    assert set(PLANS) == {config.estimator.name for config in used}
    assert set(LEVELS) - {config.ratio for config in used} == {"block"}
    assert {*ADVANTAGES, "pairs"} - {config.advantage for config in used} == {"batch"}
    assert set(KL) == {config.kl for config in used if config.kl_coefficient}
    assert {config.data for config in used} == {"policy", "reference", "targets"}


@pytest.mark.parametrize("name", ["d1", "coupled_grpo", "spg", "espo", "dpo", "rft", "d2"])
def test_a_run_in_bf16_with_rematerialisation_passes_its_own_start_check(toy, name):
    """Scores carry weights up to the length of a text, and bf16 rounds: the check must tell that from masks that are not shared."""
    path = next(path for path in toy.files if path.stem == name)
    method = parse(["--config", str(toy.quickstart), "--rl", str(path)]).rl
    small = dataclasses.replace(method, prompts_per_step=2, group_size=4, inner_updates=2)
    built = Built(toy, small, 1, dtype="bfloat16", remat=True)
    advantage = toy.advantages(method, np.random.default_rng(1).random((2, 4)))
    _, metrics = built(advantage, check=True)
    assert check_start(metrics, small, "bfloat16")[0].startswith("checked: ratio is one")


@pytest.mark.parametrize("name", ["d1", "wd1", "espo", "rft"])
def test_rows_that_are_left_out_change_nothing_however_the_batch_is_cut(toy, name):
    path = next(path for path in toy.files if path.stem == name)
    method = parse(["--config", str(toy.quickstart), "--rl", str(path)]).rl
    small = dataclasses.replace(method, prompts_per_step=2, group_size=4, inner_updates=1)
    advantage = toy.advantages(method, np.random.default_rng(1).random((2, 4)))
    kept = np.array([1, 1, 0, 1, 0, 1, 0, 0], bool)
    other = np.where(kept, advantage, 5.0)  # what a row that is left out is credited with does not matter
    (_, whole), (_, parts) = Built(toy, small, 1)(advantage, kept=kept), Built(toy, small, 4)(other, kept=kept)
    np.testing.assert_allclose(whole["loss"], parts["loss"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(whole["grad_norm"], parts["grad_norm"], rtol=1e-3)
