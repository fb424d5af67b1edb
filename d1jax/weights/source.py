"""Where weights come from: `open_source` says it of a Hugging Face directory, of d1jax's form of one, of a GGUF file, and of a run.

A GGUF file is opened as the Hugging Face directory that it is turned into. A run is one more kind of checkpoint: it has a configuration,
what is not weights in source/, and weights at every saved step.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d1jax.config import Config, ModelConfig, SamplerConfig, UserError
from d1jax.weights.generation_config import read_sampler
from d1jax.weights.gguf import cached_checkpoint, is_gguf, packaged
from d1jax.weights.hf_directory import Checkpoint, fingerprint, is_checkpoint, open_checkpoint
from d1jax.weights.run import RunDirectory, is_run, open_run, run_and_step


@dataclass(frozen=True)
class CheckpointSource:
    """A directory with config.json: Hugging Face's form, or d1jax's own."""

    checkpoint: Checkpoint

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    @property
    def model(self) -> ModelConfig:
        """The architecture."""
        return self.checkpoint.config

    @property
    def files(self) -> Path:
        """Where tokenizer, config.json and remote code are."""
        return self.checkpoint.path

    @property
    def sampler(self) -> SamplerConfig | None:
        """How it says that one samples from it."""
        return read_sampler(self.checkpoint.path)

    def identity(self) -> dict[str, Any]:
        """What tells these weights from others under the same name."""
        return {"files": fingerprint(self.checkpoint)}

    def check_saved(self) -> None:
        """Nothing: a checkpoint directory was looked at when it was opened."""


@dataclass(frozen=True)
class RunSource:
    """A run directory; `stage` and `step` where RUN/checkpoints/STAGE/STEP was named."""

    run: RunDirectory
    config: Config
    stage: str | None = None
    step: int | None = None

    @property
    def path(self) -> Path:
        return self.run.path

    @property
    def model(self) -> ModelConfig:
        """The architecture."""
        return self.config.model

    @property
    def files(self) -> Path | None:
        """Where tokenizer, config.json and remote code are; None for a run that was never started."""
        return self.run.source if self.run.source.is_dir() else None

    @property
    def sampler(self) -> SamplerConfig | None:
        """How its texts were sampled; None of an autoregressive model, which a run trains but never samples."""
        return None if self.model.attention_mask == "causal" else self.config.sampler

    def saved(self) -> dict[str, int]:
        """{stage: its selected or else its last saved step} in the order of the run. Raises UserError where nothing is saved."""
        last = self.run.saved_steps(self.config.trained_stages)
        steps = {name: self.run.selected(name) or step for name, step in last.items() if step}
        if not steps:
            raise UserError(f"run {str(self.path)!r} has no checkpoint yet")
        return steps

    def check_saved(self) -> None:
        """Raises UserError where the weights that are meant are not saved."""
        saved = self.saved()
        if self.last_stage not in saved:
            raise UserError(
                f"run {str(self.path)!r} has no checkpoint of stage {self.stage!r}; choices: {', '.join(saved)}"
            )
        if self.step is not None and not (self.run.checkpoints(self.last_stage) / str(self.step)).is_dir():
            raise UserError(
                f"run {str(self.path)!r}: stage {self.stage!r} has no checkpoint of step {self.step}; the last one is that of step "
                f"{self.run.saved_steps([self.last_stage])[self.last_stage]}"
            )

    @property
    def last_stage(self) -> str:
        """The stage that was named, or the last one that is saved. Raises UserError where nothing is saved."""
        return self.stage or list(self.saved())[-1]

    def identity(self) -> dict[str, Any]:
        """The stage and step that are meant: those that were named, or the last ones that are saved now."""
        if self.stage is not None:
            return {"stage": self.stage, "step": self.step}
        stage, step = list(self.saved().items())[-1]
        return {"stage": stage, "step": step}


Source = CheckpointSource | RunSource


def run_source(path: str | Path, stage: str | None = None, step: int | None = None) -> RunSource:
    """An existing run. Raises UserError where there is none."""
    run, config = open_run(path)
    return RunSource(run, config, stage, step)


def located(name: str | Path) -> Path:
    """The path that a name stands for: inside its package for the name of one that brings a model, else the path that it is.

    Raises UserError where the package is not installed.
    """
    return packaged(name) or Path(name)


def lasting(name: str) -> str:
    """A name that stands for the same in every working directory."""
    return name if packaged(name) else str(Path(name).absolute())


def directory_of(name: str | Path) -> Path:
    """The directory that is read for a name or path: of a GGUF file the checkpoint that it is turned into.

    Raises UserError where that is broken or not supported.
    """
    path = located(name)
    return cached_checkpoint(path) if is_gguf(path) else path


def open_source(path: str | Path, named: str = "") -> Source:
    """What lies at a path, looked at in this order: a GGUF file, a checkpoint directory, a run directory, RUN/checkpoints/STAGE/STEP.

    `named` is what the user called it by ("init_from 'runs/a'"), for messages. Raises UserError where it is none of these, or is
    broken. No weights are read, but of a GGUF file that was not opened before.
    """
    named = named or repr(str(path))
    path = directory_of(path)
    if is_checkpoint(path):
        return CheckpointSource(open_checkpoint(path))
    run_path, stage, step = run_and_step(path)
    if is_run(run_path):
        return run_source(run_path, stage, step)
    if not os.path.isdir(run_path):
        raise UserError(
            f"{named}: no such directory; name a checkpoint (config.json), a GGUF file, a run (config.yaml) or RUN/checkpoints/STAGE/STEP"
        )
    raise UserError(
        f"{named} is no checkpoint directory (config.json), no run directory (config.yaml) and no RUN/checkpoints/STAGE/STEP"
    )
