"""How to sample travels with the weights: the section "d1jax_sampler" of a checkpoint's generation_config.json.

The file is transformers'; what else stands in it is left as it is. `max_new_tokens` and `steps` are written beside the section for
programs that know nothing of d1jax (Dream's own reads both).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from d1jax.config import Config, SamplerConfig, UserError
from d1jax.config.check import check
from d1jax.config.stored import sampler_from
from d1jax.config.values import plain
from d1jax.files import write_json
from d1jax.weights.hf_directory import read_json

FILE, SECTION = "generation_config.json", "d1jax_sampler"


def read_sampler(directory: Path) -> SamplerConfig | None:
    """The sampler's settings that a checkpoint brings along; None where it brings none. Raises UserError for impossible ones."""
    path = directory / FILE
    stored = read_json(path).get(SECTION) if path.is_file() else None
    if stored is None:
        return None
    sampler = sampler_from(stored, f"{path}: {SECTION}")
    try:
        check(dataclasses.replace(Config(), sampler=sampler))
    except UserError as error:
        raise UserError(f"{path}: {SECTION}: {error}") from None
    return sampler


def write_end_ids(directory: Path, end_ids: Sequence[int]) -> None:
    """Says in the directory's generation_config.json what ends a text, whatever other files said it where the policy came from."""
    path = directory / FILE
    published = read_json(path) if path.is_file() else {}
    write_json(path, {**published, "eos_token_id": list(end_ids)})


def write_sampler(directory: Path, sampler: SamplerConfig) -> None:
    """Puts the settings into the directory's generation_config.json, which is made where there is none."""
    path = directory / FILE
    published = read_json(path) if path.is_file() else {}
    for_others = {"max_new_tokens": sampler.completion_length, "steps": sampler.steps}
    write_json(path, {**published, **for_others, SECTION: plain(sampler)})
