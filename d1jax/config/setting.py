"""What a setting is: a field with its default, its meaning and its bounds on one line; and what its section forbids.

A *section* is a dataclass of settings. A *choice* is a setting whose value is one of several small dataclasses, told apart by their
`name`; each has the parameters that it reads and no others, so a parameter of another choice cannot be written.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

MOST = 2**31 - 1  # what an index can be: the largest whole number unless a setting says otherwise
Rule = tuple[bool, str]  # (broken, what to say)


def setting(
    default: Any,
    help: str,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> Any:
    """A field of a section. Bounds are of numbers: > above, >= at_least, < below, <= at_most."""
    metadata = {"help": help, "above": above, "at_least": at_least, "below": below, "at_most": at_most}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def choice(default: Any, help: str) -> Any:
    """A field whose value is one of several dataclasses (its type is their union)."""
    return dataclasses.field(default=default, metadata={"help": help, "choice": True})


def section(factory: Any) -> Any:
    """A field that is a section of its own."""
    return dataclasses.field(default_factory=factory)


def is_section(value: Any) -> bool:
    """Whether the value of a field is a section; a choice, which has a `name`, is a setting."""
    return dataclasses.is_dataclass(value) and not is_choice(value)


def is_choice(value: Any) -> bool:
    named = dataclasses.is_dataclass(value) and isinstance(getattr(type(value), "name", None), str)
    return named and all(field.name != "name" for field in dataclasses.fields(value))  # `task.name` is a setting


def settings(part: Any, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field]]:
    """(full name, value, field) of every setting of a section, and of every parameter of its choices.

    The value of a choice is its name; its parameters follow, as `rl.estimator.samples` follows `rl.estimator`.
    """
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if is_choice(value):
            yield prefix + field.name, value.name, field
        if dataclasses.is_dataclass(value):
            yield from settings(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value, field


def rules_of(part: Any, path: str = "") -> Iterator[Rule]:
    """What the sections and choices of a section forbid; each has a method `rules` where it forbids anything.

    A section names its settings in full. A choice, which may stand in several sections, does not know where: its `path` is put before.
    """
    if hasattr(part, "rules"):
        where = f"{path}: " if is_choice(part) else ""
        yield from ((broken, where + message) for broken, message in part.rules())
    yield from rules_of_fields(part, path)


def rules_of_fields(part: Any, path: str = "") -> Iterator[Rule]:
    """`rules_of` the sections and choices in a section, without its own."""
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if dataclasses.is_dataclass(value):
            yield from rules_of(value, f"{path}.{field.name}" if path else field.name)


def value_at(part: Any, name: str) -> Any:
    """The value under a full name, e.g. `rl.optimizer.beta1`; None for a parameter that the choice does not have."""
    for key in name.split("."):
        part = getattr(part, key, None)
    return part


def bounds(part: Any, prefix: str = "") -> Iterator[Rule]:
    """The bounds of every number in a section."""
    for name, value, field in settings(part, prefix):
        if type(value) in (int, float):
            yield from _bounds_of(name, value, field.metadata)


def _bounds_of(name: str, value: float, limits: Any) -> Iterator[Rule]:
    above, at_least, below, at_most = (limits.get(key) for key in ("above", "at_least", "below", "at_most"))
    written = f"{name} = {value}"
    if isinstance(value, float):
        yield not math.isfinite(value), f"{written} must be a finite number"
    low = (above is not None and value <= above) or (at_least is not None and value < at_least)
    high = (below is not None and value >= below) or (at_most is not None and value > at_most)
    if isinstance(value, float) and (above, at_least) != (None, None) and (below, at_most) != (None, None):
        opening, closing = ("(" if at_least is None else "["), (")" if at_most is None else "]")
        first, last = (above if at_least is None else at_least), (below if at_most is None else at_most)
        yield low or high, f"{written} must lie in {opening}{first:g}, {last:g}{closing}"
        return
    if above is not None:
        yield low, f"{written} must be above {above:g}"
    if at_least is not None:
        yield low, f"{written} must not be negative" if at_least == 0 else f"{written} must be at least {at_least:g}"
    if isinstance(value, int):
        most = MOST if at_most is None else at_most
        yield value > most, f"{written} is more than {most}, the most there may be"
    elif at_most is not None:
        yield high, f"{written} must be at most {at_most:g}"


def with_fields(cls: type) -> type:
    """A class decorator: adds every field, its default and its meaning to the docstring, which is what `help(SamplerConfig)` shows."""
    told = []
    for field in dataclasses.fields(cls):
        if "help" in field.metadata:
            default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
            told.append(f"    {field.name} = {default!r}: {field.metadata['help']}")
        else:
            told.append(f"    {field.name}: a {field.type}, whose fields are described there")
    cls.__doc__ = f"{(cls.__doc__ or '').rstrip()}\n\n    Fields, with their defaults:\n\n" + "\n".join(told) + "\n    "
    return cls
