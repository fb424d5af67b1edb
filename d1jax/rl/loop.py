"""One RL stage, top to bottom: sample, reward, compare within groups, update. The names in the config make it diffu-GRPO or another method.

Q problems, G completions of each, B = Q G rows, C completion columns, U inner updates.

Source: d1, arXiv 2504.12216, algorithm 1, for the order of things; configs/methods says what each method is.
Differs from d1's released code: mu inner updates meet mu different prompt masks for every accumulation setting; the reference
and old policies are scored under the same masks; completions of a group share their mask (mask_sharing); rollouts, rewards
and updates are functions of (seed, step), so a run resumes exactly; padding is never attended to.
"""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from d1jax.data.order import RowOrder
from d1jax.diffusion.canvas import Canvas
from d1jax.diffusion.sampler import given, sample
from d1jax.evaluation import accuracy
from d1jax.models import sharding
from d1jax.models.transformer import Variables, in_model_dtype
from d1jax.rl import diagnostics, metrics
from d1jax.rl.credit import credit
from d1jax.rl.likelihood import Batch, Scorer, make_penalty
from d1jax.rl.rewards import Judge, total_rewards
from d1jax.rl.update import make_update
from d1jax.tasks.task import DataError
from d1jax.training.context import Experiment
from d1jax.training.optimizer import TrainState, make_optimizer, make_schedule, new_state
from d1jax.training.setup import split, trained_table, with_adapter
from d1jax.training.stage_log import Journal


def train(experiment: Experiment, start: Variables, journal: Journal) -> Variables:
    """Runs (or continues, or finds finished) the stage; returns its last weights, an adapter beside what it was trained on."""
    config, problems, task, mesh = experiment.config.rl, experiment.train, experiment.task, experiment.mesh
    sampler, special, root = experiment.config.sampler, experiment.tokenizer.special, experiment.key("rl")
    questions, group = config.prompts_per_step, config.group_size
    row_ids_B = np.arange(questions * group, dtype=np.int32)
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
    if config.estimator.name == "autoregressive" and (
        sampler.remasking != "left_to_right" or sampler.steps < sampler.completion_length
    ):
        journal.note(
            "rl.estimator.name = autoregressive is exact for sampler.remasking = left_to_right with one token a step only"
        )
    reference = _reference(experiment, state.trainable, frozen)
    items, first = journal.resume(_items(state, reference))
    state, reference = TrainState(items["trainable"], items["optimizer"]), items.get("reference", reference)

    usable = problems.has_target_R.nonzero()[0] if config.data == "targets" else np.arange(len(problems))
    order = RowOrder(len(usable), experiment.config.seed + 1)
    unjudged = 0  # steps in a row without a text that could be rewarded
    for step in range(first, config.steps):
        key = jax.random.fold_in(root, step)
        clock = [time.perf_counter()]

        # -- rollouts: G completions of each problem
        rows_B = np.repeat(usable[order.take(step * questions, questions)], group)
        prompts = problems.prompt_RP[rows_B], problems.prompt_length_R[rows_B]
        policy = in_model_dtype({**frozen, **state.trainable}, experiment.config.model)
        if config.data == "targets":
            rollout = given(problems.target_RC[rows_B], special.end_ids)
        else:
            rollout = jax.device_get(sample(
                experiment.model, reference if config.data == "reference" else policy,
                *sharding.place_rows(mesh, prompts), jax.random.fold_in(key, 0), sharding.place_rows(mesh, row_ids_B),
                config=sampler, special=special, temperature=config.temperature,
            ))  # fmt: skip
        batch = Batch(  # all rows alike, until they are judged
            Canvas(rollout.tokens_BC, *prompts), mask_ids_B, rollout.reveal_step_BC,
            np.zeros(rollout.tokens_BC.shape, np.float32), np.ones(len(rows_B), bool),
            rollout.entropy_BC if config.estimator.subset < 1 else None,
        )  # fmt: skip
        clock.append(time.perf_counter())

        # -- rewards and advantages, on the host
        texts, values = accuracy.texts_of(experiment, rollout), {}
        judge = Judge(task, [problems.rows[row] for row in rows_B], rows_B.tolist(), config)
        parts_B = judge.rewards(texts)
        unjudged = unjudged + 1 if len(judge.failures) == len(texts) else 0
        if unjudged >= min(experiment.config.max_bad_updates, config.steps):
            raise DataError(
                f"rl step {step + 1}: no text of the last {unjudged} steps could be rewarded, so nothing is learnt; {judge.failures[0]}"
            )
        reward_QG = total_rewards(parts_B, config.reward_weights).reshape(questions, group)
        compared_QG = reward_QG
        if config.kl_in_reward:
            kl_B, tokens = penalty(policy, reference, sharding.place_rows(mesh, batch), jax.random.fold_in(key, 1))
            compared_QG = reward_QG - config.kl_coefficient * np.asarray(kl_B, np.float64).reshape(reward_QG.shape)
            values["kl"] = float(kl_B.sum() / tokens)
        elif config.advantage == "accepted":
            compared_QG = parts_B[config.accept].reshape(reward_QG.shape)
        del policy  # in training its copy in the model's dtype is not needed
        credits = credit(config, rollout, compared_QG, experiment.tokenizer, judge, (experiment.config.seed, step))
        for line in judge.failures[:1]:
            journal.note(f"step {step + 1}: {line}; it counts as 0 ({len(judge.failures)} such texts)")
        clock.append(time.perf_counter())

        # -- mu inner updates in one compiled call
        if config.advantage == "pairs":  # the best and the worst of each group
            batch = jax.tree.map(lambda x, rows_B=credits.rows_B: x[rows_B], batch)
        batch = batch._replace(advantage_BC=credits.advantage_BC, kept_B=credits.kept_B)
        batch = sharding.place_rows(mesh, batch)
        state, inner = update(state, frozen, reference, batch, jax.random.fold_in(key, 1), step == 0)
        inner = jax.device_get(inner)
        if step == 0:
            for line in diagnostics.check_start(inner, config, experiment.config.model.dtype):
                journal.note(line)
        if config.reference_sync_every and (step + 1) % config.reference_sync_every == 0:
            reference = _mixed(reference, {**frozen, **state.trainable}, config.reference_mix)
        clock.append(time.perf_counter())

        # -- what is left behind
        values |= {
            **metrics.of_rewards(parts_B, reward_QG, len(judge.failures)),
            **metrics.of_completions(rollout, texts, group, special.end_ids, task.columns is not None),
            **metrics.of_update(inner, config),
            "learning_rate": float(schedule(step * config.inner_updates)),
            **dict(zip(("time/rollout_s", "time/reward_s", "time/update_s"), np.diff(clock).tolist(), strict=True)),
        }
        every = experiment.config.evaluation.every
        if every and (step + 1) % every == 0:
            values |= accuracy.headline(experiment, {**frozen, **state.trainable})
        journal.record(step + 1, values, watch=("reward", "rewards/solved/mean", "kl", "entropy"))
        for line in diagnostics.no_signal(journal.recent, step + 1, config):
            journal.note(line)
        signs = diagnostics.collapsed(journal.recent, group, config.guard)
        if signs:
            journal.roll_back(step + 1, config.guard.patience, signs)
        journal.keep(step + 1, _items(state, reference))
    return {**frozen, **state.trainable}


def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def _mixed(reference: Variables, policy: Variables, share: float) -> Variables:
    """share x policy + (1 - share) x reference, where the reference lives; 1 is a copy, bit for bit."""
    if share == 1:
        return _copy(policy)
    where = jax.tree.map(lambda x: x.sharding, reference)
    mix = jax.jit(_weighted, out_shardings=where)
    return mix(reference, policy, share)


def _weighted(reference: Variables, policy: Variables, share: float) -> Variables:
    return jax.tree.map(lambda r, p: (share * p + (1 - share) * r).astype(r.dtype), reference, policy)


def _reference(experiment: Experiment, trainable: Variables, frozen: Variables) -> Variables:
    """The policy at the start; a method without a reference gets {}. Under LoRA the base is shared, and only the adapter is copied.

    One that never moves is kept in the dtype in which it computes, which changes no score.
    """
    config = experiment.config.rl
    if not config.needs_reference:
        return {}
    start = {**frozen, **_copy(trainable)}
    return start if config.reference_sync_every else in_model_dtype(start, experiment.config.model)


def _items(state: TrainState, reference: Variables) -> dict[str, Any]:
    """What a checkpoint holds. Under LoRA the reference is what the stage began with (rl_rules.py: it moves in full fine-tuning only)."""
    saved = {"reference": reference} if reference and "params" in state.trainable else {}
    return {"trainable": state.trainable, "optimizer": state.optimizer, **saved}
