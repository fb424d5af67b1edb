"""What a run checks at its start, and when it says that its policy has collapsed."""

import math

import numpy as np
import pytest

from d1jax.config import GuardConfig, RlConfig
from d1jax.config.errors import Diverged
from d1jax.rl.diagnostics import check_start, collapsed, no_signal, signs_of_collapse
from d1jax.rl.metrics import clipped_ratio, repeated_tokens

GOOD = {
    "check/tokens": np.array([9, 9]),
    "check/score_rms": np.array([1e-6, 0.3]), "ratio/mean": np.array([1.0, 1.1]),
    "check/zero_advantage_loss": np.array([0.0, 0.2]),
    "check/masks_alone_log_rms": np.float32(0.63), "check/masks_alone_clipped": np.float32(0.47),
}  # fmt: skip


def test_a_good_start_says_what_masks_alone_would_do():
    first, second = check_start(GOOD, RlConfig(), "float32")
    assert first == "checked: ratio is one (scores agree to 1.0e-06), groups of equal rewards have no loss"
    assert "spreads by 0.63 (rms), and 47% of tokens would lie outside [0.8, 1.2]" in second
    assert len(check_start(GOOD, RlConfig(ratio="none"), "float32")) == 1  # nothing is clipped


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"check/score_rms": np.array([0.01])}, "differ from the same policy's old scores by 0.01"),
        ({"check/score_rms": np.array([math.nan])}, "scores are not finite"),
        ({"ratio/mean": np.array([0.999])}, "the mean ratio is 0.999"),
        ({"check/zero_advantage_loss": np.array([1e-9])}, "a policy loss of 1e-09 instead of exactly 0"),
    ],
)
def test_a_broken_invariant_stops_the_run(wrong, message):
    with pytest.raises(Diverged, match=message):
        check_start(GOOD | wrong, RlConfig(), "float32")


def test_bf16_may_round_more():
    assert check_start(GOOD | {"check/score_rms": np.array([0.05])}, RlConfig(), "bfloat16")


def test_pairs_are_compared_with_a_reference_that_may_round():
    close = GOOD | {"ratio/mean": np.array([0.9999])}
    assert check_start(close, RlConfig(advantage="pairs", ratio="none"), "float32")
    with pytest.raises(Diverged):
        check_start(close, RlConfig(), "float32")


def test_a_first_step_without_a_right_completion_has_nothing_to_check():
    (line,) = check_start(GOOD | {"check/tokens": np.array([0])}, RlConfig(advantage="accepted"), "float32")
    assert line.startswith("nothing to check")


FINE = {
    "completions/repeated_tokens": 0.3,
    "completions/distinct_per_group": 6.0,
    "entropy": 0.5,
    "ratio/log_rms": 0.2,
    "kl": 0.1,
}
STRICT = GuardConfig(patience=2, repeated_tokens=0.8, distinct=0.2, entropy=0.01, log_ratio=2.0, kl=1.0)


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
    off = GuardConfig(patience=1, repeated_tokens=0, distinct=0, entropy=0, log_ratio=0, kl=0)
    bad = {name: 1e9 for name in FINE}
    assert collapsed([bad], 8, off) is None
    assert collapsed([FINE | {"entropy": 0.0}] * 9, 8, GuardConfig(patience=0, entropy=1.0)) is None


def test_repeated_tokens_counts_inside_texts_only():
    tokens = np.array([[5, 5, 5, 9, 9, 9], [1, 2, 1, 2, 2, 9]])
    assert repeated_tokens(tokens, np.array([4, 6])) == pytest.approx(3 / 8)
    assert repeated_tokens(tokens, np.array([1, 1])) == 0.0


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


def test_imitation_is_told_where_there_is_nothing_to_imitate_only():
    imitation = RlConfig(advantage="accepted", ratio="none", clip="none")
    right = [{"frac_reward_zero_std": 1.0, "reward": 1.0, "rewards/solved/mean": 1.0}] * 3
    wrong = [{"frac_reward_zero_std": 1.0, "reward": 0.0, "rewards/solved/mean": 0.0}] * 3
    assert no_signal(right, 3, imitation) == []
    assert "no completion earned 'solved'" in no_signal(wrong, 3, imitation)[0]
    assert no_signal(wrong, 3, RlConfig(supervision="text_steps")) == []


@pytest.mark.parametrize(("shares", "step"), [([1, 1], 2), ([1, 1, 1, 1], 4), ([0.5, 1, 0.9], 3), ([1, 1], 3)])
def test_otherwise_and_later_nothing_is_said(shares, step):
    assert no_signal(steps(shares, 0.0), step, RlConfig()) == []


# -- completions that were cut off ---------------------------------------------------------------------------------------


def test_clipped_is_what_has_no_end_token():
    tokens_BC = np.array([[1, 9, 9], [1, 2, 3], [1, 2, 9], [4, 5, 6]])
    texts = ["a", "abc", "ab", "de\n"]
    assert clipped_ratio(tokens_BC, texts, (9,), grids=False) == 0.5
    assert clipped_ratio(tokens_BC, texts, (9,), grids=True) == 0.25, "a grid whose last line is closed is whole"
