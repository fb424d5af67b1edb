"""One stage on plain text, top to bottom: masked diffusion on packed windows, or next tokens where the model's mask is causal.

Source: DiffuLLaMA, arXiv 2410.17891, for the mask that goes from causal to full; Dream, arXiv 2508.15487, for opening it at once.

B windows of an update, T tokens of a window.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from d1jax.adapt.bits import bits_per_byte
from d1jax.adapt.loss import Masked, corrupt, next_tokens, weighted_loss
from d1jax.adapt.order import order_on_text
from d1jax.config import AdaptConfig
from d1jax.models import sharding
from d1jax.models.attention import annealed
from d1jax.models.transformer import Transformer, Variables
from d1jax.training.context import Context
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
from d1jax.training.setup import split, trained_table, with_adapter
from d1jax.training.stage_log import StageLog


def train(context: Context, start: Variables, log: StageLog) -> Variables:
    """Runs (or continues, or finds finished) the stage; returns its last weights, an adapter beside what it was trained on."""
    config = context.config.adapt
    trainable, frozen = split(with_adapter(context, start, log.stage))
    trained_table(trainable, frozen, config.optimizer, log.note)
    log.note(
        f"{config.steps} updates of {config.batch_size} windows of {config.length} tokens: {config.tokens:,} tokens"
    )
    optimizer = make_optimizer(config.optimizer, config.steps)
    schedule = make_schedule(config.optimizer, config.steps)
    state = new_state(optimizer, trainable, context.mesh, config.optimizer.offload)
    update = make_update(context.model, optimizer, config, context.tokenizer.special.mask, state)
    items, first = log.resume({"trainable": state.trainable, "optimizer": state.optimizer})
    state = TrainState(items["trainable"], items["optimizer"])

    batches = context.texts.batches(log.stream_at(first) if config.streaming else None)
    for step in range(first, config.steps):
        # -- the batch, and how much of the causal mask is opened by now
        tokens_BT = sharding.shard_batch(context.mesh, batches.take(step))
        share = opened(config, step)

        # -- the update
        key = jax.random.fold_in(context.key(log.stage), step)
        state, metrics = update(state, frozen, tokens_BT, key, share)
        values = {
            **metrics,
            "learning_rate": float(schedule(step)),
            "tokens": (step + 1) * config.batch_size * config.length,
        }
        values["mask/opened"] = (
            float(context.model.config.attention_mask != "causal") if share is None else float(share)
        )

        # -- what is left behind
        every = context.config.evaluation.every
        if every and (step + 1) % every == 0:
            values |= watch(context, {**frozen, **state.trainable})
        log.log_metrics(step + 1, values, watch=("loss", "grad_norm"))
        saved = {"trainable": state.trainable, "optimizer": state.optimizer}
        log.save_checkpoint(step + 1, saved, lambda: batches.state)
    return {**frozen, **state.trainable}


def opened(config: AdaptConfig, step: int) -> np.ndarray | None:
    """The share of the later columns that is open in an update: 1 / anneal_steps in the first, all (None) from `anneal_steps` on."""
    if step + 1 >= config.anneal_steps:
        return None
    return np.float32((step + 1) / config.anneal_steps)


def make_update(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    config: AdaptConfig,
    mask_id: int,
    state: TrainState,
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """The compiled step: `update(state, frozen, tokens_BT, key, share) -> (state, metrics)`. share: of the columns that the causal mask
    hides, how many are open (None: the model's own mask).
    """
    causal = model.config.attention_mask == "causal"

    @compiled_update(state)
    def update(
        state: TrainState, frozen: Variables, tokens_BT: Array, key: Array, share: Array | None
    ) -> tuple[TrainState, dict[str, Array]]:
        windows = next_tokens(tokens_BT) if causal else corrupt(key, tokens_BT, config, mask_id)
        visible_1TT = None if share is None else annealed(jax.random.fold_in(key, 1), tokens_BT.shape[1], share)

        def loss(trainable: Any, rows: Masked) -> tuple[Array, Array]:
            return weighted_loss(model, {**frozen, **trainable}, rows, visible_1TT)

        value, logp_BC, gradient = gradients(loss, state.trainable, windows, config.grad_accumulation_steps)
        state = apply_gradient(optimizer, state, gradient, value)
        in_a_row, in_all = bad_updates(state.optimizer)
        masked_BC = windows.weight_BT[:, 1:] > 0
        return state, {
            "loss": value,
            "nll": -jnp.sum(jnp.where(masked_BC, logp_BC, 0.0)) / jnp.maximum(jnp.sum(masked_BC), 1),
            "grad_norm": optax.tree.norm(gradient),
            "mask/frac": jnp.mean(masked_BC, dtype=jnp.float32),
            "nonfinite/in_a_row": in_a_row,
            "nonfinite/total": in_all,
        }

    return update


def watch(context: Context, variables: Variables) -> dict[str, float]:
    """validation/NAME/bits_per_byte of every validation set, its standard error, and local_ar_1 and global_ar_1 of its decoding."""
    found = {}
    for name, value in measured(context, variables).items():
        found[f"validation/{name}/bits_per_byte"] = value["bits_per_byte"]
        found[f"validation/{name}/error"] = value["error"]
        for measure in ("local_ar", "global_ar"):
            if "1" in value.get("order", {}).get(measure, {}):
                found[f"validation/{name}/{measure}_1"] = value["order"][measure]["1"]
    return found


def measured(context: Context, variables: Variables, causal: bool = False) -> dict[str, dict[str, Any]]:
    """{name of a validation set: bits per byte, its standard error, windows, samples, "order": of its decoding}; `causal`: as the
    autoregressive model that these weights are of, whatever they are to become. Such a model has no order but one.
    """
    config, model = context.config.adapt, context.model
    if causal:
        was = dataclasses.replace(model.config, attention_mask="causal", mask_block=0, alignment="shifted")
        model = Transformer(was, model.lora)
    found = {
        name: bits_per_byte(
            model, variables, windows, context.mesh, config.batch_size, context.tokenizer.special.mask,
            config.validation_samples, context.key("validation"),
        )._asdict()
        for name, windows in context.texts.validation.items()
    }  # fmt: skip
    if config.order_windows and model.config.attention_mask != "causal":
        for name, windows in context.texts.validation.items():
            found[name]["order"] = order_on_text(context, variables, windows, config.order_windows)
    return found
