"""What a run checks at its start, and when it says that its policy has collapsed."""

import math

import numpy as np
import pytest

from d1jax.config import IgnoreCollapse, PolicyGradient, Reward, RlConfig, StopOnCollapse, TextSteps
from d1jax.config.errors import Diverged
from d1jax.rl.diagnostics import check_start, collapsed, no_signal, signs_of_collapse
from d1jax.rl.update import FirstScores

COUNTED = np.array([[True, True], [True, False]])
ADVANTAGE = np.array([[1.0, 1.0], [0.0, 0.0]])


def first(logp=((1.0, 2.0), (3.0, 0.0)), policy=((0.5, -0.5), (0.0, 7.0)), weight=1.0, counted=COUNTED):
    return FirstScores(np.array(logp), np.array(policy), np.full((2, 2), weight), counted)


START = np.array([[[1.0, 2.0], [3.0, 9.0]], [[1.6, 2.6], [2.4, 0.0]]])  # what is not counted may differ


def test_a_good_start_says_what_masks_alone_would_do():
    one, two = check_start(first(), START, ADVANTAGE, RlConfig(), "float32")
    assert one == "checked: ratio is one (scores agree to 0.0e+00), tokens of advantage 0 have no loss"
    assert "spreads by 0.60 (rms), and 100% of tokens would lie outside [0.8, 1.2]" in two
    unclipped = RlConfig(policy_loss=PolicyGradient())
    assert len(check_start(first(), START, ADVANTAGE, unclipped, "float32")) == 1  # nothing is clipped
    same = np.stack([START[0], START[0]])
    assert len(check_start(first(), same, ADVANTAGE, RlConfig(), "float32")) == 1  # one mask for all updates


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"logp": [[1.01, 2.01], [3.01, 0]]}, "differ from the same policy's old scores by 0.01"),
        ({"logp": [[math.nan, 2.0], [3.0, 0]]}, "scores are not finite"),
        ({"policy": [[0.5, 0.5], [1e-9, 0.0]]}, "a policy loss of 1e-09 instead of exactly 0"),
    ],
)
def test_a_broken_invariant_stops_the_run(wrong, message):
    with pytest.raises(Diverged, match=message):
        check_start(first(**wrong), START, ADVANTAGE, RlConfig(), "float32")


def test_weights_of_the_views_scale_the_rounding_and_bf16_may_round_more():
    rounded = {"logp": [[1.01, 2.01], [3.01, 0]]}
    assert check_start(first(**rounded, weight=20.0), START, ADVANTAGE, RlConfig(), "float32")
    assert check_start(first(**rounded), START, ADVANTAGE, RlConfig(), "bfloat16")


def test_a_first_step_without_a_token_that_counts_has_nothing_to_check():
    (line,) = check_start(first(counted=np.zeros((2, 2), bool)), START, ADVANTAGE, RlConfig(), "float32")
    assert line.startswith("nothing to check")


FINE = {
    "completions/repeated_tokens": 0.3,
    "completions/distinct_per_group": 6.0,
    "entropy": 0.5,
    "ratio/log_rms": 0.2,
    "kl": 0.1,
}
STRICT = StopOnCollapse(patience=2, repeated_tokens=0.8, distinct=0.2, entropy=0.01, log_ratio=2.0, kl=1.0)


@pytest.mark.parametrize(
    ("sick", "words"),
    [
        ({"completions/repeated_tokens": 0.95}, "repeated tokens 0.95 (above 0.8)"),
        ({"completions/distinct_per_group": 1.0}, "distinct completions of a group 0.125 (not above 0.2)"),
        ({"entropy": 0.001}, "entropy 0.001 (below 0.01)"),
        ({"ratio/log_rms": 3.0}, "log ratio (rms) 3 (above 2)"),
        ({"kl": math.inf}, "KL inf (above 1)"),
        ({"entropy": math.nan}, "entropy nan (below 0.01)"),
    ],
)
def test_each_sign_of_collapse_is_named(sick, words):
    assert signs_of_collapse(FINE, 8, STRICT) == []
    assert signs_of_collapse(FINE | sick, 8, STRICT) == [words]
    assert collapsed([FINE | sick], 8, STRICT) is None
    assert collapsed([FINE | sick, FINE], 8, STRICT) is None
    assert collapsed([FINE, FINE | sick, FINE | sick], 8, STRICT) == [words]


def test_a_limit_of_zero_is_not_watched_and_patience_zero_never_stops():
    off = StopOnCollapse(patience=1, repeated_tokens=0, distinct=0, entropy=0, log_ratio=0, kl=0)
    bad = {name: 1e9 for name in FINE}
    assert collapsed([bad], 8, off) is None
    assert collapsed([FINE | {"entropy": 0.0}] * 9, 8, IgnoreCollapse()) is None


# -- groups that teach nothing -----------------------------------------------------------------------------------------


def steps(shares, reward):
    return [{"frac_reward_zero_std": share, "reward": reward} for share in shares]


def test_a_policy_that_solves_nothing_is_told_after_the_first_steps():
    (line,) = no_signal(steps([1.0, 0.95, 1.0], 0.01), 3, RlConfig())
    assert "in the first 3 steps 98% of the groups had equal rewards (mean reward 0.01)" in line
    assert "rl.reward_weights" in line and "init_from" in line
    (line,) = no_signal(steps([1.0, 1.0, 1.0], 1.0), 3, RlConfig())
    assert "too easy" in line
    (line,) = no_signal(steps([1.0, 1.0], 0.0), 2, RlConfig(steps=2))
    assert "in the first 2 steps" in line, "a run of fewer steps is told at its end"


def test_nothing_is_said_where_equal_rewards_teach_something():
    wrong = [{"frac_reward_zero_std": 1.0, "reward": 0.0, "rewards/solved/mean": 0.0}] * 3
    assert no_signal(wrong, 3, RlConfig(advantage=Reward(), policy_loss=PolicyGradient())) == []
    assert no_signal(wrong, 3, RlConfig(supervision=TextSteps())) == []


@pytest.mark.parametrize(("shares", "step"), [([1, 1], 2), ([1, 1, 1, 1], 4), ([0.5, 1, 0.9], 3), ([1, 1], 3)])
def test_otherwise_and_later_nothing_is_said(shares, step):
    assert no_signal(steps(shares, 0.0), step, RlConfig()) == []
