"""YAML files and command lines -> Config, and back.

    config = parse(["--config", "configs/quickstart.yaml", "--rl.steps", "50"])

Later sources win: defaults of the dataclasses, then files, then sections' files, then flags. A setting keeps its type: a text
is what was typed, true is no number. Every mistake is a `ConfigError` that names the key, its value and the cure.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import draccus
from draccus.utils import DecodingError, ParsingError

from d1jax.config import Config, ConfigError
from d1jax.config.no_effect import Command, idle_stages, leaves, no_effect, unread, value_at, without_unread
from d1jax.config.rules import check
from d1jax.config.version import __version__
from d1jax.config.yaml_text import parse_yaml, read_yaml, shown, write_yaml

COMMAND_LINE = "command line"
CONFIGS = Path(__file__).resolve().parents[2] / "configs"  # of the repository
FOLDERS = {"rl": "methods", "model": "models"}  # sections with files of their own there
SECTIONS = tuple(name for name, hint in get_type_hints(Config).items() if dataclasses.is_dataclass(hint))


def asks_for_version(argv: Sequence[str]) -> bool:
    return "--version" in argv


def version_text() -> str:
    return f"d1jax {__version__}"


def dashed(argv: Sequence[str]) -> list[str]:
    """Arguments with - for _ in the names of flags: both spellings are accepted everywhere."""
    split = [argument.partition("=") if argument.startswith("--") else (argument, "", "") for argument in argv]
    return [
        (name.replace("_", "-") if name.startswith("--") else name) + equals + value for name, equals, value in split
    ]


def own_flags(argv: Sequence[str], names: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """({name: value} of a command's own flags, the rest for `parse`). Raises ConfigError for a flag without a value."""
    own, rest, queue = {}, [], list(argv)
    while queue:
        flag = queue.pop(0)
        key, equals, value = flag[2:].partition("=")
        name = key.replace("-", "_")
        if flag.startswith("--") and name in names:
            if not equals and not queue:
                raise ConfigError(f"command line: {flag} has no value")
            own[name] = value if equals else queue.pop(0)
        else:
            rest.append(flag)
    return own, rest


def parse(
    argv: Sequence[str], base: Config | None = None, command: Command = "train", reads: Collection[str] = ()
) -> Config:
    """`--config file.yaml` and `--a.b value` (or `--a.b=value`) -> a checked Config. Raises ConfigError.

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
    raw = to_dict(Config() if base is None else base)
    origins: dict[str, str] = {}
    idle: set[str] = set()  # settings that had no effect already where they were given
    for level in _levels(argv):
        given_here: set[str] = set()
        for key, value, source in level:
            if reads and key != "config" and not any(f"{key}.".startswith(f"{name}.") for name in reads):
                raise ConfigError(f"{source}: {command} does not read {key}; it reads {', '.join(reads)}")
            given = _given(key, value)
            _merge(raw, given, Config, source)
            named = _named(given, Config)
            given_here |= named
            origins |= dict.fromkeys(named, source)
        idle = {name for name in unread(decode(raw), command) if name in given_here or name in idle}
    config = check(decode(raw), command)
    if idle:
        where = unread(config, command)
        alike: dict[tuple[str, str], list[str]] = {}
        for name in sorted(idle):
            alike.setdefault((origins[name], where[name]), []).append(f"{name} = {shown(value_at(config, name))}")
        told = [f"{source}: {no_effect(', '.join(names), reader)}" for (source, reader), names in alike.items()]
        raise ConfigError("\n".join(told))
    # Once more, because a rule may look at a setting that has just fallen back to its default.
    config = check(without_unread(config, command), command)
    return config, {name: origins[name] for name in _changed(config) if name in origins}


def describe_origins(config: Config, origins: Mapping[str, str]) -> list[str]:
    """A line a file, and one for the flags: which settings that differ from the defaults come from it."""
    by_source: dict[str, list[str]] = {}
    for name, source in origins.items():
        flag = source.startswith(COMMAND_LINE)
        by_source.setdefault(COMMAND_LINE if flag else source, []).append(f"{name} = {value_at(config, name)}")
    idle = [f"the settings of {stage!r} have no effect: it is not among the stages" for stage in idle_stages(config)]
    return idle + [
        f"settings from {'the ' if source == COMMAND_LINE else ''}{source}: {', '.join(found)}"
        for source, found in by_source.items()
    ]


def _changed(config: Config) -> list[str]:
    return [name for name in leaves(config) if value_at(config, name) != value_at(Config(), name)]


def _levels(argv: Sequence[str]) -> list[list[tuple[str, str, str]]]:
    """What is given, in the order in which it counts: each file is a level, then each section's file, then all flags together."""
    pairs = _command_line(argv)
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
            raise ConfigError(f"{COMMAND_LINE}: --{section} is given {' and '.join(named)}; choose one")
    flags = [pair for pair in pairs if pair[0] != "config" and pair[0] not in SECTIONS]
    return [*([pair] for pair in (*files, *sections)), flags]


def _given(key: str, value: str) -> dict[str, Any]:
    """What a flag says: a whole file, a section from a file (--model configs/models/dream_7b.yaml, --rl wd1), or a value."""
    if key == "config":
        return _whole(read_yaml(value), value)
    if key in SECTIONS:
        return {key: read_yaml(value)}
    return _nested(key, value)


def _whole(given: dict[str, Any], file: str) -> dict[str, Any]:
    """What a file of --config says. Raises ConfigError for the file of a section (configs/methods/wd1.yaml)."""
    if not given.keys() <= get_type_hints(Config).keys():
        for section in FOLDERS:
            if given.keys() <= get_type_hints(get_type_hints(Config)[section]).keys():
                raise ConfigError(f"{file}: holds settings of the section {section!r}; write --{section} {file}")
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
        raise ConfigError(what)
    if not names:
        raise ConfigError(f"{what} (names are looked up in {folder} of the repository, which is not here)")
    near = difflib.get_close_matches(value, names, n=1)
    suggestion = f" (did you mean {near[0]!r}?)" if near else ""
    raise ConfigError(f"{what}, or --{section} with a name of {folder}: {', '.join(names)}{suggestion}")


def section_names(section: str) -> list[str]:
    """What may stand after --rl and --model: the names of the files in configs/methods and configs/models."""
    return sorted(file.stem for file in (CONFIGS / FOLDERS[section]).glob("*.yaml")) if section in FOLDERS else []


def decode(raw: Mapping[str, Any]) -> Config:
    try:
        return draccus.decode(Config, raw)
    except (DecodingError, ParsingError) as error:
        raise ConfigError(f"config: {error}") from error


def section_from(cls: type, given: Any, where: str) -> Any:
    """A section (SamplerConfig, say) with these settings, the others at their defaults. Raises ConfigError that begins with `where`."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where}: expected keys and values, found {type(given).__name__}")
    raw = to_dict(cls())
    _merge(raw, given, cls, where)
    return draccus.decode(cls, raw)


def to_dict(config: Any) -> dict[str, Any]:
    """Plain dictionaries and lists, as YAML and JSON want them."""
    return draccus.encode(config)


def to_yaml(config: Config) -> str:
    return write_yaml(to_dict(config))


def from_yaml(path: str | Path) -> Config:
    """The resolved configuration that a run directory keeps."""
    raw = to_dict(Config())
    _merge(raw, read_yaml(path), Config, str(path))
    try:
        return without_unread(check(decode(raw)))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def differences(old: Config, new: Config) -> list[str]:
    """`rl.steps: 40 -> 50`, one line a field."""
    leaves = [name for name, hint in _keys(Config) if not dataclasses.is_dataclass(hint)]
    here, there = to_dict(old), to_dict(new)
    pairs = [(name, _value(here, name), _value(there, name)) for name in leaves]
    # repr, because mappings of another order are another configuration.
    return [f"{name}: {a!r} -> {b!r}" for name, a, b in pairs if repr(a) != repr(b)]


def _value(tree: Any, name: str) -> Any:
    for key in name.split("."):
        tree = tree[key]
    return tree


def help_text(program: str) -> str:
    """Every key with its default, its choices and what it means."""
    lines = [
        f"usage: {program} --config FILE.yaml [--section.key VALUE ...]",
        "",
        "Later sources win: defaults below, then the file, then sections' files, then flags. - and _ are one in the names of flags.",
    ]
    for section in FOLDERS:
        lines.append(
            f"--{section} FILE.yaml lays a file over that section; --{section} NAME is one of {', '.join(section_names(section))}."
        )

    def describe(cls: type, default: Any, prefix: str) -> None:
        hints = get_type_hints(cls)
        lines.extend(["", f"{prefix[:-1] or 'run'}: {(cls.__doc__ or '').strip().splitlines()[0]}"])
        nested = []
        for field in dataclasses.fields(cls):
            value = getattr(default, field.name)
            if dataclasses.is_dataclass(value):
                nested.append((hints[field.name], value, f"{prefix}{field.name}."))
                continue
            choices = get_args(hints[field.name]) if get_origin(hints[field.name]) is Literal else ()
            shown = " | ".join(map(str, choices)) if choices else str(draccus.encode(value))
            flag = f"--{prefix}{field.name}"
            mark = f"[{value}] of {shown}" if choices else f"[{shown}]"
            lines.append(f"  {flag:<34} {field.metadata['help']}  {mark}".rstrip())
        for child in nested:
            describe(*child)

    describe(Config, Config(), "")
    return "\n".join(lines)


def _command_line(argv: Sequence[str]) -> list[tuple[str, str, str]]:
    """[(key, value, where it stood)] of flags in either spelling, --rl.group_size or --rl.group-size."""
    pairs, rest = [], list(argv)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            file = flag.endswith((".yaml", ".yml"))
            cure = f"--config {flag}" if file else "--section.key value"
            raise ConfigError(f"{COMMAND_LINE}: {shown(flag)} is not a flag; write {cure}")
        key, equals, value = flag[2:].partition("=")
        if not equals:
            if not rest:
                raise ConfigError(f"{COMMAND_LINE}: {flag} has no value")
            value = rest.pop(0)
        key = _underscored(key)
        pairs.append((key, value, value if key == "config" else f"{COMMAND_LINE}: --{key}"))
    return pairs


def _underscored(key: str) -> str:
    """--rl.group-size is --rl.group_size; the name of a reward or of an evaluation set is left as it is."""
    section, dot, name = key.replace("-", "_").rpartition(".")
    mapping = get_origin(_hint(section)) is dict
    return section + dot + (key.rpartition(".")[2] if mapping else name)


def _nested(dotted: str, value: str) -> dict[str, Any]:
    """'rl.steps', '50' -> {'rl': {'steps': 50}}. What is a text stays as it was typed; everything else is written as in YAML."""
    hint = _hint(dotted)
    as_typed = hint is str or (
        get_origin(hint) is Literal and all(isinstance(choice, str) for choice in get_args(hint))
    )
    node: Any = (
        value if as_typed else parse_yaml(value, f"{COMMAND_LINE}: --{dotted} {shown(value)} is not a YAML value")
    )
    for key in reversed(dotted.split(".")):
        node = {key: node}
    return node


def _hint(dotted: str) -> Any:
    """The type of the setting, or of an entry of a setting that is a mapping; None for an unknown name."""
    known = dict(_keys(Config))
    above, _, _ = dotted.rpartition(".")
    if dotted in known:
        return known[dotted]
    return get_args(known[above])[1] if get_origin(known.get(above)) is dict else None


def _named(given: Mapping[str, Any], cls: type, prefix: str = "") -> set[str]:
    """The full names of the settings in a mapping that `_merge` has accepted."""
    found: set[str] = set()
    for key, value in given.items():
        hint = get_type_hints(cls)[key]
        found |= _named(value, hint, f"{prefix}{key}.") if dataclasses.is_dataclass(hint) else {prefix + key}
    return found


def _merge(base: dict[str, Any], extra: Mapping[str, Any], cls: type, source: str, path: str = "") -> None:
    """Lays `extra` over `base` in place. Only sections merge; mappings that are values (reward_weights) are replaced."""
    hints = get_type_hints(cls)
    for key, value in extra.items():
        if key not in hints:
            meant = _meant(str(key), path, hints)
            suggestion = f" (did you mean '{meant}'?)" if meant else ""
            name = shown(f"{path}{key}")
            raise ConfigError(f"{source}: unknown key {name}{suggestion}; choices: {', '.join(hints)}")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, Mapping):
                raise ConfigError(
                    f"{source}: '{path}{key}' is a section; write '{path}{key}.<key>' (got {shown(value)})"
                )
            _merge(base[key], value, hints[key], source, f"{path}{key}.")
            continue
        base[key] = _typed(value, hints[key], path + key, source)


def _typed(value: Any, hint: Any, name: str, source: str) -> Any:
    """The value of a setting, of exactly the type that it must have. Raises ConfigError."""

    def wrong(problem: str) -> ConfigError:
        return ConfigError(f"{source}: {name} = {shown(value)} {problem}")

    if get_origin(hint) is Literal:
        choices = get_args(hint)
        if value in choices and isinstance(value, str):
            return value
        near = difflib.get_close_matches(str(value), choices, n=1)
        raise wrong(f"is not one of {', '.join(choices)}" + (f" (did you mean '{near[0]}'?)" if near else ""))
    if value is None:
        raise ConfigError(f"{source}: {name} has no value; write one, or leave the key out for its default")
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):  # a string would be read letter by letter
            raise wrong(f"is not a list; write [{shown(value).strip(chr(39))}]")
        return [_typed(item, get_args(hint)[0], f"{name}.{index}", source) for index, item in enumerate(value)]
    if get_origin(hint) is dict:
        if not isinstance(value, Mapping):
            raise wrong("is not a mapping; write {name: value}")
        keys = [_typed(key, str, f"a name in {name}", source) for key in value]
        return {key: _typed(value[key], get_args(hint)[1], f"{name}.{key}", source) for key in keys}
    if hint is bool:
        if not isinstance(value, bool):
            raise wrong("is no bool; write true or false")
        return value
    if hint is int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise wrong("is no int; write a whole number")
        return value
    if hint is float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong("is no float; write a number")
        if isinstance(value, int) and abs(value) > 2**1000:
            raise wrong("is too large for a float")
        return float(value)
    if not isinstance(value, str):
        quoted = f"; write it in quotes, '{value}'" if isinstance(value, bool | int | float) else ""
        raise wrong(f"is no text{quoted}")
    return value


def _meant(key: str, path: str, hints: Mapping[str, Any]) -> str | None:
    """The full name of the key that was meant: the same name in another section, or else a similar one here or there."""
    every = [name for name, _ in _keys(Config)]
    same = [name for name in every if name.rpartition(".")[2] == key]
    if same:
        return difflib.get_close_matches(path + key, same, n=1, cutoff=0)[0]
    here = difflib.get_close_matches(key, hints, n=1, cutoff=0.5)
    if here:
        return path + here[0]
    last = {name.rpartition(".")[2]: name for name in every}
    return next((last[match] for match in difflib.get_close_matches(key, last, n=1, cutoff=0.8)), None)


def _keys(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The full name of every section and key, and its type."""
    for key, hint in get_type_hints(cls).items():
        yield prefix + key, hint
        if dataclasses.is_dataclass(hint):
            yield from _keys(hint, f"{prefix}{key}.")
