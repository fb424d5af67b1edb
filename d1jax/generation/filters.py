"""What a generated text must be to be kept, beside what its rewards say; each drop has the name of the filter that made it.

Source: DeepSeek-R1, arXiv 2501.12948, section 2.3.3, filters out mixed languages, long paragraphs and code blocks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from d1jax.config.generation import FILTERS
from d1jax.tasks.reward_functions import language, repetition_penalty


class Text(NamedTuple):
    """A completion that is looked at."""

    text: str
    tokens: int  # of the text, without the one that ends it
    ended: bool  # whether a token ends it, or it is a grid that fills its columns


def _finished(one: Text, _: float) -> bool:
    """The length limit has not cut it off."""
    return one.ended


def _tokens(one: Text, most: float) -> bool:
    """It has at most so many tokens."""
    return one.tokens <= most


def _repetition(one: Text, most: float) -> bool:
    """At most this share of its 3-grams of words occurred before in it."""
    return -repetition_penalty([one.text])[0] <= most


def _language(one: Text, least: float) -> bool:
    """At least this share of its words is written in Latin letters."""
    return language([one.text])[0] >= least


def _paragraph(one: Text, most: float) -> bool:
    """No paragraph of it (what stands between empty lines) has more than so many characters."""
    return all(len(part.strip()) <= most for part in re.split(r"\n[ \t]*\n", one.text))


def _no_code(one: Text, _: float) -> bool:
    """It has no fence of a code block."""
    return re.search(r"^[ \t]*(```|~~~)", one.text, re.MULTILINE) is None


TESTS: Mapping[str, Callable[[Text, float], bool]] = {
    "finished": _finished,
    "no_code": _no_code,
    "tokens": _tokens,
    "repetition": _repetition,
    "language": _language,
    "paragraph": _paragraph,
}
assert TESTS.keys() == FILTERS.keys()


def dropped_by(one: Text, filters: tuple[str, ...]) -> str | None:
    """The first filter, as it was written (tokens:200), that the text does not pass; None where it passes all."""
    for written in filters:
        name, _, number = written.partition(":")
        if not TESTS[name](one, float(number or 0)):
            return written
    return None
