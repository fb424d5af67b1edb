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

from d1jax.config import RlConfig, SamplerConfig
from d1jax.data.tokenizers import SpecialTokens
from d1jax.models.transformer import Transformer, Variables
from d1jax.rl.likelihood import Batch, Scorer
from d1jax.rl.loss import LEVELS, POOLINGS, exp, preference_terms, token_terms
from d1jax.training.optimizer import TrainState, apply_gradient, bad_updates, gradients, placement

Update = Callable[..., tuple[TrainState, dict[str, Array]]]


class Scored(NamedTuple):
    """What one micro-batch of an inner update needs."""

    batch: Batch
    weight_BC: Array  # pooling weights: they sum the batch, and vanish where no view scores a token
    old_logp_BC: Array
    reference_logp_BC: Array | None


def view_keys(key: Array, inner_updates: int, fresh_masks: bool) -> Array:
    """The key of each inner update's prompt masks: mu different ones, or d1's ablation with one for all."""
    return jax.vmap(lambda u: jax.random.fold_in(key, u))(jnp.arange(inner_updates, dtype=jnp.int32) * fresh_masks)


def make_update(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    config: RlConfig,
    sampler: SamplerConfig,
    special: SpecialTokens,
    state: TrainState,
) -> Update:
    """`update(state, frozen, reference, batch, key, check=False) -> (state, metrics)`; metrics are fp32 arrays [U], one value an
    inner update, and those of the check (see guards.check_start) scalars.

    `state` is an example that says where arrays live. `frozen` holds the collections that are not trained; `reference` the
    whole reference policy ({} without one). Old and reference scores are taken under the same masked views as the policy's:
    the views are a pure function of (key, u, mask id). The old policy is not scored where it is the current one, before the first
    inner update, unless `check` asks for a comparison.
    """
    scorer = Scorer(model, config, sampler, special)
    pairs = config.advantage == "pairs"
    with_reference = pairs or (config.kl_in_loss and config.kl_to == "reference")
    with_old = (config.ratio != "none" and not pairs) or (config.kl_in_loss and config.kl_to == "old")

    def loss(
        trainable: Any, rows: Scored, frozen: Variables, key: Array, first: Array
    ) -> tuple[Array, dict[str, Array]]:
        batch, mask_BC = rows.batch, rows.weight_BC > 0
        views = scorer.views(key, batch)
        scores = scorer.scores({**frozen, **trainable}, batch, views)
        # Before the first inner update the old policy is the current one: its score is this very number, so the ratio is exactly 1.
        # A method without old scores has it there always.
        old_logp_BC = jax.lax.stop_gradient(scores.logp)
        if with_old:
            old_logp_BC = jnp.where(first, old_logp_BC, rows.old_logp_BC)
        if pairs:
            terms = preference_terms(scores.logp, rows.reference_logp_BC, batch.advantage_BC, mask_BC, config)
        else:
            compared_BC = None if not config.kl_in_loss else rows.reference_logp_BC if with_reference else old_logp_BC
            terms = token_terms(
                scores.logp, old_logp_BC, compared_BC, batch.advantage_BC, mask_BC, config, sampler.block_length
            )
        # The mean over the views that score a token, weighted as its score is; 0 where none does.
        weight_BC = jnp.sum(views.weight_NBC, axis=0)
        entropy_BC = scores.entropy / jnp.where(weight_BC > 0, weight_BC, 1.0)
        loss_BC = terms.loss_BC
        if config.entropy_coefficient > 0:  # 0 x entropy would still be differentiated
            loss_BC = loss_BC - config.entropy_coefficient * entropy_BC
        hidden_BP = (views.prompt_NBP[0] != batch.canvas.prompt_BP) & batch.canvas.prompt_mask_BP
        sums = {
            "tokens": mask_BC,
            "scored": mask_BC & (weight_BC > 0),
            "ratio/mean": terms.ratio_BC * mask_BC,
            "ratio/log_square": jnp.log(terms.ratio_BC) ** 2 * mask_BC,
            "kl": terms.kl_BC * mask_BC,
            "entropy": entropy_BC * mask_BC,
            "clip_ratio/low_mean": terms.clipped_low_BC & mask_BC,
            "clip_ratio/high_mean": terms.clipped_high_BC & mask_BC,
            "mask/prompt_hidden": hidden_BP,
            "mask/prompt_tokens": batch.canvas.prompt_mask_BP,
            # A weight of 1 / share carries the rounding of log p with it.
            "check/score_square": ((scores.logp - rows.old_logp_BC) / jnp.maximum(weight_BC, 1.0)) ** 2 * mask_BC,
            "check/zero_advantage_loss": jnp.where(batch.advantage_BC == 0, jnp.abs(terms.policy_BC), 0.0) * mask_BC,
        }
        return jnp.sum(rows.weight_BC * loss_BC), {name: jnp.sum(x, dtype=jnp.float32) for name, x in sums.items()}

    @partial(jax.jit, donate_argnums=0, out_shardings=(placement(state), None))
    def update(
        state: TrainState,
        frozen: Variables,
        reference: Variables,
        batch: Batch,
        key: Array,
        check: Array | bool = False,
    ) -> tuple[TrainState, dict[str, Array]]:
        keys_U = view_keys(key, config.inner_updates, config.fresh_masks)
        behaviour, nothing_BC = {**frozen, **state.trainable}, jnp.zeros(batch.canvas.completion_BC.shape, jnp.float32)
        needed_U = (jnp.arange(config.inner_updates, dtype=jnp.int32) > 0) & with_old | check
        old_logp_UBC = jax.lax.map(
            lambda x: jax.lax.cond(x[1], lambda: scorer.logps(behaviour, batch, x[0]), lambda: nothing_BC),
            (keys_U, needed_U),
        )
        reference_logp_UBC = None
        if with_reference:
            reference_logp_UBC = jax.lax.map(lambda k: scorer.logps(reference, batch, k), keys_U)
        rows_kept = jnp.maximum(jnp.sum(batch.kept_B), 1)

        def inner(
            state: TrainState, xs: tuple[Array, Array, Array, Array | None]
        ) -> tuple[TrainState, dict[str, Array]]:
            u, key, old_logp_BC, reference_logp_BC = xs
            counted_BC = scorer.counted_BC(key, batch).astype(jnp.float32)
            weight_BC = POOLINGS[config.pooling](counted_BC, rows_kept, config.group_size)
            rows = Scored(batch, weight_BC, old_logp_BC, reference_logp_BC)
            value, sums, gradient = gradients(
                lambda t, r: loss(t, r, frozen, key, u == 0), state.trainable, rows, config.micro_batches
            )
            state = apply_gradient(optimizer, state, gradient, value)
            in_a_row, in_all = bad_updates(state.optimizer)
            counts = {"nonfinite/in_a_row": in_a_row, "nonfinite/total": in_all}
            return state, {**summarize(sums), "loss": value, "grad_norm": optax.tree.norm(gradient), **counts}

        xs = (jnp.arange(config.inner_updates, dtype=jnp.int32), keys_U, old_logp_UBC, reference_logp_UBC)
        state, metrics = jax.lax.scan(inner, state, xs)
        text_BC = scorer.text_BC(batch) & batch.kept_B[:, None]
        return state, metrics | masks_alone(old_logp_UBC, text_BC, config, sampler.block_length)

    return update


def summarize(sums: dict[str, Array]) -> dict[str, Array]:
    """Sums over tokens -> means over tokens, under TRL's names. The entropy is that of the tokens that some view scores."""
    tokens = jnp.maximum(sums["tokens"], 1)
    means = {name: sums[name] / tokens for name in ("ratio/mean", "kl", "clip_ratio/low_mean", "clip_ratio/high_mean")}
    return {
        **means,
        "ratio/mean": jnp.where(
            sums["tokens"] > 0, means["ratio/mean"], 1.0
        ),  # of nothing, e.g. when no completion was right
        "entropy": sums["entropy"] / jnp.maximum(sums["scored"], 1),
        "ratio/log_rms": jnp.sqrt(sums["ratio/log_square"] / tokens),
        "clip_ratio/region_mean": means["clip_ratio/low_mean"] + means["clip_ratio/high_mean"],
        "mask/prompt_frac": sums["mask/prompt_hidden"] / jnp.maximum(sums["mask/prompt_tokens"], 1),
        "check/tokens": sums["tokens"],
        "check/score_rms": jnp.sqrt(sums["check/score_square"] / tokens),
        "check/zero_advantage_loss": sums["check/zero_advantage_loss"],
    }


def masks_alone(old_logp_UBC: Array, text_BC: Array, config: RlConfig, block_length: int) -> dict[str, Array]:
    """How far apart the scores of one policy are under two plans, at the level of config.ratio, and the share of tokens that this
    alone would clip: what a method would see whose policy and old policy do not share their masks. 0 where there is one plan only.
    """
    apart_BC = LEVELS[config.ratio]((old_logp_UBC[-1] - old_logp_UBC[0]) * text_BC, text_BC, block_length) * text_BC
    ratio_BC, tokens = exp(apart_BC), jnp.maximum(jnp.sum(text_BC), 1)
    outside_BC = (ratio_BC < 1 - config.clip_low) | (ratio_BC > 1 + config.clip_high)
    return {
        "check/masks_alone_log_rms": jnp.sqrt(jnp.sum(apart_BC**2) / tokens),
        "check/masks_alone_clipped": jnp.sum(outside_BC & text_BC) / tokens,
    }
