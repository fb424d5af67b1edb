"""The numbered checkpoints of a stage, by Orbax: whole or not there, with a digest of every array."""

from __future__ import annotations

import gc
import itertools
import json
import logging
import os
import re
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from orbax.checkpoint import v1 as ocp

from d1jax.config import UserError
from d1jax.files import is_writer
from d1jax.models import processes

RECORD = "_CHECKPOINT_METADATA"  # Orbax's record of a step, which holds ours
Keep = Callable[[list[int]], Collection[int]]


class DamagedCheckpoint(UserError):
    """A checkpoint that was saved whole and is not whole any more; the message names its folder and what is wrong there."""

    def __init__(self, step: int, problem: str) -> None:
        super().__init__(f"the checkpoint of step {step} is damaged: {problem}")
        self.step, self.problem = step, problem


class Checkpoints:
    """Numbered checkpoints in one directory, one folder a step.

    Orbax writes a folder beside its final name and renames it, so a step is either whole or not there. A digest of every array
    goes with it and is compared when the step is loaded: a bit that flips on a disk would else be trained on.

    `keep`, given all steps after a save, says which of them stay; without it nothing is deleted.
    """

    def __init__(self, directory: Path, owner: bool = False, keep: Keep | None = None) -> None:
        self.directory, self._owner, self._keep = directory.resolve(), owner, keep
        self._broken = False
        self._open()

    def _open(self) -> None:
        # A save that was killed leaves a temporary folder; it is no checkpoint and may go. Only the process that holds the
        # run's lock may say so: to a reader it could be a save that is under way.
        with _quiet():
            self._checkpointer = ocp.training.Checkpointer(
                self.directory,
                cleanup_tmp_directories=self._owner,
                preservation_policy=None if self._keep is None else _Preserved(self._keep),
            )

    def latest(self) -> int | None:
        """The last saved step, or None."""
        return max(self.steps(), default=None)

    def steps(self) -> list[int]:
        """The saved steps; of several processes the first one looks, and all must ask."""
        return processes.agreed(lambda: sorted(found.step for found in self._checkpointer.checkpoints))

    def save(self, step: int, items: dict[str, Any]) -> None:
        """Saves the trees of `items` under their names; returns when they are on disk. Raises OSError where that fails."""
        record = {"step": step, "digests": {name: _digests(tree) for name, tree in items.items()}}
        # Where a folder cannot even be made, Orbax would leave threads behind that keep the process from ending.
        os.rmdir(tempfile.mkdtemp(prefix=".", dir=self.directory))
        try:
            with _quiet():
                self._checkpointer.save_checkpointables(step, items, force=True, custom_metadata=record)
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise  # of this machine, not of the disk
        except Exception as error:
            self._broken = True
            raise OSError(f"{self.directory / str(step)} cannot be written ({_first_line(error)})") from None

    def load(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        """The trees named in `like`, each array with the dtype and placement of its example.

        Raises KeyError if there is no such step, DamagedCheckpoint if it is not what was saved, UserError if it is whole, but
        of another model, optimizer or version of d1jax; where one of several processes finds that, all of them do.
        """
        if step not in (saved := self.steps()):
            raise KeyError(f"{self.directory}: no checkpoint of step {step}; there are {saved}")
        digests = _found_by_all(step, lambda: self._checked(step, like))
        loaded = _found_by_all(step, lambda: self._read(step, like, digests))
        _found_by_all(step, lambda: self._compare(step, loaded, digests))
        return {name: jax.tree.map(_like, loaded[name], like[name]) for name in like}

    def _checked(self, step: int, like: dict[str, Any]) -> dict[str, dict[str, str]]:
        """The recorded digests of a step whose parts are there and have the shapes of `like`. Raises as `load` does."""
        folder = self.directory / str(step)
        digests = _recorded_digests(folder, step)
        missing = next((name for name in like if not (folder / name).is_dir()), None)
        if missing is not None:
            raise DamagedCheckpoint(step, f"{folder / missing} is missing")
        for name, tree in like.items():
            wanted, found = sorted(x.shape for x in jax.tree.leaves(tree)), self._shapes(step, name)
            if found is not None and found != wanted:
                raise UserError(
                    f"{folder / name} holds {len(found)} arrays which are not the {len(wanted)} of this configuration; it was saved "
                    "by another configuration or version of d1jax, which can still read it"
                )
        return digests

    def _read(self, step: int, like: dict[str, Any], digests: dict[str, dict[str, str]]) -> dict[str, Any]:
        """The trees as they are stored. Raises DamagedCheckpoint where Orbax cannot read them."""
        stored = {name: _as_stored(tree, digests.get(name, {})) for name, tree in like.items()}
        with warnings.catch_warnings(), _quiet():
            warnings.simplefilter("ignore")  # Orbax warns about partial loads, which are what evaluation wants
            try:
                return self._checkpointer.load_checkpointables(step, stored)
            except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
                raise  # of this machine, not of the files
            except Exception as error:  # Orbax has no error class of its own
                reason = _reason(error, self.directory / str(step))
                del error
                gc.collect()  # of reads that Orbax left unfinished, which complain when they go: here, where nobody listens
        raise DamagedCheckpoint(step, reason)

    def _compare(self, step: int, loaded: dict[str, Any], digests: dict[str, dict[str, str]]) -> None:
        """Raises DamagedCheckpoint where a digest is not the recorded one."""
        for name, tree in loaded.items() if digests else ():
            recorded, found = digests.get(name, {}), _digests(tree)
            changed = next((path for path in found if recorded.get(path) != found[path]), None)
            if changed is not None:
                folder = self.directory / str(step)
                raise DamagedCheckpoint(step, f"{folder / name}: {changed} is not what was saved (its digest differs)")

    def _shapes(self, step: int, name: str) -> list[tuple[int, ...]] | None:
        """The shapes of what is stored, sorted; None where that cannot be read."""
        try:
            with _quiet():
                stored = self._checkpointer.checkpointables_metadata(step).metadata[name]
            leaves = jax.tree.leaves(stored, is_leaf=lambda x: hasattr(x, "shape"))
            return sorted(tuple(x.shape) for x in leaves) or None
        except Exception:  # Orbax has no error class of its own; loading will tell what is damaged
            return None

    def last_good(self, before: int, like: dict[str, Any]) -> int | None:
        """The newest step below `before` that loads."""
        for step in reversed([step for step in self.steps() if step < before]):
            try:
                self.load(step, like)
            except DamagedCheckpoint:
                continue
            return step
        return None

    def set_aside(self, after: int, directory: Path) -> list[int]:
        """Moves all checkpoints behind step `after` into another directory, so that a run goes on from before them; which."""
        moved = [step for step in self.steps() if step > after]
        processes.meet()
        for step in moved if is_writer() else ():
            directory.mkdir(parents=True, exist_ok=True)
            names = (directory / (f"{step}-{n}" if n else str(step)) for n in itertools.count())
            free = next(name for name in names if not name.exists())  # of an earlier time nothing is lost
            (self.directory / str(step)).rename(free)
        processes.meet()
        self.close()
        self._open()  # Orbax remembers the steps that it has seen
        return moved

    def close(self) -> None:
        try:
            self._checkpointer.close()
        except Exception:
            if not self._broken:  # a save that failed has said so, and fails once more here
                raise


class _Preserved:
    """`keep` in the form that Orbax asks for."""

    def __init__(self, keep: Keep) -> None:
        self._keep = keep

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        kept = self._keep(sorted(found.step for found in checkpoints))
        return [found.step in kept for found in checkpoints]


def _found_by_all(step: int, function: Callable[[], Any]) -> Any:
    """`function()`. Where it raises DamagedCheckpoint or UserError in one of several processes, it does in all: only one may have read what
    is damaged, and they go on alike."""
    found, problem = None, None
    try:
        found = function()
    except DamagedCheckpoint as error:
        problem = [True, error.problem]
    except UserError as error:
        problem = [False, str(error)]
    problem = next(filter(None, processes.gathered(problem)), None)
    if problem is None:
        return found
    is_damaged, told = problem
    raise DamagedCheckpoint(step, told) if is_damaged else UserError(told)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what Orbax and its threads log and print about a checkpoint that is damaged or cannot be written, which is told in one line
    instead."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels, hook, of_thread = [logger.level for logger in loggers], sys.unraisablehook, threading.excepthook
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    sys.unraisablehook = lambda unraisable: None
    threading.excepthook = lambda failed: None if _is_of_orbax(failed.exc_traceback) else of_thread(failed)
    try:
        yield
    finally:
        sys.unraisablehook, threading.excepthook = hook, of_thread
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _is_of_orbax(where: TracebackType | None) -> bool:
    """Whether a function of Orbax raised, or called what did."""
    return any("orbax" in Path(frame.filename).parts for frame in traceback.extract_tb(where))


def _recorded_digests(folder: Path, step: int) -> dict[str, dict[str, str]]:
    """{item: {array: digest}} as they were saved; {} for a checkpoint from before there were digests."""
    record = folder / RECORD
    try:
        ours = json.loads(record.read_text(encoding="utf-8"))["custom_metadata"] or {}
        named, digests = ours.get("step", step), ours.get("digests", {})
    except FileNotFoundError:
        raise DamagedCheckpoint(step, f"{record} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(step, f"{record} is not readable ({error})") from None
    if named != step:
        raise DamagedCheckpoint(step, f"{folder} holds step {named} under another name")
    return digests


def _reason(error: Exception, folder: Path) -> str:
    """The file and the cause, out of a chain of errors of which each has a page to say."""
    while error.__cause__ is not None:
        error = error.__cause__
    file = re.search(re.escape(str(folder)) + r"[^\s\"':,\]]*", str(error))
    return f"{file[0].rstrip('/.') if file else folder} cannot be read ({_first_line(error)})"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0].partition(' [')[0][:300]}"


def _digests(tree: Any) -> dict[str, str]:
    """{path of an array: its dtype and a number that any change of its bits changes}."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    numbers = jax.device_get(_mixed_sums([leaf for _, leaf in leaves]))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype} {int(number):08x}"
        for (path, leaf), number in zip(leaves, numbers, strict=True)
    }


@jax.jit
def _mixed_sums(leaves: list[Array]) -> list[Array]:
    # What waits in the memory of the host (`optimizer.offload`) is brought to the device, which computes.
    return [_mixed_sum(jax.device_put(leaf, jax.memory.Space.Device)) for leaf in leaves]


def _mixed_sum(x: Array) -> Array:
    """sum_i mix(bits_i xor mix(i)) modulo 2^32: computed where the array lies, and the same for every placement.

    `mix` is a bijection (the finalizer of MurmurHash3), so a change within one element always changes the sum; other changes
    go unseen once in 2^32.
    """
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(_mix(bits ^ _mix(index)), dtype=jnp.uint32)


def _mix(x: Array) -> Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _as_stored(tree: Any, digests: dict[str, str]) -> Any:
    """What to ask Orbax for: the arrays in the dtype in which they were saved, which is the one that was digested."""

    def stored(path: tuple[Any, ...], x: Array) -> jax.ShapeDtypeStruct:
        recorded = digests.get(jax.tree_util.keystr(path, simple=True, separator="/"))
        dtype = x.dtype if recorded is None else _dtype(recorded.partition(" ")[0], x.dtype)
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)

    return jax.tree_util.tree_map_with_path(stored, tree)


def _dtype(name: str, otherwise: np.dtype) -> np.dtype:
    try:
        return jnp.dtype(name)
    except TypeError:  # the record itself is damaged, which the comparison of digests will tell
        return otherwise


def _like(loaded: Array, like: Any) -> Array:
    return loaded if loaded.dtype == like.dtype else jax.device_put(loaded.astype(like.dtype), like.sharding)
