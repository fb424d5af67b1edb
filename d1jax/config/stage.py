"""One stage of a run as it is written: its name, its kind, and what it changes for itself."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from d1jax.config.adapt import AdaptConfig
from d1jax.config.after import EvaluateConfig, ExportConfig
from d1jax.config.errors import UserError
from d1jax.config.generation import GenerateConfig
from d1jax.config.preference import PreferenceConfig
from d1jax.config.reward_model import RewardModelConfig
from d1jax.config.rl import RlConfig
from d1jax.config.sampler import SamplerConfig
from d1jax.config.task import TaskConfig
from d1jax.config.training import SftConfig
from d1jax.config.values import alternatives, hints_of, merge, plain
from d1jax.config.yaml_text import shown

SECTIONS = {
    "adapt": AdaptConfig,
    "sft": SftConfig,
    "rl": RlConfig,
    "preference": PreferenceConfig,
    "generate": GenerateConfig,
    "reward_model": RewardModelConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
}
KINDS = tuple(SECTIONS)
SAMPLED = frozenset({"rl", "preference", "generate"})  # kinds that sample completions of training rows
START = "start"  # the weights that the run begins with, in `from` of a stage
RESERVED = {
    "weights",
    "evaluation",
    "validation",
    "audit",
    "task",
    "start",
}  # what else is called by a name: random keys, rows, weights
TRAINING = (
    "adapt",
    "sft",
    "rl",
    "preference",
)  # kinds that update weights, so that checkpoints and an evaluation belong to them
# The kinds of stages that know what to do with a model under a mask.
MASKED_KINDS = {
    "full": set(SECTIONS),
    "causal": {"adapt", "export"},
    "block_causal": {"generate", "evaluate", "export"},
}
OF_A_STAGE = {"task": TaskConfig, "sampler": SamplerConfig}  # sections that a stage may change for itself alone


@dataclass(frozen=True)
class Stage:
    """One stage of a run: `{name: cold_start, kind: sft, steps: 50}`; `sft` is short for `{name: sft, kind: sft}`.

    Checkpoints, metrics and evaluations are filed under the name. `from` names the stage whose weights it works with (the last one before
    it that trained; `start`: those that the run began with), `task` and `sampler` change these sections for this stage alone, and what
    else is given changes the section of the kind.
    """

    name: str
    kind: str
    changes: dict[str, Any] = field(default_factory=dict)  # of the section of the kind
    shared: dict[str, dict[str, Any]] = field(default_factory=dict)  # of the sections `task` and `sampler`
    weights: str = ""  # the stage that `from` names

    @classmethod
    def from_plain(cls, value: Any, where: str, source: str) -> Stage:
        """A stage as it is written. Raises UserError."""
        given = {"name": value, "kind": value} if isinstance(value, str) else value
        if not isinstance(given, Mapping):
            raise UserError(
                f"{source}: {where} = {shown(value)} is no stage; write a kind, or {{name: NAME, kind: KIND}}"
            )
        name, kind = given.get("name"), given.get("kind", given.get("name"))
        if kind not in KINDS:
            near = difflib.get_close_matches(str(kind), KINDS, n=1)
            suggestion = f" (did you mean '{near[0]}'?)" if near else ""
            raise UserError(f"{source}: {where}: kind {shown(kind)} is not one of {', '.join(KINDS)}{suggestion}")
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
            raise UserError(
                f"{source}: {where}: name {shown(name)} must be letters, digits and _, beginning with a letter: files are called by it"
            )
        changes = {key: found for key, found in given.items() if key not in ("name", "kind", "from", *OF_A_STAGE)}
        merge(plain(SECTIONS[kind]()), _with_names(changes, SECTIONS[kind]), SECTIONS[kind], f"{source}: {where}")
        shared = {key: given[key] for key in OF_A_STAGE if key in given}
        for key, found in shared.items():
            if not isinstance(found, Mapping):
                raise UserError(f"{source}: {where}: {key} = {shown(found)} is a section; write {{key: value}}")
            merge(plain(OF_A_STAGE[key]()), found, OF_A_STAGE[key], f"{source}: {where}", f"{key}.")
        weights = given.get("from", "")
        if not isinstance(weights, str):
            raise UserError(f"{source}: {where}: from = {shown(weights)} is no name of a stage")
        return cls(name, kind, changes, {key: dict(found) for key, found in shared.items()}, weights)

    @property
    def short(self) -> Any:
        """How it is written: the name alone where that says everything."""
        more = {**({"from": self.weights} if self.weights else {}), **self.shared, **self.changes}
        if self.name == self.kind and not more:
            return self.name
        return {"name": self.name, "kind": self.kind, **more}


def _with_names(changes: Mapping[str, Any], cls: type) -> dict[str, Any]:
    """The changes, to be looked at before the section that they change is known: parameters of a choice that the section makes
    (`kl: {coefficient: 0.1}`) under the name of one that has them."""
    named = dict(changes)
    for key, value in changes.items():
        choices = alternatives(hints_of(cls).get(key))
        if isinstance(value, Mapping) and "name" not in value:
            owner = next((name for name, one in choices.items() if value.keys() <= hints_of(one).keys()), None)
            named[key] = {"name": owner, **value} if owner else value
    return named
