"""Documents as windows of tokens: packed one behind the other, an end token between them, and cut to one length.

N windows, T tokens of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from d1jax.config import UserError
from d1jax.data.tokenizers import Tokenizer


class Windows(NamedTuple):
    """Packed text. `bytes_NT`: the bytes of UTF-8 that a token stands for, a document's spread evenly over its tokens; 0 of an end."""

    tokens_NT: np.ndarray
    bytes_NT: np.ndarray


@dataclass
class Counted:
    """What was met while packing."""

    documents: int = 0
    split: int = 0  # longer than a window
    left_over: int = 0  # tokens behind the last whole window


class Packer:
    """Takes documents and gives windows; `state` is all that it remembers between the two."""

    def __init__(self, length: int, end: int, state: Mapping[str, Any] | None = None) -> None:
        self._length, self._end = length, end
        self._tokens = list(state["tokens"]) if state else []
        self._bytes = list(state["bytes"]) if state else []

    @property
    def state(self) -> dict[str, Any]:
        """The tokens that fill no window yet."""
        return {"tokens": list(self._tokens), "bytes": list(self._bytes)}

    def add(self, ids: list[int], size: int) -> Iterator[tuple[list[int], list[float]]]:
        """The windows that a document of so many bytes completes; an end token is put behind it."""
        self._tokens += [*ids, self._end]
        self._bytes += [*[size / len(ids)] * len(ids), 0.0] if ids else [0.0]
        whole = len(self._tokens) // self._length * self._length
        tokens, sizes = self._tokens, self._bytes
        self._tokens, self._bytes = tokens[whole:], sizes[whole:]  # once: a book has thousands of windows
        for start in range(0, whole, self._length):
            yield tokens[start : start + self._length], sizes[start : start + self._length]


def encode(tokenizer: Tokenizer, text: str, where: str, setting: str) -> list[int]:
    """The ids of a document: control tokens that it spells out are text. Raises UserError where it cannot be written."""
    try:
        return tokenizer.encode(text)
    except ValueError as error:
        raise UserError(f"config: {setting}: {where}: {error}") from None


def pack(
    documents: Iterable[tuple[str, str]],
    tokenizer: Tokenizer,
    length: int,
    setting: str,
    log: Callable[[str], None] = lambda line: None,
) -> Windows:
    """All whole windows of a corpus, in its order.

    What is left over behind the last one, and documents longer than a window, which go on in the next, are counted for the log. Raises
    UserError for a corpus without a whole window.
    """
    packer, counted = Packer(length, tokenizer.special.end), Counted()
    tokens, sizes = [], []
    for where, text in documents:
        ids = encode(tokenizer, text, where, setting)
        counted.documents += 1
        counted.split += len(ids) > length
        for window, size in packer.add(ids, len(text.encode())):
            tokens.append(np.array(window, np.int32))
            sizes.append(np.array(size, np.float32))
    counted.left_over = len(packer.state["tokens"])
    if not tokens:
        raise UserError(
            f"config: {setting}: {counted.documents} documents with {counted.left_over} tokens fill no window of {length}; "
            "give more text, or lower adapt.length"
        )
    log(
        f"data: {setting}: {counted.documents} documents, {len(tokens)} windows of {length} tokens; {counted.split} documents are longer "
        f"than a window and split, {counted.left_over} tokens behind the last window left out"
    )
    return Windows(np.stack(tokens), np.stack(sizes))
