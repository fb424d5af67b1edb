"""YAML files and command lines -> Config; stored.py writes and reads what a run keeps.

    config = parse(["--config", "configs/quickstart.yaml", "--rl.steps", "50"])

Later sources win: defaults of the dataclasses, then files, then sections' files, then flags. A setting keeps its type: a text
is what was typed, true is no number. Every mistake is a `UserError` that names the key, its value and the cure.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from d1jax.config.check import check
from d1jax.config.errors import UserError
from d1jax.config.flags import COMMAND_LINE, chooses, command_line_pairs, nested
from d1jax.config.no_effect import Command, default_at, no_effect, unread, without_unread
from d1jax.config.schema import Config
from d1jax.config.setting import is_choice, settings, value_at
from d1jax.config.values import alternatives, build, hints_of, is_section_type, merge, plain
from d1jax.config.yaml_text import read_yaml, shown

CONFIGS = Path(__file__).resolve().parents[2] / "configs"  # of the repository
FOLDERS = {"rl": "methods", "preference": "preferences", "model": "models"}  # sections with files of their own there
SECTIONS = tuple(name for name, hint in hints_of(Config).items() if is_section_type(hint))


def parse(
    argv: Sequence[str], base: Config | None = None, command: Command = "train", reads: Collection[str] = ()
) -> Config:
    """`--config file.yaml` and `--a.b value` (or `--a.b=value`) -> a checked Config. Raises UserError.

    base: what is changed (None: the defaults). command: which settings have an effect. reads: the sections and settings that
    the command looks at at all (none named: every one).
    """
    return parse_with_origins(argv, base, command, reads)[0]


def parse_with_origins(
    argv: Sequence[str], base: Config | None = None, command: Command = "train", reads: Collection[str] = ()
) -> tuple[Config, dict[str, str]]:
    """(config, {full name of a setting: the file or flag that it comes from}, for all that differ from the defaults).

    A setting that has no effect is refused where its own source says so. Where a later source has taken its effect away
    (--schedule even, over a file with a threshold), it falls back to its default.
    """
    raw = plain(Config() if base is None else base)
    origins: dict[str, str] = {}
    idle: set[str] = set()  # settings that had no effect already where they were given
    for level in _levels(argv):
        given_here: set[str] = set()
        for key, value, source in level:
            if reads and key != "config" and not any(f"{key}.".startswith(f"{name}.") for name in reads):
                raise UserError(f"{source}: {command} does not read {key}; it reads {', '.join(reads)}")
            given = _given(key, value)
            merge(raw, given, Config, source)
            named = _named(given, Config)
            given_here |= named
            origins |= dict.fromkeys(named, source)
        idle = {name for name in unread(build(Config, raw), command) if name in given_here or name in idle}
    config = check(build(Config, raw), command)
    _check_overridden(config, [name for name, source in origins.items() if source.startswith(COMMAND_LINE)])
    if idle:
        where = unread(config, command)
        alike: dict[tuple[str, str], list[str]] = {}
        for name in sorted(idle):
            alike.setdefault((origins[name], where[name]), []).append(
                f"{name} = {shown(_written(value_at(config, name)))}"
            )
        told = [f"{source}: {no_effect(', '.join(names), reader)}" for (source, reader), names in alike.items()]
        raise UserError("\n".join(told))
    # Once more, because a rule may look at a setting that has just fallen back to its default.
    config = check(without_unread(config, command), command)
    return config, {name: origins[name] for name in _changed(config) if name in origins}


def _check_overridden(config: Config, given: Sequence[str]) -> None:
    """Raises UserError for a flag of a section that each of its stages overrides: nothing would read it."""
    for name in given:
        kind, _, key = name.partition(".")
        stages = [stage for stage in config.stages if stage.kind == kind]
        if stages and all(key.partition(".")[0] in stage.changes for stage in stages):
            names = " and ".join(repr(stage.name) for stage in stages)
            raise UserError(
                f"{COMMAND_LINE}: {name} = {shown(_written(value_at(config, name)))} has no effect: stage {names} sets its own; change "
                "it there (in stages), or leave this out"
            )


def _written(value: Any) -> Any:
    return value.name if is_choice(value) else value


def _changed(config: Config) -> list[str]:
    return [name for name, _, _ in settings(config) if value_at(config, name) != default_at(config, name)]


def _levels(argv: Sequence[str]) -> list[list[tuple[str, str, str]]]:
    """What is given, in the order in which it counts: each file is a level, then each section's file, then all flags together."""
    pairs = command_line_pairs(argv)
    files = [pair for pair in pairs if pair[0] == "config"]
    sections = [
        (key, str(file), str(file))
        for key, value, source in pairs
        if key in SECTIONS
        for file in [_section_file(key, value, source)]
    ]
    for section in FOLDERS:
        named = [value for key, value, _ in pairs if key == section and value in section_names(section)]
        if len(named) > 1:
            raise UserError(f"{COMMAND_LINE}: --{section} is given {' and '.join(named)}; choose one")
    flags = [pair for pair in pairs if pair[0] != "config" and pair[0] not in SECTIONS]
    flags.sort(key=lambda pair: not chooses(pair[0]))  # a choice is made before its parameters are set
    return [*([pair] for pair in (*files, *sections)), flags]


def _given(key: str, value: str) -> dict[str, Any]:
    """What a flag says: a whole file, a section from a file (--model configs/models/dream_7b.yaml, --rl wd1), or a value."""
    if key == "config":
        return _whole(read_yaml(value), value)
    if key in SECTIONS:
        return {key: read_yaml(value)}
    return nested(key, value)


def _whole(given: dict[str, Any], file: str) -> dict[str, Any]:
    """What a file of --config says. Raises UserError for the file of a section (configs/methods/wd1.yaml)."""
    if not given.keys() <= hints_of(Config).keys():
        for section in FOLDERS:
            if given.keys() <= hints_of(hints_of(Config)[section]).keys():
                raise UserError(f"{file}: holds settings of the section {section!r}; write --{section} {file}")
    return given


def _section_file(section: str, value: str, source: str) -> Path:
    """The file of a section: by its path, or by its name in the repository's configs."""
    if value.endswith((".yaml", ".yml")):
        return Path(value)
    folder = CONFIGS / FOLDERS[section] if section in FOLDERS else None
    names = section_names(section)
    if folder is not None and value in names:
        return folder / f"{value}.yaml"
    what = f"{source}: {shown(value)} is no file; {section!r} is a section: write --{section} FILE.yaml or --{section}.key value"
    if folder is None:
        raise UserError(what)
    if not names:
        raise UserError(f"{what} (names are looked up in {folder} of the repository, which is not here)")
    near = difflib.get_close_matches(value, names, n=1)
    suggestion = f" (did you mean {near[0]!r}?)" if near else ""
    raise UserError(f"{what}, or --{section} with a name of {folder}: {', '.join(names)}{suggestion}")


def section_names(section: str) -> list[str]:
    """What may stand after --rl, --preference and --model: the names of the files in that folder of configs."""
    return sorted(file.stem for file in (CONFIGS / FOLDERS[section]).glob("*.yaml")) if section in FOLDERS else []


def _named(given: Mapping[str, Any], cls: type, prefix: str = "") -> set[str]:
    """The full names of the settings in a mapping that `merge` has accepted, and of the parameters of choices."""
    found: set[str] = set()
    for key, value in given.items():
        hint = hints_of(cls)[key]
        if is_section_type(hint):
            found |= _named(value, hint, f"{prefix}{key}.")
            continue
        found.add(prefix + key)
        if alternatives(hint) and isinstance(value, Mapping):
            found |= {f"{prefix}{key}.{name}" for name in value if name != "name"}
    return found
