"""Protects: a right answer in any documented form is right, a wrong one is wrong, and no text breaks the grader."""

import json
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.tasks.gsm8k import Gsm8k
from d1jax.tasks.jsonl import read_rows
from d1jax.tasks.task import DataError

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
TASK = Gsm8k()
ROW = {"question": "How many?", "solution": "2 * 9 = 18", "answer": "18"}


def row(answer):
    return TASK.parse({"question": "How many?", "answer": f"Because.\n#### {answer}"}, "rows:1")


def spellings(value):
    """Documented spellings of a whole number."""
    grouped, plain, sign = f"{abs(value):,}", str(abs(value)), "-" if value < 0 else ""
    return [
        f"{sign}{plain}", f"{sign}{grouped}", f"{sign}{plain}.0", f"{sign}{plain}.00", f"{sign}{grouped} apples", f"{sign}${grouped}",
        f"x = {sign}{plain}", f"{sign}{plain}%", f"{sign}\\frac{{{2 * abs(value)}}}{{2}}", f"{sign.replace('-', '−')}{plain}",
        f"{sign}{grouped.replace(',', '{,}')}", f"{sign}{plain}.",
    ]  # fmt: skip


PLACES = (
    "<reasoning>\nfirst 7, then 8\n</reasoning>\n<answer>\n{}\n</answer>",
    "<answer>\\boxed{{{}}}</answer>",
    "I get 7. So \\boxed{{{}}} it is",
    "so we have \\boxed{{{}",
    "<answer>{}",
    "3 * 6 = 7\n#### {}",
    "Well, 7 and 8. The answer is {}",
    "\\boxed{{7}} no, wait. \\boxed{{{}}}",
    "<answer>7</answer> no: <answer>{}</answer>",
)


@given(st.integers(-(10**9), 10**9), st.data())
def test_a_right_answer_in_any_documented_form_is_right(value, data):
    spelling = data.draw(st.sampled_from(spellings(value)))
    text = data.draw(st.sampled_from(PLACES)).format(spelling)
    assert TASK.grade(row(f"{value:,}"), text)["solved"] == 1.0, text
    assert TASK.grade(row(f"{value + 1}"), text)["solved"] == 0.0
    assert Fraction(TASK.offer(ROW, text)) == value


@pytest.mark.parametrize(
    "text",
    ["", "18 or 20", "<answer>17 and 18</answer>", "\\boxed{18} or \\boxed{19}", "<answer>...</answer>", "<answer>3 + 15</answer>",
     "18", "\\boxed{}", "<answer>\\sqrt{18}</answer>", "#### ", "9**9**9**9", "<answer>" + "9" * 5000 + "</answer>"],
)  # fmt: skip
def test_a_text_without_one_answer_solves_nothing(text):
    assert TASK.grade(ROW, text)["solved"] == 0.0


@given(st.text(max_size=200))
def test_no_text_breaks_it(text):
    grade, rewards = TASK.grade(ROW, text), TASK.rewards(ROW, text)
    assert set(grade) == {"solved", "answered", "format"} and all(abs(value) < 1e6 for value in rewards.values())


@pytest.mark.parametrize(
    "text", ["\\boxed{" * 100_000, "<answer>" * 100_000, "{" * 10**6, "\ud800<answer>18</answer>", "1," * 10**6]
)
def test_megabytes_and_broken_unicode_take_no_time(text):
    TASK.rewards(ROW, text)


def test_the_worked_solution_has_no_calculator_marks_and_is_graded_right():
    made = TASK.parse({"question": "q", "answer": "3*6=<<3*6=18>>18 eggs\n#### 18"}, "rows:1")
    target = TASK.target(made)
    assert target == "<reasoning>\n3*6=18 eggs\n</reasoning>\n<answer>\n18\n</answer>"
    assert TASK.rewards(made, target)["format"] == TASK.rewards(made, target)["solved"] == 1.0


def test_the_five_rewards_of_d1_are_its_own():
    one_line = "<reasoning>\nso\n</reasoning>\n<answer>\n18\n</answer>\n"
    found = TASK.rewards(ROW, one_line)
    assert {name: found[f"d1_{name}"] for name in ("correct", "integer", "strict_format", "soft_format")} == {
        "correct": 2.0, "integer": 0.5, "strict_format": 0.5, "soft_format": 0.0,
    }  # fmt: skip
    assert found["d1_xml_count"] == pytest.approx(0.5)
    bare = TASK.rewards(ROW, "18")
    assert bare["d1_correct"] + bare["d1_integer"] == 2.5, "no tags are needed there"
    assert TASK.rewards(ROW, "<answer>18.0</answer>")["d1_correct"] == 0.0 and bare["solved"] == 0.0
    ends_with_the_tag = "<reasoning>\n" + "x" * 700 + "\n</reasoning>\n<answer>\n18\n</answer>"
    assert TASK.rewards(ROW, ends_with_the_tag)["d1_xml_count"] < 0, "it loses 0.001 for each of its characters"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"answer": "#### 1"}, r"rows:1: question = None"),
        ({"question": "q"}, r"rows:1: answer = None"),
        ({"question": "q", "answer": "#### many"}, r"ends with 'many', which is no number; end it with #### 18"),
    ],
)
def test_a_row_that_cannot_be_is_named(record, message):
    with pytest.raises(DataError, match=message):
        TASK.parse(record, "rows:1")


@pytest.mark.skipif(not DATA.exists(), reason="the data is not here")
def test_the_real_rows_load_and_their_solutions_are_right():
    rows = read_rows(DATA / "gsm8k" / "test.jsonl.gz", TASK)
    assert len(rows) == 1319 and all(TASK.grade(one, TASK.target(one))["solved"] == 1.0 for one in rows)
    assert len({TASK.problem_key(one) for one in rows}) == len(rows)
    json.dumps(rows[0])
