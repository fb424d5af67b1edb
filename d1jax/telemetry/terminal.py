"""The denoising of a text, drawn in a terminal while it happens."""

from __future__ import annotations

import shutil
import sys
import unicodedata
from collections.abc import Sequence
from typing import TextIO

MASK = "░"
FRESH, FADED, PLAIN = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"


def printable(text: str) -> str:
    """The text without control characters: a model may write escape sequences, which a terminal would obey."""
    return "".join(c if c in "\n\t" or unicodedata.category(c)[0] != "C" else "�" for c in text)


def frame(pieces: Sequence[str | None], fresh: Sequence[bool], width: int, height: int) -> list[str]:
    """The canvas as at most `height` lines of at most `width` columns, the last ones; None is a masked position.

    What this step has committed stands out, masks are faded. A line break is shown and obeyed.
    """
    lines, line, used = [], "", 0
    for piece, new in zip(pieces, fresh, strict=True):
        colour = FADED if piece is None else FRESH if new else ""
        for character in MASK if piece is None else printable(piece).replace("\t", " "):
            shown, size = ("↵", 1) if character == "\n" else (character, _columns(character))
            if used + size > width:
                lines, line, used = [*lines, line], "", 0
            line, used = line + (f"{colour}{shown}{PLAIN}" if colour else shown), used + size
            if character == "\n":
                lines, line, used = [*lines, line], "", 0
    return [*lines, line][-height:]


def _columns(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


class DenoisingView:
    """Draws frames over each other: `view.draw(pieces, fresh, status)` a step, `view.clear()` before the final text."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._height = 0

    def draw(self, pieces: Sequence[str | None], fresh: Sequence[bool], status: str) -> None:
        size = shutil.get_terminal_size((80, 24))
        lines = frame(pieces, fresh, size.columns - 1, size.lines - 3)
        self.clear()
        self._stream.write("\n".join([*lines, f"{FADED}{status[: size.columns - 1]}{PLAIN}"]) + "\n")
        self._stream.flush()
        self._height = len(lines) + 1

    def clear(self) -> None:
        if self._height:
            self._stream.write(f"\x1b[{self._height}A\x1b[J")
            self._height = 0
