"""The sampler's settings as flags of a command, by short names: --length, --block, --schedule threshold --threshold 0.9."""

from __future__ import annotations

import argparse
import dataclasses
import re
from typing import Any, Literal, get_args, get_origin

from d1jax.config import Config, SamplerConfig, UserError
from d1jax.config.check import check
from d1jax.config.no_effect import check_sampler, with_effect
from d1jax.config.values import alternatives, build, hints_of, merge, plain

SIZES = {"completion_length": "length", "block_length": "block", "steps": "steps"}
# Parameters of choices: the flag, and where it belongs.
PARAMETERS = {
    "threshold": ("schedule", "threshold"),
    "kl_threshold": ("schedule", "kl_threshold"),
    "factor": ("schedule", "factor"),
    "entropy_bound": ("schedule", "bound"),
    "cache_refresh": ("cache", "refresh"),
    "remasking_temperature": ("remasking", "temperature"),
    "confidence_of": ("remasking", "confidence_of"),
}
RULES = [field for field in dataclasses.fields(SamplerConfig) if field.name not in SIZES]


def add_sampler_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the sampler's settings."""
    parser.add_argument("--length", type=int, help="new tokens [as the model says, or 128]")
    parser.add_argument("--block", type=int, help="tokens of a block [as the model says, or 32]")
    parser.add_argument(
        "--steps", type=int, help="denoising steps over all blocks [as many a token as the model says, or one for two]"
    )
    rules = parser.add_argument_group("how to decode [as the model says, or the first named]")
    for field in RULES:
        hint, flag, text = hints_of(SamplerConfig)[field.name], _flag(field.name), field.metadata["help"]
        text = text.replace("%", "%%")
        if hint is bool:
            rules.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        elif get_origin(hint) is Literal:
            rules.add_argument(flag, choices=get_args(hint), help=text)
        elif alternatives(hint):
            rules.add_argument(flag, choices=list(alternatives(hint)), help=text)
        else:
            rules.add_argument(flag, type=hint, help=f"{text} [{field.default}]")
    for name, (choice, key) in PARAMETERS.items():
        owners = {n: cls for n, cls in alternatives(hints_of(SamplerConfig)[choice]).items() if key in hints_of(cls)}
        cls = next(iter(owners.values()))
        parameter = {one.name: one for one in dataclasses.fields(cls)}[key]
        told = f"--{choice} {' or '.join(owners)}: {parameter.metadata['help']} [{parameter.default}]"
        hint = hints_of(cls)[key]
        kind = {"choices": get_args(hint)} if get_origin(hint) is Literal else {"type": hint}
        rules.add_argument(_flag(name), **kind, help=told)


def sampler_from_flags(arguments: argparse.Namespace, base: SamplerConfig) -> SamplerConfig:
    """What the flags say, laid over `base`. Raises UserError, in the words of the flags."""
    sizes = _sizes(arguments, base)
    named = {field.name: value for field in RULES if (value := getattr(arguments, field.name)) is not None}
    given: dict[str, Any] = dict(named)
    flags = {name: _flag(name) for name in (*named, *(["steps"] if arguments.steps else []))}
    for name, (choice, key) in PARAMETERS.items():
        value = getattr(arguments, name)
        if value is not None:
            made = given.get(choice, {})
            made = {"name": made} if isinstance(made, str) else made
            given[choice] = {**made, key: value}
            flags[f"{choice}.{key}"] = _flag(name)
    try:
        raw = plain(base) | sizes
        merge(raw, given, SamplerConfig, "generate")
        config = build(SamplerConfig, raw)
        check_sampler(config, arguments.temperature, flags)
        config = with_effect(config, arguments.temperature)
        check(Config(sampler=config))
    except UserError as error:
        raise UserError(_in_flags(str(error))) from None
    return config


def _sizes(arguments: argparse.Namespace, base: SamplerConfig) -> dict[str, int]:
    """Length, block and steps; what is not given keeps the proportions of `base`."""
    for name in SIZES.values():
        size = getattr(arguments, name)
        if size is not None and size < 1:
            raise UserError(f"--{name} {size} must be above 0; leave it out for what the model says")
    length = arguments.length or base.completion_length
    widest = min(arguments.block or base.block_length, length)
    block = arguments.block or next((size for size in range(widest, 0, -1) if length % size == 0), 1)
    if not arguments.block and block * 4 < widest:
        near = [size for size in (length // widest * widest, -(-length // widest) * widest) if size]
        raise UserError(
            f"--length {length} has no block near {widest} tokens (the next is {block}); try --length {' or '.join(map(str, near))}, "
            "or name a --block"
        )
    blocks = max(length // block, 1)
    per_token = base.steps / base.completion_length
    steps = arguments.steps or max(round(length * per_token / blocks), 1) * blocks
    return {"completion_length": length, "block_length": block, "steps": steps}


def _in_flags(message: str) -> str:
    """A message about settings in the words of the flags."""
    for name, (choice, key) in PARAMETERS.items():
        message = re.sub(rf"(sampler\.)?{choice}\.{key}\b", _flag(name), message)
    message = re.sub(r"sampler\.(\w+)", lambda found: _flag(found[1]), message)
    return re.sub(r"(--|\b)(schedule|cache|remasking) = ", lambda found: f"--{found[2]} ", message)


def _flag(name: str) -> str:
    return "--" + SIZES.get(name, name).replace("_", "-")
