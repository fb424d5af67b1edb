"""Powers of integers whose value nobody can write, such as 9^{9^{9^{9}}}: math-verify works on one until its time limit."""

import math
import re

MAX_DIGITS = 20_000_000
"""Digits of a value that math-verify still computes in time (2^{2^{25}} has ten million, and takes it a fifth of a second)."""

# 9^{9^9}, 9^(9^9); what is raised may end in a bracket: (9^9)^{9^9}
_TOWER = re.compile(r"(?:[0-9]+|[)}])(?:\^[{(]*-?[0-9]+)+")
_LEAST_OF_BRACKETS = 2.0


def has_unwritable_power(form: str) -> bool:
    """Whether a formula in its normal form has a power of integers, or of brackets, with more than MAX_DIGITS digits."""
    return any(_digits(match.group()) > MAX_DIGITS for match in _TOWER.finditer(form))


def _digits(tower: str) -> float:
    """log10 of a tower of powers, computed from its top; infinite where that is no float."""
    *bases, top = re.findall(r"[0-9]+|[)}]", tower)
    value, digits = float(top), 0.0
    for base in map(_least, reversed(bases)):
        if base < 2:
            value, digits = base, 0.0
        else:
            digits = value * math.log10(base)
            value = 10.0**digits if digits < 300 else math.inf
    return digits


def _least(base: str) -> float:
    return float(base) if base.isdecimal() else _LEAST_OF_BRACKETS
