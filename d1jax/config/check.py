"""A configuration is checked as a whole: bounds, then what sections forbid; every problem is told at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from d1jax.config.errors import UserError
from d1jax.config.no_effect import Command, no_effect, unread
from d1jax.config.schema import Config, PreferenceConfig, RejectionConfig, RlConfig, Stage
from d1jax.config.setting import Rule, bounds, rules_of


def check(config: Config, command: Command = "train") -> Config:
    """`config` as it is. Raises a UserError that lists every impossible value and combination, and what to change.

    `evaluate` does not read the sections of RL: a run's sampler may be changed there in ways in which it could not be trained.
    """
    read = config
    if command == "evaluate":
        read = dataclasses.replace(
            config, rl=RlConfig(), preference=PreferenceConfig(), rejection=RejectionConfig(), stages=("sft",)
        )
    problems = list(dict.fromkeys(message for broken, message in all_rules(read) if broken))
    if problems:
        raise UserError("config: " + "\nconfig: ".join(problems))
    return config


def all_rules(config: Config) -> Iterator[Rule]:
    """Every bound and rule of a configuration, and of each of its stages; what divides by numbers comes after their bounds."""
    changed = [stage for stage in config.stages if stage.changes]
    resolved = [config, *(config.for_stage(stage.name) for stage in changed)]
    sizes = [rule for one in resolved for rule in bounds(one)]
    yield from sizes
    if any(broken for broken, _ in sizes):
        return
    yield from rules_of(config)
    for stage, one in zip(changed, resolved[1:], strict=True):
        yield from rules_of(getattr(one, stage.kind))
        yield from one.rules_between_sections()
        yield from _idle_changes(one, stage)


def _idle_changes(config: Config, stage: Stage) -> Iterator[Rule]:
    """What a stage changes without an effect."""
    for name, reader in unread(config).items():
        kind, _, key = name.partition(".")
        changed = kind == stage.kind and key.partition(".")[0] in stage.changes
        yield changed, f"stage {stage.name!r}: {no_effect(name, reader)}"
