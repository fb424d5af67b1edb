"""What the help and the log say of settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from d1jax.config.flags import COMMAND_LINE
from d1jax.config.no_effect import idle_stages
from d1jax.config.parse import FOLDERS, section_names
from d1jax.config.schema import Config
from d1jax.config.setting import is_choice, is_section, value_at
from d1jax.config.values import alternatives, hints_of, plain


def describe_origins(config: Config, origins: Mapping[str, str]) -> list[str]:
    """A line a file, and one for the flags: which settings that differ from the defaults come from it."""
    by_source: dict[str, list[str]] = {}
    for name, source in origins.items():
        flag = source.startswith(COMMAND_LINE)
        value = value_at(config, name)
        told = value.name if is_choice(value) else plain(value)
        by_source.setdefault(COMMAND_LINE if flag else source, []).append(f"{name} = {told}")
    idle = [f"the settings of {kind!r} have no effect: no stage is of that kind" for kind in idle_stages(config)]
    return idle + [
        f"settings from {'the ' if source == COMMAND_LINE else ''}{source}: {', '.join(found)}"
        for source, found in by_source.items()
    ]


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
    lines.extend(_described(Config(), ""))
    return "\n".join(lines)


def _described(part: Any, prefix: str) -> list[str]:
    """A section, its settings, then the sections in it."""
    hints = hints_of(type(part))
    lines = ["", f"{prefix[:-1] or 'run'}: {(type(part).__doc__ or '').strip().splitlines()[0]}"]
    inner = []
    for field in dataclasses.fields(part):
        value, hint, name = getattr(part, field.name), hints[field.name], f"{prefix}{field.name}"
        if is_section(value):
            inner.append((value, f"{name}."))
        elif named := alternatives(hint):
            lines.append(_line(name, f"{field.metadata['help']}  [{value.name}] of {' | '.join(named)}"))
            lines.extend(line for cls in named.values() for line in _parameters(cls, name))
        else:
            choices = " | ".join(map(str, get_args(hint))) if get_origin(hint) is Literal else ""
            mark = f"[{value}] of {choices}" if choices else f"[{plain(value)}]"
            lines.append(_line(name, f"{field.metadata['help']}  {mark}"))
    for section, name in inner:
        lines.extend(_described(section, name))
    return lines


def _parameters(cls: type, name: str) -> list[str]:
    """The parameters of one choice."""
    default = cls()
    return [
        _line(f"{name}.{field.name}", f"{cls.name}: {field.metadata['help']}  [{getattr(default, field.name)}]")
        for field in dataclasses.fields(cls)
    ]


def _line(name: str, told: str) -> str:
    return f"  --{name:<32} {told}".rstrip()
