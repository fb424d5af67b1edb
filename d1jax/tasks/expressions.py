"""Expressions over integers: a bounded parser with exact values, a printer with the fewest parentheses, and a solver.

An expression is a tree: an `int`, or `(op, left, right)` with op one of + - * /. Text that a model wrote is never
passed to `eval`, which would accept 9**9**9**9 and never come back.
"""

import re
from fractions import Fraction
from itertools import combinations

import numpy as np

Tree = int | tuple[str, "Tree", "Tree"]

MAX_LENGTH = 200
MAX_NUMBERS = 16  # also bounds the depth of a tree, hence the recursion below
MAX_DIGITS = 6

_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
_SPELLINGS = {"×": "*", "·": "*", "÷": "/", "−": "-", "\\times": "*", "\\cdot": "*", "\\div": "/"}
_SPELLING = re.compile(r"[×·÷−]|\\(?:times|cdot|div)(?![A-Za-z])")
_TOKEN = re.compile(r"\s*([0-9]+|[-+*/()])")
_VALUE = re.compile(r"\s*-?[0-9]+\s*")


def parse(text: str) -> Tree | None:
    """The tree of an expression, or None when `text` is not one.

    Grammar: integers without leading zeros, binary + - * / (also × · ÷ − and LaTeX \\times \\cdot \\div), parentheses;
    operators of equal precedence group to the left. No sign, power, // or decimals. One `= integer` may follow; it is
    dropped, whatever it claims.
    """
    text = text.strip()
    if len(text) > MAX_LENGTH:
        return None
    text, equals, claimed = _SPELLING.sub(lambda match: _SPELLINGS[match.group()], text).partition("=")
    if equals and not _VALUE.fullmatch(claimed):
        return None
    tokens = _tokens(text)
    return None if tokens is None else _tree(tokens)


def _tokens(text: str) -> list[str] | None:
    tokens, place = [], 0
    text = text.rstrip()
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            return None
        tokens.append(match.group(1))
        place = match.end()
    numbers = [token for token in tokens if token[0].isdigit()]
    # A leading zero would let one number be written in two ways.
    if len(numbers) > MAX_NUMBERS or any(len(n) > MAX_DIGITS or (n[0] == "0" and n != "0") for n in numbers):
        return None
    return tokens


def _tree(tokens: list[str]) -> Tree | None:
    """Dijkstra's shunting yard: its stacks are lists, so deep parentheses cannot exhaust Python's own stack."""
    values: list[Tree] = []
    operators: list[str] = []

    def reduce() -> None:
        right, left = values.pop(), values.pop()
        values.append((operators.pop(), left, right))

    operand_next = True
    for token in tokens:
        if operand_next != (token[0].isdigit() or token == "("):
            return None  # "2(3)", "1 2", "+3", "()" and the like
        if token == "(":
            operators.append(token)
        elif token == ")":
            while operators and operators[-1] != "(":
                reduce()
            if not operators:
                return None
            operators.pop()
        elif token in _PRECEDENCE:
            while operators and operators[-1] != "(" and _PRECEDENCE[operators[-1]] >= _PRECEDENCE[token]:
                reduce()
            operators.append(token)
            operand_next = True
        else:
            values.append(int(token))
            operand_next = False
    if operand_next or "(" in operators:
        return None
    while operators:
        reduce()
    return values[0]


def evaluate(tree: Tree) -> Fraction | None:
    """The exact value; None where something is divided by zero."""
    if isinstance(tree, int):
        return Fraction(tree)
    op, left, right = tree[0], evaluate(tree[1]), evaluate(tree[2])
    if left is None or right is None or (op == "/" and right == 0):
        return None
    if op == "+":
        return left + right
    if op == "-":
        return left - right
    return left * right if op == "*" else left / right


def leaves(tree: Tree) -> list[int]:
    """The numbers of an expression, from left to right."""
    return [tree] if isinstance(tree, int) else leaves(tree[1]) + leaves(tree[2])


def show(tree: Tree) -> str:
    """The expression without spaces and with as few parentheses as keep its value: `a+(b-c)` is written `a+b-c`."""
    if isinstance(tree, int):
        return str(tree)
    op, left, right = tree
    return _operand(left, op, False) + op + _operand(right, op, op in "-/")


def _operand(tree: Tree, op: str, closed: bool) -> str:
    """`closed`: an operand of the same precedence needs parentheses too (right of - and /)."""
    own = 3 if isinstance(tree, int) else _PRECEDENCE[tree[0]]
    return f"({show(tree)})" if own < _PRECEDENCE[op] or (closed and own == _PRECEDENCE[op]) else show(tree)


def reaches(numbers_KN: np.ndarray, target_K: np.ndarray) -> np.ndarray:
    """Which rows of numbers make their target with every number used, exact division and no negative intermediate
    value.
    """
    size = numbers_KN.shape[1]
    hit_K = np.zeros(len(numbers_KN), dtype=bool)
    for pair in combinations(range(size), 2):
        first, second = numbers_KN[:, pair[0]], numbers_KN[:, pair[1]]
        high, low = np.maximum(first, second), np.minimum(first, second)
        divisor = np.maximum(low, 1)
        # Where there is no exact quotient the sum stands in for it, which is tried anyway.
        quotient = np.where((low > 0) & (high % divisor == 0), high // divisor, high + low)
        rest = np.delete(numbers_KN, pair, axis=1)
        for value in (high + low, high - low, high * low, quotient):
            hit_K |= value == target_K if size == 2 else reaches(np.column_stack([rest, value]), target_K)
    return hit_K


def solve(numbers: list[int], target: int) -> Tree | None:
    """The first solution in a fixed order that does not depend on the order of `numbers`; the rules of `reaches`. None
    if there is none.
    """
    dead: set[tuple[int, ...]] = set()

    def search(items: list[tuple[int, Tree]]) -> Tree | None:
        if len(items) == 1:
            return items[0][1] if items[0][0] == target else None
        items = sorted(items, key=lambda item: -item[0])
        state = tuple(value for value, _ in items)
        if state in dead:
            return None
        for i, j in combinations(range(len(items)), 2):
            (high, left), (low, right) = items[i], items[j]
            rest = items[:i] + items[i + 1 : j] + items[j + 1 :]
            results = [("+", high + low), ("-", high - low), ("*", high * low)]
            if low > 0 and high % low == 0:
                results.append(("/", high // low))
            for op, value in results:
                found = search([*rest, (value, (op, left, right))])
                if found is not None:
                    return found
        dead.add(state)
        return None

    return search([(number, number) for number in numbers])
