"""What a run checks about itself: at its start that the method does what it says, and at every step that the policy still lives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from d1jax.config import GuardConfig, RlConfig
from d1jax.config.errors import Diverged

# Two programs that compute one number may round differently: fp32 sums of a few hundred terms, or bf16 activations. Masks that are not
# shared, or weights that are not the same, differ by far more.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.25}


def check_start(inner: Mapping[str, np.ndarray], config: RlConfig, dtype: str) -> list[str]:
    """Lines for the log, from the metrics of an update with `check`. Raises Diverged where an invariant does not hold.

    The old policy, scored by the program without gradients, must agree with the current one, scored by the program with them:
    the ratio is one for both reasons, by construction and by number. Completions of advantage 0 must have a loss of exactly 0.
    """
    if inner["check/tokens"][0] == 0:
        return ["nothing to check the ratio on: no completion of the first step is trained on"]
    apart, ratio = float(inner["check/score_rms"][0]), float(inner["ratio/mean"][0])
    if not np.isfinite(apart):
        raise Diverged("rl start: the policy's scores are not finite; check the weights that the run starts from")
    # A pair is compared with the reference, which another program scores; everywhere else the ratio is one by construction.
    is_one = abs(ratio - 1) <= TOLERANCE[dtype] if config.advantage == "pairs" else ratio == 1.0
    if not (apart <= TOLERANCE[dtype] and is_one):
        raise Diverged(
            f"rl start: the policy's scores differ from the same policy's old scores by {apart:.3g} (rms) and the mean ratio is {ratio}; "
            "a ratio that is not one before any learning trains on noise. This is an error of d1jax or of the backend: please report it"
        )
    idle = float(inner["check/zero_advantage_loss"][0])
    if idle != 0:
        raise Diverged(
            f"rl start: completions of advantage 0 have a policy loss of {idle:.3g} instead of exactly 0; please report it"
        )
    lines = [f"checked: ratio is one (scores agree to {apart:.1e}), groups of equal rewards have no loss"]
    spread, clipped = float(inner["check/masks_alone_log_rms"]), float(inner["check/masks_alone_clipped"])
    if spread > 0 and config.ratio != "none" and config.clip in ("ppo", "dual"):
        lines.append(
            f"under another mask the log ratio of the same policy spreads by {spread:.2f} (rms), and {clipped:.0%} of "
            f"tokens would lie outside [{1 - config.clip_low:g}, {1 + config.clip_high:g}] before any learning; masks are shared: here none"
        )
    return lines


FIRST_STEPS, NO_SIGNAL = 3, 0.9  # a share of groups from which a run hardly learns, over so many steps


def no_signal(history: Sequence[Mapping[str, float]], step: int, config: RlConfig) -> list[str]:
    """A warning for the log after the first steps, where nearly all groups have equal rewards; [] otherwise.

    A group's advantages are differences of its rewards: equal ones, all 0 or all 1, teach nothing. Not so where what is right is imitated
    (accepted), where steps of a text have rewards of their own, or where a KL is taken off the reward.
    """
    first = min(FIRST_STEPS, config.steps)
    if step != first or len(history) < first:
        return []
    if config.advantage == "accepted":
        right = float(np.mean([values[f"rewards/{config.accept}/mean"] for values in history[-first:]]))
        return (
            []
            if right > 0
            else [f"warning: in the first {first} steps no completion earned {config.accept!r}, so none is imitated"]
        )
    if config.supervision != "outcome" or config.kl_in_reward:
        return []
    share = float(np.mean([values["frac_reward_zero_std"] for values in history[-first:]]))
    reward = float(np.mean([values["reward"] for values in history[-first:]]))
    if share < NO_SIGNAL:
        return []
    highest = sum(weight for weight in config.reward_weights.values() if weight > 0)
    if reward > highest / 2:
        cure = "the problems are too easy for this policy: give it harder ones, or raise rl.temperature"
    else:
        cure = (
            "start from weights that solve some of the problems (more sft.steps, another init_from), give credit for parts of an "
            "answer in rl.reward_weights, or raise rl.group_size and rl.temperature"
        )
    return [
        f"warning: in the first {first} steps {share:.0%} of the groups had equal rewards (mean reward {reward:.3g}) and "
        f"taught nothing; {cure}"
    ]


def signs_of_collapse(values: Mapping[str, float], group_size: int, guard: GuardConfig) -> list[str]:
    """What is wrong with the metrics of one step, in words; [] where nothing is."""
    distinct = values.get("completions/distinct_per_group", group_size) / group_size
    watched = [
        ("repeated tokens", values.get("completions/repeated_tokens"), ">", guard.repeated_tokens),
        ("distinct completions of a group", distinct, "<=", guard.distinct),
        ("entropy", values.get("entropy"), "<", guard.entropy),
        ("log ratio (rms)", values.get("ratio/log_rms"), ">", guard.log_ratio),
        ("KL", values.get("kl"), ">", guard.kl),
    ]
    found = []
    for name, value, relation, limit in watched:
        if value is None or limit == 0:
            continue
        beyond = {">": value > limit, "<": value < limit, "<=": value <= limit}[relation]
        if beyond or not np.isfinite(value):
            words = {">": "above", "<": "below", "<=": "not above"}[relation]
            found.append(f"{name} {value:.3g} ({words} {limit:g})")
    return found


def collapsed(history: Sequence[Mapping[str, float]], group_size: int, guard: GuardConfig) -> list[str] | None:
    """What the last step saw, if it and the guard.patience - 1 steps before it all show signs of collapse; else None."""
    if guard.patience == 0 or len(history) < guard.patience:
        return None
    signs = [signs_of_collapse(values, group_size, guard) for values in history[-guard.patience :]]
    return signs[-1] if all(signs) else None
