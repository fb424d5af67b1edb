"""Pure, invertible name maps between published checkpoints and d1jax's parameter tree.

A linear weight is [out, in] in PyTorch and [in, out] here; the layers of a block are stacked on a leading axis [L, ...].
The map is a list of entries, one an array of ours. Loading and saving go through it entry by entry, so that a large model is
never held twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from d1jax.config import ModelConfig, UserError
from d1jax.models.families import FAMILIES, Family

MANY_LAYERS = 1000  # up to here names are made first and compared then, which says more


class Entry(NamedTuple):
    """One array of the parameter tree and the published tensors that it is made of."""

    path: tuple[str, ...]
    names: tuple[str, ...]  # one a layer, or a single one
    shape: tuple[int, ...]  # of each published tensor
    transposed: bool

    @property
    def stacked(self) -> bool:
        return self.path[0] == "blocks"


def entries(config: ModelConfig, family: Family) -> list[Entry]:
    """Every array of a model with this architecture, the largest first (then the last ones need little room beside the rest)."""
    names, head_size = family.names, config.width // config.heads
    width, hidden, kv_width = config.width, config.mlp_width, config.kv_heads * head_size
    linear = {
        "q_proj": (width, width), "k_proj": (kv_width, width), "v_proj": (kv_width, width), "attn_out": (width, width),
        "ff_proj": (hidden, width), "up_proj": (hidden, width), "ff_out": (width, hidden),
    }  # fmt: skip

    def layer_names(module: str, kind: str) -> tuple[str, ...]:
        name = f"{names.block}.{names.layer[module]}.{kind}"
        return tuple(name.format(layer=layer) for layer in range(config.layers))

    made = [
        Entry(("wte",), (f"{names.embedding}.weight",), (config.vocab_size, width), False),
        Entry(("ln_f", "scale"), (f"{names.final_norm}.weight",), (width,), False),
    ]
    if not config.tied_head:
        made.append(Entry(("ff_out",), (f"{names.head}.weight",), (config.vocab_size, width), True))
    for module in ("attn_norm", "ff_norm"):
        made.append(Entry(("blocks", module, "scale"), layer_names(module, "weight"), (width,), False))
    for module, shape in linear.items():
        made.append(Entry(("blocks", module, "kernel"), layer_names(module, "weight"), shape, True))
        if config.qkv_bias and module in ("q_proj", "k_proj", "v_proj"):
            made.append(Entry(("blocks", module, "bias"), layer_names(module, "bias"), shape[:1], False))
    return sorted(made, key=lambda entry: -len(entry.names) * math.prod(entry.shape))


def expected_shapes(config: ModelConfig, family: Family) -> dict[str, tuple[int, ...]]:
    """{published tensor name: shape} of a checkpoint with this architecture."""
    return {name: entry.shape for entry in entries(config, family) for name in entry.names}


def to_ours(entry: Entry, tensors: Sequence[Array]) -> Array:
    """The array of the tree, from its published tensors in the order of `entry.names`. Pure, so it can be compiled."""
    turned = [tensor.T if entry.transposed else tensor for tensor in tensors]
    return jnp.stack(turned) if entry.stacked else turned[0]


def our_shape(entry: Entry) -> tuple[int, ...]:
    """The shape of the array that `to_ours` makes."""
    shape = entry.shape[::-1] if entry.transposed else entry.shape
    return (len(entry.names), *shape) if entry.stacked else shape


def to_theirs(entry: Entry, array: Array, index: int) -> Array:
    """Published tensor `entry.names[index]`: the inverse of `to_ours`, bit for bit."""
    tensor = array[index] if entry.stacked else array
    return tensor.T if entry.transposed else tensor


def from_published(tensors: Mapping[str, Any], config: ModelConfig, family: Family) -> dict[str, Any]:
    """A whole state dict -> {"params": ...}. Raises UserError as `check_tensors` does."""
    check_tensors({name: tuple(tensor.shape) for name, tensor in tensors.items()}, config, family, "state dict")
    return as_tree(
        (entry.path, to_ours(entry, [jnp.asarray(tensors[name], tensors[name].dtype) for name in entry.names]))
        for entry in entries(config, family)
    )


def to_published(variables: Mapping[str, Any], config: ModelConfig, family: Family) -> dict[str, Array]:
    """The inverse of `from_published`, bit for bit."""
    made = {}
    for entry in entries(config, family):
        array = leaf(variables, entry.path)
        made |= {name: to_theirs(entry, array, index) for index, name in enumerate(entry.names)}
    return made


def as_tree(leaves: Iterable[tuple[tuple[str, ...], Array]]) -> dict[str, Any]:
    """{"params": the tree with these leaves}."""
    tree: dict[str, Any] = {}
    for path, array in leaves:
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = array
    return {"params": tree}


def leaf(variables: Mapping[str, Any], path: tuple[str, ...]) -> Array:
    node: Any = variables["params"]
    for key in path:
        node = node[key]
    return node


def check_tensors(found: Mapping[str, tuple[int, ...]], config: ModelConfig, family: Family, where: str) -> None:
    """Raises UserError that names the tensors that are missing, not expected, or of another shape than config.json says."""
    if config.layers > max(len(found), MANY_LAYERS):  # before as many names are made
        raise UserError(
            f"{where}: config.json says {family.fields['layers']} = {config.layers}, but there are only {len(found)} tensors"
        )
    expected = expected_shapes(config, family)
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    problems = []
    if missing:
        problems.append(f"missing tensors: {_some(missing)}")
    if unexpected:
        problems.append(f"unexpected tensors: {_some(unexpected)}")
    for name in sorted(expected.keys() & found.keys()):
        if expected[name] != found[name]:
            problems.append(f"tensor {name} has shape {found[name]}, config.json says {expected[name]}")
    if problems:
        shown = problems[:5] + ([f"and {len(problems) - 5} more"] if len(problems) > 5 else [])
        raise UserError(f"{where}: not a {family.name} checkpoint of this architecture:\n  " + "\n  ".join(shown))


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def parameter_count(config: ModelConfig) -> int:
    """Weights of a model with this architecture, whatever its tensors are called."""
    return sum(math.prod(our_shape(entry)) for entry in entries(config, FAMILIES["llada"]))
