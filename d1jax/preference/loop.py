"""One preference stage, top to bottom: pairs of texts, and one update of DPO or KTO.

Q pairs, B = 2 Q rows (chosen, then rejected), C completion columns.

Source: DPO, arXiv 2305.18290; VRPO (LLaDA 1.5), arXiv 2505.19223, for likelihoods that are estimated; configs/preferences.
KTO, arXiv 2402.01306; ELBO-KTO, arXiv 2510.23658.
Differs from all: where no pairs are stored they are made on the way, by the task's reward, of completions of the policy at the start or
as it is now.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from d1jax.config import PreferenceConfig
from d1jax.evaluation.grade import watch
from d1jax.models import sharding
from d1jax.models.transformer import Variables, in_model_dtype
from d1jax.preference.loss import dpo, gains, kto
from d1jax.preference.pairs import Stored, Written
from d1jax.training.context import Context
from d1jax.training.likelihood import RolloutBatch, Scorer
from d1jax.training.optimizer import (
    TrainState,
    apply_gradient,
    bad_updates,
    compiled_update,
    gradients,
    make_optimizer,
    make_schedule,
    new_state,
)
from d1jax.training.pair_order import PairOrder
from d1jax.training.setup import split, trained_table, with_adapter
from d1jax.training.stage_log import Clock, StageLog

FIRST_STEPS, NO_PAIRS = 3, 0.9  # a share of tied groups from which a stage hardly learns, over so many steps


class Rows(NamedTuple):
    """Pairs as the loss looks at them, a pair a row: arrays [Q, ...] of the chosen and of the rejected."""

    chosen: RolloutBatch
    rejected: RolloutBatch
    chosen_reference_QC: Array
    rejected_reference_QC: Array
    weight_Q: Array  # 1 / number of pairs that differ; 0 for ties


def train(context: Context, start: Variables, log: StageLog) -> Variables:
    """Runs (or continues, or finds finished) the stage; returns its last weights, an adapter beside what it was trained on."""
    config = context.config.preference
    sampler, special = context.config.sampler, context.tokenizer.special

    # -- what is compiled once, and the state that moves
    trainable, frozen = split(with_adapter(context, start, log.stage))
    trained_table(trainable, frozen, config.optimizer, log.note)
    optimizer = make_optimizer(config.optimizer, config.steps)
    schedule = make_schedule(config.optimizer, config.steps)
    state = new_state(optimizer, trainable, context.mesh, config.optimizer.offload)
    scorer = Scorer(context.model, config.estimator, sampler, special, parts=config.grad_accumulation_steps)
    update = make_update(scorer, optimizer, config, state)
    # In the dtype in which it computes, which changes no score. Under LoRA the base is shared, and only the adapter is copied.
    reference = in_model_dtype({**frozen, **jax.tree.map(jnp.copy, state.trainable)}, context.config.model)
    items, first_step = log.resume(_items(state, reference))
    state, reference = TrainState(items["trainable"], items["optimizer"]), items.get("reference", reference)

    make_pairs = Written(context, log)
    if config.data:
        make_pairs = Stored(PairOrder(*context.judged_sources, config.prompts_per_step, context.config.seed))
    for step in range(first_step, config.steps):
        key = jax.random.fold_in(context.key(log.stage), step)
        clock = Clock()

        # -- the pairs: stored ones, or the best and the worst of groups that are written and rewarded now
        writer = reference if config.writer == "reference" else {**frozen, **state.trainable}
        made = make_pairs(step, writer, jax.random.fold_in(key, 0), clock)
        del writer

        # -- update: one step
        placed = sharding.shard_batch(context.mesh, made.batch)
        state, inner = update(state, frozen, reference, placed, made.kept_Q, jax.random.fold_in(key, 1))
        values = {name: float(value) for name, value in jax.device_get(inner).items()}
        clock.lap("time/update_s")

        # -- metrics, checkpoint
        values |= {**made.values, "learning_rate": float(schedule(step)), **clock.laps}
        if log.evaluates(step + 1):
            values |= watch(context, {**frozen, **state.trainable})
        log.log_metrics(step + 1, values, watch=("loss", "rewards/accuracies", "rewards/margins"))
        log.notes(no_pairs(log.recent, step + 1, config.steps))
        log.save_checkpoint(step + 1, _items(state, reference))
    return {**frozen, **state.trainable}


def no_pairs(history: Sequence[Mapping[str, float]], step: int, steps: int) -> list[str]:
    """A warning for the log after the first steps where nearly all pairs are tied, so that nothing is learnt; [] otherwise."""
    first = min(FIRST_STEPS, steps)
    if step != first or len(history) < first or "pairs/tied" not in history[-1]:
        return []
    tied = float(np.mean([values["pairs/tied"] for values in history[-first:]]))
    if tied < NO_PAIRS:
        return []
    reward = float(np.mean([values["reward"] for values in history[-first:]]))
    return [
        f"in the first {first} steps {tied:.0%} of the groups had equal rewards (mean reward {reward:.3g}), so there is no pair to learn "
        "from; sample more completions a problem (preference.num_generations), or take problems that are neither too easy nor too hard"
    ]


def make_update(
    scorer: Scorer, optimizer: optax.GradientTransformation, config: PreferenceConfig, state: TrainState
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """`update(state, frozen, reference, batch, kept, key) -> (state, metrics)`, compiled; metrics are fp32 scalars.

    batch: the chosen rows, then the rejected ones. kept [Q]: the pairs that differ; the loss is the mean over them. `state` is an
    example that says where arrays live.
    """

    def loss(trainable: Any, rows: Rows, frozen: Variables, key: Array, baseline: Array) -> tuple[Array, Array]:
        batch = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), rows.chosen, rows.rejected)
        reference_logp_BC = jnp.concatenate([rows.chosen_reference_QC, rows.rejected_reference_QC])
        scores = scorer.scores({**frozen, **trainable}, batch, scorer.views(key, batch))
        gain_B = gains(scores.logp, reference_logp_BC, scorer.counted_BC(key, batch))
        chosen_Q, rejected_Q = jnp.split(gain_B, 2)
        method = config.loss
        if method.name == "dpo":
            loss_Q = dpo(chosen_Q, rejected_Q, method.beta)
        else:
            loss_Q = kto(chosen_Q, rejected_Q, baseline, method)
        return jnp.sum(rows.weight_Q * loss_Q), method.beta * (chosen_Q - rejected_Q)

    @compiled_update(state)
    def update(
        state: TrainState, frozen: Variables, reference: Variables, batch: RolloutBatch, kept_Q: Array, key: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        reference_logp_BC = scorer.logps(reference, batch, key)
        kept_Q = kept_Q.astype(jnp.float32)
        count = kept_Q.shape[0]
        pairs = jnp.maximum(jnp.sum(kept_Q), 1)
        chosen, rejected = (jax.tree.map(lambda x_B, part=part: x_B[part], (batch, reference_logp_BC))
                            for part in (slice(0, count), slice(count, None)))  # fmt: skip
        rows = Rows(chosen[0], rejected[0], chosen[1], rejected[1], kept_Q / pairs)
        # The mean over the whole batch, of which a micro-batch sees a part; a pass of its own, without a gradient.
        baseline = jnp.zeros((), jnp.float32)
        if config.loss.name == "kto":
            logp_BC = scorer.logps({**frozen, **state.trainable}, batch, key)
            baseline = jnp.mean(gains(logp_BC, reference_logp_BC, scorer.counted_BC(key, batch)))
        value, margin_Q, gradient = gradients(
            lambda trainable, rows: loss(trainable, rows, frozen, key, baseline),
            state.trainable,
            rows,
            config.grad_accumulation_steps,
        )
        state = apply_gradient(optimizer, state, gradient, value)
        in_a_row, in_all = bad_updates(state.optimizer)
        return state, {
            "loss": value,
            "grad_norm": optax.tree.norm(gradient),
            "rewards/margins": jnp.sum(margin_Q * kept_Q) / pairs,
            "rewards/accuracies": jnp.sum((margin_Q > 0) * kept_Q) / pairs,
            "nonfinite/in_a_row": in_a_row,
            "nonfinite/total": in_all,
        }

    return update


def _items(state: TrainState, reference: Variables) -> dict[str, Any]:
    """What a checkpoint holds. Under LoRA the reference is what the stage began with."""
    saved = {"reference": reference} if "params" in state.trainable else {}
    return {"trainable": state.trainable, "optimizer": state.optimizer, **saved}
