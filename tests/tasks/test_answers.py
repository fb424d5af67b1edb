"""The answer finders, checked on hand-written cases and against slow, obvious oracles."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.tasks.answers import (
    answer_text,
    as_answer,
    check_style,
    last_answer,
    last_boxed,
)

PIECES = st.lists(
    st.sampled_from(["<answer>", "</answer>", "\\boxed{", "{", "}", "a", "7", " ", "\n"]), max_size=14
).map("".join)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no tags", None),
        ("<answer>1+2", None),
        ("</answer><answer>", None),
        ("<answer>\n 1+2 \n</answer>", "1+2"),
        ("<answer>a</answer> then <answer>b</answer>", "b"),
        ("<answer>a</answer> then <answer>b", "a"),
        ("<answer>a <answer>b</answer>", "b"),
        ("<answer>a</answer> stray </answer>", "a"),
        ("<answer></answer>", ""),
    ],
)
def test_last_answer(text, expected):
    assert last_answer(text) == expected


@given(PIECES)
def test_last_answer_agrees_with_a_tempered_regex(text):
    pairs = re.findall(r"<answer>((?:(?!</?answer>).)*)</answer>", text, flags=re.DOTALL)
    assert last_answer(text) == (pairs[-1].strip() if pairs else None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("none", None),
        (r"\boxed{5", None),
        (r"\boxed{5}", "5"),
        (r"\boxed {5}", "5"),
        (r"\boxed{1} and \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\boxed{\boxed{3}+1}", "3"),
        (r"} \boxed{4} }", "4"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    ],
)
def test_last_boxed(text, expected):
    assert last_boxed(text) == expected


@given(PIECES)
def test_last_boxed_agrees_with_counting_braces(text):
    expected = None
    for start in [match.end() for match in re.finditer(re.escape("\\boxed{"), text)]:
        depth = 1
        for place in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                expected = text[start:place].strip()
                break
    assert last_boxed(text) == expected


@pytest.mark.parametrize("piece", ["<answer>", "</answer>", "\\boxed{", "{", "}", "\\boxed ", "<", "\\"])
def test_repeated_pieces_are_read_in_linear_time(piece):
    start = time.perf_counter()
    last_answer(piece * 200_000)
    last_boxed(piece * 200_000)
    assert time.perf_counter() - start < 2.0


def test_styles():
    assert answer_text("12", "bare") == "12"
    assert answer_text("12", "instruct") is None
    assert answer_text("12 <answer>34</answer>", "bare") == "34"
    for style in ("bare", "instruct"):
        assert answer_text(as_answer("1+2", style), style) == "1+2"
    with pytest.raises(ValueError, match="sudoku: style = 'chat' is not one of bare, instruct"):
        check_style("sudoku", "chat")
