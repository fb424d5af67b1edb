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

from d1jax.analysis import accuracy
from d1jax.config import ConfigError, RlConfig
from d1jax.data.pipeline import RowOrder
from d1jax.diffusion.canvas import Canvas
from d1jax.diffusion.sampler import given, sample
from d1jax.experiment import Experiment
from d1jax.journal import Journal
from d1jax.models import lora
from d1jax.models.transformer import Variables
from d1jax.rl import guards, metrics
from d1jax.rl.credit import credit
from d1jax.rl.rewards import reward_rows, total_rewards
from d1jax.rl.scoring import Batch, Scorer, make_penalty
from d1jax.rl.update import make_update
from d1jax.runtime import mesh as mesh_rules
from d1jax.runtime.optimizer import TrainState, make_optimizer, make_schedule, new_state
from d1jax.setup import split, trained_table, with_adapter
from d1jax.tasks.task import Row


def train(experiment: Experiment, start: Variables, journal: Journal) -> Variables:
    """Runs (or continues, or finds finished) the stage; returns its last weights, adapters merged."""
    config, problems, task, mesh = experiment.config.rl, experiment.train, experiment.task, experiment.mesh
    sampler, special, root = experiment.config.sampler, experiment.tokenizer.special, experiment.key("rl")
    questions, group = config.prompts_per_step, config.group_size
    row_ids_B = mesh_rules.place_rows(mesh, np.arange(questions * group, dtype=np.int32))
    # Completions of a group under one prompt mask: what they share cancels in their advantages, which sum to zero. With a mask
    # a row (d1) it does not, and most of the gradient's variance is of that kind (docs/architecture.md has the measurement).
    mask_ids_B = row_ids_B // group if config.mask_sharing == "group" else row_ids_B

    trainable, frozen = split(with_adapter(experiment, start, "rl"))
    trained_table(trainable, frozen, journal.note)
    optimizer = make_optimizer(config.optimizer, config.steps * config.inner_updates)
    schedule = make_schedule(config.optimizer, config.steps * config.inner_updates)
    state = new_state(optimizer, trainable, mesh)
    update = make_update(experiment.model, optimizer, config, sampler, special, state)
    penalty = make_penalty(Scorer(experiment.model, config, sampler, special))
    reference = _reference(config, trainable, frozen)
    items, first = journal.resume(_items(state, reference))
    state, reference = TrainState(items["trainable"], items["optimizer"]), items.get("reference", reference)

    names = {*config.reward_weights, *([config.accept] if config.advantage == "accepted" else [])}
    usable = problems.has_target_R.nonzero()[0] if config.data == "targets" else np.arange(len(problems))
    if not len(usable):
        raise ConfigError(
            "config: rl.data = targets needs rows with solutions, and the task has none; set it to policy"
        )
    order = RowOrder(len(usable), experiment.config.seed + 1)
    for step in range(first, config.steps):
        key = jax.random.fold_in(root, step)
        clock = [time.perf_counter()]

        # -- rollouts: G completions of each problem
        rows_B = np.repeat(usable[order.take(step * questions, questions)], group)
        prompts = mesh_rules.place_rows(mesh, (problems.prompt_RP[rows_B], problems.prompt_length_R[rows_B]))
        policy = {**frozen, **state.trainable}
        if config.data == "targets":
            rollout = given(problems.target_RC[rows_B], special.end)
        else:
            rollout = jax.device_get(sample(
                experiment.model, reference if config.data == "reference" else policy, *prompts, jax.random.fold_in(key, 0),
                row_ids_B, config=sampler, special=special, temperature=config.temperature,
            ))  # fmt: skip
        entropy_BC = rollout.entropy_BC if config.estimator.subset < 1 else None
        uncredited = Batch(  # before anybody knows what it is worth
            Canvas(rollout.tokens_BC, *prompts), mask_ids_B, rollout.reveal_step_BC,
            np.zeros(rollout.tokens_BC.shape, np.float32), np.ones(len(rows_B), bool), entropy_BC,
        )  # fmt: skip
        uncredited = mesh_rules.place_rows(mesh, uncredited)
        clock.append(time.perf_counter())

        # -- rewards and advantages, on the host
        texts = accuracy.texts_of(experiment, rollout)
        rows = [problems.rows[row] for row in rows_B]
        parts_B, failures = reward_rows(task, rows, texts, names)
        for line in failures[:1]:
            journal.note(f"step {step + 1}: {line}, so it counts as 0 ({len(failures)} of {len(rows)} rows)")
        reward_QG = total_rewards(parts_B, config.reward_weights).reshape(questions, group)
        values = {}
        judged_QG = reward_QG
        if config.kl_coefficient > 0 and config.kl_in == "reward":
            kl_B, tokens = penalty(policy, reference, uncredited, jax.random.fold_in(key, 1))
            judged_QG = reward_QG - config.kl_coefficient * np.asarray(kl_B, np.float64).reshape(reward_QG.shape)
            values["kl"] = float(kl_B.sum() / tokens)
        elif config.advantage == "accepted":
            judged_QG = parts_B[config.accept].reshape(reward_QG.shape)
        judged_QG = _controlled(config, judged_QG, experiment.config.seed, step)

        def judge(texts: list[str], rows: list[Row] = rows) -> np.ndarray:
            return total_rewards(reward_rows(task, rows, texts, config.reward_weights)[0], config.reward_weights)

        credits = credit(config, rollout, judged_QG, experiment.tokenizer, judge)
        clock.append(time.perf_counter())

        # -- mu inner updates in one compiled call
        batch = uncredited
        if config.advantage == "pairs":  # the best and the worst of each group
            batch = jax.tree.map(lambda x, rows_B=credits.rows_B: x[rows_B], batch)
        batch = batch._replace(advantage_BC=credits.advantage_BC, kept_B=credits.kept_B)
        batch = mesh_rules.place_rows(mesh, batch)
        state, inner = update(state, frozen, reference, batch, jax.random.fold_in(key, 1), step == 0)
        inner = jax.device_get(inner)
        if step == 0:
            for line in guards.check_start(inner, config, experiment.config.model.dtype):
                journal.note(line)
        if config.reference_sync_every and (step + 1) % config.reference_sync_every == 0:
            reference = _mixed(reference, {**frozen, **state.trainable}, config.reference_mix)
        clock.append(time.perf_counter())

        # -- what is left behind
        values |= {
            **metrics.of_rewards(parts_B, reward_QG, len(failures)),
            **metrics.of_completions(rollout, texts, group, special.end),
            **metrics.of_update(inner, config),
            "learning_rate": float(schedule(step * config.inner_updates)),
            **dict(zip(("time/rollout_s", "time/reward_s", "time/update_s"), np.diff(clock).tolist(), strict=True)),
        }
        every = experiment.config.evaluation.every
        if every and (step + 1) % every == 0:
            values |= accuracy.headline(experiment, lora.merge({**frozen, **state.trainable}, experiment.config.lora))
        journal.record(step + 1, values, watch=("reward", "rewards/solved/mean", "kl", "entropy"))
        signs = guards.collapsed(journal.recent, group, config.guard)
        if signs:
            journal.roll_back(step + 1, config.guard.patience, signs)
        journal.keep(step + 1, _items(state, reference))
    return lora.merge({**frozen, **state.trainable}, experiment.config.lora)


def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


@jax.jit
def _mixed(reference: Variables, policy: Variables, share: float) -> Variables:
    """share x policy + (1 - share) x reference; 1 is a copy, bit for bit."""
    return jax.tree.map(
        lambda r, p: jnp.where(share == 1, p, (share * p + (1 - share) * r).astype(r.dtype)), reference, policy
    )


def _reference(config: RlConfig, trainable: Variables, frozen: Variables) -> Variables:
    """The policy at the start. Under LoRA that is the model without its adapter: no copy. A method without one gets {}."""
    if not config.needs_reference:
        return {}
    return frozen if "lora" in trainable else _copy(trainable)


def _items(state: TrainState, reference: Variables) -> dict[str, Any]:
    """What a checkpoint holds. A reference that is the frozen base is not saved again."""
    moving = {"reference": reference} if reference and "params" in state.trainable else {}
    return {"trainable": state.trainable, "optimizer": state.optimizer, **moving}


def _controlled(config: RlConfig, reward_QG: np.ndarray, seed: int, step: int) -> np.ndarray:
    """The rewards, or for a negative control the same rewards given to the wrong completions."""
    if config.negative_control != "shuffled_rewards":
        return reward_QG
    return np.random.default_rng((seed, step)).permutation(reward_QG.reshape(-1)).reshape(reward_QG.shape)
