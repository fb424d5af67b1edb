"""Filters of generated texts, and which of them names a drop."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.config.generation import FILTERS
from d1jax.generation.filters import TESTS, Text, dropped_by

PROSE = "First add the two numbers. Then take one away."


def looked_at(text=PROSE, tokens=9, ended=True):
    return Text(text, tokens, ended)


@pytest.mark.parametrize(
    ("one", "written", "passes"),
    [
        (looked_at(), "finished", True),
        (looked_at(ended=False), "finished", False),
        (looked_at(tokens=9), "tokens:9", True),
        (looked_at(tokens=10), "tokens:9", False),
        (looked_at("one two three four five six"), "repetition:0", True),
        (looked_at("go on then " * 20), "repetition:0.5", False),
        (looked_at("the answer is \u56db"), "language:0.75", True),
        (looked_at("\u7b54\u6848 is \u56db"), "language:0.75", False),
        (looked_at("x" * 50 + "\n\n" + "y" * 50), "paragraph:50", True),
        (looked_at("x" * 50 + "\ny"), "paragraph:50", False),
        (looked_at("x" * 20 + "\n  \n" + "y" * 40), "paragraph:40", True),
        (looked_at("```python\nprint(1)\n```"), "no_code", False),
        (looked_at("as in ```this```"), "no_code", True),
        (looked_at("say\n~~~\nthis"), "no_code", False),
    ],
)
def test_each_filter(one, written, passes):
    assert (dropped_by(one, (written,)) is None) == passes


def test_the_first_filter_that_fails_is_named_as_it_was_written():
    bad = looked_at("```\n" + "go on then " * 20, tokens=99, ended=False)
    assert dropped_by(bad, ("language:0.5", "no_code", "tokens:10")) == "no_code"
    assert dropped_by(bad, ("tokens:10", "no_code")) == "tokens:10"
    assert dropped_by(bad, ()) is None


@given(st.text(max_size=200), st.integers(0, 300), st.booleans())
def test_no_text_breaks_a_filter(text, tokens, ended):
    for name, has_number in FILTERS.items():
        assert TESTS[name](Text(text, tokens, ended), 0.5 if has_number else 0.0) in (True, False)
