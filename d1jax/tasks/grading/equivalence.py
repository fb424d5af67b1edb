r"""Whether two mathematical answers are worth the same: `\frac{1}{2}` and `0.5`, `x+1` and `1+x`.

Exact checks come first. What they leave open goes to math-verify in worker processes (pool.py).
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable
from fractions import Fraction

from d1jax.tasks.grading.numbers import read_plain_number
from d1jax.tasks.grading.offers import MAX_PASSAGE
from d1jax.tasks.grading.pool import Pool, shared_pool
from d1jax.tasks.grading.powers import has_unwritable_power
from d1jax.tasks.task import DataError

MAX_LENGTH = 300
"""Characters of an answer that math-verify is asked about; a longer one is equal only where its normal form is."""

# (?<!\\): what follows a line break of a matrix, \\, is no command.
_LAYOUT = re.compile(r"(?<!\\)\\(?:[!,;:$()\[\]]|(?:left|right|displaystyle|limits|[bB]igg?[lr]?)(?![A-Za-z])\.?)|\$")
_GROUPED = re.compile(r",\s*\\!\s*|\{,\}")
_DEGREES = re.compile(r"\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\})|°|\\degree(?![A-Za-z])")
_SPACE = re.compile(r"(?<!\\)\\ |\\q?quad(?![A-Za-z])|[~\u00a0\u2009\u202f]")
_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it)|mbox|operatorname)\s*\{([^{}]*)\}")
_UNIT = re.compile(
    r"(?<=[0-9}])\s*\\(?:text|mathrm|mbox)\s*\{(?!\s*(?:and|or|if|but|hundred|thousand|million|billion|dozen)\b)[^{}0-9]*\}(?:\s*\^\s*\{?\s*[23]\s*\}?)?\s*\.?\s*\Z"
)
_FRACTION_NAME = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_BARE_TOP = re.compile(r"\\frac\s*([0-9A-Za-z])")
_BARE_BOTTOM = re.compile(r"(\\frac\{[^{}]*\})\s*([0-9A-Za-z])")
_BARE_ROOT = re.compile(r"\\sqrt\s*([0-9A-Za-z])")
_BRACED_SIGN = re.compile(r"([_^])\{([0-9A-Za-z])\}")
_SPACE_BEHIND_SIGN = re.compile(r"(?<=[_^][0-9]) (?=[0-9])")  # \log_2 3
_THOUSANDS = re.compile(r"(?<![\w.,])([1-9][0-9]{0,2}(?:,[0-9]{3})+)(?![\w,])")
_AND = re.compile(r",?\s+(?:and|or)\s+")
_OR = re.compile(r",?\s+or\s+|\\(?:cup|lor|vee)(?![A-Za-z])|∨")
# 2 1/2, not 21/2: a whole number, a space and a fraction.
_MIXED = re.compile(r"(?<![\w.,/^])([0-9]{1,9})(?: |\\[,;:])+([0-9]{1,9}) ?/ ?([0-9]{1,9})(?! ?[0-9/]|\.[0-9])")
_SPACED_THOUSANDS = re.compile(r"(?<![\w.,] )(?<![\w.,])([1-9][0-9]{0,2}(?: [0-9]{3})+)(?! ?[\w,])")
_SPACE_TO_DROP = re.compile(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])|(?<=[0-9]) (?=[A-Za-z])|(?<=[A-Za-z]) (?=[0-9])")
_TWO_NUMBERS = re.compile(r"[0-9] [0-9]")
_VARIABLE = re.compile(r"(?<![\\A-Za-z])[A-Za-z](?![A-Za-z])")
_ONE_NAME = re.compile(r"\A[A-Za-z]\s*(?:=|\\in(?![A-Za-z]))\s*")
# x=1,x=2: solutions of one variable
_EACH_NAMED = re.compile(r"([A-Za-z])=[^=,]+(?:,\1=[^=,]+)+")
_SPELLINGS = str.maketrans(
    {"−": "-", "–": "-", "×": "*", "·": "*", "π": "\\pi ", "∞": "\\infty ", "√": "\\sqrt ", "∪": "\\cup "}
)
_COMPARED = re.compile(r"\\(?:le|ge|lt|gt)q?(?![A-Za-z])|[<>≤≥=]")
_BOUND = r"(-?[0-9./]+|-?\\frac\{[0-9]+\}\{[0-9]+\}|-?\\infty)"
_SIGN = r"(<|>|\\leq?(?:slant)?(?![A-Za-z])|\\geq?(?:slant)?(?![A-Za-z])|\\[lg]t(?![A-Za-z])|≤|≥)"
_BETWEEN = re.compile(rf"{_BOUND}{_SIGN} ?[A-Za-z] ?{_SIGN} ?{_BOUND}")
_BEYOND = re.compile(rf"[A-Za-z] ?{_SIGN} ?{_BOUND}")
_BASED = re.compile(r"([0-9A-F]+)_\{?([0-9]+)\}?")
_CHOICE = re.compile(r"\(?([A-Z])\)?")
_ANOTHER = re.compile(r"(?:,|\band\b|\bor\b)\s*\(?[A-Z]\b")  # C, D is no choice
_WORDS = re.compile(r"[A-Za-z]{2,}(?:[ -][A-Za-z]+)*")


def equivalent(gold: str, offer: str) -> bool | None:
    """One pair of `equivalent_many`."""
    return equivalent_many([(gold, offer)])[0]


def equivalent_many(pairs: Iterable[tuple[str, str]], pool: Pool | None = None) -> list[bool | None]:
    """Whether each (reference, offered answer) is worth the same; None where that was not found out: math-verify took longer
    than its time limit, its process died, or a power has more digits than it can compute. All pairs share the workers, so many
    at once are faster than one by one.

    Equal are: two equal normal forms that are not blank; two numbers of the same value, with units, commas or percent signs or
    without; and what math-verify says is equal.
    Raises DataError where math-verify is needed and not installed.
    """
    pairs = list(pairs)
    decided = [decide(gold, offer) for gold, offer in pairs]
    open_forms = {
        index: (normal_form(pairs[index][0]), normal_form(pairs[index][1]))
        for index, known in enumerate(decided)
        if known is None
    }
    asked = [index for index, forms in open_forms.items() if not any(map(has_unwritable_power, forms))]
    if asked:
        check_installed()
        answers = (pool or shared_pool()).ask([open_forms[index] for index in asked])
        for index, answer in zip(asked, answers, strict=True):
            decided[index] = answer
    return decided


def decide(gold: str, offer: str) -> bool | None:
    """What is known about a pair without math-verify; None where nothing is."""
    if max(len(gold), len(offer)) > MAX_PASSAGE:
        return gold == offer
    left, right = normal_form(gold), normal_form(offer)
    if not left or not right:
        return False
    if left == right:
        return True
    if left.casefold() == right.casefold() and _WORDS.fullmatch(left):
        return True
    if _TEXT.search(gold) and (choice := _CHOICE.fullmatch(left)):
        chosen = _CHOICE.match(right)
        rest = "" if chosen is None else right[chosen.end() :]
        return chosen is not None and chosen[1] == choice[1] and not rest[:1].isalpha() and not _ANOTHER.search(rest)
    if _WORDS.fullmatch(left) and (_TEXT.search(gold) or len(left) > 3):
        return False  # as a formula, east is e a s t, and equal to seat
    if based := _BASED.fullmatch(left):
        return right == based[1]  # the question names the base; another base is another number
    if _BASED.fullmatch(right):
        return False
    if _is_equation(left) != _is_equation(right):
        return False  # math-verify compares the right sides alone, and x + y = 3 is not 3
    if {left[:1], right[:1]} == {"(", "\\"} and (left + right).count("\\{") == 1:
        return False  # a point and a set
    if _TWO_NUMBERS.search(left) or _TWO_NUMBERS.search(right):
        return False  # math-verify reads 3 5 as a product
    numbers = read_plain_number(left), read_plain_number(right)
    if None not in numbers:
        return numbers[0] == numbers[1] or _same_share(left, numbers[0], right, numbers[1])
    return False if max(len(left), len(right)) > MAX_LENGTH else None


def _same_share(left: str, left_number: Fraction, right: str, right_number: Fraction) -> bool:
    """Whether one of the two is a percentage and the other one the number that it stands for: 50% and 0.5."""
    if left.endswith("%") == right.endswith("%"):
        return False
    percentage, share = (left_number, right_number) if left.endswith("%") else (right_number, left_number)
    return percentage == 100 * share


def _is_equation(form: str) -> bool:
    """Whether letters stand on the left of an equals sign: an equation, and not a sum that is worked out (8 + 8 = 16)."""
    left, equals, _ = form.partition("=")
    return bool(equals) and _VARIABLE.search(left) is not None


def normal_form(answer: str) -> str:
    r"""One spelling for answers that differ in layout only: spaces, `\left`, `\,`, `$ $`, `\dfrac`, degrees, braces left out
    (`\frac12`, `\sqrt3`, `x^{2}`), `\text{ }`, a unit in `\text{ }` behind a number, commas for thousands, `and` and `or` for a
    comma, a name before `=` (`x = 5`, and `x = 1, x = 2` of one variable), a period at the
    end. `2 1/2` becomes `2\frac{1}{2}`, and solved inequalities intervals.
    """
    text = _UNIT.sub("", _SPACE.sub(" ", _GROUPED.sub(",", answer.translate(_SPELLINGS))))
    text = _MIXED.sub(_as_mixed, text)
    text = _DEGREES.sub("", _LAYOUT.sub("", text))
    text = _BARE_TOP.sub(r"\\frac{\1}", _FRACTION_NAME.sub(r"\\frac", text))
    text = _BARE_ROOT.sub(r"\\sqrt{\1}", _BARE_BOTTOM.sub(r"\1{\2}", text))
    text = _TEXT.sub(lambda match: f" {match[1]} ", text)
    if not re.search(r"[(\[]|\\\{", text):  # (1,200) is a point
        text = _THOUSANDS.sub(lambda match: match[1].replace(",", ""), text)
    text = _AND.sub(", ", _as_union(_SPACE_BEHIND_SIGN.sub("", " ".join(text.split()))))
    text = _SPACED_THOUSANDS.sub(lambda match: match[1].replace(" ", ""), text)
    text = _SPACE_TO_DROP.sub("", text).removesuffix(".")
    text = _as_interval(_BRACED_SIGN.sub(r"\1\2", text))
    if named := _EACH_NAMED.fullmatch(text):
        return text.replace(f"{named[1]}=", "")
    return text if len(_COMPARED.findall(text)) > 1 else _ONE_NAME.sub("", text)


def _as_mixed(found: re.Match[str]) -> str:
    """`2 1/2` as `2\\frac{1}{2}`; 3 5/2 is left alone, since it may be 3 + 5/2 and 3 times 5/2."""
    whole, top, bottom = found.groups()
    return f"{whole}\\frac{{{top}}}{{{bottom}}}" if int(top) < int(bottom) else found.group()


def _as_union(text: str) -> str:
    """`x<2 or x>5` as `(-\\infty,2)\\cup(5,\\infty)`, where all parts are solved inequalities of one variable. `and` and a comma
    are left alone: x>2 and x<5 is no union.
    """
    parts = [_SPACE_TO_DROP.sub("", part.strip()) for part in _OR.split(text.removesuffix("."))]
    intervals = [_as_interval(part) for part in parts]
    solved = all(interval != part for interval, part in zip(intervals, parts, strict=True))
    variables = {name for part in parts for name in _VARIABLE.findall(part)}
    return "\\cup".join(intervals) if len(parts) > 1 and solved and len(variables) == 1 else text


def _as_interval(text: str) -> str:
    """`1<x\\le2` as `(1,2]`: math-verify is not asked, which would also accept an inequality that is not solved yet."""
    if both := _BETWEEN.fullmatch(text):
        low, first, second, high = both.groups()
        if _points_left(first) != _points_left(second):
            return text
        if _points_left(first) is False:
            low, first, second, high = high, second, first, low
    elif one := _BEYOND.fullmatch(text):
        sign, bound = one.groups()
        low, first, second, high = (
            ("-\\infty", "<", sign, bound) if _points_left(sign) else (bound, sign, "<", "\\infty")
        )
    else:
        return text
    return f"{'[' if _includes(first) else '('}{low},{high}{']' if _includes(second) else ')'}"


def _points_left(sign: str) -> bool:
    return sign.startswith(("<", "\\l", "≤"))


def _includes(sign: str) -> bool:
    return sign.startswith(("\\le", "\\ge", "≤", "≥"))


def check_installed() -> None:
    """Raises DataError where math-verify is not installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise DataError("comparing mathematical answers needs math-verify; pip install 'd1jax[maths]'")
