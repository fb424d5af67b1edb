"""Protects: functions that people already have run unchanged, and none of them can end or hang a run."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.tasks import reward_functions
from d1jax.tasks.reward_functions import NAMED, call, resolve
from d1jax.tasks.task import DataError

MINE = """
import time


def lengths(completions, **columns):
    print("a lot")
    return [float(len(text)) for text in completions]

def of_answers(completions, answer):
    return [None if gold == "?" else float(gold in text) for text, gold in zip(completions, answer)]

def raises(completions, **columns):
    raise RuntimeError("boom")

def exits(completions, **columns):
    raise SystemExit(0)

def sleeps(completions, **columns):
    time.sleep(2)

def few(completions, **columns):
    return [1.0]

def words(completions, **columns):
    return ["good"] * len(completions)

def nothing(completions, **columns):
    pass

NUMBER = 3
"""
ROWS = [{"answer": "18"}, {"answer": "?"}]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "mine.py"
    path.write_text(MINE)
    return path


def test_a_function_of_a_file_gets_completions_and_columns(file, capsys):
    found = call("lengths", resolve(f"{file}:lengths"), ["p", "q"], ["a", "bcd"], ROWS)
    assert found == [1.0, 3.0] and "a lot" in capsys.readouterr().out
    assert call("of_answers", resolve(f"{file}:of_answers"), ["p", "q"], ["is 18", "x"], ROWS) == [1.0, None]


def test_a_function_of_a_module():
    found = resolve("statistics:fmean")
    assert callable(found)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("raises", RuntimeError, "boom"),
        ("exits", RuntimeError, "called for an end: SystemExit"),
        ("few", ValueError, "returned 1 values for 2 texts"),
        ("words", ValueError, "returned 'good', which is no finite number"),
        ("nothing", ValueError, "returned a NoneType; return a list"),
    ],
)
def test_what_a_function_does_wrong_is_told(file, name, error, message):
    with pytest.raises(error, match=message):
        call(name, resolve(f"{file}:{name}"), ["p", "q"], ["a", "b"], ROWS)


def test_one_that_sleeps_is_left_behind(file, monkeypatch):
    monkeypatch.setattr(reward_functions, "SECONDS", 0.05)
    with pytest.raises(TimeoutError, match="took more than 0.05 seconds for 2 texts"):
        call("sleeps", resolve(f"{file}:sleeps"), ["p", "q"], ["a", "b"], ROWS)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("FILE:missing", "has no function 'missing'"),
        ("FILE:NUMBER", "has no function 'NUMBER'"),
        ("nowhere.py:f", "there is no file 'nowhere.py'"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("regex:(", "the pattern cannot be read"),
        ("length_penalty:0", "write length_penalty:N"),
    ],
)
def test_a_reward_that_cannot_be_made_is_told(file, name, message):
    with pytest.raises(ValueError, match=message):
        resolve(name.replace("FILE", str(file)))


def test_a_name_that_is_none_is_none():
    assert resolve("lenght") is None and resolve("a: b") is None


@pytest.mark.parametrize(
    ("name", "text", "answer", "value"),
    [
        ("exact", "<answer> 18 </answer>", "18", 1.0),
        ("exact", "18", "18.0", 0.0),
        ("number", "\\boxed{18.0}", "#### 18", 1.0),
        ("number", "\\boxed{18}", "eighteen", None),
        ("math", "\\boxed{\\frac12}", "0.5", 1.0),
        ("math", "nothing", "0.5", 0.0),
        ("boxed", "\\boxed{x}", "", 1.0),
        ("regex:^<reasoning>", "<reasoning> so", "", 1.0),
        ("length_penalty:2", "one two three", "", -0.5),
        ("length_penalty:2", "one two", "", 0.0),
        ("length_penalty:2", "one " * 100, "", -1.0),
        ("language", "the answer 是 four", "", 0.75),
        ("repetition_penalty", "a b c a b c", "", -0.25),
        ("repetition_penalty", "a b", "", 0.0),
    ],
)
def test_named_rewards(name, text, answer, value):
    assert call(name, resolve(name), ["p"], [text], [{"answer": answer}]) == [value]


def test_a_reward_that_compares_needs_answers():
    with pytest.raises(DataError, match="compares with the field `answer`"):
        call("exact", NAMED["exact"], ["p"], ["x"], [{"gold": "1"}])


def test_a_slow_pattern_is_not_found(monkeypatch):
    monkeypatch.setattr(reward_functions, "PATTERN_SECONDS", 0.05)
    assert call("slow", resolve("regex:^(a|aa|a?b)+$"), ["p", "q"], ["a" * 60 + "!", "aa"], [{}, {}]) == [0.0, 1.0]


def test_a_batch_of_slow_texts_has_one_budget_and_its_ordinary_texts_are_still_found(monkeypatch):
    now, limits = [0.0], []

    class Pattern:
        def search(self, text, timeout):
            limits.append(timeout)
            if text != "slow":
                return text == "found"
            now[0] += timeout
            raise TimeoutError

    monkeypatch.setattr("regex.compile", lambda _: Pattern())
    monkeypatch.setattr(reward_functions, "monotonic", lambda: now[0])
    texts, failures = ["slow"] * 500 + ["found", "other"], []
    values = call("regex:x", resolve("regex:x"), [""] * 502, texts, [{}] * 502, failures)
    assert values == [0.0] * 500 + [1.0, 0.0]
    assert failures == ["reward 'regex:x', 502 texts: in 500 of them the search took too long"]
    assert limits[:20] == [1.0] * 20 and limits[20:] == [0.01] * 482
    assert now[0] == pytest.approx(20 + 480 * 0.01)


@given(st.text(max_size=100))
def test_no_text_breaks_a_named_reward(text):
    for name in ("exact", "number", "boxed", "language", "repetition_penalty", "length_penalty:5"):
        (value,) = call(name, resolve(name), ["p"], [text], [{"answer": "18"}])
        assert -1.0 <= value <= 1.0
    assert re.escape(text) is not None


OWN = """
from __future__ import annotations
from dataclasses import dataclass

seen = []


@dataclass
class Count:
    number: int = 0


def endless(completions, **columns):
    while True:
        yield 1.0

def mutates(completions, meta, **columns):
    for one in meta:
        one and one.clear()
    seen.append(1)
    return [float(len(seen))] * len(completions)

def with_none(completions, answer=None, **columns):
    return [None if gold is None else 1.0 for gold in answer]
"""


def test_generators_changes_and_missing_fields(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    rows = [{"meta": {"a": 1}, "answer": "x"}, {"meta": {"b": 2}}]
    with pytest.raises(ValueError, match="returned 3 values for 2 texts"):
        call("endless", resolve(f"{path}:endless"), ["p", "q"], ["a", "b"], rows)
    assert call("mutates", resolve(f"{path}:mutates"), ["p", "q"], ["a", "b"], rows) == [1.0, 1.0]
    assert call("mutates", resolve(f"{path}:mutates"), ["p", "q"], ["a", "b"], rows) == [2.0, 2.0], (
        "the file is executed once"
    )
    assert rows[0]["meta"] == {"a": 1}, "the rows of training are not a function's to change"
    assert call("with_none", resolve(f"{path}:with_none"), ["p", "q"], ["a", "b"], rows) == [1.0, None]
    assert call("exact", NAMED["exact"], ["p", "q"], ["x", "y"], rows) == [1.0, None]
