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

from d1jax.config import Config, SamplerConfig, UserError
from d1jax.config.check import check
from d1jax.data.tokenizers import Tokenizer
from d1jax.diffusion.decoding import Decoding, Prompts
from d1jax.diffusion.noise import KeyedNoise
from d1jax.diffusion.rollout import Rollout, not_finite
from d1jax.inference.complete import check_draws, filled_up, place, sampler_for, settings_for
from d1jax.inference.policy import Policy, check_sees_both_sides

MASK_SPAN = re.compile(r"\{\{mask:([^{}]*)\}\}")  # how a hole is written
LIKE_A_MASK_SPAN = re.compile(r"\{\{\s*mask\b", re.IGNORECASE)
SIZE = re.compile(r"0*[1-9][0-9]{0,5}")


@dataclass(frozen=True)
class InfillTemplate:
    """A text with holes: texts[0], a hole of sizes[0] tokens, texts[1], ..."""

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
    unmask_step: np.ndarray  # int [C] the step, from 0, that unmasked the token
    confidence: np.ndarray  # fp32 [C] its probability then, in [0, 1]
    nfe: int  # forward passes


def has_holes(text: str) -> bool:
    """Whether a text has holes. Raises UserError for what looks like one and is none."""
    holes = len(MASK_SPAN.findall(text))
    if len(LIKE_A_MASK_SPAN.findall(text)) > holes:
        raise UserError("infill: a hole is written {{mask:16}}, with its number of tokens and nothing else")
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
    row i draws from (seed, first_row + i) only. temperature: 0 takes the likeliest token. Raises UserError for a text without
    holes, a malformed one, an impossible setting.

        (found,) = d1jax.infill(policy, ["def f(x): {{mask:16}} return y"])
        found.text, found.holes
    """
    if isinstance(texts, str):
        raise UserError("infill: texts is one text; write a list, [text]")
    config = settings_for(policy, config, temperature)
    return fill(policy, texts, config, seed, temperature, range(first_row, first_row + len(texts)))


def fill(
    policy: Policy, texts: Sequence[str], config: SamplerConfig, seed: int, temperature: float, row_ids: Sequence[int]
) -> list[Filled]:
    """A `Filled` of each text, in their order; row i draws from (seed, row_ids[i]). Texts and errors are those of `infill`."""
    if not texts:
        return []
    check_sees_both_sides(policy.config, "infill")
    templates = [parse_template(policy.tokenizer, text) for text in texts]
    found: dict[int, Filled] = {}
    for total in sorted({len(template.before) for template in templates}):
        rows = [row for row, template in enumerate(templates) if len(template.before) == total]
        batch = filled_up(policy, rows)
        ours = [templates[row] for row in batch]
        settings = for_holes(config, total)
        sampler = sampler_for(policy, settings, temperature)
        check_draws(seed, temperature)
        prompts, noise = _place(policy, ours, settings, seed, [row_ids[row] for row in batch])
        with jax.set_mesh(policy.mesh):
            rollout = jax.device_get(sampler.sample(policy.variables, prompts, noise))
        rollout = Rollout(*(x[: len(rows)] for x in rollout))
        found |= {row: _filled(policy, templates[row], rollout, index) for index, row in enumerate(rows)}
    return [found[row] for row in range(len(texts))]


def watch_infill(
    policy: Policy, text: str, config: SamplerConfig, *, seed: int = 0, temperature: float = 0.0, first_row: int = 0
) -> Iterator[Decoding | Filled]:
    """Fills the holes of one text and yields a `Decoding` after every denoising step, then the `Filled` that `infill` returns for it."""
    check_sees_both_sides(policy.config, "infill")
    template = parse_template(policy.tokenizer, text)
    config = for_holes(config, len(template.before))
    sampler = sampler_for(policy, config, temperature)
    check_draws(seed, temperature)
    prompts, noise = _place(policy, [template], config, seed, [first_row])
    with jax.set_mesh(policy.mesh):
        for state in sampler.stream(policy.variables, prompts, noise):
            state = jax.device_get(state)
            yield _filled(policy, template, state, 0) if isinstance(state, Rollout) else state


def for_holes(config: SamplerConfig, total: int) -> SamplerConfig:
    """These settings for `total` tokens in holes."""
    check(Config(sampler=config))
    steps = min(max(round(total * config.steps / config.completion_length), 1), total)
    sizes = {"completion_length": total, "block_length": total, "steps": steps}
    return dataclasses.replace(config, **sizes, end_token="all_forbidden", early_exit=False)


def parse_spans(text: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """(texts, sizes): texts[0], a hole of sizes[0] tokens, texts[1], ... Raises UserError where there is no hole, or one
    whose size is not a whole number from 1 to 999999."""
    parts = MASK_SPAN.split(text)
    if len(parts) == 1:
        raise UserError(f"infill: no hole in {text!r}; write {{{{mask:16}}}} where 16 tokens are missing")
    wrong = next((size for size in parts[1::2] if not SIZE.fullmatch(size)), None)
    if wrong is not None:
        raise UserError(f"infill: {{{{mask:{wrong[:20]}}}}} needs a number of tokens above 0, e.g. {{{{mask:16}}}}")
    return tuple(parts[0::2]), tuple(map(int, parts[1::2]))


def parse_template(tokenizer: Tokenizer, text: str) -> InfillTemplate:
    """A text and its holes as token ids. Raises UserError where the text cannot be written, or nothing stands around the holes."""
    texts, sizes = parse_spans(text)
    ids: list[int] = []
    before: list[int] = []
    try:
        for part, size in zip(texts, (*sizes, 0), strict=True):
            ids += tokenizer.encode(part) if part else []
            before += [len(ids)] * size
    except ValueError as error:
        raise UserError(f"infill: {error}") from None
    if not ids:
        raise UserError("infill: there is no text around the holes")
    return InfillTemplate(texts, sizes, ids, before)


def merge(given: Sequence[Any], holes: Sequence[Any], before: Sequence[int]) -> list[Any]:
    """Given values and those of hole tokens in the order of the text."""
    merged: list[Any] = []
    for index, (value, count) in enumerate(zip(holes, before, strict=True)):
        merged += given[before[index - 1] if index else 0 : count]
        merged.append(value)
    return merged + list(given[before[-1] :])


def _place(
    policy: Policy, templates: list[InfillTemplate], config: SamplerConfig, seed: int, row_ids: Sequence[int]
) -> tuple[Prompts, KeyedNoise]:
    if policy.config.alignment == "shifted" and config.cache.name != "none":
        raise UserError(
            f"infill: cache = {config.cache.name}: in this model a token is scored from the one before it, which a window of the cache "
            "may lack; set cache = none"
        )
    before_RC = np.array([template.before for template in templates], np.int32)
    return place(policy, [template.ids for template in templates], config, seed, row_ids, before_RC)


def _filled(policy: Policy, template: InfillTemplate, rollout: Rollout, row: int) -> Filled:
    problem = not_finite(np.asarray(rollout.confidence_BC))
    if problem:
        raise UserError(f"infill: {problem}")
    tokens = np.asarray(rollout.tokens_BC[row])
    ends = np.cumsum(template.sizes)
    holes = [policy.tokenizer.decode(part.tolist()) for part in np.split(tokens, ends[:-1])]
    text = "".join(merge(template.texts, holes, range(1, len(holes) + 1)))
    values = (np.asarray(x[row]) for x in (rollout.unmask_step_BC, rollout.confidence_BC))
    return Filled(text, tuple(holes), tokens, *values, nfe=int(rollout.nfe_B[row]))
