"""A character tokenizer for small models, and the special tokens that every part of d1jax agrees on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class SpecialTokens:
    """mask: the absorbing state; end: ends a text and pads it (the first one counts); turn_end: a second closing token, or -1."""

    mask: int
    end: int
    turn_end: int = -1
    vocab_size: int = 2**31 - 1  # ids from here on only pad the embedding and are never sampled


@dataclass(frozen=True)
class CharacterTokenizer:
    """One id a character of `alphabet`, then <end> and <mask>."""

    alphabet: str

    def __post_init__(self) -> None:
        if len(set(self.alphabet)) != len(self.alphabet) or not self.alphabet:
            raise ValueError(f"tokenizer: alphabet {self.alphabet!r} must be distinct characters, at least one")

    @property
    def special(self) -> SpecialTokens:
        return SpecialTokens(len(self.alphabet) + 1, len(self.alphabet), vocab_size=self.vocab_size)

    @property
    def vocab_size(self) -> int:
        return len(self.alphabet) + 2

    def encode(self, text: str) -> list[int]:
        """Raises ValueError naming the first character that is not in the alphabet."""
        for column, character in enumerate(text):
            if character not in self.alphabet:
                raise ValueError(
                    f"tokenizer: character {character!r} at column {column} of {text!r} is not in the alphabet {self.alphabet!r}"
                )
        return [self.alphabet.index(character) for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        """The text before the first <end>; mask ids are dropped."""
        characters = []
        for token in ids:
            if token == self.special.end:
                break
            if token < len(self.alphabet):
                characters.append(self.alphabet[token])
        return "".join(characters)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Each token by itself, for display; an id that only pads the vocabulary shows as <id>."""
        names = [*self.alphabet, "<end>", "<mask>"]
        return [names[token] if token < len(names) else f"<{token}>" for token in ids]

    def to_dict(self) -> dict[str, str]:
        """What tokenizer.json holds; `load_tokenizer` reads it back."""
        return {"kind": "characters", **dataclasses.asdict(self)}


def load_tokenizer(path: Path) -> CharacterTokenizer:
    stored = json.loads(path.read_text(encoding="utf-8"))
    if stored.get("kind") != "characters":
        raise ValueError(f"{path}: tokenizer kind {stored.get('kind')!r} is not one of characters")
    return CharacterTokenizer(stored["alphabet"])


def pad_rows(rows: Sequence[Sequence[int]], width: int, fill: int) -> tuple[np.ndarray, np.ndarray]:
    """([B, width] int32 right-padded with `fill`, [B] lengths). Raises ValueError naming the first row that is too long."""
    lengths = np.array([len(row) for row in rows], np.int32)
    if len(rows) and lengths.max() > width:
        row = int(lengths.argmax())
        raise ValueError(f"row {row} has {lengths[row]} tokens, more than the {width} columns there are for it")
    padded = np.full((len(rows), width), fill, np.int32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded, lengths
