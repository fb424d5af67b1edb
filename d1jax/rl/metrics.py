"""What an RL update reports, under TRL's names where it has one.

U inner updates, B rows, C completion columns, P prompt columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from d1jax.config import RlConfig
from d1jax.rl.loss import TokenTerms


class Raw(NamedTuple):
    """What the loss of one inner update leaves behind, unreduced."""

    terms: TokenTerms
    logp_BC: Array
    entropy_BC: Array  # of the predictions, weighted over views as the scores are
    view_weight_BC: Array  # sum over views of the weights of a position; 0 where none scores it
    counted_BC: Array  # the tokens that the loss is over
    prompt_masked_BP: Array
    prompt_BP: Array  # where the prompt's tokens are


def of_iteration(raw: Raw) -> dict[str, Array]:
    """Means over the tokens of a batch, fp32 scalars. The entropy is that of the tokens that some view scores."""
    tokens = jnp.sum(raw.counted_BC, dtype=jnp.float32)
    terms = raw.terms

    def mean(x_BC: Array) -> Array:
        return jnp.sum(x_BC * raw.counted_BC, dtype=jnp.float32) / jnp.maximum(tokens, 1)

    scored_BC = raw.counted_BC & (raw.view_weight_BC > 0)
    entropy_BC = raw.entropy_BC / jnp.where(raw.view_weight_BC > 0, raw.view_weight_BC, 1.0)
    low, high = mean(terms.clipped_low_BC), mean(terms.clipped_high_BC)
    prompt_tokens = jnp.sum(raw.prompt_BP, dtype=jnp.float32)
    return {
        "ratio/mean": jnp.where(tokens > 0, mean(terms.ratio_BC), 1.0),  # of nothing, where no token is scored
        "ratio/log_rms": jnp.sqrt(mean(jnp.log(terms.ratio_BC) ** 2)),
        "kl": mean(terms.kl_BC),
        "entropy": jnp.sum(entropy_BC * scored_BC, dtype=jnp.float32) / jnp.maximum(jnp.sum(scored_BC), 1),
        "clip_ratio/low_mean": low,
        "clip_ratio/high_mean": high,
        "clip_ratio/region_mean": low + high,
        "mask/prompt_frac": jnp.sum(raw.prompt_masked_BP, dtype=jnp.float32) / jnp.maximum(prompt_tokens, 1),
    }


def of_both(of_policy: Mapping[str, float], of_values: Mapping[str, float]) -> dict[str, float]:
    """The metrics of the policy's update and of the value model's ({} without one); an update that either skipped counts."""
    skipped = {name: max(of_policy[name], of_values.get(name, 0)) for name in ("nonfinite/in_a_row", "nonfinite/total")}
    return {**of_policy, **of_values, **skipped}


def of_update(inner: Mapping[str, np.ndarray], config: RlConfig) -> dict[str, float]:
    """Means over the inner updates; the first ratio by itself, because it must be exactly 1."""
    values = {name: float(value.mean()) for name, value in inner.items() if not name.startswith("nonfinite/")}
    if config.kl.name != "loss":
        del values["kl"]
    values["ratio/first"] = float(inner["ratio/mean"][0])
    return values | {
        "nonfinite/in_a_row": int(inner["nonfinite/in_a_row"][-1]),
        "nonfinite/total": int(inner["nonfinite/total"][-1]),
    }
