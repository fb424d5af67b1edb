"""The compiled inner loop of every method: score old and reference, then mu optimizer updates, in one donated function.

U inner updates (mu), B rows, C completion columns, P prompt columns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from optax.microbatching import AccumulationType

from d1jax.config import RlConfig, SamplerConfig
from d1jax.data.tokenizers import SpecialTokens
from d1jax.diffusion.canvas import Canvas, through_first_end
from d1jax.diffusion.estimators import views_of
from d1jax.diffusion.likelihood import Views, score
from d1jax.models.transformer import Transformer, Variables
from d1jax.rl.objective import POOLINGS, token_terms
from d1jax.runtime.optimizer import TrainState, apply_gradient, bad_updates, gradients, over_micro_batches, placement

Update = Callable[[TrainState, Variables, Variables, "Batch", Array], tuple[TrainState, dict[str, Array]]]


class Batch(NamedTuple):
    """A rollout batch; every array has a row axis."""

    canvas: Canvas
    mask_ids_B: Array  # rows of equal id meet equal masks
    reveal_step_BC: Array
    advantage_B: Array


class Scored(NamedTuple):
    """What one micro-batch of an inner update needs."""

    batch: Batch
    weight_BC: Array  # pooling weights: they sum the batch, and vanish where no view scores a token
    old_logp_BC: Array
    reference_logp_BC: Array | None


def view_keys(key: Array, inner_updates: int, fresh_masks: bool) -> Array:
    """The key of each inner update's prompt masks: mu different ones, or d1's ablation with one for all."""
    return jax.vmap(lambda u: jax.random.fold_in(key, u))(jnp.arange(inner_updates) * fresh_masks)


def make_update(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    config: RlConfig,
    sampler: SamplerConfig,
    special: SpecialTokens,
    state: TrainState,
) -> Update:
    """`update(state, frozen, reference, batch, key) -> (state, metrics)`; metrics are fp32 arrays [U], one value an inner update.

    `state` is an example that says where arrays live. `frozen` holds the collections that are not trained; `reference` the
    whole reference policy ({} without KL). Old and reference scores are taken under the same masked views as the policy's:
    the views are a pure function of (key, u, mask id).
    """
    with_kl = config.kl_coefficient > 0
    with_reference = with_kl and config.kl_to == "reference"
    with_old = config.ratio != "none" or (with_kl and config.kl_to == "old")

    def plan(key: Array, batch: Batch) -> Views:
        return views_of(
            key, batch.canvas, batch.mask_ids_B, batch.reveal_step_BC,
            estimator=config.estimator, sampler=sampler, special=special, prompt_mask=config.prompt_mask,
        )  # fmt: skip

    def logps(variables: Variables, batch: Batch, key: Array) -> Array:
        def score_rows(variables: Variables, batch: Batch) -> Array:
            return score(model, variables, batch.canvas, plan(key, batch)).logp

        return over_micro_batches(score_rows, 1, batch, config.micro_batches, AccumulationType.CONCAT)(variables, batch)

    def loss(
        trainable: Any, rows: Scored, frozen: Variables, key: Array, first: Array
    ) -> tuple[Array, dict[str, Array]]:
        views = plan(key, rows.batch)
        scores = score(model, {**frozen, **trainable}, rows.batch.canvas, views)
        # Before the first inner update the old policy is the current one: its score is this very number, so the ratio is exactly 1.
        # A method without old scores has it there always.
        old_logp_BC = jax.lax.stop_gradient(scores.logp)
        if with_old:
            old_logp_BC = jnp.where(first, old_logp_BC, rows.old_logp_BC)
        compared_BC = rows.reference_logp_BC if with_reference else old_logp_BC if with_kl else None
        mask_BC = rows.weight_BC > 0
        terms = token_terms(
            scores.logp, old_logp_BC, compared_BC, rows.batch.advantage_B, mask_BC, config, sampler.block_length
        )
        hidden_BP = (views.prompt_NBP[0] != rows.batch.canvas.prompt_BP) & rows.batch.canvas.prompt_mask_BP
        sums = {
            "tokens": mask_BC,
            "ratio/mean": terms.ratio_BC * mask_BC,
            "ratio/log_square": (scores.logp - old_logp_BC) ** 2 * mask_BC,
            "kl": terms.kl_BC * mask_BC,
            "entropy": scores.entropy * mask_BC,
            "clip_ratio/low_mean": terms.clipped_low_BC & mask_BC,
            "clip_ratio/high_mean": terms.clipped_high_BC & mask_BC,
            "mask/prompt_hidden": hidden_BP,
            "mask/prompt_tokens": rows.batch.canvas.prompt_mask_BP,
        }
        return jnp.sum(rows.weight_BC * terms.loss_BC), {
            name: jnp.sum(x, dtype=jnp.float32) for name, x in sums.items()
        }

    @partial(jax.jit, donate_argnums=0, out_shardings=(placement(state), None))
    def update(
        state: TrainState, frozen: Variables, reference: Variables, batch: Batch, key: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        keys_U = view_keys(key, config.inner_updates, config.fresh_masks)
        behaviour = {**frozen, **state.trainable}
        unused_1BC = jnp.zeros((1, *batch.canvas.completion_BC.shape), jnp.float32)
        if with_old:
            later_UBC = jax.lax.map(lambda k: logps(behaviour, batch, k), keys_U[1:])
        else:  # never read
            later_UBC = jnp.zeros((config.inner_updates - 1, *unused_1BC.shape[1:]), jnp.float32)
        old_logp_UBC = jnp.concatenate([unused_1BC, later_UBC])
        reference_logp_UBC = jax.lax.map(lambda k: logps(reference, batch, k), keys_U) if with_reference else None
        text_BC = through_first_end(batch.canvas.completion_BC, special.end)

        def inner(
            state: TrainState, xs: tuple[Array, Array, Array, Array | None]
        ) -> tuple[TrainState, dict[str, Array]]:
            u, key, old_logp_BC, reference_logp_BC = xs
            counted_BC = text_BC
            if config.estimator.weight == "uniform":  # a mean of scores: tokens that no view masks have none
                counted_BC = text_BC & jnp.any(plan(key, batch).weight_NBC > 0, axis=0)
            weight_BC = POOLINGS[config.pooling](counted_BC.astype(jnp.float32))
            rows = Scored(batch, weight_BC, old_logp_BC, reference_logp_BC)
            value, sums, gradient = gradients(
                lambda t, r: loss(t, r, frozen, key, u == 0), state.trainable, rows, config.micro_batches
            )
            state = apply_gradient(optimizer, state, gradient, value)
            in_a_row, in_all = bad_updates(state.optimizer)
            counts = {"nonfinite/in_a_row": in_a_row, "nonfinite/total": in_all}
            return state, {**summarize(sums), "loss": value, "grad_norm": optax.tree.norm(gradient), **counts}

        return jax.lax.scan(inner, state, (jnp.arange(config.inner_updates), keys_U, old_logp_UBC, reference_logp_UBC))

    return update


def summarize(sums: dict[str, Array]) -> dict[str, Array]:
    """Sums over tokens -> means over tokens, under TRL's names."""
    tokens = jnp.maximum(sums["tokens"], 1)
    means = {
        name: sums[name] / tokens
        for name in ("ratio/mean", "kl", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean")
    }
    return {
        **means,
        "ratio/log_rms": jnp.sqrt(sums["ratio/log_square"] / tokens),
        "clip_ratio/region_mean": means["clip_ratio/low_mean"] + means["clip_ratio/high_mean"],
        "mask/prompt_frac": sums["mask/prompt_hidden"] / jnp.maximum(sums["mask/prompt_tokens"], 1),
    }
