"""Adapters as a second variable collection: what is trained, what is frozen, and how an adapter is merged.

`Dense` in transformer.py applies them; here are the pure functions on trees around it. Without dropout: a dropped adapter
would make the ratio of the first inner update differ from 1 (d1 trains with 0.05 and has that defect).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
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


def merge(variables: Variables, lora: LoraConfig) -> Variables:
    """{"params": W + A B alpha / r} without the adapter collection; the sum is made in fp32 and stored as W was."""
    if "lora" not in variables:
        return dict(variables)
    params, adapters = variables["params"], variables["lora"]["blocks"]
    blocks = {
        name: {**layer, "kernel": _merged(layer["kernel"], adapters[name], lora)} if name in adapters else layer
        for name, layer in params["blocks"].items()
    }
    return {"params": {**params, "blocks": blocks}}


def merge_each(
    arrays: Iterable[tuple[Path, Array]], adapters: Mapping[str, Any], lora: LoraConfig
) -> Iterator[tuple[Path, Array]]:
    """The same for (path in the parameter tree, array) pairs, one after the other, so that not all of them need be in memory."""
    blocks = adapters["blocks"]
    for path, array in arrays:
        adapted = path[0] == "blocks" and path[1] in blocks and path[2] == "kernel"
        yield path, _merged(array, blocks[path[1]], lora) if adapted else array


def side_by_side(adapters: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One adapter that does what these do together: [A1 A2 ...] and [B1; B2; ...], for a scale of the same alpha / rank."""

    def joined(keys: tuple[Any, ...], *parts: Array) -> Array:
        rank_axis = 2 if keys[-1].key == "a" else 1  # a [L, in, r], b [L, r, out]
        return jnp.concatenate(parts, axis=rank_axis)

    return jax.tree_util.tree_map_with_path(joined, *adapters)


@partial(jax.jit, static_argnums=2)
def _merged(kernel_Lio: Array, adapter: Mapping[str, Array], lora: LoraConfig) -> Array:
    def layer(inputs: tuple[Array, Array, Array]) -> Array:
        kernel_io, a_ir, b_ro = inputs
        delta_io = jnp.matmul(a_ir, b_ro, precision="highest") * (lora.alpha / lora.rank)
        return (kernel_io.astype(jnp.float32) + delta_io).astype(kernel_io.dtype)

    # Layer by layer: in fp32 all of them would take twice the room of the kernel itself.
    return jax.lax.map(layer, (kernel_Lio, adapter["a"], adapter["b"]))


def parameter_table(variables: Variables) -> list[tuple[str, tuple[int, ...], int]]:
    """(path, shape, count) of every array, for the log line that says what is trained."""
    leaves = jax.tree_util.tree_flatten_with_path(variables)[0]
    return [("/".join(str(k.key) for k in path), leaf.shape, leaf.size) for path, leaf in leaves]
