"""A run is made longer: the same configuration but for more steps of a stage.

The step k of a stage is a function of (seed, k) and of the state after step k - 1, so more steps go on from the last checkpoint as if
they had been asked for from the start, unless the learning rate of a step depends on how many there are.
"""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

from d1jax.config import Config, UserError
from d1jax.config.stage import TRAINING
from d1jax.config.stored import from_yaml, to_yaml
from d1jax.files import atomic_write
from d1jax.training.optimizer import make_schedule
from d1jax.training.redo import left_by

if TYPE_CHECKING:
    from d1jax.weights.run import RunDirectory


def only_longer(old: Config, new: Config) -> bool:
    """Whether the configurations are one but for the numbers of steps, none of which is lower than it was."""
    if [(stage.name, stage.kind) for stage in old.stages] != [(stage.name, stage.kind) for stage in new.stages]:
        return False
    grown = all(steps_of(old, name) <= steps_of(new, name) for name in new.trained_stages)
    return grown and old != new and repr(_without_steps(old)) == repr(_without_steps(new))


def steps_of(config: Config, stage: str) -> int:
    """How many steps a stage that trains has."""
    return config.section_of(config.stage(stage)).steps


def check_longer(run: RunDirectory, old: Config, new: Config) -> None:
    """Raises UserError where the run cannot go on from `old` to `new`; changes nothing."""
    saved = run.saved_steps(new.stage_names)
    for stage, what in _grown(run, old, new).items():
        before = steps_of(old, stage)
        after = new.stage_names[new.stage_names.index(stage) + 1 :]
        later = [other for other in after if left_by(run, other)]
        if later:
            raise UserError(
                f"{what}: stage {later[0]!r} has begun from the weights of {stage} step {before} already; choose another run_dir, "
                f"with init_from {str(run.checkpoints(stage) / str(before))!r} or this run"
            )
        if saved.get(stage):
            _check_schedule(what, old, new, stage)


def make_longer(run: RunDirectory, new: Config) -> list[str]:
    """Readies a run whose configuration `check_longer` has accepted for more steps; returns lines for the log ([]: nothing grows).

    The configuration is written down, and the evaluation of the stage is set aside, so that it is made again: evaluations/rl.json
    becomes evaluations/rl.step3.json. Called when configuration, rows and weights have been looked at, because it changes the run.
    """
    old, saved, lines = from_yaml(run.config), run.saved_steps(new.stage_names), []
    if not only_longer(old, new):
        return []
    for stage, what in _grown(run, old, new).items():
        for path in (run.evaluation(stage), run.evaluation_samples(stage), run.text_measured(stage)):
            if path.exists():
                aside = path.name.replace(stage, f"{stage}.step{steps_of(old, stage)}", 1)
                os.replace(path, path.with_name(aside))
        if saved.get(stage):
            after = f"continues after step {saved[stage]} with the optimizer's state; its evaluation is made again"
            lines.append(f"{what}: {after}")
    atomic_write(run.config, to_yaml(new))
    return lines


def _grown(run: RunDirectory, old: Config, new: Config) -> dict[str, str]:
    """{stage that gets more steps: what to call that}."""
    steps = {stage: (steps_of(old, stage), steps_of(new, stage)) for stage in new.trained_stages}
    return {
        stage: f"run_dir {str(run.path)!r}: {stage}.steps {before} -> {after}"
        for stage, (before, after) in steps.items()
        if after > before
    }


def _check_schedule(what: str, old: Config, new: Config, stage: str) -> None:
    optimizer, rates = new.section_of(new.stage(stage)).optimizer, []
    if optimizer.schedule == "constant":
        return
    for config in (old, new):
        section = config.section_of(config.stage(stage))
        updates = section.steps * section.updates_per_step
        last = steps_of(old, stage) * section.updates_per_step - 1
        rates.append(float(make_schedule(section.optimizer, updates)(last)))
    raise UserError(
        f"{what}: {stage}.optimizer.schedule = {optimizer.schedule} goes down to zero over the number of steps, so the steps that are done "
        f"would have had other learning rates (the last one {rates[1]:.3g} instead of {rates[0]:.3g}); choose another run_dir, or "
        "init_from this one. Only schedule = constant can be continued"
    )


def _without_steps(config: Config) -> tuple[Any, ...]:
    """All that a run is but how long: the sections of its stages with one step each, and everything else."""
    sections = []
    for stage in config.stages:
        section = config.section_of(stage)
        section = dataclasses.replace(section, steps=1) if stage.kind in TRAINING else section
        sections.append((section, stage.shared, stage.weights))
    default = Config()
    used = {kind: getattr(default, kind) for kind in config.kinds}
    rest = dataclasses.replace(config.apart_from_the_machine, stages=("sft",), **used)
    return tuple(sections), rest
