"""A configuration as it is written down: in a run's config.yaml, in a checkpoint's generation_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_origin

from d1jax.config.check import check
from d1jax.config.errors import UserError
from d1jax.config.no_effect import without_unread
from d1jax.config.older import of_older_run, of_older_sampler
from d1jax.config.sampler import SamplerConfig
from d1jax.config.schema import Config
from d1jax.config.values import build, keys_of, merge, plain
from d1jax.config.yaml_text import read_yaml, write_yaml


def to_yaml(config: Config) -> str:
    """The text of config.yaml, which `from_yaml` reads back as this configuration."""
    return write_yaml(plain(config))


def from_yaml(path: str | Path) -> Config:
    """The resolved configuration that a run directory keeps; one of d1jax 0.1 is read under today's names. Raises UserError."""
    raw = plain(Config())
    merge(raw, of_older_run(read_yaml(path), str(path)), Config, str(path))
    try:
        return without_unread(check(build(Config, raw)))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def sampler_from(given: Any, where: str) -> SamplerConfig:
    """The sampler that plain values describe, those of d1jax 0.1 too. Raises UserError that begins with `where`."""
    return section_from(SamplerConfig, of_older_sampler(given) if isinstance(given, Mapping) else given, where)


def section_from(cls: type, given: Any, where: str) -> Any:
    """A section (SamplerConfig, say) with these settings, the others at their defaults. Raises UserError that begins with `where`."""
    if not isinstance(given, Mapping):
        raise UserError(f"{where}: expected keys and values, found {type(given).__name__}")
    raw = plain(cls())
    merge(raw, given, cls, where)
    return build(cls, raw)


def differences(old: Config, new: Config) -> list[str]:
    """`rl.steps: 40 -> 50`, one line a setting; a parameter that a choice does not have is left out."""
    here, there = flat(old), flat(new)
    # repr, because mappings of another order are another configuration.
    return [
        f"{name}: {here[name]!r} -> {there[name]!r}"
        for name in here
        if name in there and repr(here[name]) != repr(there[name])
    ]


def flat(config: Config) -> dict[str, Any]:
    """{full name: plain value} of every setting; of a choice its name, and its parameters under it."""
    return _flat(plain(config))


@cache
def _mappings() -> frozenset[str]:
    """The settings whose value is a mapping, which is no section."""
    return frozenset(name for name, hint in keys_of(Config) if get_origin(hint) is dict)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or prefix in _mappings():
        return {prefix: tree}
    flat = {prefix: tree["name"]} if prefix and "name" in tree and prefix != "task" else {}
    for key, value in tree.items():
        if key != "name" or prefix in ("", "task"):
            flat |= _flat(value, f"{prefix}.{key}" if prefix else key)
    return flat
