"""One RL stage, top to bottom: rollout, rewards, advantages, update. The names in the config make it diffu-GRPO or another method.

Q problems, G completions of each, B = Q G rows, C completion columns, P prompt columns; 2: first and last inner update.

Source: d1, arXiv 2504.12216, algorithm 1, for the order of things; configs/methods says what each method is.
Differs from d1's released code: mu inner updates meet mu different prompt masks for every accumulation setting; the reference
and old policies are scored under the same masks; completions of a group share their mask (mask_sharing); rollouts, rewards
and updates are functions of (seed, step), so a run resumes exactly; padding is never attended to.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from d1jax.config import RlConfig
from d1jax.evaluation.decode import decoding_copy
from d1jax.evaluation.grade import watch
from d1jax.models import sharding
from d1jax.models.transformer import Variables
from d1jax.rl import diagnostics, metrics
from d1jax.rl.advantages import compute_advantages
from d1jax.rl.loss import make_kl_in_reward
from d1jax.rl.reference import at_the_start, moved
from d1jax.rl.update import Batch, make_update, rows_alike
from d1jax.rl.value_model import make_value_model
from d1jax.rollouts import metrics as rollout_metrics
from d1jax.rollouts.generate import Failures, Generator, fetch_and_grade
from d1jax.training.context import Context
from d1jax.training.likelihood import Scorer
from d1jax.training.optimizer import TrainState, make_optimizer, make_schedule, new_state
from d1jax.training.setup import split, trained_table, with_adapter
from d1jax.training.stage_log import Clock, StageLog


def train(context: Context, start: Variables, log: StageLog) -> Variables:
    """Runs (or continues, or finds finished) the stage; returns its last weights, an adapter beside what it was trained on."""
    config, seed = context.config.rl, context.config.seed
    sampler, special = context.config.sampler, context.tokenizer.special
    group, total_updates = config.num_generations, config.steps * config.num_iterations

    # -- what is compiled once, and the state that moves
    trainable, frozen = split(with_adapter(context, start, log.stage))
    trained_table(trainable, frozen, config.optimizer, log.note)
    optimizer = make_optimizer(config.optimizer, total_updates)
    schedule = make_schedule(config.optimizer, total_updates)
    state = new_state(optimizer, trainable, context.mesh, config.optimizer.offload)
    scorer = Scorer(
        context.model, config.estimator, sampler, special, config.prompt_mask, config.grad_accumulation_steps,
        rows_alike(config, context.mesh),
    )  # fmt: skip
    update = make_update(scorer, optimizer, config, state)
    start_scores = diagnostics.make_start_scores(scorer, config)
    with_kl = make_kl_in_reward(scorer, config.kl)
    reference = at_the_start(config, context.config.model, state.trainable, frozen)
    value_model = make_value_model(context, config, scorer, state.trainable, total_updates)
    log.notes(value_model.notes())
    state, reference, value_state, first_step = _resumed(log, state, reference, value_model.start)
    log.notes(diagnostics.notes(config, sampler))

    generate = Generator(context, config, record_entropy=config.estimator.needs_entropy)
    failures = Failures(log.stage, min(context.config.max_bad_updates, config.steps))
    mask_ids_B = _mask_ids(config)
    for step in range(first_step, config.steps):
        rollout_key, update_key = _keys(context, log.stage, step)
        clock = Clock()

        # -- rollout: G completions of each problem, by the policy in the dtype that it computes in
        prompts = generate.prompts(step)
        policy = decoding_copy(context, {**frozen, **state.trainable})
        parts = generate(policy, prompts, rollout_key)

        # -- rewards, on the host, of each part of the batch while the next is decoded
        rollout, graded = fetch_and_grade(context, config.reward_weights, prompts, parts, group, clock)
        batch = sharding.shard_batch(context.mesh, generate.batch(prompts, rollout, mask_ids_B))
        log.notes(failures.note(step + 1, graded))
        reward_QG, values = with_kl(graded.reward_QG, policy, reference, batch, update_key)
        clock.lap("time/reward_s")

        # -- advantages, a number a token
        value_BC = value_model.values(value_state, frozen, batch)
        advantage_BC = compute_advantages(config, rollout, reward_QG, graded, value_BC, context.tokenizer, (seed, step))
        train_batch = Batch(batch, sharding.shard_batch(context.mesh, advantage_BC))

        # -- update: mu inner updates in one compiled call
        start_scores_2BC = start_scores({**frozen, **state.trainable}, train_batch, update_key) if step == 0 else None
        del policy  # in training its copy in the model's dtype is not needed
        state, update_metrics, first_scores = update(state, frozen, reference, train_batch, update_key)
        update_metrics = sharding.fetch(update_metrics)
        if start_scores_2BC is not None:
            checked = sharding.fetch((first_scores, start_scores_2BC))
            log.notes(diagnostics.check_start(*checked, advantage_BC, config, context.config.model.dtype))
        reference = moved(config, reference, {**frozen, **state.trainable}, step)
        value_state, of_values = value_model.update(value_state, frozen, batch, value_BC, reward_QG.reshape(-1))
        clock.lap("time/update_s")

        # -- metrics, checks, checkpoint
        values |= {
            **rollout_metrics.of_rewards(graded),
            **rollout_metrics.of_completions(
                rollout, graded.texts, group, special.end_ids, context.task.columns is not None
            ),
            **metrics.of_both(metrics.of_update(update_metrics, config), of_values),
            "learning_rate": float(schedule(step * config.num_iterations)),
            **clock.laps,
        }
        if log.evaluates(step + 1):
            values |= watch(context, {**frozen, **state.trainable})
        log.log_metrics(step + 1, values, watch=("reward", "rewards/solved/mean", "kl", "entropy", *clock.laps))
        log.notes(diagnostics.no_signal(log.recent, step + 1, config))
        signs = diagnostics.collapsed(log.recent, group, config.collapse)
        if signs:
            log.quarantine(step + 1, config.collapse.patience, signs)
        log.save_checkpoint(step + 1, _items(state, reference, value_state))
    return {**frozen, **state.trainable}


def _mask_ids(config: RlConfig) -> np.ndarray:
    """[B]: rows of equal id meet equal masks.

    Completions of a group under one prompt mask: what they share cancels in their advantages, which sum to zero. With a mask a row
    (d1) it does not, and most of the gradient's variance is of that kind (docs/architecture.md has the measurement).
    """
    row_ids_B = np.arange(config.rollout_rows, dtype=np.int32)
    return row_ids_B // config.num_generations if config.mask_sharing == "group" else row_ids_B


def _keys(context: Context, stage: str, step: int) -> tuple[jax.Array, jax.Array]:
    """(key of the rollout, key of the masks) of a step: functions of the seed, the stage and the step only."""
    key = jax.random.fold_in(context.key(stage), step)
    return jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)


def _resumed(
    log: StageLog, state: TrainState, reference: Variables, values: TrainState | None
) -> tuple[TrainState, Variables, TrainState | None, int]:
    """(state, reference, state of the value model, first step to do): as given, or as the last checkpoint has them."""
    items, first_step = log.resume(_items(state, reference, values))
    resumed = TrainState(items["trainable"], items["optimizer"])
    return resumed, items.get("reference", reference), items.get("value_model"), first_step


def _items(state: TrainState, reference: Variables, values: TrainState | None) -> dict[str, Any]:
    """What a checkpoint holds. Under LoRA the reference is what the stage began with: it moves in full fine-tuning only."""
    saved = {"reference": reference} if reference and "params" in state.trainable else {}
    saved |= {} if values is None else {"value_model": values}
    return {"trainable": state.trainable, "optimizer": state.optimizer, **saved}
