"""YAML as d1jax reads and writes it: the core schema of YAML 1.2, distinct keys, `!include FILE.yaml`, and nothing executed.

PyYAML does the reading; this says which plain scalars are numbers. Under YAML 1.1, PyYAML's own rules, 010 is eight, 12:30 is
750, yes is true and 1e-6 is a text. Here 1e-6 is a number, true and false are the only booleans, and the others are texts.
"""

from __future__ import annotations

import re
import reprlib
from pathlib import Path
from typing import Any

import yaml

from d1jax.config.errors import UserError

DEEPEST = 50  # files that include each other
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_SHORT.maxlevel = 3
_SCALARS = (
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", "~nN\0"),
    ("tag:yaml.org,2002:int", r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("tag:yaml.org,2002:merge", r"<<", "<"),
)


class _InThisFile(UserError):
    """A mistake in the text that is being read, not in a file that it includes; begins with its line."""


def shown(value: Any) -> str:
    """A value for an error message: `repr`, cut short."""
    return _SHORT.repr(value)


class _Loader(yaml.SafeLoader):
    """`folder` is where includes are looked up (None: there are none), `depth` how many files this one is included by."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    folder: Path | None = None
    depth = 0

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        first: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str | int | float):
                raise _InThisFile(f"line {line}: a key must be a name, not a {type(key).__name__}")
            if key in first:
                raise _InThisFile(
                    f"line {line}: key {shown(key)} stands there twice, first in line {first[key]}; keep one of them"
                )
            first[key] = line
        return super().construct_mapping(node, deep=deep)

    def include(self, node: yaml.Node) -> dict[str, Any]:
        line = node.start_mark.line + 1
        if self.folder is None or not isinstance(node, yaml.ScalarNode):
            raise _InThisFile(f"line {line}: !include needs a file name and stands in a file; write !include FILE.yaml")
        path = self.folder / node.value
        if path.suffix not in (".yaml", ".yml") or not path.is_file():
            raise _InThisFile(f"line {line}: !include {shown(node.value)} is no .yaml file next to this one")
        if self.depth == DEEPEST:
            raise _InThisFile(f"line {line}: {DEEPEST} files include each other; do they go round in a circle?")
        return read_yaml(path, self.depth + 1)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), [c if c != "\0" else "" for c in _first])
_Loader.add_constructor("!include", _Loader.include)


def read_yaml(path: str | Path, depth: int = 0) -> dict[str, Any]:
    """The keys and values of a file; {} where it is empty. Raises UserError that names the file and line, not its contents."""
    path = Path(path)
    try:
        if not path.is_file():
            raise UserError(f"config file {shown(str(path))} does not exist")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not readable as YAML: {error}") from None
    loaded = _load(text, str(path), path.parent, depth)
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: expected keys and values, found {type(loaded).__name__}")
    return loaded


def parse_yaml(text: str, where: str) -> Any:
    """The value that a text spells. Raises UserError that begins with `where`."""
    return _load(text, where, None, 0)


def _load(text: str, where: str, folder: Path | None, depth: int) -> Any:
    try:
        loader = _Loader(text)
        loader.folder, loader.depth = folder, depth
        return loader.get_single_data()
    except _InThisFile as error:
        raise UserError(f"{where}: {error}") from None
    except UserError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark is not None else ""
        raise UserError(f"{where}: not readable as YAML: {line}{error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a number of too many digits, brackets in brackets
        first = str(error).partition("\n")[0]
        raise UserError(f"{where}: not readable as YAML: {type(error).__name__}: {first[:100]}") from None


def write_yaml(value: Any) -> str:
    """The text that `read_yaml` reads back as this value; keys keep their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
