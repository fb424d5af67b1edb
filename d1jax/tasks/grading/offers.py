"""Where a text states its answer: one passage, from the first of a fixed list of places that has one.

Every function is linear in the length of the text and raises on none. docs/graders.md gives the reason for each place.
"""

import re
from typing import NamedTuple

MAX_PASSAGE = 4000
"""Characters. A longer passage states no answer."""

PLACES = ("box in answer tags", "answer tags", "box", "open box", "open answer tags", "hashes", "phrase")
"""From the first that is looked at to the last."""

END_TOKENS = ("<|endoftext|>", "<|eot_id|>", "<|im_end|>", "<|end_of_text|>", "<|startoftext|>", "</s>", "<|mdm_mask|>")
"""What published tokenizers write at the end of a text, and LLaDA's mask where a decoding was not finished."""

_TAG = re.compile(r"</?answer>")
# Escaped braces come first, so that \{ and \} are stepped over: they are printed characters and group nothing.
# The backslash of \boxed is optional: models drop it, and nothing else is called so.
_BRACES = re.compile(r"\\[{}]|\\?(?:boxed|fbox)\s*\{|[{}]")
_PLACEHOLDER = re.compile(r"(?:\s|[.…$>*]|\\l?dots|\\[()\[\]]|\\text\{\s*\}|\\?boxed\s*\{[\s.]*\})*")
_HASHES = re.compile(r"####[ \t]*([^\n]*)")
_PHRASE = re.compile(r"(?<![<\\/])\banswer[ \t*]*(?:(?:is|was|equals)\b|[:=])[ \t*:]*", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?=\s|\Z)|\n")
_AT_THE_END = 300  # characters in which "the answer is" still is the end of a text


class Offer(NamedTuple):
    """`text`: the passage, without the tags or the box around it. `place`: one of PLACES."""

    text: str
    place: str


def offer(text: str) -> Offer | None:
    """The passage in which the text states its answer, or None.

    A passage that is blank or a placeholder (`...`) is none, and one of more than MAX_PASSAGE characters states nothing.
    """
    tagged, open_tag = _tagged(text)
    if tagged is not None:
        boxed, open_box = _boxed(tagged)
        inside = boxed if boxed is not None else open_box
        found = Offer(inside, PLACES[0]) if inside is not None else Offer(tagged.strip(), PLACES[1])
    else:
        found = _untagged(text, open_tag)
    return found if found and len(found.text) <= MAX_PASSAGE else None


def _untagged(text: str, open_tag: str | None) -> Offer | None:
    boxed, open_box = _boxed(text)
    if boxed is not None:
        return Offer(boxed, PLACES[2])
    if open_box is not None:
        return Offer(open_box, PLACES[3])
    if open_tag is not None:
        return Offer(open_tag, PLACES[4])
    for match in reversed(list(_HASHES.finditer(text))):
        if not _is_placeholder(match[1]):
            return Offer(match[1].strip(), PLACES[5])
    start = max(0, len(text) - _AT_THE_END)
    for match in reversed(list(_PHRASE.finditer(text, start))):
        end = _SENTENCE_END.search(text, match.end())
        sentence = text[match.end() : end.start() if end else len(text)].strip()
        if not _is_placeholder(sentence):
            return Offer(sentence, PLACES[6])
    return None


def without_end_tokens(text: str) -> str:
    """The text without END_TOKENS and the space at its end."""
    for token in END_TOKENS:
        text = text.replace(token, "")
    return text.rstrip()


def two_blocks(text: str) -> bool:
    """Whether the text is one reasoning block and then one answer block, with nothing else but space."""
    text = text.strip()
    reasoning, _, answer = text.partition("</reasoning>")
    return (
        all(text.count(tag) == 1 for tag in ("<reasoning>", "</reasoning>", "<answer>", "</answer>"))
        and reasoning.startswith("<reasoning>")
        and answer.lstrip().startswith("<answer>")
        and answer.endswith("</answer>")
    )


def last_box(text: str) -> str | None:
    r"""What the last `\boxed{...}` or `\fbox{...}` with balanced braces holds; None where there is none or all are blank."""
    return _boxed(text)[0]


def _tagged(text: str) -> tuple[str | None, str | None]:
    """(what the last complete answer tags hold that hold something, what stands behind an opening tag that is never closed)."""
    start, found = None, None
    for match in _TAG.finditer(text):
        if match.group() == "<answer>":
            start = match.end()
        elif start is not None:
            if not _is_placeholder(inside := text[start : match.start()]):
                found = inside
            start = None
    behind = None if start is None else text[start:]
    return found, None if behind is None or _is_placeholder(behind) else _cut(behind)


def _boxed(text: str) -> tuple[str | None, str | None]:
    """(the last box that is closed and holds something, what stands behind the last box that is never closed)."""
    opened: list[tuple[bool, int]] = []
    closed = (-1, -1)
    for match in _BRACES.finditer(text):
        token = match.group()
        if token == "}":
            if opened:
                is_box, start = opened.pop()
                if is_box and start > closed[0] and not _is_placeholder(text[start : match.start()]):
                    closed = (start, match.start())
        elif token == "{" or len(token) > 2:
            opened.append((token != "{", match.end()))
    behind = next((text[start:] for is_box, start in reversed(opened) if is_box), None)
    return (
        text[closed[0] : closed[1]].strip() if closed[0] >= 0 else None,
        None if behind is None or _is_placeholder(behind) else _cut(behind),
    )


def _cut(text: str) -> str:
    """What stands before the line or the formula ends, or a tag begins: nothing further belongs to an answer that was cut off.
    Models also close a box with `>`.
    """
    return re.split(r"\n|(?<!\\)\$|\\\)|\\\]|</?(?:answer|reasoning)", text.strip(" \n$"), maxsplit=1)[0].rstrip(" >")


def _is_placeholder(text: str) -> bool:
    return len(text) <= MAX_PASSAGE and _PLACEHOLDER.fullmatch(text) is not None
