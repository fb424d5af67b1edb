"""Stages are done again: what they and the later ones have left is moved aside, never deleted, and the run goes on from before them."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from d1jax.config import Config, Stage, UserError
from d1jax.config.stage import KINDS
from d1jax.config.stored import to_yaml
from d1jax.files import atomic_write, write_json
from d1jax.weights.run import RunDirectory, read_record


def first_changed(old: Config, new: Config) -> str | None:
    """The name, in the new configuration, of the first stage that another configuration would have made otherwise; None where only stages
    at the end were taken away, or nothing differs."""
    for index, stage in enumerate(new.stages):
        if index >= len(old.stages) or _seen(old, old.stages[index]) != _seen(new, stage):
            return stage.name
    return None


def _seen(config: Config, stage: Stage) -> str:
    """All that a stage depends on, as text. Mappings of another order are another configuration."""
    default = Config()
    sections = {kind: getattr(default, kind) for kind in KINDS}
    rest = dataclasses.replace(config.apart_from_the_machine, stages=("sft",), **sections)
    return repr((stage.name, stage.kind, config.section_of(stage), stage.shared, stage.weights, rest))


def later_stages(config: Config, name: str) -> tuple[str, ...]:
    """The names of a stage and of all that come after it. Raises UserError where there is no such stage."""
    names = config.stage_names
    if name not in names:
        raise UserError(f"command line: no stage is named {name!r}; choices: {', '.join(names)}")
    return names[names.index(name) :]


def set_aside(run: RunDirectory, old: Config, new: Config, name: str) -> list[str]:
    """Moves what stage `name` of a run and all later ones have left to redone/N, and writes the new configuration down.

    Returns lines for the log. Raises UserError where a stage before it would be another one, too, and changes nothing then.
    """
    changed = first_changed(old, new)
    stages = later_stages(new, name)
    if changed is not None and changed not in stages:
        raise UserError(
            f"run_dir {str(run.path)!r}: the configuration of stage {changed!r}, which comes before {name!r}, is another one now; "
            f"--from {changed} does it again"
        )
    # Of the old run also stages that are there no more: they came after what stays.
    again = [*stages, *(stage for stage in old.stage_names if stage not in new.stage_names)]
    paths = [path for stage in again for path in left_by(run, stage)]
    if not paths:
        atomic_write(run.config, to_yaml(new))
        return []
    aside = next(path for n in itertools.count(1) if not (path := run.path / "redone" / str(n)).exists())
    aside.mkdir(parents=True)
    for path in (run.config, run.path / "metrics.jsonl", run.data):
        if path.exists():
            shutil.copyfile(path, aside / path.name)
    for path in paths:
        target = aside / path.relative_to(run.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    _forget_rows(run, again)
    atomic_write(run.config, to_yaml(new))
    return [f"from {name}: what {', '.join(stages)} had left is now in {aside}"]


def left_by(run: RunDirectory, stage: str) -> list[Path]:
    """The files and directories that a stage has written."""
    exact = [run.checkpoints(stage), run.collapsed(stage), run.damaged(stage), run.exported(stage), run.profile(stage)]
    exact.append(run.streams(stage))
    named = [
        path
        for folder in ("evaluations", "generated", "exports")
        for path in (run.path / folder).glob(f"{stage}.*")
        if path not in exact
    ]
    return [path for path in (*exact, *sorted(named)) if path.exists()]


def _forget_rows(run: RunDirectory, stages: Sequence[str]) -> None:
    """Which rows of their own the stages began with: they may begin with others now."""
    if not run.data.exists():
        return
    recorded: dict[str, Any] = read_record(run.data)
    prefixes = tuple(f"{stage}." for stage in stages)
    write_json(run.data, {name: found for name, found in recorded.items() if not name.startswith(prefixes)})


def check_only(run: RunDirectory, config: Config, name: str) -> None:
    """Raises UserError where a stage cannot be run alone, because one before it is not finished."""
    before = config.stages[: config.stage_names.index(later_stages(config, name)[0])]
    missing = [stage.name for stage in before if not is_finished(run, config, stage)]
    if missing:
        raise UserError(
            f"--only {name}: stage {missing[0]!r} comes before it and is not finished; run it first (--only {missing[0]}), or leave "
            "--only out"
        )


def is_finished(run: RunDirectory, config: Config, stage: Stage) -> bool:
    """Whether a stage has left all that it leaves."""
    name = stage.name
    if stage.kind == "generate":
        return run.kept(name).exists() and run.kept(name).with_suffix(".json").exists()
    if stage.kind == "evaluate":
        return run.sampled(name).exists()
    if stage.kind == "export":
        record = run.exported(name).with_suffix(".json")
        return record.exists() and Path(read_record(record)["out"]).is_dir()
    steps = config.section_of(stage).steps
    if stage.kind == "reward_model":
        return run.measured(name).exists()
    evaluated = run.evaluation(name).exists() or not config.answers_task
    if stage.kind == "adapt":
        text = run.text_measured(name)
        evaluated = evaluated and text.exists() and "after" in read_record(text)
    return evaluated and run.saved_steps([name]).get(name, 0) >= steps
