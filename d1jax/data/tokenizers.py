"""What a tokenizer is, the special tokens that every part of d1jax agrees on, and two tokenizers for small models.

Published checkpoints bring their own: hf_tokenizer.py.
"""

from __future__ import annotations

import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from d1jax.config import UserError
from d1jax.files import write_json

FILE = "tokenizer.json"
Chat = Sequence[dict[str, str]]  # [{"role": "user", "content": ...}, ...]


@dataclass(frozen=True)
class SpecialTokens:
    """mask: the absorbing state; end: ends a text and pads it; turn_end: what closes a turn of a chat, or -1.

    The first token of `end_ids` ends a text, for rewards, scores, early exit and decoding alike.
    """

    mask: int
    end: int
    turn_end: int = -1
    vocab_size: int = 2**31 - 1  # ids from here on only pad the embedding and are never sampled
    other_ends: tuple[int, ...] = ()  # what else ends a text, by one of the files of a checkpoint

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Every token that ends a text."""
        return tuple(sorted({self.end, self.turn_end, *self.other_ends} - {-1}))


class Tokenizer(Protocol):
    """Text <-> ids. Two tokenizers are equal when they give the same ids."""

    @property
    def special(self) -> SpecialTokens: ...

    @property
    def vocab_size(self) -> int:
        """Ids in use: 0 .. vocab_size - 1."""
        ...

    @property
    def chats(self) -> bool:
        """Whether a prompt is rendered as a chat."""
        ...

    def encode(self, text: str) -> list[int]:
        """Raises ValueError where the text cannot be written."""
        ...

    def prompt(self, prompt: str | Chat) -> list[int]:
        """What the model is given: the text itself, or a chat up to where the assistant answers."""
        ...

    def answer(self, text: str) -> list[int]:
        """What SFT teaches after such a prompt: the text, and what closes the turn."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text before the first token that ends it, without special tokens."""
        ...

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Each token by itself, special ones too, for display."""
        ...


class SmallTokenizer(ABC):
    """What character and byte tokenizers share: ids 0 .. symbols - 1 are text, then <end>, then <mask>."""

    symbols: int
    chats: ClassVar[bool] = False

    @property
    def special(self) -> SpecialTokens:
        return SpecialTokens(self.symbols + 1, self.symbols, vocab_size=self.vocab_size)

    @property
    def vocab_size(self) -> int:
        return self.symbols + 2

    @abstractmethod
    def encode(self, text: str) -> list[int]: ...

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Writes what `load_small_tokenizer` reads."""

    def prompt(self, prompt: str | Chat) -> list[int]:
        if not isinstance(prompt, str):
            raise ValueError("tokenizer: a chat needs a checkpoint with a chat template; give a text instead")
        return self.encode(prompt)

    def answer(self, text: str) -> list[int]:
        return self.encode(text)

    def _text_ids(self, ids: Sequence[int]) -> list[int]:
        """The ids of text before the first <end>."""
        ids = list(ids)
        before = ids[: ids.index(self.symbols)] if self.symbols in ids else ids
        return [token for token in before if token < self.symbols]


@dataclass(frozen=True)
class CharacterTokenizer(SmallTokenizer):
    """One id a character of `alphabet`."""

    alphabet: str

    def __post_init__(self) -> None:
        if len(set(self.alphabet)) != len(self.alphabet) or not self.alphabet:
            raise ValueError(f"tokenizer: alphabet {self.alphabet!r} must be distinct characters, at least one")

    @property
    def symbols(self) -> int:
        return len(self.alphabet)

    def encode(self, text: str) -> list[int]:
        """Raises ValueError naming the first character that is not in the alphabet."""
        for column, character in enumerate(text):
            if character not in self.alphabet:
                raise ValueError(
                    f"tokenizer: character {character!r} at column {column} of {text!r} is not in the alphabet {self.alphabet!r}"
                )
        return [self.alphabet.index(character) for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.alphabet[token] for token in self._text_ids(ids))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        names = [*self.alphabet, "<end>", "<mask>"]
        return [names[token] if token < len(names) else f"<{token}>" for token in ids]

    def save(self, directory: Path) -> None:
        write_json(directory / FILE, {"kind": "characters", "alphabet": self.alphabet})


@dataclass(frozen=True)
class ByteTokenizer(SmallTokenizer):
    """One id a byte of UTF-8: every text can be written."""

    symbols: ClassVar[int] = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", errors="replace"))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(self._text_ids(ids)).decode("utf-8", errors="replace")

    def pieces(self, ids: Sequence[int]) -> list[str]:
        named = {256: "<end>", 257: "<mask>"}
        # A byte of a longer character has no text of its own.
        return [
            chr(token) if token < 128 else named.get(token, f"<{token:02x}>" if token < 256 else f"<{token}>")
            for token in ids
        ]

    def save(self, directory: Path) -> None:
        write_json(directory / FILE, {"kind": "bytes"})


@dataclass(frozen=True)
class IdTokenizer:
    """Of a checkpoint without tokenizer files: token ids go in and come out, and a text cannot be written.

    A completion's text is its ids, separated by spaces.
    """

    directory: str
    mask: int | None
    end: int | None
    vocab_size: int
    other_ends: tuple[int, ...] = ()  # further ids that end a text
    chats: ClassVar[bool] = False

    @property
    def special(self) -> SpecialTokens:
        """Raises UserError where config.json does not name them."""
        for name, token in (("mask_token_id", self.mask), ("pad_token_id", self.end)):
            if token is None or not 0 <= token < self.vocab_size:
                raise UserError(
                    f"checkpoint {self.directory!r}: has no tokenizer files, and {name} = {token} in config.json is no id; "
                    "set it there, or name a tokenizer with --tokenizer DIR (tokenizer=... in Python)"
                )
        return SpecialTokens(mask=self.mask, end=self.end, vocab_size=self.vocab_size, other_ends=self.other_ends)

    def encode(self, text: str) -> list[int]:
        raise ValueError(
            f"checkpoint {self.directory!r}: has no tokenizer files, so a text cannot be written; give token ids, or name a "
            "tokenizer with --tokenizer DIR (tokenizer=... in Python)"
        )

    def prompt(self, prompt: str | Chat) -> list[int]:
        return self.encode(str(prompt))

    def answer(self, text: str) -> list[int]:
        return self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        closing = {self.end, *self.other_ends}
        return " ".join(str(token) for token in itertools.takewhile(lambda token: token not in closing, ids))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [f"{token} " for token in ids]


def load_small_tokenizer(directory: Path) -> SmallTokenizer | None:
    """The character or byte tokenizer saved in a directory; None where it holds another one, or none."""
    path = directory / FILE
    try:
        stored: Any = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError):
        return None  # whatever it is, it is not ours
    if not isinstance(stored, dict):
        return None
    if stored.get("kind") == "characters":
        return CharacterTokenizer(str(stored.get("alphabet", "")))
    return ByteTokenizer() if stored.get("kind") == "bytes" else None


def export_tokenizer(tokenizer: SmallTokenizer, directory: Path) -> None:
    """Writes a small tokenizer as transformers reads it: tokenizer.json and tokenizer_config.json with the same ids."""
    import tokenizers as hf

    special = tokenizer.special
    if isinstance(tokenizer, ByteTokenizer):
        # The byte-level scheme writes byte b as a printable character; a model without merges leaves them apart.
        byte_names = _byte_names()
        made = hf.Tokenizer(hf.models.BPE(vocab={name: b for b, name in enumerate(byte_names)}, merges=[]))
        made.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.decoder = hf.decoders.ByteLevel()
    else:
        assert isinstance(tokenizer, CharacterTokenizer)
        vocabulary = {character: token for token, character in enumerate(tokenizer.alphabet)}
        made = hf.Tokenizer(hf.models.WordLevel(vocab=vocabulary, unk_token=None))
        made.pre_tokenizer = hf.pre_tokenizers.Split(hf.Regex(r"[\s\S]"), "isolated")
        made.decoder = hf.decoders.Fuse()
    made.add_special_tokens(["<end>", "<mask>"])
    assert (made.token_to_id("<end>"), made.token_to_id("<mask>")) == (special.end, special.mask)
    made.save(str(directory / FILE))
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<end>",
            "pad_token": "<end>",
            "mask_token": "<mask>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": 2**31 - 1,
        },
    )


def _byte_names() -> list[str]:
    """GPT-2's printable character of each byte: itself where it is printable, else the next free one from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


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
