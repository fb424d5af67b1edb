"""What `--model_args` of the harness may say to d1jax, and what a request's generation arguments mean for the sampler."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from d1jax.config import Config, MeshConfig, SamplerConfig, UserError
from d1jax.config.check import check
from d1jax.config.no_effect import no_effect, with_effect
from d1jax.config.values import typed
from d1jax.config.yaml_text import shown
from d1jax.inference.policy import sampler_of
from d1jax.inference.sampler_flags import PARAMETERS, RULES, sampler_from_flags

PLACE = "--model_args"
LOG = logging.getLogger(__name__)
KINDS: dict[str, Any] = {
    "pretrained": str,
    "dtype": Literal["float32", "bfloat16"],
    "adapter": str,
    "tokenizer": str,
    "data": int,
    "fsdp": int,
    "tensor": int,
    "samples": int,
    "seed": int,
    "check_greedy": bool,
    "max_length": int,
    "batch_size": int,
    "steps_per_token": float,
    "length": int,
    "block": int,
}
OF_SAMPLER = (*(field.name for field in RULES), *PARAMETERS)
LOWEST = {"samples": 1, "max_length": 2, "batch_size": 1, "length": 1, "block": 1}
OF_HARNESS = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}


@dataclass(frozen=True)
class HarnessSettings:
    """What a model of the harness was made with."""

    pretrained: str
    sampler: SamplerConfig
    steps_per_token: float
    mesh: MeshConfig
    dtype: str | None
    adapter: str | None
    tokenizer: str | None
    samples: int  # most passes of a log-likelihood
    seed: int
    check_greedy: bool
    max_length: int | None
    batch_size: int


class Generating(NamedTuple):
    """How a request wants its text."""

    sampler: SamplerConfig
    temperature: float
    tokens: int  # at most; the sampler may write up to a block more, which is cut off
    until: tuple[str, ...]


def settings_of(given: Mapping[str, Any]) -> HarnessSettings:
    """The settings that the arguments describe; what is not given is the checkpoint's way of sampling, 128 samples, seed 0.

    Raises UserError, in the words of --model_args, before any weights are read.
    """
    # The harness names a device, "cuda:0" unless told otherwise; here JAX chooses. It gives a batch size as text.
    given = {key: value for key, value in given.items() if key != "device" and (value is not None or key in OF_SAMPLER)}
    if str(given.get("batch_size", "")).isdecimal():
        given["batch_size"] = int(given["batch_size"])
    _refuse(given)
    values = {key: typed(given[key], kind, key, PLACE) for key, kind in KINDS.items() if key in given}
    if "pretrained" not in values:
        raise UserError(f"{PLACE}: pretrained is missing; write {PLACE} pretrained=DIR, a checkpoint or a run")
    for key, least in LOWEST.items():
        if values.get(key, least) < least:
            raise UserError(f"{PLACE}: {key} = {values[key]} must be at least {least}")
    if not 0 <= values.get("seed", 0) < 2**32:
        raise UserError(f"{PLACE}: seed = {values['seed']} must be between 0 and 2**32 - 1")
    sampler, steps_per_token = _sampler(given, values)
    return HarnessSettings(
        pretrained=values["pretrained"],
        sampler=sampler,
        steps_per_token=steps_per_token,
        mesh=MeshConfig(values.get("data", -1), values.get("fsdp", 1), values.get("tensor", 1)),
        dtype=values.get("dtype"),
        adapter=values.get("adapter"),
        tokenizer=values.get("tokenizer"),
        samples=values.get("samples", 128),
        seed=values.get("seed", 0),
        check_greedy=values.get("check_greedy", True),
        max_length=values.get("max_length"),
        batch_size=values.get("batch_size", 1),
    )


def _refuse(given: Mapping[str, Any]) -> None:
    if str(given.get("batch_size", "")).startswith("auto"):
        raise UserError(f"--batch_size {given['batch_size']}: d1jax tries no sizes; write a number, --batch_size 32")
    if given.get("max_batch_size"):
        raise UserError(f"--max_batch_size {given['max_batch_size']}: read with --batch_size auto only; leave it out")
    if "steps" in given:
        raise UserError(
            f"{PLACE}: steps = {given['steps']} would be of one length, and tasks ask for several; "
            "write steps_per_token, 0.5 for a step for two tokens"
        )
    known = [*KINDS, *OF_SAMPLER]
    for key, value in given.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            meant = f" (did you mean {near[0]!r}?)" if near else ""
            raise UserError(f"{PLACE}: unknown argument {key} = {shown(value)}{meant}; choices: {', '.join(known)}")


def _sampler(given: Mapping[str, Any], values: Mapping[str, Any]) -> tuple[SamplerConfig, float]:
    """(sampler, steps a token). The sizes are those of a request that says nothing of its length."""
    rules = {name: given.get(name) for name in OF_SAMPLER}
    # The harness reads "none", the name of several choices, as no value.
    rules |= {name: "none" for name in ("cache",) if name in given and given[name] is None}
    arguments = argparse.Namespace(
        length=values.get("length"), block=values.get("block"), steps=None, temperature=1.0, **rules
    )
    try:
        sampler = sampler_from_flags(arguments, sampler_of(values["pretrained"]))
    except UserError as error:
        raise UserError(f"{PLACE}: {_in_arguments(str(error))}") from None
    steps_per_token = values.get("steps_per_token")
    if steps_per_token is None:
        return sampler, sampler.steps / sampler.completion_length
    if not 0 < steps_per_token <= 1:
        raise UserError(f"{PLACE}: steps_per_token = {steps_per_token} must be above 0 and at most 1, a step a token")
    if sampler.schedule.adaptive:
        what = no_effect(f"steps_per_token = {steps_per_token}", "schedule = even, time or chance")
        raise UserError(f"{PLACE}: {what}")
    return sampler, steps_per_token


def _in_arguments(message: str) -> str:
    """A message in the words of flags in those of --model_args: --kl-threshold 2 is kl_threshold = 2 there."""
    message = re.sub(r"--([a-z][a-z-]*) (?=[\d'])", r"--\1 = ", message)
    message = re.sub(r"--([a-z][a-z-]*)", lambda found: found[1].replace("-", "_"), message)
    return message.removeprefix("generate: ")


def generating(settings: HarnessSettings, wanted: Mapping[str, Any]) -> Generating:
    """What a request's generation arguments, as `normalize_gen_kwargs` of the harness has them, mean here.

    Its length is rounded up to whole blocks, as many steps a token as otherwise. do_sample: false takes the likeliest tokens at
    any temperature; true without a temperature means 1. What has no meaning for a denoiser is named in the log and left out.
    """
    tokens = wanted["max_gen_toks"]
    if tokens < 1:
        raise UserError(f"generation argument max_gen_toks = {tokens} must be above 0")
    temperature = float(wanted.get("temperature", 1.0)) if wanted["do_sample"] else 0.0
    if not 0 <= temperature < float("inf"):
        raise UserError(
            f"generation argument temperature = {temperature} must be 0 or above; correct it in --gen_kwargs"
        )
    sampler = _of_length(settings, tokens)
    if temperature > 0:
        top_k, top_p = int(wanted.get("top_k") or 0), float(wanted.get("top_p") or 1.0)
        given = {"top_k": max(top_k, 0)} if "top_k" in wanted else {}
        given |= {"top_p": top_p} if "top_p" in wanted else {}
        sampler = dataclasses.replace(sampler, **given)
    if idle := sorted(set(wanted) - OF_HARNESS):
        _name_once(", ".join(idle))
    sampler = with_effect(sampler, temperature)
    check(Config(sampler=sampler))
    return Generating(sampler, temperature, tokens, tuple(text for text in wanted["until"] if text))


@functools.cache
def _name_once(idle: str) -> None:
    LOG.warning("d1jax: generation arguments without a meaning for a denoiser, left out: %s", idle)


def _of_length(settings: HarnessSettings, tokens: int) -> SamplerConfig:
    sampler = settings.sampler
    whole = sampler.schedule.name in ("time", "chance")  # they work on the whole completion
    block = tokens if whole else min(sampler.block_length, tokens)
    blocks = -(-tokens // block)
    steps = max(round(block * settings.steps_per_token), 1) * blocks
    return dataclasses.replace(sampler, completion_length=block * blocks, block_length=block, steps=steps)


def cut(text: str, until: tuple[str, ...]) -> str:
    """The text before the first of these strings."""
    return text[: min((place for stop in until if (place := text.find(stop)) >= 0), default=len(text))]
