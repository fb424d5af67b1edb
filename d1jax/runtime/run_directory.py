"""The directory of one run: its paths, its lock, and the configuration that it belongs to.

config.yaml  data.json  source/  metrics.jsonl  checkpoints/<stage>/<step>/  evaluations/<stage>.json
samples.jsonl  summary.json  report.html  collapsed/<stage>/<step>/  damaged/<stage>/<step>/
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from d1jax.config import Config, ConfigError
from d1jax.config_file import differences, from_yaml, to_yaml
from d1jax.files import distinct, write_beside, write_json
from d1jax.runtime.longer import check_longer, only_longer

OURS = (".lock", "config.yaml.tmp")  # what a claim that was killed may leave


@dataclass(frozen=True)
class RunDirectory:
    path: Path

    @property
    def begun(self) -> bool:
        """Whether anything that was learnt is saved."""
        return any(self.path.glob("checkpoints/*/[0-9]*"))

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def source(self) -> Path:
        """What is not weights: tokenizer, config.json, remote code. Exporting copies it."""
        return self.path / "source"

    @property
    def origin(self) -> Path:
        return self.path / "init_from.json"

    @property
    def adapter(self) -> Path:
        """Says of a LoRA run that its stages share one adapter."""
        return self.path / "adapter.json"

    @property
    def data(self) -> Path:
        """Which rows the run began with."""
        return self.path / "data.json"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    def checkpoints(self, stage: str) -> Path:
        return self.path / "checkpoints" / stage

    def collapsed(self, stage: str) -> Path:
        """Checkpoints of a policy that had collapsed; nothing reads them."""
        return self.path / "collapsed" / stage

    def damaged(self, stage: str) -> Path:
        """Checkpoints that were not what had been saved; nothing reads them."""
        return self.path / "damaged" / stage

    def saved_steps(self, stages: Sequence[str]) -> dict[str, int]:
        """How far each stage that has begun is saved (0: not yet)."""
        begun = [stage for stage in stages if self.checkpoints(stage).is_dir()]
        names = {stage: [path.name for path in self.checkpoints(stage).iterdir()] for stage in begun}
        return {stage: max((int(n) for n in found if n.isdigit()), default=0) for stage, found in names.items()}

    def evaluation(self, stage: str) -> Path:
        return self.path / "evaluations" / f"{stage}.json"

    def evaluation_samples(self, stage: str) -> Path:
        return self.path / "evaluations" / f"{stage}.samples.jsonl"


def claim(config: Config) -> tuple[RunDirectory, IO[str]]:
    """The run directory of `config`, made if it is new, and the lock that this process holds on it.

    Raises ConfigError where the directory belongs to another configuration, to another running process, or to something else,
    or cannot be written to.
    """
    run = RunDirectory(Path(config.run_dir))
    try:
        lock = _lock(run, config.run_dir)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:  # ValueError: Python refuses a path with a NUL by itself
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"run_dir {config.run_dir!r} cannot be made or written to ({reason}); choose another"
        ) from None
    try:
        _take_over(run, config)
    except BaseException:
        lock.close()
        raise
    return run, lock


def _take_over(run: RunDirectory, config: Config) -> None:
    """Writes the configuration of a new run down. Raises ConfigError where the directory has begun with another one.

    One that is only longer is accepted and not written: `longer.make_longer` does that, when nothing can be refused any more.
    """
    # Before the first checkpoint nothing has been learnt, and a corrected configuration may take the directory over.
    if run.config.exists() and run.begun:
        # Where the directory lies is no part of what it holds: a moved run may be continued.
        old = from_yaml(run.config)
        changed = differences(dataclasses.replace(old, run_dir=""), dataclasses.replace(config, run_dir=""))
        if changed and only_longer(old, config):
            check_longer(run, old, config)
        elif changed:
            raise ConfigError(
                f"run_dir {config.run_dir!r} holds a run with another configuration; it differs in\n  "
                + "\n  ".join(changed)
                + "\nchoose another run_dir, or undo these"
            )
    else:
        # What an earlier start of another configuration has put beside it goes with that configuration.
        shutil.rmtree(run.source, ignore_errors=True)
        run.origin.unlink(missing_ok=True)
        write_beside(run.config, to_yaml(config))


def _lock(run: RunDirectory, name: str) -> IO[str]:
    """The directory, made if it is new, and this process's lock on it."""
    if run.path.exists() and not run.path.is_dir():
        raise ConfigError(f"run_dir {name!r} is a file; choose another run_dir")
    if run.path.is_dir() and not run.config.exists() and any(p.name not in OURS for p in run.path.iterdir()):
        raise ConfigError(
            f"run_dir {name!r} holds files but no config.yaml, so it is not a run; choose another run_dir"
        )
    run.path.mkdir(parents=True, exist_ok=True)
    lock = open(run.path / ".lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ConfigError(
            f"run_dir {name!r} is in use by another process; wait for it or choose another run_dir"
        ) from None
    return lock


def check_data(run: RunDirectory, data: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Compares {setting: {"source", "rows", "sha256"}} with the rows that the run began with, and writes it down if it is new.

    Returns a line for the log where there is something to say. Raises ConfigError where the rows of a source have changed.
    """
    if not run.begun:
        write_json(run.data, data)
        return None
    if not run.data.exists():
        write_json(run.data, data)
        return "this run was begun before runs recorded their rows; whether these are the same cannot be told"
    changed = changed_rows(run, data)
    if changed:
        raise ConfigError("; ".join(changed) + "; put the former rows back, or choose another run_dir")
    return None


def changed_rows(run: RunDirectory, data: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for every source whose rows are not those that the run began with; [] for a run that did not record them."""
    recorded = read_record(run.data) if run.data.exists() else data
    pairs = [(setting, recorded.get(setting, {}), now) for setting, now in data.items()]
    return [
        f"{setting}: {now['source']} has other rows than when the run in {str(run.path)!r} began: {then.get('rows')} rows with "
        f"sha256 {str(then.get('sha256'))[:16]} then, {now['rows']} rows with {now['sha256'][:16]} now"
        for setting, then, now in pairs
        if then.get("sha256") != now["sha256"]
    ]


def read_record(path: Path) -> dict[str, Any]:
    """A JSON object that a run has left. Raises ConfigError that names the file where it is cut or changed."""
    return _parsed(path, lambda text: [text])[0]


def read_records(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file with one a line. Raises ConfigError that names the file where it is cut or changed."""
    return _parsed(path, lambda text: [line for line in text.split("\n") if line])


def _parsed(path: Path, parts: Callable[[str], list[str]]) -> list[dict[str, Any]]:
    try:
        values = [json.loads(part, object_pairs_hook=distinct) for part in parts(path.read_text(encoding="utf-8"))]
        if not all(isinstance(value, dict) for value in values):
            raise ValueError("it holds something else")
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path}: not readable as JSON objects ({error}); move it away, and the same command makes it again"
        ) from None
    return values


def run_and_step(path: Path) -> tuple[Path, str | None, int | None]:
    """(run directory, stage, step) of RUN/checkpoints/STAGE/STEP; of a run, whose stage and step are open, (path, None, None)."""
    parts = Path(os.path.abspath(path)).parts  # not resolved: a name that no file can have would raise
    if not is_run(path) and len(parts) > 3 and parts[-3] == "checkpoints" and parts[-1].isdigit():
        return Path(*parts[:-3]), parts[-2], int(parts[-1])
    return path, None, None


def is_run(path: Path) -> bool:
    return os.path.isfile(RunDirectory(path).config)  # False also for a name that no file can have


def run_above(path: Path) -> Path | None:
    """The run that a path is, or lies in as RUN/checkpoints/STAGE/STEP; None where it is neither."""
    return next((parent for parent in (path, *path.absolute().parents[:3]) if is_run(parent)), None)


def open_run(path: str | Path) -> tuple[RunDirectory, Config]:
    """An existing run and its resolved configuration. Raises ConfigError where there is none."""
    run = RunDirectory(Path(path))
    if not is_run(run.path):
        raise ConfigError(f"{str(path)!r} is no run directory: it has no config.yaml")
    return run, from_yaml(run.config)
