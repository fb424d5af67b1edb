"""Configurations that d1jax 0.1 wrote into run directories and checkpoints, under today's names, so that old runs resume.

Only what a program wrote is read this way; in a user's own file an old name is an unknown key, with a suggestion.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from d1jax.config.errors import UserError
from d1jax.config.estimator import AnyEstimator
from d1jax.config.sampler import Cache, Remasking, Schedule
from d1jax.config.values import alternatives, hints_of

MARKS = ("group_size", "inner_updates", "pooling", "ratio")  # keys of a section rl of 0.1
RENAMED = {
    "group_size": "num_generations", "inner_updates": "num_iterations", "micro_batches": "grad_accumulation_steps",
    "pooling": "loss_aggregation",
}  # fmt: skip
PARAMETERS = {"entropy_bound": "bound"}
_CURE = "train it again, or use the version that wrote it"


def of_older_run(raw: dict[str, Any], path: str) -> dict[str, Any]:
    """A stored configuration under today's names; one of today is returned as it is. Raises UserError for a method that is gone."""
    raw = _with_named_remat(_with_task_options(raw))
    if not any(key in raw.get("rl", {}) for key in MARKS):
        return raw
    new = dict(raw)
    new["sampler"] = of_older_sampler(raw.get("sampler", {}))
    new["sft"] = _renamed(raw.get("sft", {}))
    new["rl"] = _rl(raw["rl"], path, "rl" in raw.get("stages", ()))
    return new


def _with_task_options(raw: dict[str, Any]) -> dict[str, Any]:
    """`task.numbers`, which was a setting of every task, as an option of countdown."""
    task = raw.get("task")
    if not isinstance(task, Mapping) or "numbers" not in task:
        return raw
    kept = {key: value for key, value in task.items() if key != "numbers"}
    if task.get("name") == "countdown" and list(task["numbers"]) != [3]:
        kept["options"] = {"numbers": task["numbers"]}
    return {**raw, "task": kept}


def _with_named_remat(raw: dict[str, Any]) -> dict[str, Any]:
    """`model.remat`, which was true or false, as the name of what is computed again."""
    model = raw.get("model")
    if not isinstance(model, Mapping) or not isinstance(model.get("remat"), bool):
        return raw
    return {**raw, "model": {**model, "remat": "full" if model["remat"] else "none"}}


def of_older_sampler(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The stored settings of a sampler under today's names."""
    new = {key: value for key, value in raw.items() if key not in ("record_entropy", "cache_refresh")}
    for key in ("threshold", "kl_threshold", "factor", "entropy_bound"):
        new.pop(key, None)
    parameters = {
        "temperature": new.pop("remasking_temperature", 0.0),
        "confidence_of": new.pop("confidence_of", "model"),
    }
    if isinstance(raw.get("remasking"), str):
        new["remasking"] = _chosen(raw["remasking"], parameters, Remasking)
    if isinstance(raw.get("schedule"), str):
        old = {PARAMETERS.get(key, key): value for key, value in raw.items() if key != "steps"}
        new["schedule"] = _chosen(raw["schedule"], old, Schedule)
    if isinstance(raw.get("cache"), str):
        new["cache"] = _chosen(raw["cache"], {"refresh": raw.get("cache_refresh", 0)}, Cache)
    return new


def _rl(raw: Mapping[str, Any], path: str, used: bool) -> dict[str, Any]:
    gone = {
        "data": ("policy",), "advantage": ("center", "zscore", "leave_one_out", "softmax"), "ratio": ("none", "token",
        "sequence_mean", "sequence_sum"), "clip": ("ppo", "cispo", "none"), "drop_equal_groups": (False,), "entropy_coefficient": (0.0,),
    }  # fmt: skip
    for key, kept in gone.items():
        if used and raw.get(key, kept[0]) not in kept:
            raise UserError(
                f"{path}: rl.{key} = {raw[key]} is of an older d1jax; preferences and rejection sampling are stages of their own now; "
                f"{_CURE}"
            )
    if used and raw.get("clip") == "none" and raw.get("ratio", "token") != "none":
        raise UserError(
            f"{path}: rl.clip = none beside rl.ratio = {raw.get('ratio', 'token')} is of an older d1jax; {_CURE}"
        )
    if used and raw.get("kl_in") == "reward" and raw.get("kl_coefficient", 0) > 0 and raw.get("kl", "k3") != "k1":
        raise UserError(
            f"{path}: rl.kl = {raw.get('kl', 'k3')} in the reward is of an older d1jax, which takes k1 now; {_CURE}"
        )
    if not used:
        return {}
    same = ("steps", "prompts_per_step", "temperature", "prompt_mask", "mask_sharing", "fresh_masks", "reward_weights",
            "negative_control", "optimizer")  # fmt: skip
    new = {key: raw[key] for key in same if key in raw} | {new: raw[old] for old, new in RENAMED.items() if old in raw}
    if new.get("loss_aggregation") in ("sequence_mean", "dapo"):
        new["loss_aggregation"] = {"sequence_mean": "grpo", "dapo": "bnpo"}[new["loss_aggregation"]]
    estimator = dict(raw.get("estimator", {"name": "one_step"}))
    new["estimator"] = _chosen(estimator["name"], estimator, AnyEstimator)
    if estimator["name"] == "trajectory" and estimator.get("shrink"):
        new["estimator"].pop("samples", None)
    new["policy_loss"] = _policy_loss(raw)
    advantage = raw.get("advantage", "center")
    new["advantage"] = "rloo" if advantage == "leave_one_out" else advantage
    if advantage == "softmax":
        new["advantage"] = {"name": "softmax", "scale": raw.get("softmax_scale", 1.0)}
    if raw.get("supervision", "outcome") == "commit_steps":
        new["supervision"] = {"name": "commit_steps", "parts": raw.get("supervision_steps", 4)}
    elif "supervision" in raw:
        new["supervision"] = raw["supervision"]
    new["kl"] = _kl(raw)
    if raw.get("reference_sync_every"):
        new["reference"] = {
            "name": "moving",
            "every": raw["reference_sync_every"],
            "mix": raw.get("reference_mix", 1.0),
        }
    guard = dict(raw.get("guard", {}))
    new["collapse"] = "ignore" if guard.get("patience") == 0 else {"name": "stop", **guard}
    return new


def _policy_loss(raw: Mapping[str, Any]) -> Any:
    if raw.get("ratio") == "none":
        return "policy_gradient"
    clip = {"level": raw.get("ratio", "token"), "clip_high": raw.get("clip_high", 0.2)}
    if raw.get("clip") == "cispo":
        return {"name": "cispo", **clip}
    return {"name": "ppo", **clip, "clip_low": raw.get("clip_low", 0.2)}


def _kl(raw: Mapping[str, Any]) -> Any:
    coefficient = raw.get("kl_coefficient", 0.0)
    if coefficient == 0:
        return "none"
    if raw.get("kl_in") == "reward":
        return {"name": "reward", "coefficient": coefficient}
    return {
        "name": "loss", "coefficient": coefficient, "estimator": raw.get("kl", "k3"), "level": raw.get("kl_level", "token"),
        "to": raw.get("kl_to", "reference"),
    }  # fmt: skip


def _renamed(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {RENAMED.get(key, key): value for key, value in raw.items()}


def _chosen(name: str, parameters: Mapping[str, Any], union: Any) -> dict[str, Any]:
    """A choice with those of the old settings that it reads."""
    cls = alternatives(union).get(name)
    return {"name": name} | {key: parameters[key] for key in (hints_of(cls) if cls else ()) if key in parameters}
