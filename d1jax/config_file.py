"""YAML files and command lines -> Config, and back.

    config = parse(["--config", "configs/quickstart.yaml", "--rl.steps", "50"])

YAML is read by draccus (so `!include` works and `1e-6` is a float where the field is one). Later sources win: defaults of
the dataclasses, then the file, then the command line. Every mistake is a `ConfigError` that names the key, its value and the cure.
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
from d1jax.config_rules import check


def own_flags(argv: Sequence[str], names: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """({name: value} of a command's own flags, the rest for `parse`). Raises ConfigError for a flag without a value."""
    own, rest, queue = {}, [], list(argv)
    while queue:
        flag = queue.pop(0)
        name, equals, value = flag[2:].partition("=")
        if flag.startswith("--") and name in names:
            if not equals and not queue:
                raise ConfigError(f"command line: {flag} has no value")
            own[name] = value if equals else queue.pop(0)
        else:
            rest.append(flag)
    return own, rest


def parse(argv: Sequence[str]) -> Config:
    """`--config file.yaml` and `--a.b value` (or `--a.b=value`) -> a checked Config. Raises ConfigError."""
    raw = to_dict(Config())
    for key, value, source in _command_line(argv):
        _merge(raw, _given(key, value), Config, source)
    return check(decode(raw))


def _given(key: str, value: str) -> dict[str, Any]:
    """What a flag says: a whole file, a section from a file (--model configs/models/dream_7b.yaml), or a value."""
    if key == "config":
        return _read_yaml(value)
    if (
        key in get_type_hints(Config)
        and dataclasses.is_dataclass(get_type_hints(Config)[key])
        and value.endswith(".yaml")
    ):
        return {key: _read_yaml(value)}
    return _nested(key, value)


def decode(raw: Mapping[str, Any]) -> Config:
    try:
        return draccus.decode(Config, raw)
    except (DecodingError, ParsingError) as error:
        raise ConfigError(f"config: {error}") from error


def to_dict(config: Any) -> dict[str, Any]:
    """Plain dictionaries and lists, as YAML and JSON want them."""
    return draccus.encode(config)


def to_yaml(config: Config) -> str:
    return draccus.dump(config, sort_keys=False)  # the first evaluation set is the headline: order means something


def from_yaml(path: str | Path) -> Config:
    """The resolved configuration that a run directory keeps."""
    raw = to_dict(Config())
    _merge(raw, _read_yaml(str(path)), Config, str(path))
    return check(decode(raw))


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
        "Later sources win: defaults below, then the file, then the command line.",
    ]

    def describe(cls: type, default: Any, prefix: str) -> None:
        hints = get_type_hints(cls)
        lines.extend(["", f"{prefix[:-1] or 'run'}: {(cls.__doc__ or '').strip()}"])
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
    """[(key, value, where it stood)], with the config file first so that flags win wherever it stands."""
    pairs, rest = [], list(argv)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise ConfigError(f"command line: {flag!r} is not a flag; write --section.key value")
        key, equals, value = flag[2:].partition("=")
        if not equals:
            if not rest:
                raise ConfigError(f"command line: {flag} has no value")
            value = rest.pop(0)
        pairs.append((key, value, value if key == "config" else f"command line: --{key}"))
    return sorted(pairs, key=lambda pair: pair[0] != "config")


def _read_yaml(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise ConfigError(f"config file {path!r} does not exist")
    try:
        with open(path, encoding="utf-8") as stream:
            loaded = draccus.cfgparsing.load_config(stream, file=path)
    except (ParsingError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error.__cause__ or error}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(loaded).__name__}")
    return loaded


def _nested(dotted: str, value: str) -> dict[str, Any]:
    """'rl.steps', '50' -> {'rl': {'steps': 50}}; the value is YAML, so lists and mappings can be written too."""
    try:
        node: Any = draccus.cfgparsing.parse_string(value)
    except Exception as error:
        raise ConfigError(f"command line: --{dotted} {value!r} is not a YAML value: {error}") from error
    for key in reversed(dotted.split(".")):
        node = {key: node}
    return node


def _merge(base: dict[str, Any], extra: Mapping[str, Any], cls: type, source: str, path: str = "") -> None:
    """Lays `extra` over `base` in place. Only sections merge; mappings that are values (reward_weights) are replaced."""
    hints = get_type_hints(cls)
    for key, value in extra.items():
        if key not in hints:
            meant = _meant(str(key), path, hints)
            suggestion = f" (did you mean '{meant}'?)" if meant else ""
            raise ConfigError(f"{source}: unknown key '{path}{key}'{suggestion}; choices: {', '.join(hints)}")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{source}: '{path}{key}' is a section; write '{path}{key}.<key>' (got {value!r})")
            _merge(base[key], value, hints[key], source, f"{path}{key}.")
            continue
        if get_origin(hints[key]) is Literal and value not in get_args(hints[key]):
            choices = get_args(hints[key])
            near = difflib.get_close_matches(str(value), choices, n=1)
            suggestion = f" (did you mean '{near[0]}'?)" if near else ""
            raise ConfigError(f"{source}: {path}{key} = {value!r} is not one of {', '.join(choices)}{suggestion}")
        if value is None:
            raise ConfigError(f"{source}: {path}{key} has no value; write one, or leave the key out for its default")
        if get_origin(hints[key]) is tuple and not isinstance(value, (list, tuple)):
            # A string would be read letter by letter.
            raise ConfigError(f"{source}: {path}{key} = {value!r} is not a list; write [{value}]")
        base[key] = value


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
