"""Pure, invertible name maps between published checkpoints and d1jax's parameter tree.

A linear weight is [out, in] in PyTorch and [in, out] here; the layers of a block are stacked on a leading axis [L, ...].
The map is a list of entries, one an array of ours. Loading and saving go through it entry by entry, so that a large model is
never held twice. The experts of a layer are a further axis, [L, E, ...], of one tensor each; q, k and v may be rows of one tensor.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from d1jax.config import MixtureOfExperts, ModelConfig, UserError
from d1jax.models.family import Family
from d1jax.models.transformer import Transformer, stacks

FUSED = ("q_proj", "k_proj", "v_proj")  # in this order where they are one tensor
MANY_LAYERS = 1000  # up to here names are made first and compared then, which says more


class Entry(NamedTuple):
    """One array of the parameter tree and the published tensors that it is made of."""

    path: tuple[str, ...]
    names: tuple[str, ...]  # one a layer (of its experts one after the other), or a single one
    shape: tuple[int, ...]  # of each published tensor
    transposed: bool
    experts: int = 0  # of a layer, each a tensor of its own; 0: the layer is one tensor
    rows: tuple[int, int] | None = None  # the rows of each published tensor that are this array's; None: all

    @property
    def stacked(self) -> bool:
        return self.path[0].startswith("blocks")

    @property
    def part(self) -> tuple[int, ...]:
        """The shape of what is this array's of each published tensor."""
        return self.shape if self.rows is None else (self.rows[1] - self.rows[0], *self.shape[1:])


def entries(config: ModelConfig, family: Family) -> list[Entry]:
    """Every array of a model with this architecture, the largest first (then the last ones need little room beside the rest)."""
    made = [_entry(path, shape, config, family) for path, shape in _parameters(config)]
    return sorted(made, key=lambda entry: -len(entry.names) * math.prod(entry.part))


@functools.cache
def _parameters(config: ModelConfig) -> tuple[tuple[tuple[str, ...], tuple[int, ...]], ...]:
    """(path, shape) of every parameter of the model itself, of which none is made."""
    tokens_BT, length_B = jnp.zeros((1, 1), jnp.int32), jnp.ones((1,), jnp.int32)
    initialize = functools.partial(Transformer(config).init, positions_BT=tokens_BT, length_B=length_B)
    tree = nn.unbox(jax.eval_shape(initialize, jax.random.key(0), tokens_BT))["params"]
    return tuple((tuple(key.key for key in keys), array.shape) for keys, array in jax.tree.leaves_with_path(tree))


def _entry(path: tuple[str, ...], shape: tuple[int, ...], config: ModelConfig, family: Family) -> Entry:
    names = family.names
    transposed = path[-1] == "kernel" or path == ("ff_out",)
    if path[0] not in stacks(config):
        published = ({"wte": names.embedding, "ln_f": names.final_norm, "ff_out": names.head}[path[0]] + ".weight",)
        return Entry(path, published, shape[::-1] if transposed else shape, transposed)
    module = path[1]
    kind = path[-1] if path[-1].endswith("bias") else "weight"
    name, shape = f"{names.block}.{names.layer[module]}.{kind}", shape[1:]
    experts = shape[0] if module.startswith("experts_") else 0
    shape = shape[1:] if experts else shape
    published = tuple(
        name.format(layer=layer, expert=expert) for layer in stacks(config)[path[0]] for expert in range(experts or 1)
    )
    shape, rows = shape[::-1] if transposed else shape, None
    if family.fused and module in FUSED:
        sizes = [count * config.head_columns for count in (config.heads, config.kv_heads, config.kv_heads)]
        start = sum(sizes[: FUSED.index(module)])
        rows, shape = (start, start + shape[0]), (sum(sizes), *shape[1:])
    return Entry(path, published, shape, transposed, experts, rows)


def expected_shapes(config: ModelConfig, family: Family) -> dict[str, tuple[int, ...]]:
    """{published tensor name: shape} of a checkpoint with this architecture."""
    return {name: entry.shape for entry in entries(config, family) for name in entry.names}


def to_ours(entry: Entry, tensors: Sequence[Array]) -> Array:
    """The array of the tree, from its published tensors in the order of `entry.names`. Pure, so it can be compiled."""
    own = [tensor if entry.rows is None else tensor[slice(*entry.rows)] for tensor in tensors]
    turned = [tensor.T if entry.transposed else tensor for tensor in own]
    if not entry.stacked:
        return turned[0]
    stacked = jnp.stack(turned)
    return stacked.reshape(-1, entry.experts, *stacked.shape[1:]) if entry.experts else stacked


def our_shape(entry: Entry) -> tuple[int, ...]:
    """The shape of the array that `to_ours` makes."""
    shape = entry.part[::-1] if entry.transposed else entry.part
    if not entry.stacked:
        return shape
    leading = (len(entry.names) // entry.experts, entry.experts) if entry.experts else (len(entry.names),)
    return (*leading, *shape)


def to_theirs(entry: Entry, array: Array, index: int) -> Array:
    """Published tensor `entry.names[index]`, or its rows that are this array's: the inverse of `to_ours`, bit for bit."""
    if entry.experts:
        tensor = array[index // entry.experts, index % entry.experts]
    else:
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
    made: dict[str, Array] = {}
    joined = Joined(jnp.concatenate)
    for entry in entries(config, family):
        array = leaf(variables, entry.path)
        for index, name in enumerate(entry.names):
            tensor = joined.whole(entry, name, to_theirs(entry, array, index))
            made |= {} if tensor is None else {name: tensor}
    return made


class Joined:
    """Puts published tensors together whose rows come from several arrays."""

    def __init__(self, concatenate: Callable[[list[Any]], Any]) -> None:
        self._concatenate, self._parts = concatenate, defaultdict[str, dict[int, Any]](dict)

    def whole(self, entry: Entry, name: str, part: Any) -> Any | None:
        """The tensor, once all of its rows have come; None before."""
        if entry.rows is None:
            return part
        parts = self._parts[name]
        parts[entry.rows[0]] = part
        if sum(len(one) for one in parts.values()) < entry.shape[0]:
            return None
        del self._parts[name]
        return self._concatenate([parts[start] for start in sorted(parts)])


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
    experts = config.mlp.experts if isinstance(config.mlp, MixtureOfExperts) else 1
    if experts > max(len(found), MANY_LAYERS):
        raise UserError(
            f"{where}: config.json says {family.experts['experts']} = {experts}, but there are only {len(found)} tensors"
        )
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
    return sum(math.prod(shape) for _, shape in _parameters(config))
