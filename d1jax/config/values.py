"""Plain values (what YAML and JSON hold) <-> dataclasses, by the types of their fields; every mistake with its place and cure."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from functools import cache
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from d1jax.config.errors import UserError
from d1jax.config.setting import is_choice
from d1jax.config.yaml_text import shown


class WithChoices:
    """A section with choices: in Python, too, the name of a choice may stand for it, as in `SamplerConfig(schedule="threshold")`."""

    def __post_init__(self) -> None:
        for name, hint in hints_of(type(self)).items():
            value, named = getattr(self, name), alternatives(hint)
            if named and isinstance(value, str):
                chosen = typed(value, Literal[tuple(named)], name, type(self).__name__)
                object.__setattr__(self, name, named[chosen]())


@cache
def hints_of(cls: type) -> dict[str, Any]:
    """{field: type} of a section or of a choice."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def alternatives(hint: Any) -> dict[str, type]:
    """{name: class} of a choice; {} for every other type."""
    return {cls.name: cls for cls in get_args(hint)} if isinstance(hint, UnionType) else {}


def plain(value: Any) -> Any:
    """Dictionaries, lists, texts and numbers. A choice is {"name": ..., its parameters}, or its name where it has none."""
    if hasattr(value, "short"):  # a stage
        return value.short
    if dataclasses.is_dataclass(value):
        fields = {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        if is_choice(value):
            return {"name": value.name, **fields} if fields else value.name
        return fields
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return dict(value) if isinstance(value, Mapping) else value


def build(cls: type, raw: Mapping[str, Any]) -> Any:
    """The section that plain values, which `merge` has accepted, describe."""
    return cls(**{key: _built(hint, raw[key]) for key, hint in hints_of(cls).items()})


def _built(hint: Any, value: Any) -> Any:
    if named := alternatives(hint):
        given = {"name": value} if isinstance(value, str) else value
        cls = named[given["name"]]
        return cls(**{key: _built(kind, given[key]) for key, kind in hints_of(cls).items()})
    if is_section_type(hint):
        return build(hint, value)
    if get_origin(hint) is tuple:
        return tuple(_built(get_args(hint)[0], item) for item in value)
    if hasattr(hint, "from_plain") and not isinstance(value, hint):  # a stage as `plain` writes it
        return hint.from_plain(value, hint.__name__.lower(), "config")
    return value


def merge(
    base: dict[str, Any], extra: Mapping[str, Any], cls: type, source: str, path: str = "", root: type | None = None
) -> None:
    """Lays `extra` over `base` in place. Sections merge, and a choice does while its name stays; mappings that are values are replaced.

    Raises UserError that begins with `source`; for an unknown key it suggests one of `root` (None: of `cls`).
    """
    hints, root = hints_of(cls), root or cls
    for key, value in extra.items():
        name = f"{path}{key}"
        if key not in hints:
            near = _meant(str(key), path, hints, root)
            suggestion = f" (did you mean '{near}'?)" if near else ""
            raise UserError(f"{source}: unknown key {shown(name)}{suggestion}; choices: {', '.join(hints)}")
        hint = hints[key]
        if named := alternatives(hint):
            base[key] = _merged_choice(base[key], value, named, source, name)
        elif is_section_type(hint):
            if not isinstance(value, Mapping):
                raise UserError(f"{source}: '{name}' is a section; write '{name}.<key>' (got {shown(value)})")
            merge(base[key], value, hint, source, f"{name}.", root)
        else:
            base[key] = typed(value, hint, name, source)


def _merged_choice(base: Any, value: Any, named: Mapping[str, type], source: str, path: str) -> Any:
    """The plain form of a choice after `value`, a name or a mapping of parameters, was laid over it."""
    before = {"name": base} if isinstance(base, str) else base
    given = {"name": value} if isinstance(value, str) else value
    if not isinstance(given, Mapping):
        raise UserError(f"{source}: {path} = {shown(value)} is not one of {', '.join(named)}")
    name = given.get("name", before["name"])
    if not isinstance(name, str) or name not in named:
        near = difflib.get_close_matches(str(name), named, n=1)
        suggestion = f" (did you mean '{near[0]}'?)" if near else ""
        raise UserError(f"{source}: {path} = {shown(name)} is not one of {', '.join(named)}{suggestion}")
    cls = named[name]
    made = dict(before) if name == before["name"] else {"name": name, **plain_fields(cls())}
    for key, one in given.items():
        if key == "name":
            continue
        if key not in hints_of(cls):
            raise UserError(f"{source}: {_no_such_parameter(path, name, str(key), named)}")
        made[key] = typed(one, hints_of(cls)[key], f"{path}.{key}", source)
    return made


def plain_fields(value: Any) -> dict[str, Any]:
    return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}


def _no_such_parameter(path: str, name: str, key: str, named: Mapping[str, type]) -> str:
    owners = [other for other, cls in named.items() if key in hints_of(cls)]
    if owners:
        return f"{path}.{key} belongs to {path} = {' or '.join(owners)}, not to {name}; choose that, or leave it out"
    own = list(hints_of(named[name]))
    near = difflib.get_close_matches(key, {k for cls in named.values() for k in hints_of(cls)}, n=1)
    suggestion = f" (did you mean '{path}.{near[0]}'?)" if near else ""
    return f"unknown key {shown(f'{path}.{key}')}{suggestion}; {name} has {', '.join(own) or 'no parameters'}"


def typed(value: Any, hint: Any, name: str, source: str) -> Any:
    """The value of a setting, of exactly the type that it must have. Raises UserError."""

    def wrong(problem: str) -> UserError:
        return UserError(f"{source}: {name} = {shown(value)} {problem}")

    if get_origin(hint) is Literal:
        choices = get_args(hint)
        if value in choices and isinstance(value, str):
            return value
        near = difflib.get_close_matches(str(value), choices, n=1)
        raise wrong(f"is not one of {', '.join(choices)}" + (f" (did you mean '{near[0]}'?)" if near else ""))
    if hint is Any:
        return plain(value)
    if value is None:
        raise UserError(f"{source}: {name} has no value; write one, or leave the key out for its default")
    if hasattr(hint, "from_plain"):
        return hint.from_plain(value, name, source)
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):  # a string would be read letter by letter
            raise wrong(f"is not a list; write [{shown(value).strip(chr(39))}]")
        return [typed(item, get_args(hint)[0], f"{name}.{index}", source) for index, item in enumerate(value)]
    if get_origin(hint) is dict:
        if not isinstance(value, Mapping):
            raise wrong("is not a mapping; write {name: value}")
        keys = [typed(key, str, f"a name in {name}", source) for key in value]
        return {key: typed(value[key], get_args(hint)[1], f"{name}.{key}", source) for key in keys}
    return _scalar(value, hint, wrong)


def _scalar(value: Any, hint: Any, wrong: Any) -> Any:
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


def keys_of(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The full name of every section, setting and parameter of a choice, and its type."""
    for key, hint in hints_of(cls).items():
        yield prefix + key, hint
        inner = [hint] if is_section_type(hint) else list(alternatives(hint).values())
        for one in inner:
            yield from keys_of(one, f"{prefix}{key}.")


def is_section_type(hint: Any) -> bool:
    return dataclasses.is_dataclass(hint) and not hasattr(hint, "from_plain")


def _meant(key: str, path: str, hints: Mapping[str, Any], root: type) -> str | None:
    """The full name of the key that was meant: the same name in another section, or else a similar one here or there."""
    every = list(dict(keys_of(root)))
    same = [name for name in every if name.rpartition(".")[2] == key]
    if same:
        return difflib.get_close_matches(path + key, same, n=1, cutoff=0)[0]
    here = difflib.get_close_matches(key, hints, n=1, cutoff=0.5)
    if here:
        return path + here[0]
    last = {name.rpartition(".")[2]: name for name in every}
    return next((last[match] for match in difflib.get_close_matches(key, last, n=1, cutoff=0.8)), None)
