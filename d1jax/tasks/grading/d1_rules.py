"""The rules by which d1 grades, faults included, for comparison with published numbers. Nothing of d1jax is rewarded by them,
except the rewards whose name begins with d1_.

Source: d1, arXiv 2504.12216, its released reward functions and its evaluation's parser, described in our words.
"""

import re
from collections.abc import Sequence

from d1jax.tasks import expressions
from d1jax.tasks.answers import last_answer
from d1jax.tasks.grading.offers import last_box

_LENGTH = 20_000  # characters of a text that are looked at: some of these rules are not linear
_BOX = re.compile(r"\\boxed\{(.*?)\}")
_DECIMAL = re.compile(r"-?[0-9]+\.?[0-9]*")
_SUDOKU = (
    re.compile(r"<answer>.*?```\s*([\d\s]+)```", re.DOTALL),
    re.compile(r"<answer>(.*?)(?:<\|eot_id\|>|<\|endoftext\|>|</answer>)", re.DOTALL),
    re.compile(r"</answer>\s*(.*?)(?:<\|eot_id\|>|<\|endoftext\|>|$)", re.DOTALL),
    re.compile(r"(\d{16})\s*</answer>"),
    re.compile(r"\b(\d{16})\b"),
)
_BETWEEN = re.compile(r"</reasoning>\s*<answer>")
_CLAIM = re.compile(r"([0-9+\-*/() ]+)=[0-9. ]+")


# -- evaluation --------------------------------------------------------------------------------------------------------


def gsm8k_value(text: str) -> float | None:
    """The first number of the first box that has one; else the last number of the first answer tags. A brace ends a box, and
    a comma ends a number.
    """
    text = text[:_LENGTH]
    for inside in _BOX.findall(text):
        if (value := _number(inside.strip(), first=True)) is not None:
            return value
    tagged = _first_tagged(text)
    return None if tagged is None else _number(tagged, first=False)


def _number(text: str, first: bool) -> float | None:
    try:
        return float(text)
    except ValueError:
        found = _DECIMAL.findall(text)
        return float(found[0 if first else -1]) if found else None


def math_correct(text: str, answer: str) -> bool:
    """Whether the last box, normalised, is the answer, normalised, letter by letter. Without a box the whole text is compared;
    a box that is not closed gives way to the first answer tags.
    """
    text = text[:_LENGTH]
    offered = _last_box(text) or _first_tagged(text)
    return offered is not None and _equal(offered, answer)


def countdown_correct(text: str, numbers: Sequence[int], target: int) -> bool:
    """Whether the last box, or without one the first `expression = number` of the whole text, makes the target.

    Differs from the released code: expressions are parsed and not evaluated by Python, so powers and // do not count.
    """
    text = text[:_LENGTH]
    offered = _last_box(text) or _first_tagged(text) or text
    for command, sign in ((r"\div", "/"), (r"\times", "*"), (r"\cdot", "*")):
        offered = offered.replace(command, sign)
    if claim := _CLAIM.search(offered):
        offered = claim[1].strip()
    tree = expressions.parse(offered)
    value = None if tree is None else expressions.evaluate(tree)
    return value is not None and sorted(expressions.leaves(tree)) == sorted(numbers) and value == target


def sudoku_cells(text: str) -> str:
    """The 16 cells that d1's evaluation reads from a text with its end-of-text tokens: from the answer tags, from what stands
    behind them, or the first run of 16 digits. Space is dropped, other characters keep their place; 0 where a cell is missing.
    """
    text = text[:_LENGTH]
    for pattern in _SUDOKU:
        found = pattern.search(text)
        if found and found[1].strip():
            return "".join(found[1].split())[:16].ljust(16, "0")
    return "0" * 16


# -- rewards -----------------------------------------------------------------------------------------------------------


def reward_answer(text: str) -> str:
    """What the rewards of GSM8K take as the answer: behind the last opening tag, up to the next closing one; all without tags."""
    return text.rpartition("<answer>")[2].partition("</answer>")[0].strip()


def xml_count(text: str) -> float:
    """0.125 for each of four tags that stands exactly once, with its line breaks, less 0.001 for each character behind the
    closing answer tag, which two of the rules subtract. A text that ends with the closing tag and without a line break loses
    0.001 for each of *all* its characters.
    """
    count = 0.125 * (text.count("<reasoning>\n") == 1) + 0.125 * (text.count("\n</reasoning>\n") == 1)
    if text.count("\n<answer>\n") == 1:
        count += 0.125 - len(text.split("\n</answer>\n")[-1]) * 0.001
    if text.count("\n</answer>") == 1:
        count += 0.125 - (len(text.split("\n</answer>")[-1]) - 1) * 0.001
    return count


def soft_format(text: str) -> float:
    """0.5 where the text begins with reasoning tags and then answer tags and none of them holds a line break."""
    text = text[:_LENGTH]
    first_line = text.partition("\n")[0]
    if not text.startswith("<reasoning>"):
        return 0.0
    for between in _BETWEEN.finditer(text, len("<reasoning>")):
        if between.start() > len(first_line):
            return 0.0
        line_end = text.find("\n", between.end())
        if text.find("</answer>", between.end(), len(text) if line_end < 0 else line_end) >= 0:
            return 0.5
    return 0.0


def strict_format(text: str) -> float:
    """0.5 where the text is six lines: tag, one line, tag, tag, one line, tag; and one or two line breaks behind them."""
    lines = text.split("\n", 8)
    tags = ["<reasoning>", "</reasoning>", "<answer>", "</answer>", ""]
    return 0.5 * ([*lines[0:1], *lines[2:4], *lines[5:]] in (tags, [*tags, ""]))


def boxed_format(text: str) -> float:
    """1.00 for a closed box in the last answer tags, 0.75 for the tags alone, 0.50 for a box alone, 0.25 for neither: the table of
    the paper.
    """
    tagged = last_answer(text)
    if tagged is not None:
        return 1.0 if last_box(tagged) is not None else 0.75
    return 0.5 if last_box(text) is not None else 0.25


def math_reward(text: str, answer: str) -> bool:
    """As `math_correct`, but a box that is not closed gives way to the whole text."""
    text = text[:_LENGTH]
    offered = _last_box(text)
    return _equal(text if offered is None else offered, answer)


# -- LaTeX ---------------------------------------------------------------------------------------------------------------


def _first_tagged(text: str) -> str | None:
    start = text.find("<answer>")
    end = text.find("</answer>", start)
    return None if start < 0 or end < 0 else text[start + 8 : end].strip()


def _last_box(text: str) -> str | None:
    r"""The last \boxed, from a space behind it up to a dollar sign or in its braces; all of a text without one; None where it
    is not closed.
    """
    if "\\boxed " in text:
        return text.rpartition("\\boxed ")[2].partition("$")[0]
    start = max(text.rfind("\\boxed"), -1)
    if start < 0 and (start := text.rfind("\\fbox")) < 0:
        return text
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "{") - (text[place] == "}")
        if text[place] == "}" and depth == 0:
            inside = text[start : place + 1]
            return inside[7:-1] if inside.startswith("\\boxed{") else inside
    return None


def _equal(left: str, right: str) -> bool:
    try:
        return normal_form(left) == normal_form(right)
    except (IndexError, ValueError):  # a \frac or \sqrt with nothing behind it, units twice
        return left == right


def normal_form(text: str) -> str:
    """One spelling for several, by replacing text: the normaliser that came with MATH and that d1 took over."""
    for old, new in (
        *(("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"), ("\\left", "")),
        *(("\\right", ""), ("^{\\circ}", ""), ("^\\circ", ""), ("\\$", "")),
    ):
        text = text.replace(old, new)
    if "\\text{ " in text:
        text, _ = text.split("\\text{ ")
    for old, new in (("\\%", ""), (" .", " 0."), ("{.", "{0.")):
        text = text.replace(old, new)
    if not text:
        return text
    text = "0" + text if text[0] == "." else text
    if text.count("=") == 1 and len(text.partition("=")[0]) <= 2:
        text = text.partition("=")[2]
    head, *roots = text.split("\\sqrt")
    text = head + "".join("\\sqrt" + (root if root[0] == "{" else f"{{{root[0]}}}{root[1:]}") for root in roots)
    text = _braced_fractions(text.replace(" ", ""))
    text = "\\frac{1}{2}" if text == "0.5" else text
    if whole := re.fullmatch(r"(-?(?:0|[1-9][0-9]*))/(-?(?:0|[1-9][0-9]*))", text):
        text = f"\\frac{{{whole[1]}}}{{{whole[2]}}}"
    return text


def _braced_fractions(text: str) -> str:
    head, *parts = text.split("\\frac")
    made = [head]
    for part in parts:
        if part[0] == "{":
            made.append(part)
        elif len(part) < 2:
            return text
        else:
            bottom = part[1:] if part[1] == "{" else f"{{{part[1]}}}{part[2:]}"
            made.append(f"{{{part[0]}}}{bottom}")
    return "\\frac".join(made)
