"""Published ways of putting benchmarks to a model, as files: configs/evaluations/NAME.yaml."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from d1jax.config import UserError
from d1jax.config.benchmark import BenchmarkConfig
from d1jax.config.setting import bounds, rules_of
from d1jax.config.values import build, merge, plain
from d1jax.config.yaml_text import read_yaml, shown
from d1jax.tasks import TASKS
from d1jax.tasks.benchmarks import benchmark

FOLDER = Path(__file__).parents[2] / "configs" / "evaluations"
KEYS = ("source", "lengths", "defaults", "benchmarks")


@dataclass(frozen=True)
class Protocol:
    """Settings of all benchmarks, and of single ones; lengths at which all are put."""

    name: str = ""
    source: str = ""  # where the settings were published
    lengths: tuple[int, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    benchmarks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def settings(self, name: str, given: Mapping[str, Any]) -> BenchmarkConfig:
        """The settings of the benchmark `name`, with `given` laid over them. Raises UserError for unknown and impossible ones."""
        raw = plain(BenchmarkConfig())
        where = f"protocol {self.name}" if self.name else "evaluation"
        for part in (self.defaults, self.benchmarks.get(name, {})):
            merge(raw, part, BenchmarkConfig, where)
        merge(raw, given, BenchmarkConfig, "command line")
        return build(BenchmarkConfig, raw)


def check_settings(config: BenchmarkConfig, where: str) -> BenchmarkConfig:
    """`config` as it is. Raises UserError for a number out of its bounds, or what has no meaning together."""
    wrong = [message for broken, message in bounds(config) if broken]
    wrong = wrong or [message for broken, message in config.rules() if broken]
    wrong = wrong or [message for broken, message in rules_of(config.decoding, "sampler") if broken]
    if wrong:
        raise UserError("\n".join(f"{where}: {message}" for message in wrong))
    return config


def protocol_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_protocol(name: str) -> Protocol:
    """The protocol of a name in configs/evaluations, or of a file. Raises UserError."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        names = protocol_names()
        near = difflib.get_close_matches(name, names, n=1)
        suggestion = f" (did you mean {near[0]!r}?)" if near else ""
        raise UserError(f"--protocol {shown(name)} is not one of {', '.join(names)}{suggestion}, and no file")
    raw = read_yaml(path)
    unknown = sorted(raw.keys() - set(KEYS))
    if unknown:
        raise UserError(f"{path}: unknown key {shown(unknown[0])}; choices: {', '.join(KEYS)}")
    if not isinstance(raw.get("source"), str):
        raise UserError(f"{path}: source must say where these settings were published")
    lengths = raw.get("lengths", [])
    if not isinstance(lengths, list) or not all(type(length) is int and length > 0 for length in lengths):
        raise UserError(f"{path}: lengths = {lengths}: write a list of whole numbers above 0")
    defaults, benchmarks = _mapping(raw, "defaults", path), _mapping(raw, "benchmarks", path)
    for name in benchmarks:
        _mapping(benchmarks, name, path, "benchmarks.")
        try:
            benchmark(name, TASKS)
        except ValueError as error:
            raise UserError(f"{path}: {str(error).replace('--tasks', 'benchmarks')}") from None
    made = Protocol(path.stem, raw["source"], tuple(lengths), defaults, benchmarks)
    for name in ("", *benchmarks):
        one = made.settings(name, {})
        for length in lengths or (one.length,):
            check_settings(one.at(length), f"{path}{f', {name}' if name else ''}")
    return made


def _mapping(raw: Mapping[str, Any], key: str, path: Path, above: str = "") -> dict[str, Any]:
    found = raw.get(key, {})
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise UserError(f"{path}: {above}{key} must be a mapping, not {shown(found)}")
    return found
