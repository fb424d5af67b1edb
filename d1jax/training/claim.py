"""A run directory is made or taken over by one process: the lock, the configuration and the rows that it belongs to."""

from __future__ import annotations

import fcntl
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from d1jax.config import Config, UserError
from d1jax.config.stored import differences, from_yaml, to_yaml
from d1jax.files import atomic_write, write_json
from d1jax.models import processes
from d1jax.training.longer import check_longer, only_longer
from d1jax.training.redo import first_changed, later_stages, set_aside
from d1jax.weights.run import RunDirectory, read_record

OURS = (".lock", "config.yaml.tmp")  # what a claim that was killed may leave


def claim(config: Config, again_from: str = "") -> tuple[RunDirectory, IO[str]]:
    """The run directory of `config`, made if it is new, and the lock that this process holds on it.

    again_from: the stage from which on all is done again, what they have left being moved aside ("": nothing is).

    Raises UserError where the directory belongs to another configuration, to another running process, or to something else,
    or cannot be written to.
    """
    run = RunDirectory(Path(config.run_dir))
    try:
        lock = _lock(run, config.run_dir)
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ValueError: Python refuses a path with a NUL by itself
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"run_dir {config.run_dir!r} cannot be made or written to ({reason}); choose another") from None
    try:
        _take_over(run, config, again_from)
    except BaseException:
        lock.close()
        raise
    return run, lock


def check_shared(run: RunDirectory) -> None:
    """Raises UserError where this process does not see the run directory that the first one has claimed; all of them must ask."""
    first = processes.agreed(lambda: _text_of(run.config))
    processes.wait_until(lambda: _text_of(run.config) == first, lambda: repr(str(run.config.absolute())))


def _text_of(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


def _take_over(run: RunDirectory, config: Config, again_from: str) -> None:
    """Writes the configuration of a new run down. Raises UserError where the directory has begun with another one.

    One that is only longer is accepted and not written: `longer.make_longer` does that, when nothing can be refused any more.
    """
    # Before the first checkpoint nothing has been learnt, and a corrected configuration may take the directory over.
    if run.config.exists() and run.begun:
        # A moved run may be continued, and on other devices.
        old = from_yaml(run.config)
        changed = differences(old.apart_from_the_machine, config.apart_from_the_machine)
        if again_from:
            for line in set_aside(run, old, config, again_from):
                print(line, file=sys.stderr)
        elif changed and only_longer(old, config):
            check_longer(run, old, config)
        elif changed:
            raise UserError(
                f"run_dir {config.run_dir!r} holds a run with another configuration; it differs in\n  "
                + "\n  ".join(changed)
                + f"\nchoose another run_dir, or undo these{_redo(old, config)}"
            )
    else:
        # What an earlier start of another configuration has put beside it goes with that configuration.
        shutil.rmtree(run.source, ignore_errors=True)
        run.origin.unlink(missing_ok=True)
        atomic_write(run.config, to_yaml(config))


def _redo(old: Config, new: Config) -> str:
    """What would be done again under another configuration, where that leaves a stage as it is."""
    name = first_changed(old, new)
    if name is None:
        return ""
    return f"; --from {name} does {', '.join(later_stages(new, name))} again, and keeps what they had left in redone/"


def _lock(run: RunDirectory, name: str) -> IO[str]:
    """The directory, made if it is new, and this process's lock on it."""
    if run.path.exists() and not run.path.is_dir():
        raise UserError(f"run_dir {name!r} is a file; choose another run_dir")
    if run.path.is_dir() and not run.config.exists() and any(p.name not in OURS for p in run.path.iterdir()):
        raise UserError(f"run_dir {name!r} holds files but no config.yaml, so it is not a run; choose another run_dir")
    run.path.mkdir(parents=True, exist_ok=True)
    lock = open(run.path / ".lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(
            f"run_dir {name!r} is in use by another process; wait for it or choose another run_dir"
        ) from None
    return lock


def check_data(run: RunDirectory, data: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Compares {setting: {"source", "rows", "sha256"}} with the rows that the run began with, and writes it down if it is new.

    Returns a line for the log where there is something to say. Raises UserError where the rows of a source have changed.
    """
    if not run.begun:
        write_json(run.data, data)
        return None
    if not run.data.exists():
        write_json(run.data, data)
        return "this run was begun before runs recorded their rows; whether these are the same cannot be told"
    changed = changed_rows(run, data)
    if changed:
        raise UserError("; ".join(changed) + "; put back what was there, or choose another run_dir")
    recorded = read_record(run.data)
    if not data.keys() <= recorded.keys():  # of stages that are done again
        write_json(run.data, {**recorded, **data})
    return None


def changed_rows(run: RunDirectory, data: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for every source whose rows are not those that the run began with; [] for a run that did not record them."""
    recorded = read_record(run.data) if run.data.exists() else data
    pairs = [(setting, recorded[setting], now) for setting, now in data.items() if setting in recorded]
    return [
        f"{setting}: {now['source']} is not what it was when the run in {str(run.path)!r} began: {then.get('rows')} rows with "
        f"sha256 {str(then.get('sha256'))[:16]} then, {now['rows']} rows with {now['sha256'][:16]} now"
        for setting, then, now in pairs
        if then.get("sha256") != now["sha256"]
    ]
