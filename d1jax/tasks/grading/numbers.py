"""The number that a passage states, exactly, and whether two passages state the same one.

`18`, `18.0`, `$18.00`, `18 eggs`, `18%`, `43,500`, `\\frac{1}{2}`, `1 1/2`, `-3`, `1.5e3` and `x = 18` state a number; `18 or 20`,
`3 + 15` and `5-6` state none. Nothing here raises on a text, and no number is longer than MAX_DIGITS.
"""

import re
from fractions import Fraction

from d1jax.tasks.grading.offers import MAX_PASSAGE, offer

MAX_DIGITS = 64
MAX_EXPONENT = 30

# Minus signs, fullwidth digits and what is written for a space, one character each.
_CHARACTERS = {ord(sign): "-" for sign in "−‐‑‒–—－﹣"} | {ord("０") + digit: str(digit) for digit in range(10)}
_CHARACTERS |= {ord(sign): " " for sign in "\u00a0\u2007~*"} | {ord(sign): "" for sign in "\u2009\u202f\u200b$€£¥₹¢"}
_CHARACTERS |= {ord("×"): "*", ord("·"): "*", ord("÷"): ":", ord("，"): ","}
# Thin spaces group digits; signs of currency and of the layout say nothing about the number.
_NOTHING = re.compile(r"\\[!,;:$]|\\(?:left|right|displaystyle|mathrm|mathbf|mathit|bf|rm)(?![A-Za-z])|\\[()\[\]]")
_COMMA = re.compile(r"\{,\}")
_TEN_TO_THE = re.compile(r"\s*(?:\\times|\\cdot|×|·|\*|x)\s*10\s*\^\s*\{?\s*([-−+]?[0-9]{1,4})\s*\}?")
_FRACTION = re.compile(
    r"\\[dtc]?frac\s*(?:\{\s*([-−]?[0-9]+)\s*\}|([0-9]))\s*(?:\{\s*([-−]?[0-9]+)\s*\}|([0-9]))(?![0-9])"
)
_FULL_HOUR = re.compile(r"(?<![0-9:])([0-9]{1,2}):00(?![0-9:])")  # 2:00 pm is 2 pm
_OPERATOR = re.compile(r"\\(?:times|cdot|div|pm|mp)(?![A-Za-z])|\^")
# A number under a root or times pi is another number; \circ and \% are units.
_FUNCTION = re.compile(r"\\(?:sqrt|pi|log|ln|exp|sin|cos|tan|[dtc]?frac|binom|sum|prod|int)(?![A-Za-z])|π|√|[0-9]!")
_COMMAND = re.compile(r"\\[A-Za-z]+|\\.|[{}]")
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_NUMBER = re.compile(
    rf"(?<![\w.])(?:(?P<sign>[-+]) ?)?(?:(?P<whole>{_DIGITS})[ \-](?P<over>[0-9]+)/(?P<under>[0-9]+)"
    rf"|(?P<top>{_DIGITS}) ?/ ?(?P<bottom>{_DIGITS})(?![./0-9])"
    rf"|(?P<plain>{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE](?P<exponent>[-+]?[0-9]{{1,4}}))?)(?![0-9]*_)"
)
_LISTS = re.compile(
    r"\s*(?:[-+*/:;,&^|…]|\s|\b(?:and|or|to|maybe|plus|minus|times|divided|by)\b)*\s*"
)  # two numbers, or a sum that is not worked out
_UNIT_ONLY = re.compile(
    r"\s*[A-Za-z]+\.?,?\s*(?:(?:and|or|plus|minus|times)\b)?\s*,?\s*"
)  # 2 hours and 30 minutes: two numbers for one answer
# 18 is not what these say: a relation, another power or fraction of it, a hexadecimal number, an apostrophe between thousands.
_RELATION = re.compile(
    r"[<>≤≥]\s*=?\s*[-+$]?[0-9]|!=|≠|\\(?:geq?|leq?|neq?|gt|lt|approx)(?:slant)?(?![A-Za-z])"
    r"|[0-9][²³¹⁰⁴-⁹½⅓¼¾⅔]|\b0x[0-9a-fA-F]|[0-9]'[0-9]"
)
_BEFORE = re.compile(r"\b(?:(?:less|more|greater|fewer|larger|smaller) than|at (?:least|most)|not)\s*$", re.IGNORECASE)
_MINUS = re.compile(r"\b(?:minus|negative)\s*$", re.IGNORECASE)
_MULTIPLIER = re.compile(r"\s*(?:(?:hundred|thousand|million|billion|trillion|dozen|score)s?\b|[kKM]\b)", re.IGNORECASE)
# 2 and 1/2 is a mixed number; 2 and a half is one in words, which are not read.
_AND_FRACTION = re.compile(r"([0-9]{1,9})\s+and\s+([0-9]{1,9})\s*/\s*([0-9]{1,9})(?!\s*[0-9/]|\.[0-9])")
_AND_WORDS = re.compile(
    r"(?:\s+[A-Za-z]+)?\s+and\s+(?:a|an|one|two|three)[\s-]+(?:half|halves|thirds?|quarters?|fourths?)\b", re.IGNORECASE
)
_UNIT = re.compile(r" ?(?:%|[A-Za-z]{2,}(?: [A-Za-z]{2,})*)?\.? ?")
_LEADING = re.compile(r"[^A-Za-z0-9.+-]*(?:[-+]\s*)?(?:(?:USD|US|EUR|Rs\.?|Php|A\$|C\$)\s*)?")


def final_number(text: str) -> Fraction | None:
    """The number that a text states as its answer, or None."""
    found = offer(text)
    return None if found is None else read_number(found.text)


def same_number(left: str, right: str) -> bool:
    """Whether both passages state a number, and the same one."""
    value = read_number(left)
    return value is not None and value == read_number(right)


def read_number(passage: str) -> Fraction | None:
    """The number that a passage states, or None.

    Behind an equals sign, what stands behind the last one counts. A passage that begins with a number states that one, with
    whatever words behind it; another states its last one. Two numbers with only a sign, a comma, a unit, `and` or `or` between
    them are no answer.
    """
    if len(passage) > MAX_PASSAGE:
        return None
    text = _plain(passage)
    if text is None or _RELATION.search(passage):
        return None
    if "=" in text or "≈" in text:
        text = re.split(r"[=≈]", text.rstrip("=≈ "))[-1]
    if _FUNCTION.search(text):
        return None
    text = _with_mixed(_COMMAND.sub(" ", text))
    numbers = list(_NUMBER.finditer(text))
    if not numbers:
        return None
    first_counts = _LEADING.match(text).end() >= numbers[0].start()
    chosen = numbers[0] if first_counts else numbers[-1]
    if len(numbers) > 1:
        pair = numbers[:2] if first_counts else numbers[-2:]
        between = text[pair[0].end() : pair[1].start()]
        if _LISTS.fullmatch(between) or _UNIT_ONLY.fullmatch(between):
            return None
    if _BEFORE.search(text[: chosen.start()]):
        return None
    if _MULTIPLIER.match(text, chosen.end()) or _AND_WORDS.match(text, chosen.end()):
        return None
    value = _value(chosen)
    return -value if value is not None and _MINUS.search(text[: chosen.start()]) else value


def _with_mixed(text: str) -> str:
    """`2 and 1/2` at the beginning as `2 1/2`, where the fraction is below 1: `3 and 5/2` are two answers."""
    found = _AND_FRACTION.match(text, _LEADING.match(text).end())
    if found is None or int(found[2]) >= int(found[3]):
        return text
    return f"{text[: found.start()]}{found[1]} {found[2]}/{found[3]}{text[found.end() :]}"


def read_plain_number(passage: str) -> Fraction | None:
    """The number where the passage is a number and nothing else but a unit in letters, a sign of currency or %; else None."""
    if len(passage) > MAX_PASSAGE or "=" in passage or _FUNCTION.search(text := _plain(passage)):
        return None
    found = _NUMBER.search(_COMMAND.sub(" ", text))
    whole = found and not text[: found.start()].strip() and _UNIT.fullmatch(_COMMAND.sub(" ", text), found.end())
    if whole and _MULTIPLIER.match(_COMMAND.sub(" ", text), found.end()):
        return None
    return _value(found) if whole else None


def show_number(value: Fraction) -> str:
    """`18`, `0.5` or `1/3`: read_number reads it back where it has no more than MAX_DIGITS characters."""
    rest, places = value.denominator, 0
    while rest % 10 == 0 or rest % 2 == 0 or rest % 5 == 0:
        rest, places = rest // (10 if rest % 10 == 0 else 2 if rest % 2 == 0 else 5), places + 1
    if rest != 1 or not places:
        return str(value)
    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"


def _plain(passage: str) -> str | None:
    """The passage with its LaTeX of the layout removed, fractions as a/b and powers of ten as e; None for unreadable fractions."""
    text = _COMMA.sub(",", _NOTHING.sub("", passage))
    text = _TEN_TO_THE.sub(lambda match: "e" + match[1].replace("−", "-"), text)
    text = _FRACTION.sub(_as_slash, text)
    text = _OPERATOR.sub(":", _FULL_HOUR.sub(r"\1", text))
    return " ".join(text.translate(_CHARACTERS).split())


def _as_slash(match: re.Match[str]) -> str:
    top, bottom = (match[1] or match[2]).replace("−", "-"), (match[3] or match[4]).replace("−", "-")
    negative = (top[0] == "-") != (bottom[0] == "-")
    return f"{' -' if negative else ' '}{top.lstrip('-')}/{bottom.lstrip('-')} "


def _value(number: re.Match[str]) -> Fraction | None:
    if len(number.group()) > MAX_DIGITS:
        return None
    parts = {name: part.replace(",", "") for name, part in number.groupdict().items() if part is not None}
    exponent = int(parts.get("exponent", "0"))
    if abs(exponent) > MAX_EXPONENT:
        return None
    try:
        if "whole" in parts:
            value = int(parts["whole"]) + Fraction(int(parts["over"]), int(parts["under"]))
        elif "top" in parts:
            value = Fraction(int(parts["top"]), int(parts["bottom"]))
        else:
            value = Fraction(parts["plain"]) * Fraction(10) ** exponent
    except ZeroDivisionError:
        return None
    return -value if parts.get("sign") == "-" else value
