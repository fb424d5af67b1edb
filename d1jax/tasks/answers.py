"""Finding the answer in a text: tags, boxes, and the two prompt styles that the tasks share.

Every function here is linear in the length of the text. A regular expression such as `<answer>(.*?)</answer>` is not,
when a model repeats an opening tag a thousand times.
"""

import re

STYLES = ("bare", "instruct")

_OPEN, _CLOSE = "<answer>", "</answer>"
# Escaped braces come first, so that \{ and \} are stepped over: they are printed characters and group nothing.
_BRACES = re.compile(r"\\[{}]|\\boxed\s*\{|[{}]")


def last_answer(text: str) -> str | None:
    """Content of the last complete `<answer>...</answer>`, without surrounding space; None when there is none."""
    close = text.rfind(_CLOSE)
    if close < 0:
        return None
    start = text.rfind(_OPEN, 0, close)
    if start < 0:
        return None
    start += len(_OPEN)
    # The first close after this opening ends the pair; `close` itself may be a stray one further on.
    return text[start : text.index(_CLOSE, start)].strip()


def last_boxed(text: str) -> str | None:
    r"""Content of the `\boxed{...}` that opens last among those whose braces balance; None when there is none."""
    opened: list[tuple[bool, int]] = []
    best: tuple[int, int] | None = None
    for match in _BRACES.finditer(text):
        token = match.group()
        if token == "}":
            if opened:
                boxed, start = opened.pop()
                if boxed and (best is None or start > best[0]):
                    best = (start, match.start())
        elif token == "{" or len(token) > 2:
            opened.append((token != "{", match.end()))
    return None if best is None else text[best[0] : best[1]].strip()


def answer_text(text: str, style: str) -> str | None:
    """What a model offers as its answer: the last answer tag; without tags, the whole text (bare) or nothing
    (instruct).
    """
    tagged = last_answer(text)
    if tagged is not None:
        return tagged
    return text if style == "bare" else None


def as_answer(answer: str, style: str) -> str:
    """The completion that states `answer` in the given style."""
    return answer if style == "bare" else f"{_OPEN}\n{answer}\n{_CLOSE}"


def question_key(question: str) -> str:
    """Equal for questions that differ in spacing and capitals only."""
    return " ".join(question.split()).casefold()


def check_style(task: str, style: str) -> None:
    """Raises ValueError unless `style` is one of `STYLES`."""
    if style not in STYLES:
        raise ValueError(f"{task}: style = {style!r} is not one of {', '.join(STYLES)}")


def check_request(task: str, split: str, count: int) -> None:
    """Raises ValueError for a split or count that no generator can serve."""
    if split not in ("train", "test"):
        raise ValueError(f"{task}: split = {split!r} is not one of train, test")
    if count < 0:
        raise ValueError(f"{task}: count = {count} is negative; ask for 0 rows or more")
