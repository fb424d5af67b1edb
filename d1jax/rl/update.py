"""The compiled inner loop of every method: score old and reference, then mu optimizer updates, in one donated function.

U inner updates (mu), B rows, C completion columns, P prompt columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from d1jax.config import RlConfig
from d1jax.models import sharding
from d1jax.models.transformer import Variables
from d1jax.rl import metrics
from d1jax.rl.loss import AGGREGATIONS, relative_to_group, self_normalized_weights, token_terms
from d1jax.training.likelihood import RolloutBatch, Scorer
from d1jax.training.optimizer import TrainState, apply_gradient, bad_updates, compiled_update, gradients


class Batch(NamedTuple):
    """A rollout batch that is ready to be learnt from."""

    rollout: RolloutBatch
    advantage_BC: Array


class Rows(NamedTuple):
    """What one micro-batch of an inner update needs."""

    batch: Batch
    weight_BC: Array  # aggregation weights: they sum the batch, and vanish where no view scores a token
    old_logp_BC: Array | None
    reference_logp_BC: Array | None


class FirstScores(NamedTuple):
    """Of the first inner update, for the check of a run's first step (rl/diagnostics.py)."""

    logp_BC: Array  # scores by the program with gradients
    policy_BC: Array  # the surrogate
    view_weight_BC: Array
    counted_BC: Array


Update = Callable[..., tuple[TrainState, dict[str, Array], FirstScores]]


def view_keys(key: Array, num_iterations: int, fresh_masks: bool) -> Array:
    """The key of each inner update's masks: mu different ones, or d1's ablation with one for all."""
    return jax.vmap(lambda u: jax.random.fold_in(key, u))(jnp.arange(num_iterations, dtype=jnp.int32) * fresh_masks)


def rows_alike(config: RlConfig, mesh: Mesh) -> int:
    """How many rows, one behind the other, are shown alike by a view that hides all of a completion (`Views.rows_alike`).

    Under one prompt mask the completions of a problem differ in nothing that the model sees there, so one pass serves them: in d1's
    one-step score, and in the view of all masks of DiffuCoder's. 1 where they do differ, and where devices or micro-batches would cut the
    set of a problem.
    """
    is_alike = config.estimator.has_view_of_all_masked and (config.mask_sharing == "group" or config.prompt_mask == 0)
    is_whole = config.prompts_per_step % (config.grad_accumulation_steps * sharding.row_shards(mesh)) == 0
    return config.num_generations if is_alike and is_whole else 1


def make_update(scorer: Scorer, optimizer: optax.GradientTransformation, config: RlConfig, state: TrainState) -> Update:
    """`update(state, frozen, reference, batch, key) -> (state, metrics, first)`; metrics are fp32 arrays [U], one value an inner
    update; `first` are raw scores of the first.

    `state` is an example that says where arrays live. `frozen` holds the collections that are not trained; `reference` the
    whole reference policy ({} without one). Old and reference scores are taken under the same masked views as the policy's:
    the views are a pure function of (key, u, mask id).
    """
    kl = config.kl
    with_reference = kl.name == "loss" and kl.to == "reference"
    with_old = config.policy_loss.name != "policy_gradient" or (kl.name == "loss" and kl.to == "old")

    def loss(trainable: Any, rows: Rows, frozen: Variables, key: Array, first: Array) -> tuple[Array, metrics.Raw]:
        batch, counted_BC = rows.batch, rows.weight_BC > 0
        canvas = batch.rollout.canvas
        views = scorer.views(key, batch.rollout)
        scores = scorer.scores({**frozen, **trainable}, batch.rollout, views, batch.advantage_BC)
        # Before the first inner update the old policy is the current one: its score is this very number, so the ratio is exactly 1.
        # A method without old scores has it there always.
        old_logp_BC = jax.lax.stop_gradient(scores.logp)
        if with_old:
            old_logp_BC = jnp.where(first, old_logp_BC, rows.old_logp_BC)
        compared_BC = rows.reference_logp_BC if with_reference else old_logp_BC
        terms = token_terms(scores.logp, old_logp_BC, compared_BC, batch.advantage_BC, counted_BC, config)
        raw = metrics.Raw(
            terms=terms,
            logp_BC=scores.logp,
            entropy_BC=scores.entropy,
            view_weight_BC=jnp.sum(views.weight_NBC, axis=0),
            counted_BC=counted_BC,
            prompt_masked_BP=(views.prompt_NBP[0] != canvas.prompt_BP) & canvas.prompt_mask_BP,
            prompt_BP=canvas.prompt_mask_BP,
        )
        return jnp.sum(rows.weight_BC * terms.loss_BC), raw

    @compiled_update(state, outputs=2)
    def update(
        state: TrainState, frozen: Variables, reference: Variables, batch: Batch, key: Array
    ) -> tuple[TrainState, dict[str, Array], FirstScores]:
        keys_U = view_keys(key, config.num_iterations, config.fresh_masks)
        u_U = jnp.arange(config.num_iterations, dtype=jnp.int32)
        old_logp_UBC = reference_logp_UBC = None
        if with_old:
            behaviour = {**frozen, **state.trainable}
            old_logp_UBC = jax.lax.map(lambda x: _later_logps(scorer, behaviour, batch, *x), (u_U, keys_U))
        if with_reference:
            reference_logp_UBC = jax.lax.map(
                lambda key: scorer.logps(reference, batch.rollout, key, batch.advantage_BC), keys_U
            )

        def iteration(state: TrainState, xs: Any) -> tuple[TrainState, tuple[dict[str, Array], FirstScores]]:
            u, key, old_logp_BC, reference_logp_BC = xs
            counted_BC = scorer.counted_BC(key, batch.rollout).astype(jnp.float32)
            weight_BC = AGGREGATIONS[config.loss_aggregation](counted_BC, config.num_generations)
            rows = Rows(batch, weight_BC, old_logp_BC, reference_logp_BC)
            rows = _compared_in_groups(scorer, config, {**frozen, **state.trainable}, rows, u, key)
            value, raw, gradient = gradients(
                lambda trainable, rows: loss(trainable, rows, frozen, key, u == 0),
                state.trainable, rows, config.grad_accumulation_steps, rows_alike=scorer.rows_alike,
            )  # fmt: skip
            state = apply_gradient(optimizer, state, gradient, value)
            in_a_row, in_all = bad_updates(state.optimizer)
            values = {
                **metrics.of_iteration(raw),
                "loss": value,
                "grad_norm": optax.tree.norm(gradient),
                "nonfinite/in_a_row": in_a_row,
                "nonfinite/total": in_all,
            }
            return state, (values, FirstScores(raw.logp_BC, raw.terms.policy_BC, raw.view_weight_BC, raw.counted_BC))

        state, (values_U, scores_U) = jax.lax.scan(iteration, state, (u_U, keys_U, old_logp_UBC, reference_logp_UBC))
        return state, values_U, jax.tree.map(lambda x_U: x_U[0], scores_U)

    return update


def _compared_in_groups(
    scorer: Scorer, config: RlConfig, variables: Variables, rows: Rows, u: Array, key: Array
) -> Rows:
    """The rows with what follows from the current scores of whole groups, in a pass of its own: micro-batches cut groups.

    self_normalized: the advantages times their weights. A relative KL: reference scores that its groups are centred on. Methods without
    either have no such pass.
    """
    batch, counted_BC, group = rows.batch, rows.weight_BC > 0, config.num_generations
    if config.policy_loss.name == "self_normalized":
        logp_BC = _later_logps(scorer, variables, batch, u, key)
        weight_B1 = self_normalized_weights(logp_BC, rows.old_logp_BC, counted_BC, group, config.policy_loss)
        rows = rows._replace(batch=batch._replace(advantage_BC=weight_B1 * batch.advantage_BC))
    if config.kl.name == "loss" and config.kl.level == "relative":
        logp_BC = scorer.logps(variables, batch.rollout, key, batch.advantage_BC)
        centred_BC = relative_to_group(logp_BC, rows.reference_logp_BC, counted_BC, group)
        rows = rows._replace(reference_logp_BC=centred_BC)
    return rows


def _later_logps(scorer: Scorer, variables: Variables, batch: Batch, u: Array, key: Array) -> Array:
    """[B, C]: scores under the masks of inner update u, of the policy that wrote the batch or of the current one; zeros for the first.

    In the first inner update the two are one policy, and what compares them needs no score; a branch saves that pass and keeps one program.
    """
    nothing_BC = jnp.zeros(batch.advantage_BC.shape, jnp.float32)
    return jax.lax.cond(
        u > 0, lambda: scorer.logps(variables, batch.rollout, key, batch.advantage_BC), lambda: nothing_BC
    )
