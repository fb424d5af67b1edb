"""Command lines: flags in either spelling, and the value that each gives to a setting."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cache
from typing import Any, Literal, get_args, get_origin

from d1jax.config.errors import UserError
from d1jax.config.schema import Config
from d1jax.config.values import alternatives, keys_of
from d1jax.config.version import __version__
from d1jax.config.yaml_text import parse_yaml, shown

COMMAND_LINE = "command line"


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


def split_switch(argv: Sequence[str], name: str) -> tuple[bool, list[str]]:
    """(whether a command's own flag without a value is given, the rest)."""
    rest = [argument for argument in argv if argument != f"--{name}"]
    return len(rest) < len(argv), rest


def split_flags(argv: Sequence[str], names: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """({name: value} of a command's own flags, the rest for `parse`). Raises UserError for a flag without a value."""
    own, rest, queue = {}, [], list(argv)
    while queue:
        flag = queue.pop(0)
        key, equals, value = flag[2:].partition("=")
        name = key.replace("-", "_")
        if flag.startswith("--") and name in names:
            if not equals and not queue:
                raise UserError(f"command line: {flag} has no value")
            if name in own:
                raise UserError(f"command line: {flag} is given twice; once is meant")
            own[name] = value if equals else queue.pop(0)
        else:
            rest.append(flag)
    return own, rest


def command_line_pairs(argv: Sequence[str]) -> list[tuple[str, str, str]]:
    """[(key, value, where it stood)] of flags in either spelling, --rl.num_generations or --rl.num-generations."""
    pairs, rest = [], list(argv)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            file = flag.endswith((".yaml", ".yml"))
            cure = f"--config {flag}" if file else "--section.key value"
            raise UserError(f"{COMMAND_LINE}: {shown(flag)} is not a flag; write {cure}")
        key, equals, value = flag[2:].partition("=")
        if not equals:
            if not rest:
                raise UserError(f"{COMMAND_LINE}: {flag} has no value")
            value = rest.pop(0)
        key = _underscored(key)
        pairs.append((key, value, value if key == "config" else f"{COMMAND_LINE}: --{key}"))
    return pairs


def _underscored(key: str) -> str:
    """--rl.num-generations is --rl.num_generations; the name of a reward or of an evaluation set is left as it is."""
    section, dot, name = key.replace("-", "_").rpartition(".")
    mapping = get_origin(_hint(section)) is dict
    return section + dot + (key.rpartition(".")[2] if mapping else name)


def nested(dotted: str, value: str) -> dict[str, Any]:
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
    known = _known()
    above, _, _ = dotted.rpartition(".")
    if dotted in known:
        return known[dotted]
    return get_args(known[above])[1] if get_origin(known.get(above)) is dict else None


@cache
def _known() -> dict[str, Any]:
    return dict(keys_of(Config))


def chooses(key: str) -> bool:
    """Whether a flag makes a choice (--rl.estimator, --rl.estimator.name), which counts before the parameters of that choice."""
    return bool(alternatives(_hint(key.removesuffix(".name"))))
