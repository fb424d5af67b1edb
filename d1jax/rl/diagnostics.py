"""What a run checks about itself: at its start that the method does what it says, and at every step whether the policy has collapsed.

B rows, C completion columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from d1jax.config import RlConfig, SamplerConfig, StopOnCollapse
from d1jax.config.errors import Diverged
from d1jax.config.objective import Collapse
from d1jax.models.transformer import Variables
from d1jax.rl.loss import LEVELS, clip_range, safe_exp
from d1jax.rl.update import Batch, FirstScores, view_keys
from d1jax.training.likelihood import Scorer

# Two programs that compute one number may round differently: fp32 sums of a few hundred terms, or bf16 activations. Masks that are not
# shared, or weights that are not the same, differ by far more.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.25}


def make_start_scores(scorer: Scorer, config: RlConfig) -> Callable[[Variables, Batch, Array], Array]:
    """`start_scores(policy, batch, key) -> [2, B, C]`: scores of the policy by a program without gradients, under the masks of the first
    and of the last inner update of a step, each row by a pass of its own. Compiled, and run before the first update of a run only.
    """
    # In as many more parts: with all rows the same passes would need more memory than the update.
    scorer = dataclasses.replace(scorer, rows_alike=1, parts=scorer.parts * scorer.rows_alike)

    @jax.jit
    def start_scores(policy: Variables, batch: Batch, key: Array) -> Array:
        keys_U = view_keys(key, config.num_iterations, config.fresh_masks)
        ends_2 = keys_U[jnp.array([0, config.num_iterations - 1], jnp.int32)]
        return jax.lax.map(lambda key: scorer.logps(policy, batch.rollout, key, batch.advantage_BC), ends_2)

    return start_scores


def check_start(
    first: FirstScores, start_2BC: np.ndarray, advantage_BC: np.ndarray, config: RlConfig, dtype: str
) -> list[str]:
    """Lines for the log, from the first update of a run. Raises Diverged where an invariant does not hold.

    The policy, scored by the program without gradients, must agree with its scores by the program with them: in the loss the first ratio
    is one by construction, which would hide masks or weights that are not shared. Completions of advantage 0 must have a loss of exactly 0.
    """
    counted_BC = np.asarray(first.counted_BC)
    if not counted_BC.any():
        return ["nothing to check the ratio on: no completion of the first step is trained on"]
    # A score is weighted by up to 1 / share, which also scales its rounding; divided out, scores compare as log-probabilities do.
    apart_BC = (first.logp_BC - start_2BC[0]) / np.maximum(first.view_weight_BC, 1.0)
    apart = float(np.sqrt(np.mean(apart_BC[counted_BC] ** 2)))
    if not np.isfinite(apart):
        raise Diverged("rl start: the policy's scores are not finite; check the weights that the run starts from")
    if apart > TOLERANCE[dtype]:
        raise Diverged(
            f"rl start: the policy's scores differ from the same policy's old scores by {apart:.3g} (rms), so the ratio is not one before "
            "any learning, which trains on noise. This is an error of d1jax or of the backend: please report it"
        )
    idle = float(np.abs(first.policy_BC[counted_BC & (advantage_BC == 0)]).sum())
    if idle != 0:
        raise Diverged(
            f"rl start: completions of advantage 0 have a policy loss of {idle:.3g} instead of exactly 0; please report it"
        )
    lines = [f"checked: ratio is one (scores agree to {apart:.1e}), tokens of advantage 0 have no loss"]
    return lines + _masks_alone(start_2BC, counted_BC, config)


def _masks_alone(start_2BC: np.ndarray, counted_BC: np.ndarray, config: RlConfig) -> list[str]:
    """How far apart the scores of one policy are under two plans, at the level of the policy loss, and the share of tokens that this alone
    would clip: what a method would see whose policy and old policy do not share their masks.
    """
    if config.policy_loss.name != "ppo":
        return []
    apart_BC = (start_2BC[1] - start_2BC[0]) * counted_BC
    apart_BC = np.asarray(
        LEVELS[config.policy_loss.level](jnp.asarray(apart_BC, jnp.float32), jnp.asarray(counted_BC, bool))
    )
    spread = float(np.sqrt(np.mean(apart_BC[counted_BC] ** 2)))
    low, high = clip_range(config.policy_loss)
    ratio_BC = np.asarray(safe_exp(jnp.asarray(apart_BC, jnp.float32)))
    clipped = float(np.mean(((ratio_BC < low) | (ratio_BC > high))[counted_BC]))
    if spread == 0:
        return []
    return [
        f"under another mask the log ratio of the same policy spreads by {spread:.2f} (rms), and {clipped:.0%} of "
        f"tokens would lie outside [{low:g}, {high:g}] before any learning; masks are shared: here none"
    ]


FIRST_STEPS, NO_SIGNAL = 3, 0.9  # a share of groups from which a run hardly learns, over so many steps


def no_signal(history: Sequence[Mapping[str, float]], step: int, config: RlConfig) -> list[str]:
    """A warning for the log after the first steps, where nearly all groups have equal rewards; [] otherwise.

    A group's advantages are differences of its rewards: equal ones, all 0 or all 1, teach nothing. Not so where the reward itself is the
    advantage or is compared with a value, where steps of a text have rewards of their own, or where a KL is taken off the reward.
    """
    first = min(FIRST_STEPS, config.steps)
    if step != first or len(history) < first:
        return []
    if config.supervision.name != "outcome" or config.kl.name == "reward":
        return []
    if config.advantage.name in ("reward", "gae"):
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
            "answer in rl.reward_weights, or raise rl.num_generations and rl.temperature"
        )
    return [
        f"warning: in the first {first} steps {share:.0%} of the groups had equal rewards (mean reward {reward:.3g}) and "
        f"taught nothing; {cure}"
    ]


def signs_of_collapse(values: Mapping[str, float], group: int, watch: StopOnCollapse) -> list[str]:
    """What is wrong with the metrics of one step, in words; [] where nothing is. group: completions of a problem."""
    distinct = values.get("completions/distinct_per_group", group) / group
    watched = [
        ("repeated tokens", values.get("completions/repeated_tokens"), ">", watch.repeated_tokens),
        ("distinct completions of a group", distinct, "<=", watch.distinct),
        ("entropy", values.get("entropy"), "<", watch.entropy),
        ("log ratio (rms)", values.get("ratio/log_rms"), ">", watch.log_ratio),
        ("KL", values.get("kl"), ">", watch.kl),
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


def collapsed(history: Sequence[Mapping[str, float]], group: int, collapse: Collapse) -> list[str] | None:
    """What the last step saw, if it and the patience - 1 steps before it all show signs of collapse; else None."""
    if collapse.patience == 0 or len(history) < collapse.patience:
        return None
    signs = [signs_of_collapse(values, group, collapse) for values in history[-collapse.patience :]]
    return signs[-1] if all(signs) else None


def notes(config: RlConfig, sampler: SamplerConfig) -> list[str]:
    """What a user should know about the settings before the first step."""
    one_at_a_time = sampler.remasking.name == "left_to_right" and sampler.steps >= sampler.completion_length
    if config.estimator.name == "autoregressive" and not one_at_a_time:
        return [
            "rl.estimator = autoregressive is exact for sampler.remasking = left_to_right with one token a step only"
        ]
    return []
