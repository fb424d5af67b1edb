"""The directory of one run: its paths, its lock, and the configuration that it belongs to.

config.yaml  source/  metrics.jsonl  checkpoints/<stage>/<step>/  evaluations/<stage>.json
samples.jsonl  summary.json  report.html  collapsed/<stage>/<step>/
"""

from __future__ import annotations

import dataclasses
import fcntl
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from d1jax.config import Config, ConfigError
from d1jax.config_file import differences, from_yaml, to_yaml
from d1jax.files import write_beside

OURS = (".lock", "config.yaml.tmp")  # what a claim that was killed may leave


@dataclass(frozen=True)
class RunDirectory:
    path: Path

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

    Raises ConfigError where the directory belongs to another configuration, to another running process, or to something else.
    """
    run = RunDirectory(Path(config.run_dir))
    if run.path.exists() and not run.path.is_dir():
        raise ConfigError(f"run_dir {config.run_dir!r} is a file; choose another run_dir")
    if run.path.is_dir() and not run.config.exists() and any(p.name not in OURS for p in run.path.iterdir()):
        raise ConfigError(
            f"run_dir {config.run_dir!r} holds files but no config.yaml, so it is not a run; choose another run_dir"
        )
    run.path.mkdir(parents=True, exist_ok=True)
    lock = open(run.path / ".lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ConfigError(
            f"run_dir {config.run_dir!r} is in use by another process; wait for it or choose another run_dir"
        ) from None
    # Before the first checkpoint nothing has been learnt, and a corrected configuration may take the directory over.
    if run.config.exists() and any(run.path.glob("checkpoints/*/[0-9]*")):
        # Where the directory lies is no part of what it holds: a moved run may be continued.
        changed = differences(
            dataclasses.replace(from_yaml(run.config), run_dir=""), dataclasses.replace(config, run_dir="")
        )
        if changed:
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
    return run, lock


def is_run(path: Path) -> bool:
    return RunDirectory(path).config.is_file()


def open_run(path: str | Path) -> tuple[RunDirectory, Config]:
    """An existing run and its resolved configuration. Raises ConfigError where there is none."""
    run = RunDirectory(Path(path))
    if not is_run(run.path):
        raise ConfigError(f"{str(path)!r} is no run directory: it has no config.yaml")
    return run, from_yaml(run.config)
