"""Adapters as a second variable collection: what is trained, what is frozen, and how an adapter is merged.

`Dense` in transformer.py applies them; here are the pure functions on trees around it. Without dropout: a dropped adapter
would make the ratio of the first inner update differ from 1 (d1 trains with 0.05 and has that defect).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from d1jax.config import ConfigError, LoraConfig
from d1jax.models.transformer import Variables

Path = tuple[str, ...]


def check_targets(params: Mapping[str, Any], lora: LoraConfig) -> None:
    """Every target must be a linear layer of a block; the vocabulary head is not in a block, so its namesake cannot match."""
    linear = sorted(name for name, leaf in params["blocks"].items() if "kernel" in leaf)
    unknown = sorted(set(lora.targets) - set(linear))
    if unknown:
        raise ConfigError(
            f"config: lora.targets = {unknown} match no linear layer of a block; choices: {', '.join(linear)}"
        )


def merge(variables: Variables, lora: LoraConfig, dtype: Any = None) -> Variables:
    """{"params": W + A B alpha / r} without the adapter collection; the sum is made in fp32, then all is cast to `dtype` (None: as W was).

    A cast to bf16 rounds away what of the adapter is small beside the weights, so nothing is merged but for an export, and for
    another run that starts from this one.
    """
    if "lora" not in variables:
        return {"params": jax.tree.map(lambda x: x.astype(dtype or x.dtype), variables["params"])}
    params, adapters = variables["params"], variables["lora"]["blocks"]
    blocks = {
        name: {**layer, "kernel": _merged(layer["kernel"], adapters[name], lora, dtype)} if name in adapters else layer
        for name, layer in params["blocks"].items()
    }
    return {"params": jax.tree.map(lambda x: x.astype(dtype or x.dtype), {**params, "blocks": blocks})}


@dataclass
class Rounding:
    """How much of an adapter's effect D = A B alpha / r is left after the merged weights were cast to the dtype of the base."""

    kept: float = 0.0  # sum of (stored - W) x D
    whole: float = 0.0  # sum of D x D

    @property
    def share(self) -> float:
        """1: nothing is lost; 0: rounding leaves the weights as they were. 1 for an adapter that does nothing."""
        return self.kept / self.whole if self.whole > 0 else 1.0


def merge_each(
    arrays: Iterable[tuple[Path, Array]], adapters: Mapping[str, Any], lora: LoraConfig, rounding: Rounding
) -> Iterator[tuple[Path, Array]]:
    """`merge` for (path in the parameter tree, array) pairs, one after the other, so that not all of them need be in memory.

    Adds to `rounding` what the cast to the dtype of each array keeps.
    """
    blocks = adapters["blocks"]
    for path, array in arrays:
        if path[0] == "blocks" and path[1] in blocks and path[2] == "kernel":
            merged = _merged(array, blocks[path[1]], lora)
            products_2L = np.asarray(_kept_and_whole(merged, array, blocks[path[1]], lora), np.float64)
            rounding.kept += products_2L[0].sum()
            rounding.whole += products_2L[1].sum()
            array = merged
        yield path, array


def _delta(a_ir: Array, b_ro: Array, lora: LoraConfig) -> Array:
    return jnp.matmul(a_ir, b_ro, precision="highest") * (lora.alpha / lora.rank)


@partial(jax.jit, static_argnums=(2, 3))
def _merged(kernel_Lio: Array, adapter: Mapping[str, Array], lora: LoraConfig, dtype: Any = None) -> Array:
    def layer(inputs: tuple[Array, Array, Array]) -> Array:
        kernel_io, a_ir, b_ro = inputs
        return (kernel_io.astype(jnp.float32) + _delta(a_ir, b_ro, lora)).astype(dtype or kernel_io.dtype)

    # Layer by layer: in fp32 all of them would take twice the room of the kernel itself.
    return jax.lax.map(layer, (kernel_Lio, adapter["a"], adapter["b"]))


@partial(jax.jit, static_argnums=3)
def _kept_and_whole(merged_Lio: Array, kernel_Lio: Array, adapter: Mapping[str, Array], lora: LoraConfig) -> Array:
    """[2, L]: of each layer the sums of (merged - kernel) x delta and of delta x delta."""

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
