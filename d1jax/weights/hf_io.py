"""Weights in and out: published safetensors <-> arrays on a mesh, one array of the tree at a time.

In: Orbax reads just the bytes that each device needs; a compiled pure function (convert.py) stacks and transposes on the devices.
Out: shards are planned by huggingface_hub, filled tensor by tensor, written beside and renamed.
Arrays come and go one by one, so a conversion needs memory for an array of the tree and a shard, not for the model.
"""

from __future__ import annotations

import gc
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import save_file
from tqdm import tqdm

from d1jax.config import ModelConfig, UserError
from d1jax.files import is_writer, new_directory, write_json
from d1jax.models import sharding
from d1jax.models.family import Family
from d1jax.models.transformer import Transformer, Variables, abstract_variables
from d1jax.weights.arrays import load_array, load_safetensors, save_array
from d1jax.weights.hf_directory import INDEX, Checkpoint, copy_companions, first_line, native_directory
from d1jax.weights.names import Entry, Joined, as_tree, entries, leaf, our_shape, to_ours, to_theirs

SHARD_BYTES = 3_000_000_000
PathAndArray = tuple[tuple[str, ...], Array]


def load_weights(checkpoint: Checkpoint, config: ModelConfig, mesh: Mesh) -> Variables:
    """{"params": ...} of a checkpoint, each array placed by the rule table and stored as `config.param_dtype`.

    Raises UserError that names a tensor which is not finite. Conversions, which move bits, do not ask.
    """
    plan = entries(config, checkpoint.family)
    with _progress("reading", plan, config.param_dtype) as bar:
        arrays = _counted(arrays_of(checkpoint, config, mesh, plan), bar)
        return as_tree(_finite(arrays, plan, str(checkpoint.path)))


def _finite(arrays: Iterable[PathAndArray], plan: Sequence[Entry], where: str) -> Iterator[PathAndArray]:
    for entry, (path, array) in zip(plan, arrays, strict=True):
        if not bool(_all_finite(array)):
            tensors = array.reshape(-1, *array.shape[2:]) if entry.experts else array
            name = entry.names[not_finite_at(tensors) if entry.stacked else 0]
            raise UserError(
                f"checkpoint {where!r}: tensor {name} holds NaN or infinite values; download or export it again"
            )
        yield path, array


def not_finite_at(array: Array) -> int | None:
    """The first index on the leading axis that holds a value which is not finite; None where there is none."""
    if bool(_all_finite(array)):
        return None
    return int(jnp.argmin(jnp.isfinite(array).all(axis=tuple(range(1, array.ndim)))))


@jax.jit
def _all_finite(array: Array) -> Array:
    return jnp.isfinite(array).all()


def arrays_of(checkpoint: Checkpoint, config: ModelConfig, mesh: Mesh, plan: Sequence[Entry]) -> Iterator[PathAndArray]:
    """(path, array) of the entries of `plan`, one after the other, so that their consumer decides what is in memory."""
    like = abstract_variables(Transformer(config), mesh)
    for entry in plan:
        target = leaf(like, entry.path)
        if checkpoint.native:
            yield entry.path, _read_native(native_directory(checkpoint.path, entry), target)
            continue
        # Of experts a layer at a time: a program of thousands of arguments takes a minute to compile.
        size = entry.experts or len(entry.names)
        layers = [
            _converted(checkpoint, entry._replace(names=entry.names[start : start + size]), target)
            for start in range(0, len(entry.names), size)
        ]
        array = layers[0] if len(layers) == 1 else jax.block_until_ready(_joiner(target.sharding)(layers))
        for layer in layers if len(layers) > 1 else ():
            layer.delete()
        del layers
        _collect(array.nbytes)
        yield entry.path, array


def _converted(checkpoint: Checkpoint, entry: Entry, target: jax.ShapeDtypeStruct) -> Array:
    tensors = _read(checkpoint, entry, _published_sharding(entry, target.sharding))
    array = jax.block_until_ready(_converter(_kind(entry), target.dtype, target.sharding)(tensors))
    for tensor in tensors:
        tensor.delete()
    return array


@cache
def _joiner(sharding: NamedSharding) -> Callable[[list[Array]], Array]:
    """Layers [1, E, ...] -> [L, E, ...]."""

    def join(layers: list[Array]) -> Array:
        return _floats(jnp.concatenate([_bits(layer) for layer in layers]), layers[0].dtype)

    return jax.jit(join, out_shardings=sharding)


def streamed(arrays: Iterable[PathAndArray]) -> Iterator[PathAndArray]:
    """These arrays one by one, each freed when the next one is asked for: a conversion needs each of them once."""
    for path, array in arrays:
        yield path, array
        size = array.nbytes
        array.delete()
        _collect(size)


def _read_native(directory: Path, like: jax.ShapeDtypeStruct) -> Array:
    try:
        return load_array(directory, like)
    except Exception as error:  # Orbax has no error class of its own
        raise UserError(
            f"{directory}: not readable by Orbax ({first_line(error)}); convert the checkpoint again"
        ) from None


def _collect(size: int) -> None:
    """Orbax leaves its buffers in reference cycles; large ones must go before the next ones come."""
    if size > 2**26:
        gc.collect()


def _counted(arrays: Iterable[PathAndArray], bar: tqdm) -> Iterator[PathAndArray]:
    for path, array in arrays:
        bar.update(array.nbytes)
        yield path, array


@cache
def _converter(kind: Entry, dtype: Any, sharding: NamedSharding) -> Callable[[list[Array]], Array]:
    """The compiled `to_ours`; entries of one kind and later calls share it."""

    def convert(tensors: list[Array]) -> Array:
        stored = tensors[0].dtype
        return _floats(to_ours(kind, [_bits(tensor) for tensor in tensors]), stored).astype(dtype)

    return jax.jit(convert, out_shardings=sharding)


def _bits(x: Array) -> Array:
    """The bits as integers. Moving floats about may not be exact: XLA changes the payload of some NaNs on its way."""
    return jax.lax.bitcast_convert_type(x, {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])


def _floats(bits: Array, dtype: Any) -> Array:
    return jax.lax.bitcast_convert_type(bits, dtype)


def _read(checkpoint: Checkpoint, entry: Entry, sharding: NamedSharding) -> list[Array]:
    """The published tensors of an entry, read with the placement that `to_ours` turns into the final one."""
    wanted: dict[Path, dict[str, Any]] = defaultdict(dict)
    for name in entry.names:
        tensor = checkpoint.tensors[name]
        stored = jnp.dtype(checkpoint.config.param_dtype)
        wanted[tensor.file][name] = jax.ShapeDtypeStruct(tensor.shape, stored, sharding=sharding)
    read = {name: array for file, like in wanted.items() for name, array in load_safetensors(file, like).items()}
    return [read[name] for name in entry.names]


def _published_sharding(entry: Entry, target: NamedSharding) -> NamedSharding:
    axes = tuple(target.spec)[(1 if entry.stacked else 0) + (1 if entry.experts else 0) :]
    axes = axes[::-1] if entry.transposed else axes
    return NamedSharding(target.mesh, PartitionSpec(*((None, *axes[1:]) if entry.rows else axes)))


def save_weights(
    arrays: Iterable[PathAndArray],
    config: ModelConfig,
    family: Family,
    out: Path,
    companions: Callable[[Path], None],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a Hugging Face directory: the shards, their index, and what `companions` puts beside them.

    The arrays come in the order of `entries`, and one of them and one shard are in memory at a time; tensors are therefore not
    sorted by layer in the shards. They are stored as `config.param_dtype`. Raises FileExistsError where `out` is not new;
    nothing is deleted.
    """
    plan, itemsize = entries(config, family), jnp.dtype(config.param_dtype).itemsize
    split = split_state_dict_into_shards_factory(
        {name: entry for entry in plan for name in entry.names},
        get_storage_size=lambda entry: math.prod(entry.shape) * itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    missing = {file: set(names) for file, names in split.filename_to_tensors.items()}
    joined = Joined(np.concatenate)
    shards: dict[str, dict[str, np.ndarray]] = {file: {} for file in missing}
    with new_directory(out) as beside, _progress("writing", plan, config.param_dtype) as bar:
        companions(beside)
        for entry, (_, array) in zip(plan, arrays, strict=True):
            for index, name in enumerate(entry.names):
                file = split.tensor_to_filename[name] if split.is_sharded else next(iter(missing))
                # The layer is an argument, not a constant: one program serves all layers.
                part = np.ascontiguousarray(sharding.fetch(_to_theirs(_kind(entry), array, index)))
                bar.update(part.nbytes)
                tensor = joined.whole(entry, name, part)
                if tensor is None:
                    continue
                shards[file][name] = tensor
                missing[file].discard(name)
                if missing[file]:
                    continue
                whole = shards.pop(file)
                if is_writer():
                    save_file(whole, beside / file, metadata={"format": "pt"})
        if split.is_sharded:
            write_json(beside / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})


def save_native(
    arrays: Iterable[PathAndArray],
    config: ModelConfig,
    family: Family,
    out: Path,
    companions: Callable[[Path], None],
) -> None:
    """Writes a directory in d1jax's own form: each array of the tree by Orbax, so that every device reads its part of it as it is.

    The arrays come in the order of `entries`; `companions` writes what stands beside them. Raises FileExistsError where `out` is not new.
    """
    plan = entries(config, family)
    with new_directory(out) as beside, _progress("writing", plan, config.param_dtype) as bar:
        companions(beside)
        for entry, (_, array) in zip(plan, arrays, strict=True):
            save_array(native_directory(beside, entry), array)
            bar.update(array.nbytes)


def in_memory(variables: Variables, config: ModelConfig, family: Family) -> Iterator[PathAndArray]:
    """The arrays of variables in the order in which they are saved."""
    return ((entry.path, leaf(variables, entry.path)) for entry in entries(config, family))


@partial(jax.jit, static_argnums=0)
def _to_theirs(kind: Entry, array: Array, index: Array | int) -> Array:
    return _floats(to_theirs(kind, _bits(array), index), array.dtype)


def _kind(entry: Entry) -> Entry:
    """The entry without its names, so that entries of one kind share a program."""
    return entry._replace(names=(), path=entry.path[:1])


def companions_of(checkpoint: Checkpoint, dtype: str) -> Callable[[Path], None]:
    """What stands beside the weights in `checkpoint`, with the dtype that is written."""
    return lambda beside: copy_companions(checkpoint.path, beside, dtype)


def _progress(label: str, plan: list[Entry], dtype: str) -> tqdm:
    size = sum(math.prod(our_shape(entry)) for entry in plan) * jnp.dtype(dtype).itemsize
    return tqdm(total=size, desc=label, unit="B", unit_scale=True, disable=None, leave=False)


def compare(one: Checkpoint, two: Checkpoint, mesh: Mesh) -> list[Entry]:
    """The arrays in which two checkpoints of one architecture differ in any bit; one array of each is in memory at a time."""
    plan = entries(one.config, one.family)
    sides = (streamed(arrays_of(side, side.config, mesh, plan)) for side in (one, two))
    different = []
    with _progress("comparing", plan, one.config.param_dtype) as bar:
        for entry, (_, ours), (_, theirs) in zip(plan, *sides, strict=True):
            # As integers: NaN differs from itself, and -0 equals 0.
            if not bool(_same_bits(ours, theirs)):
                different.append(entry)
            bar.update(ours.nbytes)
    return different


@jax.jit
def _same_bits(a: Array, b: Array) -> Array:
    return jnp.all(_bits(a) == _bits(b))
