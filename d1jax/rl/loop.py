"""One diffu-GRPO stage, top to bottom: sample, reward, compare within groups, update.

Q problems, G completions of each, B = Q G rows, C completion columns, U inner updates.

Source: d1, arXiv 2504.12216, algorithm 1.
Differs from the released code: mu inner updates meet mu different prompt masks for every accumulation setting; the reference
and old policies are scored under the same masks; completions of a group share their mask (mask_sharing); rollouts, rewards
and updates are functions of (seed, step), so a run resumes exactly; padding is never attended to.
"""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from d1jax.analysis import accuracy, autoregressiveness
from d1jax.config import RlConfig
from d1jax.data.pipeline import RowOrder
from d1jax.diffusion.canvas import Canvas
from d1jax.diffusion.sampler import Rollout, sample
from d1jax.experiment import Experiment
from d1jax.journal import Journal
from d1jax.models import lora
from d1jax.models.transformer import Variables
from d1jax.rl.advantages import group_advantages
from d1jax.rl.rewards import reward_rows, total_rewards
from d1jax.rl.update import Batch, make_update
from d1jax.runtime import mesh as mesh_rules
from d1jax.runtime.optimizer import TrainState, make_optimizer, make_schedule, new_state
from d1jax.setup import split, trained_table, with_adapter


def train(experiment: Experiment, start: Variables, journal: Journal) -> Variables:
    """Runs (or continues, or finds finished) the stage; returns its last weights, adapters merged."""
    config, problems, task, mesh = experiment.config.rl, experiment.train, experiment.task, experiment.mesh
    special, root = experiment.tokenizer.special, experiment.key("rl")
    rows_per_step = config.prompts_per_step * config.group_size
    row_ids_B = mesh_rules.place_rows(mesh, np.arange(rows_per_step, dtype=np.int32))
    # Completions of a group under one prompt mask: what they share cancels in their advantages, which sum to zero. With a mask
    # a row (d1) it does not, and most of the gradient's variance is of that kind (docs/architecture.md has the measurement).
    mask_ids_B = row_ids_B // config.group_size if config.mask_sharing == "group" else row_ids_B

    trainable, frozen = split(with_adapter(experiment, start, "rl"))
    trained_table(trainable, frozen, journal.note)
    optimizer = make_optimizer(config.optimizer, config.steps * config.inner_updates)
    schedule = make_schedule(config.optimizer, config.steps * config.inner_updates)
    state = new_state(optimizer, trainable, mesh)
    update = make_update(experiment.model, optimizer, config, experiment.config.sampler, special, state)
    reference = _reference(config, trainable, frozen)
    items, first = journal.resume(_items(config, state, reference))
    state, reference = TrainState(items["trainable"], items["optimizer"]), items.get("reference", reference)

    order = RowOrder(len(problems), experiment.config.seed + 1)
    for step in range(first, config.steps):
        key = jax.random.fold_in(root, step)
        clock = [time.perf_counter()]

        # -- rollouts: G completions of each problem
        rows_B = np.repeat(order.take(step * config.prompts_per_step, config.prompts_per_step), config.group_size)
        prompts = mesh_rules.place_rows(mesh, (problems.prompt_RP[rows_B], problems.prompt_length_R[rows_B]))
        policy = {**frozen, **state.trainable}
        rollout = sample(
            experiment.model, policy, *prompts, jax.random.fold_in(key, 0), row_ids_B,
            config=experiment.config.sampler, special=special, temperature=config.temperature,
        )  # fmt: skip
        canvas = Canvas(rollout.tokens_BC, *prompts)
        rollout = jax.device_get(rollout)
        clock.append(time.perf_counter())

        # -- rewards and advantages, on the host
        texts = accuracy.texts_of(experiment, rollout)
        parts_B, failures = reward_rows(task, [problems.rows[row] for row in rows_B], texts, config.reward_weights)
        reward_QG = total_rewards(parts_B, config.reward_weights).reshape(config.prompts_per_step, config.group_size)
        settings = {"scale": config.softmax_scale} if config.advantage == "softmax" else {}
        controlled_QG = _controlled(config, reward_QG, experiment.config.seed, step)
        advantage_QG = group_advantages(config.advantage, controlled_QG, **settings)
        if config.negative_control == "zero_advantages":
            advantage_QG = np.zeros_like(advantage_QG)
        clock.append(time.perf_counter())

        # -- mu inner updates in one compiled call
        advantage_B, reveal_step_BC = mesh_rules.place_rows(mesh, (advantage_QG.reshape(-1), rollout.reveal_step_BC))
        batch = Batch(canvas, mask_ids_B, reveal_step_BC, advantage_B)
        state, inner = update(state, frozen, reference, batch, jax.random.fold_in(key, 1))
        inner = jax.device_get(inner)
        if config.reference_sync_every and (step + 1) % config.reference_sync_every == 0:
            reference = _copy({**frozen, **state.trainable})
        clock.append(time.perf_counter())

        # -- what is left behind
        values = {
            **_reward_metrics(parts_B, reward_QG, failures),
            **_completion_metrics(rollout, texts, config.group_size, special.end),
            **_update_metrics(inner, with_kl=config.kl_coefficient > 0),
            "learning_rate": float(schedule(step * config.inner_updates)),
            **dict(zip(("time/rollout_s", "time/reward_s", "time/update_s"), np.diff(clock).tolist(), strict=True)),
        }
        every = experiment.config.evaluation.every
        if every and (step + 1) % every == 0:
            values |= accuracy.headline(experiment, lora.merge({**frozen, **state.trainable}, experiment.config.lora))
        journal.record(step + 1, values, watch=("reward", "rewards/solved/mean", "kl", "entropy"))
        journal.keep(step + 1, _items(config, state, reference))
    return lora.merge({**frozen, **state.trainable}, experiment.config.lora)


def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def _reference(config: RlConfig, trainable: Variables, frozen: Variables) -> Variables:
    """The policy at the start. Under LoRA that is the model without its adapter: no copy. Without a KL term nothing is needed."""
    if config.kl_coefficient == 0 or config.kl_to == "old":
        return {}
    return frozen if "lora" in trainable else _copy(trainable)


def _items(config: RlConfig, state: TrainState, reference: Variables) -> dict[str, Any]:
    """What a checkpoint holds. A reference that is the frozen base is not saved again."""
    moving = {"reference": reference} if reference and "params" in state.trainable else {}
    return {"trainable": state.trainable, "optimizer": state.optimizer, **moving}


def _controlled(config: RlConfig, reward_QG: np.ndarray, seed: int, step: int) -> np.ndarray:
    """The rewards, or for a negative control the same rewards given to the wrong completions."""
    if config.negative_control != "shuffled_rewards":
        return reward_QG
    return np.random.default_rng((seed, step)).permutation(reward_QG.reshape(-1)).reshape(reward_QG.shape)


def _reward_metrics(parts_B: dict[str, np.ndarray], reward_QG: np.ndarray, failures: int) -> dict[str, float]:
    values = {"reward": reward_QG.mean(), "reward_std": reward_QG.std(axis=1).mean(), "rewards/failures": failures}
    values["frac_reward_zero_std"] = (reward_QG.max(axis=1) == reward_QG.min(axis=1)).mean()
    for name, rewards_B in parts_B.items():
        values |= {f"rewards/{name}/mean": rewards_B.mean(), f"rewards/{name}/std": rewards_B.std()}
    return {name: float(value) for name, value in values.items()}


def _completion_metrics(rollout: Rollout, texts: list[str], group: int, end_id: int) -> dict[str, float]:
    distinct = [len(set(texts[i : i + group])) for i in range(0, len(texts), group)]
    return {
        "completions/mean_length": float(rollout.length_B.mean()),
        "completions/clipped_ratio": float((rollout.tokens_BC != end_id).all(axis=1).mean()),
        "completions/distinct_per_group": float(np.mean(distinct)),
        "sampler/nfe": float(rollout.nfe_B.mean()),
        **autoregressiveness.metrics(rollout),
    }


def _update_metrics(inner: dict[str, np.ndarray], with_kl: bool) -> dict[str, float]:
    """Means over the inner updates; the first ratio by itself, because it must be exactly 1."""
    values = {name: float(value.mean()) for name, value in inner.items() if not name.startswith("nonfinite")}
    if not with_kl:
        del values["kl"]
    values["ratio/first"] = float(inner["ratio/mean"][0])
    return values | {
        "nonfinite/in_a_row": int(inner["nonfinite/in_a_row"][-1]),
        "nonfinite/total": int(inner["nonfinite/total"][-1]),
    }
