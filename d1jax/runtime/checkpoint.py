"""Every call to Orbax is here: the checkpoints of a stage, single arrays, and safetensors files."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp


class Checkpoints:
    """Numbered checkpoints in one directory, one folder a step.

    Orbax writes a folder beside its final name and renames it, so a step is either whole or not there. Nothing is deleted.
    """

    def __init__(self, directory: Path, owner: bool = False) -> None:
        # A save that was killed leaves a temporary folder; it is no checkpoint and may go. Only the process that holds the
        # run's lock may say so: to a reader it could be a save that is under way.
        self._checkpointer = ocp.training.Checkpointer(directory.resolve(), cleanup_tmp_directories=owner)

    def latest(self) -> int | None:
        """The last saved step, or None."""
        found = self._checkpointer.latest
        return None if found is None else found.step

    def steps(self) -> list[int]:
        return sorted(found.step for found in self._checkpointer.checkpoints)

    def save(self, step: int, items: dict[str, Any]) -> None:
        """Saves the trees of `items` under their names; returns when they are on disk."""
        self._checkpointer.save_checkpointables(step, items, force=True)

    def load(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        """The trees named in `like`, each array with the dtype and placement of its example. KeyError if there is no such step."""
        if step not in self.steps():
            raise KeyError(f"{self._checkpointer.directory}: no checkpoint of step {step}; there are {self.steps()}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Orbax warns about partial loads, which are what evaluation wants
            return self._checkpointer.load_checkpointables(step, jax.tree.map(_abstract, like))

    def set_aside(self, after: int, directory: Path) -> list[int]:
        """Moves all checkpoints behind step `after` into another directory, so that a run goes on from before them; which."""
        moved = [step for step in self.steps() if step > after]
        for step in moved:
            directory.mkdir(parents=True, exist_ok=True)
            names = (directory / (f"{step}-{n}" if n else str(step)) for n in itertools.count())
            free = next(name for name in names if not name.exists())  # of an earlier collapse nothing is lost
            (Path(self._checkpointer.directory) / str(step)).rename(free)
        return moved

    def close(self) -> None:
        self._checkpointer.close()


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


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
