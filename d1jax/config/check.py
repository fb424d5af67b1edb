"""A configuration is checked as a whole: bounds, then what sections forbid; every problem is told at once."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator

from d1jax.config.errors import UserError
from d1jax.config.generation import GenerateConfig
from d1jax.config.no_effect import Command, no_effect, unread_by_stage
from d1jax.config.preference import PreferenceConfig
from d1jax.config.rl import RlConfig
from d1jax.config.run_rules import rules_between_sections, rules_of_run
from d1jax.config.schema import Config
from d1jax.config.setting import Rule, bounds, rules_of, rules_of_fields
from d1jax.config.stage import Stage


def check(config: Config, command: Command = "train") -> Config:
    """`config` as it is. Raises a UserError that lists every impossible value and combination, and what to change.

    `evaluate` does not read the sections of RL: a run's sampler may be changed there in ways in which it could not be trained.
    """
    read = config
    if command == "evaluate":
        read = dataclasses.replace(
            config, rl=RlConfig(), preference=PreferenceConfig(), generate=GenerateConfig(), stages=("sft",)
        )
    problems = list(dict.fromkeys(message for broken, message in all_rules(read) if broken))
    if problems:
        raise UserError("config: " + "\nconfig: ".join(problems))
    return config


def all_rules(config: Config) -> Iterator[Rule]:
    """Every bound and rule of a configuration, and of each of its stages; what divides by numbers comes after their bounds."""
    changed = [(stage, config.for_stage(stage.name)) for stage in config.stages if stage.changes or stage.shared]
    read = _as_it_is_read(config)
    sizes = list(bounds(read))
    for stage, one in changed:
        for name in (stage.kind, *stage.shared):
            sizes += _said_of(stage, bounds(getattr(one, name), f"{name}."))
    yield from sizes
    if any(broken for broken, _ in sizes):
        return
    yield from rules_of_run(config)
    yield from rules_between_sections(read)
    yield from rules_of_fields(read)
    for stage, one in changed:
        rules = (
            *(rules_of(getattr(one, name), name) for name in (stage.kind, *stage.shared)),
            rules_between_sections(one),
            _idle_changes(one, stage),
        )
        yield from _said_of(stage, itertools.chain(*rules))


def _as_it_is_read(config: Config) -> Config:
    """The configuration without the sections that no stage works with as they are, because all stages of their kind change them: what
    counts is what comes of that."""
    kinds = {stage.kind for stage in config.stages} - {stage.kind for stage in config.stages if not stage.changes}
    return dataclasses.replace(config, **{kind: type(getattr(config, kind))() for kind in kinds})


def _said_of(stage: Stage, rules: Iterable[Rule]) -> Iterator[Rule]:
    for broken, message in rules:
        yield broken, f"stage {stage.name!r}: {message}"


def _idle_changes(config: Config, stage: Stage) -> Iterator[Rule]:
    """What a stage changes without an effect."""
    for name, reader in unread_by_stage(config, stage.kind).items():
        yield name.split(".")[1] in stage.changes, no_effect(name, reader)
