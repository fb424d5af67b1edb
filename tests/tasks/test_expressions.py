"""Expressions: the parser and printer against Python's own `ast`, the solver against brute force."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.tasks import expressions
from d1jax.tasks.expressions import reaches, solve
from tests.tasks.expression_oracle import TREES, full, oracle, oracle_leaves


@given(TREES)
def test_parser_and_evaluator_agree_with_python(tree):
    text = full(tree)
    parsed = expressions.parse(text)
    if len(text) <= expressions.MAX_LENGTH:
        assert parsed == tree
    assert expressions.evaluate(tree) == oracle(text)
    assert expressions.leaves(tree) == oracle_leaves(tree)


@given(st.text("0123456789+-*/() ", max_size=12))
def test_parser_accepts_only_what_python_accepts(text):
    tree = expressions.parse(text)
    if tree is not None:
        assert expressions.evaluate(tree) == oracle(text)
        return
    try:
        oracle(text)
    except (SyntaxError, AssertionError):
        return
    # Rejected here and accepted there: too long a number, or zeros in front of a zero ("00").
    assert re.search(r"\d{7}|00", text)


@given(TREES)
def test_printer_round_trip(tree):
    text = expressions.show(tree)
    again = expressions.parse(text)
    assert oracle(text) == oracle(full(tree))
    assert expressions.show(again) == text
    assert expressions.leaves(again) == oracle_leaves(tree)
    assert len(text) <= len(full(tree)) and " " not in text
    assert set(text) <= set("0123456789+-*/()")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("44 + (19 + 35)", "44+19+35"),
        ("(44 + 19) - 35", "44+19-35"),
        ("44 + (19 - 35)", "44+19-35"),
        ("44 - (19 - 35)", "44-(19-35)"),
        ("44 - (19 + 35)", "44-(19+35)"),
        ("(2*3) + (4/5)", "2*3+4/5"),
        ("2 * (3 + 4)", "2*(3+4)"),
        ("2 * (3 / 4)", "2*3/4"),
        ("2 / (3 * 4)", "2/(3*4)"),
        ("2 / (3 / 4)", "2/(3/4)"),
        ("(2 / 3) / 4", "2/3/4"),
        ("(((7)))", "7"),
    ],
)
def test_fewest_parentheses(text, shown):
    assert expressions.show(expressions.parse(text)) == shown


@given(TREES)
def test_no_pair_of_parentheses_can_be_spared(tree):
    """Taking out any pair changes the value for some numbers: checked with generic primes in place of the leaves."""
    primes = iter([101, 103, 107, 109, 113, 127, 131, 137, 139, 149, 151, 157, 163, 167, 173, 179])
    text = expressions.show(tree if isinstance(tree, int) else relabel(tree, primes))
    stack = []
    for place, char in enumerate(text):
        if char == "(":
            stack.append(place)
        elif char == ")":
            start = stack.pop()
            assert oracle(text[:start] + text[start + 1 : place] + text[place + 1 :]) != oracle(text)


def relabel(tree, values):
    return next(values) if isinstance(tree, int) else (tree[0], relabel(tree[1], values), relabel(tree[2], values))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2+3", 5),
        (" 2 × 3 ", 6),
        ("6÷3", 2),
        ("6−3", 3),
        ("2·3", 6),
        (r"2 \times 3", 6),
        (r"6\div 3", 2),
        (r"2\cdot3", 6),
        ("2+3=5", 5),
        ("2+3 = 7", 5),
        ("2+3=-5", 5),
        ("1/3+2/3", 1),
        ("0*7", 0),
        ("8-4-2", 2),
        ("8/4/2", 1),
    ],
)
def test_accepted_spellings(text, value):
    assert expressions.evaluate(expressions.parse(text)) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "+",
        "-5",
        "2*-3",
        "+3",
        "2**3",
        "7//2",
        "2^3",
        "2.5+1",
        "1e3",
        "2(3)",
        "(2)(3)",
        "(2)3",
        "2 3",
        "()",
        "(2",
        "2)",
        "2+",
        "=5",
        "2+3=",
        "2+3=5=5",
        "2+3=x",
        "x",
        "2+x",
        "007",
        "1234567",
        "2,3",
        "2+3;",
        "٣+٤",
        "²",
        "1_000",
        "2 \\timesfoo 3",
        "2\x003",
        "+".join(["1"] * 17),
        "(" * 10 + "1" + ")" * 9,
    ],
)
def test_rejected(text):
    assert expressions.parse(text) is None


def test_length_bound():
    assert expressions.parse(" " * 500 + "(" * 99 + "12" + ")" * 99 + " " * 500) == 12
    assert expressions.parse("(" * 100 + "1" + ")" * 100) is None


def brute_force_values(numbers):
    """All values by splitting the numbers in two in every way: another recursion than the module's, which joins
    pairs.
    """
    if len(numbers) == 1:
        return {numbers[0]}
    values = set()
    for size in range(1, len(numbers)):
        for chosen in itertools.combinations(range(len(numbers)), size):
            left = [numbers[i] for i in chosen]
            right = [numbers[i] for i in range(len(numbers)) if i not in chosen]
            for a, b in itertools.product(brute_force_values(left), brute_force_values(right)):
                values |= {a + b, a * b} | ({a - b} if a >= b else set()) | ({a // b} if b and a % b == 0 else set())
    return values


@pytest.mark.parametrize(("size", "trials"), [(2, 100), (3, 60), (4, 8)])
def test_solver_and_vectorised_check_equal_brute_force(size, trials):
    rng = np.random.default_rng(size)
    for numbers in rng.integers(1, 25, size=(trials, size)):
        values = brute_force_values(numbers.tolist())
        hits = reaches(np.tile(numbers, (121, 1)), np.arange(121))
        assert set(np.flatnonzero(hits).tolist()) == {value for value in values if value <= 120}
        for target in range(0, 121, 7):
            tree = solve(numbers.tolist(), target)
            assert (tree is not None) == (target in values)
            if tree is not None:
                assert oracle(full(tree)) == target and sorted(oracle_leaves(tree)) == sorted(numbers.tolist())
                assert solve(numbers.tolist()[::-1], target) == tree
