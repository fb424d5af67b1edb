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

from d1jax.config import ConfigError, SamplerConfig
from d1jax.diffusion.sampler import Decoding, Rollout, sample_stepwise
from d1jax.diffusion.sampler import sample as sample_rows
from d1jax.policy import Policy
from d1jax.sampling import place, settings_of

HOLE = re.compile(r"\{\{mask:([^{}]*)\}\}")


@dataclass(frozen=True)
class Holed:
    """A text taken apart: texts[0], a hole of sizes[0] tokens, texts[1], ..."""

    texts: tuple[str, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Filled:
    """What `infill` returns of a text."""

    text: str  # with its holes filled
    holes: tuple[str, ...]  # what stands in each
    tokens: np.ndarray  # [C] of all holes, from left to right
    reveal_step: np.ndarray  # [C] the step that committed the token
    confidence: np.ndarray  # [C] its probability then
    nfe: int  # forward passes


def has_holes(text: str) -> bool:
    return HOLE.search(text) is not None


def infill(
    policy: Policy,
    texts: Sequence[str],
    config: SamplerConfig = SamplerConfig(),  # noqa: B008 (frozen)
    *,
    seed: int = 0,
    temperature: float = 0.0,
    first_row: int = 0,
) -> list[Filled]:
    """Each text with its {{mask:N}} replaced by N tokens; the text around them is taken as it is, without a chat template.

    All holes of a text are one block. Lengths are given, so end tokens are forbidden and nothing stops early; the number of
    steps keeps the tokens per step of `config`. Texts with equally many hole tokens are one batch; row i draws from
    (seed, first_row + i) only. Raises ConfigError for a text without holes, a malformed one, an impossible setting.
    """
    holed = [take_apart(text) for text in texts]
    found: dict[int, Filled] = {}
    for total in sorted({sum(one.sizes) for one in holed}):
        rows = [row for row, one in enumerate(holed) if sum(one.sizes) == total]
        config_of_total = for_holes(config, total)
        arguments = _arguments(
            policy, [holed[row] for row in rows], config_of_total, seed, temperature, [first_row + row for row in rows]
        )
        with jax.set_mesh(policy.mesh):
            rollout = jax.device_get(sample_rows(*arguments, **settings_of(policy, config_of_total, temperature)))
        found |= {row: _filled(policy, holed[row], rollout, index) for index, row in enumerate(rows)}
    return [found[row] for row in range(len(texts))]


def watch_infill(
    policy: Policy, text: str, config: SamplerConfig, *, seed: int = 0, temperature: float = 0.0, first_row: int = 0
) -> Iterator[Decoding | Filled]:
    """The same for one text, step by step: every state of the denoising as it happens, then the filled text."""
    holed = take_apart(text)
    config = for_holes(config, sum(holed.sizes))
    arguments = _arguments(policy, [holed], config, seed, temperature, [first_row])
    with jax.set_mesh(policy.mesh):
        for state in sample_stepwise(*arguments, **settings_of(policy, config, temperature)):
            state = jax.device_get(state)
            yield _filled(policy, holed, state, 0) if isinstance(state, Rollout) else state


def take_apart(text: str) -> Holed:
    """Raises ConfigError where there is no hole, or one whose size is not a whole number above 0."""
    parts = HOLE.split(text)
    if len(parts) == 1:
        raise ConfigError(f"infill: no hole in {text!r}; write {{{{mask:16}}}} where 16 tokens are missing")
    wrong = next((size for size in parts[1::2] if not (size.isascii() and size.isdigit() and int(size) > 0)), None)
    if wrong is not None:
        raise ConfigError(f"infill: {{{{mask:{wrong}}}}} needs a number of tokens above 0, e.g. {{{{mask:16}}}}")
    return Holed(tuple(parts[0::2]), tuple(map(int, parts[1::2])))


def for_holes(config: SamplerConfig, total: int) -> SamplerConfig:
    """These settings for `total` tokens in holes."""
    steps = min(max(round(total * config.steps / config.completion_length), 1), total)
    sizes = {"completion_length": total, "block_length": total, "steps": steps}
    return dataclasses.replace(config, **sizes, end_token="forbidden", early_exit=False)


def tokens_before(tokenizer: Any, holed: Holed) -> tuple[list[int], list[int]]:
    """(the ids of the given text, how many of them stand before each hole token)."""
    ids: list[int] = []
    before: list[int] = []
    for text, size in zip(holed.texts, (*holed.sizes, 0), strict=True):
        ids += tokenizer.encode(text) if text else []
        before += [len(ids)] * size
    return ids, before


def interleave(given: Sequence[Any], holes: Sequence[Any], before: Sequence[int]) -> list[Any]:
    """Given values and those of hole tokens in the order of the text."""
    woven: list[Any] = []
    for index, (value, count) in enumerate(zip(holes, before, strict=True)):
        woven += given[before[index - 1] if index else 0 : count]
        woven.append(value)
    return woven + list(given[before[-1] :])


def _arguments(
    policy: Policy, holed: list[Holed], config: SamplerConfig, seed: int, temperature: float, row_ids: list[int]
) -> tuple[Any, ...]:
    if policy.config.alignment == "shifted" and config.cache != "none":
        raise ConfigError(
            f"infill: cache = {config.cache}: in this model a token is scored from the one before it, which a window of the cache "
            "may lack; set cache = none"
        )
    try:
        laid = [tokens_before(policy.tokenizer, one) for one in holed]
    except ValueError as error:
        raise ConfigError(f"infill: {error}") from None
    before_RC = np.array([before for _, before in laid], np.int32)
    return place(policy, [ids for ids, _ in laid], config, seed, temperature, row_ids, before_RC)


def _filled(policy: Policy, holed: Holed, rollout: Rollout, row: int) -> Filled:
    tokens = np.asarray(rollout.tokens_BC[row])
    ends = np.cumsum(holed.sizes)
    holes = [policy.tokenizer.decode(part.tolist()) for part in np.split(tokens, ends[:-1])]
    text = "".join(interleave(holed.texts, holes, range(1, len(holes) + 1)))
    values = (np.asarray(x[row]) for x in (rollout.reveal_step_BC, rollout.confidence_BC))
    return Filled(text, tuple(holes), tokens, *values, nfe=int(rollout.nfe_B[row]))
