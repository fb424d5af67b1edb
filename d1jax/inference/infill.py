"""Texts with holes: "def f(x): {{mask:16}} return y" has one of 16 tokens.

The same sampler: a canvas whose completion columns stand between the tokens of the prompt. C tokens in all holes of a text.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from d1jax.config import Config, ConfigError, SamplerConfig
from d1jax.config.rules import check
from d1jax.data.tokenizers import Tokenizer
from d1jax.diffusion.finite import not_finite
from d1jax.diffusion.sampler import Decoding, Rollout, sample_stepwise
from d1jax.diffusion.sampler import sample as sample_rows
from d1jax.inference.complete import place, settings_for, settings_of
from d1jax.inference.policy import Policy

HOLE = re.compile(r"\{\{mask:([^{}]*)\}\}")
LIKE_A_HOLE = re.compile(r"\{\{\s*mask\b", re.IGNORECASE)
SIZE = re.compile(r"0*[1-9][0-9]{0,5}")


@dataclass(frozen=True)
class Laid:
    """A text taken apart: texts[0], a hole of sizes[0] tokens, texts[1], ..."""

    texts: tuple[str, ...]
    sizes: tuple[int, ...]
    ids: list[int]  # of the given text
    before: list[int]  # [C] how many of them stand before each hole token


@dataclass(frozen=True)
class Filled:
    """What `infill` returns of a text whose holes have C tokens in all. Arrays are numpy arrays on the host."""

    text: str  # with its holes filled
    holes: tuple[str, ...]  # what stands in each, from left to right
    tokens: np.ndarray  # int [C] ids of all holes, from left to right
    reveal_step: np.ndarray  # int [C] the step, from 0, that committed the token
    confidence: np.ndarray  # fp32 [C] its probability then, in [0, 1]
    nfe: int  # forward passes


def has_holes(text: str) -> bool:
    """Whether a text has holes. Raises ConfigError for what looks like one and is none."""
    holes = len(HOLE.findall(text))
    if len(LIKE_A_HOLE.findall(text)) > holes:
        raise ConfigError("infill: a hole is written {{mask:16}}, with its number of tokens and nothing else")
    return holes > 0


def infill(
    policy: Policy,
    texts: Sequence[str],
    config: SamplerConfig | None = None,
    *,
    seed: int = 0,
    temperature: float = 0.0,
    first_row: int = 0,
) -> list[Filled]:
    """Each text with its {{mask:N}} replaced by N tokens: a `Filled` a text, in the order of the texts.

    The text around the holes is taken as it is, without a chat template; what it spells is never a control token. All holes of a
    text are one block. Their lengths are given, so end tokens are forbidden and nothing stops early; of `config` (None: as the
    policy brings along) the tokens a step, the order and the rest hold. Texts with equally many hole tokens are one batch;
    row i draws from (seed, first_row + i) only. temperature: 0 takes the likeliest token. Raises ConfigError for a text without
    holes, a malformed one, an impossible setting.

        (found,) = d1jax.infill(policy, ["def f(x): {{mask:16}} return y"])
        found.text, found.holes
    """
    if isinstance(texts, str):
        raise ConfigError("infill: texts is one text; write a list, [text]")
    config = settings_for(policy, config, temperature)
    return fill(policy, texts, config, seed, temperature, range(first_row, first_row + len(texts)))


def fill(
    policy: Policy, texts: Sequence[str], config: SamplerConfig, seed: int, temperature: float, row_ids: Sequence[int]
) -> list[Filled]:
    """A `Filled` of each text, in their order; row i draws from (seed, row_ids[i]). Texts and errors are those of `infill`."""
    laid = [lay_out(policy.tokenizer, text) for text in texts]
    found: dict[int, Filled] = {}
    for total in sorted({len(one.before) for one in laid}):
        rows = [row for row, one in enumerate(laid) if len(one.before) == total]
        settings = for_holes(config, total)
        ids = [row_ids[row] for row in rows]
        arguments = _arguments(policy, [laid[row] for row in rows], settings, seed, temperature, ids)
        with jax.set_mesh(policy.mesh):
            rollout = jax.device_get(sample_rows(*arguments, **settings_of(policy, settings, temperature)))
        found |= {row: _filled(policy, laid[row], rollout, index) for index, row in enumerate(rows)}
    return [found[row] for row in range(len(texts))]


def watch_infill(
    policy: Policy, text: str, config: SamplerConfig, *, seed: int = 0, temperature: float = 0.0, first_row: int = 0
) -> Iterator[Decoding | Filled]:
    """Fills the holes of one text and yields a `Decoding` after every denoising step, then the `Filled` that `infill` returns for it."""
    laid = lay_out(policy.tokenizer, text)
    config = for_holes(config, len(laid.before))
    arguments = _arguments(policy, [laid], config, seed, temperature, [first_row])
    with jax.set_mesh(policy.mesh):
        for state in sample_stepwise(*arguments, **settings_of(policy, config, temperature)):
            state = jax.device_get(state)
            yield _filled(policy, laid, state, 0) if isinstance(state, Rollout) else state


def for_holes(config: SamplerConfig, total: int) -> SamplerConfig:
    """These settings for `total` tokens in holes."""
    check(Config(sampler=config))
    steps = min(max(round(total * config.steps / config.completion_length), 1), total)
    sizes = {"completion_length": total, "block_length": total, "steps": steps}
    return dataclasses.replace(config, **sizes, end_token="all_forbidden", early_exit=False)


def take_apart(text: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """(texts, sizes): texts[0], a hole of sizes[0] tokens, texts[1], ... Raises ConfigError where there is no hole, or one
    whose size is not a whole number from 1 to 999999."""
    parts = HOLE.split(text)
    if len(parts) == 1:
        raise ConfigError(f"infill: no hole in {text!r}; write {{{{mask:16}}}} where 16 tokens are missing")
    wrong = next((size for size in parts[1::2] if not SIZE.fullmatch(size)), None)
    if wrong is not None:
        raise ConfigError(f"infill: {{{{mask:{wrong[:20]}}}}} needs a number of tokens above 0, e.g. {{{{mask:16}}}}")
    return tuple(parts[0::2]), tuple(map(int, parts[1::2]))


def lay_out(tokenizer: Tokenizer, text: str) -> Laid:
    """Raises ConfigError where the text cannot be written, or nothing stands around the holes."""
    texts, sizes = take_apart(text)
    ids: list[int] = []
    before: list[int] = []
    try:
        for part, size in zip(texts, (*sizes, 0), strict=True):
            ids += tokenizer.encode(part) if part else []
            before += [len(ids)] * size
    except ValueError as error:
        raise ConfigError(f"infill: {error}") from None
    if not ids:
        raise ConfigError("infill: there is no text around the holes")
    return Laid(texts, sizes, ids, before)


def interleave(given: Sequence[Any], holes: Sequence[Any], before: Sequence[int]) -> list[Any]:
    """Given values and those of hole tokens in the order of the text."""
    woven: list[Any] = []
    for index, (value, count) in enumerate(zip(holes, before, strict=True)):
        woven += given[before[index - 1] if index else 0 : count]
        woven.append(value)
    return woven + list(given[before[-1] :])


def _arguments(
    policy: Policy, laid: list[Laid], config: SamplerConfig, seed: int, temperature: float, row_ids: Sequence[int]
) -> tuple[Any, ...]:
    if policy.config.alignment == "shifted" and config.cache != "none":
        raise ConfigError(
            f"infill: cache = {config.cache}: in this model a token is scored from the one before it, which a window of the cache "
            "may lack; set cache = none"
        )
    before_RC = np.array([one.before for one in laid], np.int32)
    return place(policy, [one.ids for one in laid], config, seed, temperature, row_ids, before_RC)


def _filled(policy: Policy, laid: Laid, rollout: Rollout, row: int) -> Filled:
    problem = not_finite(np.asarray(rollout.confidence_BC))
    if problem:
        raise ConfigError(f"infill: {problem}")
    tokens = np.asarray(rollout.tokens_BC[row])
    ends = np.cumsum(laid.sizes)
    holes = [policy.tokenizer.decode(part.tolist()) for part in np.split(tokens, ends[:-1])]
    text = "".join(interleave(laid.texts, holes, range(1, len(holes) + 1)))
    values = (np.asarray(x[row]) for x in (rollout.reveal_step_BC, rollout.confidence_BC))
    return Filled(text, tuple(holes), tokens, *values, nfe=int(rollout.nfe_B[row]))
