"""The tokenizer of a checkpoint directory, with the facts that its family and its config.json add."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from d1jax.config import ModelConfig, UserError
from d1jax.data.hf_tokenizer import NO_MASK, PretrainedTokenizer, load_pretrained_tokenizer
from d1jax.data.tokenizers import (
    IdTokenizer,
    SmallTokenizer,
    SpecialTokens,
    Tokenizer,
    export_tokenizer,
    load_small_tokenizer,
)
from d1jax.files import write_json
from d1jax.models.config_json import write_config
from d1jax.models.families import TURNS, family_of
from d1jax.models.family import Family
from d1jax.weights.hf_directory import read_json

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja",
)  # fmt: skip
GENERATION = "generation_config.json"


def has_tokenizer(directory: Path) -> bool:
    """Whether there are files that hold a vocabulary."""
    return any((directory / name).is_file() for name in ("tokenizer.json", "vocab.json", "merges.txt"))


def token_ids_only(directory: Path, vocab_size: int) -> IdTokenizer:
    """What stands in for the tokenizer of a checkpoint that has none: the special ids that its config.json names."""
    published = read_json(directory / "config.json")
    mask = _token_id(published, directory, "mask_token_id")
    end = _token_id(published, directory, "pad_token_id", "eos_token_id")
    closing = _closing_ids(published, (directory,), directory, vocab_size)
    _check_mask(mask, closing | {end}, directory)
    return IdTokenizer(str(directory), mask, end, vocab_size, tuple(sorted(closing - {end})))


def load_tokenizer(directory: Path, published_in: Path | None = None) -> Tokenizer:
    """The tokenizer saved in a directory, d1jax's own or a published one. Raises UserError where there is none.

    published_in: where config.json is, if not there (a tokenizer that is kept apart from its checkpoint).
    """
    try:
        small = load_small_tokenizer(directory)
    except ValueError as error:
        raise UserError(f"tokenizer {str(directory)!r}: {error}") from None
    described = published_in or directory
    if small is not None:
        if (described / "config.json").is_file():
            _check_ids(small.special, read_json(described / "config.json"), described)
        return small
    if not (described / "config.json").is_file():
        raise UserError(f"tokenizer {str(directory)!r}: no tokenizer is there, and no config.json")
    published = read_json(described / "config.json")
    family = family_of(published, str(described / "config.json"))
    try:
        found = load_pretrained_tokenizer(
            directory,
            mask=_token_id(published, described, "mask_token_id"),
            end=_token_id(published, described, "pad_token_id", "eos_token_id"),
            turns=((family.turn_end, family.assistant_header), *TURNS),
            masks=family.attention_mask != "causal",
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    named = found.wrapped.mask_token_id
    if named not in (None, found.special.mask) and found.special.mask != NO_MASK:
        raise UserError(
            f"tokenizer {str(directory)!r}: config.json says mask_token_id = {found.special.mask}, the tokenizer's own mask token is "
            f"{named}; correct the one that is wrong"
        )
    closing = {*found.special.end_ids, *_closing_ids(published, (directory, described), described, found.vocab_size)}
    _check_mask(found.special.mask, closing, directory)
    others = tuple(sorted(closing - {found.special.end, found.special.turn_end}))
    return dataclasses.replace(found, special=dataclasses.replace(found.special, other_ends=others))


def _closing_ids(published: Mapping[str, Any], folders: Iterable[Path], described: Path, size: int) -> set[int]:
    """Whatever config.json or a generation_config.json says ends a text: a tokenizer apart from its weights may bring another one."""
    closing = _closing(published, described / "config.json", size)
    for folder in folders:
        if (folder / GENERATION).is_file():
            closing |= _closing(read_json(folder / GENERATION), folder / GENERATION, size)
    return closing


def _check_mask(mask: int | None, closing: set[int | None], directory: Path) -> None:
    if mask is not None and mask in closing:
        raise UserError(
            f"tokenizer {str(directory)!r}: the mask token {mask} is also a token that ends a text; every text would end "
            "where it is not decided yet. Correct mask_token_id, eos_token_id or pad_token_id in config.json"
        )


def _closing(published: Mapping[str, Any], file: Path, size: int) -> set[int]:
    """The ids of eos_token_id, which is one or a list. Raises UserError for what is no id of the tokenizer."""
    value = published.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token in ids:
        if type(token) is not int or not 0 <= token < size:
            raise UserError(
                f"{file}: eos_token_id = {value!r} names {token!r}, which is none of the tokenizer's {size} ids"
            )
    return set(ids)


def _check_ids(special: SpecialTokens, published: Mapping[str, Any], directory: Path) -> None:
    """Raises UserError where config.json names other special tokens than a small tokenizer has."""
    for name, token in _token_ids(special).items():
        if published.get(name, token) != token:
            raise UserError(
                f"{directory / 'config.json'}: {name} = {published[name]!r}, but the tokenizer of this model has {token}; correct "
                "config.json"
            )


def _token_id(published: Mapping[str, Any], directory: Path, *names: str) -> int | None:
    """The first of these settings that is there; of a list of ids the first."""
    for name in names:
        value = published.get(name)
        value = value[0] if isinstance(value, list) and value else value
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise UserError(f"{directory / 'config.json'}: {name} = {published[name]!r} is not a token id")
        return value
    return None


def write_new_companions(config: ModelConfig, tokenizer: SmallTokenizer, out: Path, published: bool) -> None:
    """config.json and tokenizer files of a model that was not made from a published one.

    `published`: in transformers' format, for a Hugging Face directory; otherwise in d1jax's own.
    """
    write_json(out / "config.json", write_config(config, _token_ids(tokenizer.special)))
    save_small_tokenizer(tokenizer, out, published)


def write_pretrained_companions(
    config: ModelConfig, tokenizer: PretrainedTokenizer, out: Path, family: Family | None = None
) -> None:
    """config.json and tokenizer files, in transformers' format, of a model that was made here and has a published vocabulary."""
    tokenizer.wrapped.save_pretrained(str(out))
    ids = {name: token for name, token in _token_ids(tokenizer.special).items() if token != NO_MASK}
    ends = sorted({*tokenizer.special.end_ids})
    write_json(
        out / "config.json", write_config(config, {**ids, "eos_token_id": ends if len(ends) > 1 else ends[0]}, family)
    )


def save_small_tokenizer(tokenizer: SmallTokenizer, out: Path, published: bool) -> None:
    """`published`: in transformers' format; otherwise in d1jax's own."""
    if published:
        export_tokenizer(tokenizer, out)
    else:
        tokenizer.save(out)


def _token_ids(special: SpecialTokens) -> Mapping[str, Any]:
    return {"mask_token_id": special.mask, "eos_token_id": special.end, "pad_token_id": special.end}
