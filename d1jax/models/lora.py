"""Adapters as a second variable collection: what is trained, what is frozen, and how an adapter is merged.

`Dense` in transformer.py applies them; here are the pure functions on trees around it. Without dropout: a dropped adapter
would make the ratio of the first inner update differ from 1 (d1 trains with 0.05 and has that defect).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from d1jax.config import LoraConfig, UserError
from d1jax.models.transformer import Variables

Path = tuple[str, ...]
ATTENTION = ("q_proj", "k_proj", "v_proj", "attn_out")


def check_targets(params: Mapping[str, Any], lora: LoraConfig) -> None:
    """Every target must be a linear layer of a block; the vocabulary head is not in a block, so its namesake cannot match. Where blocks
    have experts, only the projections of the attention are adapted."""
    linear = sorted(name for name, leaf in params["blocks"].items() if "kernel" in leaf)
    if "router" in params["blocks"]:
        linear = [name for name in linear if name in ATTENTION]
        if set(lora.targets) - set(linear):
            named = ", ".join(ATTENTION)
            raise UserError(
                f"config: lora.targets = {sorted(set(lora.targets) - set(linear))}: this model has a mixture of experts, whose router and "
                f"projections are not adapted; set lora.targets to [{named}], or lora.rank = 0 to train all weights"
            )
    unknown = sorted(set(lora.targets) - set(linear))
    if unknown:
        raise UserError(
            f"config: lora.targets = {unknown} match no linear layer of a block; choices: {', '.join(linear)}"
        )


@dataclass
class Rounding:
    """How much of an adapter's effect D = A B alpha / r is left after the merged weights were cast to the dtype of the base."""

    kept: float = 0.0  # sum of (stored(W + D) - stored(W)) x D
    whole: float = 0.0  # sum of D x D

    @property
    def share(self) -> float:
        """1: nothing is lost; 0: rounding leaves the weights as they were. 1 for an adapter that does nothing."""
        return self.kept / self.whole if self.whole > 0 else 1.0


def merge(variables: Variables, lora: LoraConfig, dtype: Any = None, rounding: Rounding | None = None) -> Variables:
    """{"params": W + A B alpha / r} without the adapter collection; the sum is made in fp32, then all is cast to `dtype` (None: as W was).

    A cast to bf16 rounds away what of the adapter is small beside the weights, so nothing is merged but for an export, and for
    another run that starts from this one. What it keeps is added to `rounding`.
    """
    if "lora" not in variables:
        return {"params": jax.tree.map(lambda x: x.astype(dtype or x.dtype), variables["params"])}
    leaves, tree = jax.tree_util.tree_flatten_with_path(variables["params"])
    arrays = ((tuple(key.key for key in path), leaf) for path, leaf in leaves)
    merged = merge_each(arrays, variables["lora"], lora, rounding or Rounding(), dtype)
    return {"params": jax.tree.unflatten(tree, [array for _, array in merged])}


def merge_each(
    arrays: Iterable[tuple[Path, Array]],
    adapters: Mapping[str, Any],
    lora: LoraConfig,
    rounding: Rounding,
    dtype: Any = None,
) -> Iterator[tuple[Path, Array]]:
    """`merge` for (path in the parameter tree, array) pairs, one after the other, so that not all of them need be in memory.

    Each array is cast once, after the sum: a base that was rounded before would not feel a small adapter at all.
    """
    for path, array in arrays:
        stored = jnp.dtype(dtype or array.dtype)
        blocks = adapters.get(path[0], {})
        if len(path) == 3 and path[1] in blocks and path[2] == "kernel":
            merged = _merged(array, blocks[path[1]], lora, stored.name)
            products_2L = np.asarray(_kept_and_whole(merged, array.astype(stored), blocks[path[1]], lora), np.float64)
            rounding.kept += products_2L[0].sum()
            rounding.whole += products_2L[1].sum()
            yield path, merged
        else:
            yield path, array.astype(stored)


def warn_of_rounding(rounding: Rounding, dtype: str, cure: str) -> None:
    """Warns where the merged weights hold less than 99 % of what the adapter does."""
    if rounding.share < 0.99:
        warnings.warn(
            f"merged into {dtype} weights, {rounding.share:.0%} of the adapter's effect is left; {cure}", stacklevel=2
        )


def _delta(a_ir: Array, b_ro: Array, lora: LoraConfig) -> Array:
    return jnp.matmul(a_ir, b_ro, precision="highest") * (lora.alpha / lora.rank)


@partial(jax.jit, static_argnums=(2, 3))
def _merged(kernel_Lio: Array, adapter: Mapping[str, Array], lora: LoraConfig, dtype: str) -> Array:
    def layer(inputs: tuple[Array, Array, Array]) -> Array:
        kernel_io, a_ir, b_ro = inputs
        return (kernel_io.astype(jnp.float32) + _delta(a_ir, b_ro, lora)).astype(dtype)

    # Layer by layer: in fp32 all of them would take twice the room of the kernel itself.
    return jax.lax.map(layer, (kernel_Lio, adapter["a"], adapter["b"]))


@partial(jax.jit, static_argnums=3)
def _kept_and_whole(merged_Lio: Array, kernel_Lio: Array, adapter: Mapping[str, Array], lora: LoraConfig) -> Array:
    """[2, L]: of each layer the sums of (merged - kernel) x delta and of delta x delta, both in the dtype that is stored."""

    def layer(inputs: tuple[Array, Array, Array, Array]) -> Array:
        merged_io, kernel_io, a_ir, b_ro = inputs
        delta_io = _delta(a_ir, b_ro, lora)
        change_io = merged_io.astype(jnp.float32) - kernel_io.astype(jnp.float32)
        return jnp.stack([jnp.sum(change_io * delta_io), jnp.sum(delta_io * delta_io)])

    return jax.lax.map(layer, (merged_Lio, kernel_Lio, adapter["a"], adapter["b"])).T


def parameter_table(variables: Variables) -> list[tuple[str, tuple[int, ...], int]]:
    """(path, shape, count) of every array, for the log line that says what is trained."""
    leaves = jax.tree_util.tree_flatten_with_path(variables)[0]
    return [("/".join(str(k.key) for k in path), leaf.shape, leaf.size) for path, leaf in leaves]
