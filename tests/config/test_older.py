"""Runs and checkpoints of d1jax 0.1 are read under today's names."""

import pytest

from d1jax.config import (
    Config,
    Coupled,
    DualCache,
    EntropyBound,
    IgnoreCollapse,
    KlInLoss,
    KlInReward,
    MovingReference,
    NoKl,
    PolicyGradient,
    Ppo,
    Rloo,
    Softmax,
    StopOnCollapse,
    Trajectory,
    UserError,
)
from d1jax.config.stored import from_yaml, sampler_from
from d1jax.config.yaml_text import write_yaml

ESTIMATOR = {
    "name": "one_step", "samples": 1, "counts": "exact", "weight": "inverse", "low": 0.0, "high": 1.0, "full_mask": False,
    "subset": 1.0, "shrink": 0, "upper_share": 0.0, "upper_exponent": 1.5,
}  # fmt: skip
# What 0.1 wrote of a run that changed nothing in the section rl.
RL = {
    "steps": 40, "prompts_per_step": 64, "group_size": 8, "inner_updates": 4, "micro_batches": 1, "temperature": 1.0,
    "data": "policy", "estimator": ESTIMATOR, "prompt_mask": 0.15, "mask_sharing": "group", "fresh_masks": True, "ratio": "token",
    "clip": "ppo", "clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0, "advantage": "center", "softmax_scale": 1.0,
    "accept": "solved", "preference_scale": 0.1, "drop_equal_groups": False, "supervision": "outcome", "supervision_steps": 4,
    "kl_coefficient": 0.0, "kl": "k3", "kl_in": "loss", "kl_level": "token", "kl_to": "reference", "entropy_coefficient": 0.0,
    "reference_sync_every": 0, "reference_mix": 1.0, "pooling": "bnpo", "reward_weights": {"solved": 1.0},
    "guard": {"patience": 5, "repeated_tokens": 0.8, "distinct": 0.0, "entropy": 0.0, "log_ratio": 5.0, "kl": 0.0},
    "negative_control": "none",
    "optimizer": {"learning_rate": 3e-4, "clip_norm": 0.2},
}  # fmt: skip
SAMPLER = {
    "completion_length": 20, "block_length": 20, "steps": 4, "schedule": "even", "threshold": 0.9, "kl_threshold": 0.01,
    "factor": 1.0, "entropy_bound": 0.35, "cache": "none", "cache_refresh": 0, "record_entropy": False,
}  # fmt: skip


@pytest.fixture
def stored(tmp_path):
    def stored(stages=("sft", "rl"), sampler=SAMPLER, **rl):
        path = tmp_path / "config.yaml"
        sft = {"steps": 100, "micro_batches": 1}
        path.write_text(write_yaml({"stages": list(stages), "sft": sft, "sampler": sampler, "rl": {**RL, **rl}}))
        return from_yaml(path)

    return stored


def test_the_defaults_of_then_are_those_of_now(stored):
    assert stored() == Config()


@pytest.mark.parametrize(
    ("then", "now"),
    [
        ({"group_size": 4, "inner_updates": 2, "micro_batches": 2}, {"num_generations": 4, "num_iterations": 2}),
        ({"ratio": "sequence_mean", "clip_low": 0.1}, {"policy_loss": Ppo("sequence_mean", 0.1, 0.2)}),
        ({"ratio": "none", "clip": "none", "clip_low": 0.5}, {"policy_loss": PolicyGradient()}),
        ({"advantage": "leave_one_out", "pooling": "sequence_mean"}, {"advantage": Rloo(), "loss_aggregation": "grpo"}),
        ({"advantage": "softmax", "softmax_scale": 2.0}, {"advantage": Softmax(2.0)}),
        ({"kl_coefficient": 0.0, "kl": "k2"}, {"kl": NoKl()}),
        ({"kl_coefficient": 0.1, "kl": "k2", "kl_level": "sequence"}, {"kl": KlInLoss(0.1, "k2", "sequence")}),
        (
            {"kl_coefficient": 0.1, "reference_sync_every": 8, "reference_mix": 0.6},
            {"reference": MovingReference(8, 0.6)},
        ),
        ({"guard": {"patience": 0}}, {"collapse": IgnoreCollapse()}),
        ({"guard": {**RL["guard"], "patience": 3, "entropy": 0.1}}, {"collapse": StopOnCollapse(3, entropy=0.1)}),
        ({"estimator": {**ESTIMATOR, "name": "coupled", "samples": 2}}, {"estimator": Coupled(2)}),
        (
            {
                "estimator": {**ESTIMATOR, "name": "trajectory", "shrink": 1}, "prompt_mask": 0.0, "kl": "k1", "kl_in": "reward",
                "kl_coefficient": 0.1,
            },
            {"estimator": Trajectory(shrink=1), "kl": KlInReward(0.1)},
        ),
    ],
    ids=lambda value: " ".join(value),
)  # fmt: skip
def test_a_setting_of_then_is_one_of_now(stored, then, now):
    rl = stored(**then).rl
    assert {name: getattr(rl, name) for name in now} == now


@pytest.mark.parametrize(
    "gone", [{"advantage": "pairs"}, {"data": "targets"}, {"ratio": "block"}, {"entropy_coefficient": 0.1}]
)
def test_a_method_that_is_gone_is_refused_where_the_run_used_it(stored, gone):
    with pytest.raises(UserError, match=f"rl.{next(iter(gone))} = .* is of an older d1jax"):
        stored(**gone)
    assert stored(stages=("sft",), **gone).rl == Config().rl


def test_a_stored_sampler_keeps_the_numbers_that_its_rule_reads():
    then = {
        **SAMPLER,
        "schedule": "entropy_bound",
        "entropy_bound": 0.5,
        "remasking": "entropy",
        "cache": "dual",
        "cache_refresh": 3,
    }
    now = sampler_from(then, "a file")
    assert (now.schedule, now.cache) == (EntropyBound(0.5), DualCache(3))


@pytest.mark.parametrize(
    "then",
    [{"clip": "none"}, {"clip": "none", "ratio": "sequence_mean"}, {"kl_coefficient": 0.3, "kl_in": "reward"}],
    ids=str,
)
def test_what_would_be_another_method_today_is_refused(stored, then):
    with pytest.raises(UserError, match=r"is of an older d1jax.*train it again"):
        stored(**then)


def test_rematerialisation_that_was_true_or_false_has_its_name(tmp_path):
    for old, new in (("true", "full"), ("false", "none")):
        (tmp_path / "config.yaml").write_text(f"model: {{remat: {old}}}\n")
        assert from_yaml(tmp_path / "config.yaml").model.remat == new
