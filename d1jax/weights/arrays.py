"""Single arrays, and the tensors of safetensors files, read and written by Orbax for any placement."""

from __future__ import annotations

from pathlib import Path

import jax
from orbax.checkpoint import v1 as ocp


def save_array(directory: Path, array: jax.Array) -> None:
    """Writes one array into a new directory; returns when it is on disk. It can be read in parts, for any placement."""
    context = ocp.Context()
    # One array at a time, in pieces that are read for one device without the rest.
    context.memory.transfer_concurrent_bytes = context.memory.write_concurrent_bytes = array.nbytes + 1
    context.array.saving.storage_options.chunk_byte_size = 2**27
    context.array.saving.use_compression = False  # weights hardly shrink, and it takes longer than writing them
    with context:
        ocp.save(directory.resolve(), {"array": array})


def load_array(directory: Path, like: jax.ShapeDtypeStruct) -> jax.Array:
    """A saved array, with the dtype and placement of its example."""
    return ocp.load(directory.resolve(), {"array": like})["array"]


def stored_array(directory: Path) -> tuple[tuple[int, ...], str]:
    """(shape, dtype) of a saved array, without reading it."""
    stored = ocp.metadata(directory.resolve()).metadata["array"]
    return tuple(stored.shape), str(stored.dtype)


def load_safetensors(file: Path, like: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """The tensors named in `like`; each process reads only the bytes that its devices need."""
    context = ocp.Context()
    context.checkpoint_layout = ocp.options.CheckpointLayout.SAFETENSORS
    with context:
        return ocp.load(file.resolve(), like)
