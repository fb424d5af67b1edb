"""Protects: answers that are worth the same are equal, others are not, and a text costs at most its row."""

from pathlib import Path

import pytest

from d1jax.tasks.jsonl import read_rows
from d1jax.tasks.maths import Maths
from d1jax.tasks.task import DataError

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
TASK = Maths()


def row(answer):
    return {"problem": "p", "solution": None, "answer": answer}


@pytest.mark.parametrize(
    ("answer", "offered"),
    [
        ("\\frac{1}{2}", "0.5"), ("\\frac{1}{2}", "\\frac12"), ("\\frac{1}{2}", "1/2"), ("\\frac{3}{4}", "\\dfrac{6}{8}"),
        ("x+1", "1 + x"), ("10,\\!080", "10080"), ("\\text{east}", "East"), ("\\text{(C)}", "C"), ("2516_8", "2516"),
        ("x \\in [-2,7]", "[-2, 7]"), ("15\\mbox{ cm}^2", "15"), ("\\$36", "36.00"), ("-2 + 7i", "7i - 2"), ("90^\\circ", "90"),
        ("\\frac{\\sqrt{3}}{3}", "\\frac{1}{\\sqrt{3}}"), ("3,5,7", "7, 3, 5"), ("\\left(3, \\frac{\\pi}{2}\\right)", "(3,\\pi/2)"),
    ],
)  # fmt: skip
def test_what_is_worth_the_same_is_right(answer, offered):
    text = f"<reasoning>\nso\n</reasoning>\n<answer>\n\\boxed{{{offered}}}\n</answer>"
    assert TASK.grade(row(answer), text)["solved"] == 1.0


@pytest.mark.parametrize(
    ("answer", "offered"),
    [("\\frac{1}{2}", "0.51"), ("x+1", "x-1"), ("\\text{east}", "seat"), ("2516_8", "2516_7"), ("(3,4)", "(4,3)"), ("5", ""),
     ("5", "5 or 6"),
     ("[-2,7]", "(-2,7)"), ("12", "1/12"), ("5", "9**9**9**9")],
)  # fmt: skip
def test_what_is_not_is_wrong(answer, offered):
    assert TASK.grade(row(answer), f"\\boxed{{{offered}}}")["solved"] == 0.0


def test_many_texts_are_judged_like_one_after_the_other():
    rows = [row("5"), row("\\frac12"), row(""), row("x^2")]
    texts = ["\\boxed{5}", "\\boxed{0.5}", "\\boxed{5}", "nothing"]
    many = TASK.grade_many(rows, texts)
    assert many == [TASK.grade(one, text) for one, text in zip(rows, texts, strict=True)]
    assert [grade["solved"] for grade in many] == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("text", "value"),
    [("<answer>\\boxed{1}</answer>", 1.0), ("<answer>1</answer>", 0.75), ("\\boxed{1}", 0.5), ("1", 0.25)],
)
def test_the_format_reward_has_the_four_values_of_the_papers_table(text, value):
    assert TASK.rewards(row("1"), text)["d1_boxed_format"] == value


@pytest.mark.parametrize(
    "text", ["\\boxed{" + "{" * 10**6, "\\frac" * 10**5, "\ud800\\boxed{5}", "\\boxed{" + "9^" * 200 + "9}"]
)
def test_hostile_texts_are_wrong_and_end(text):
    assert TASK.grade(row("7"), text)["solved"] == 0.0


def test_a_row_needs_an_answer_or_a_solution():
    with pytest.raises(DataError, match=r"rows:3: needs a text as answer, or a solution"):
        TASK.parse({"problem": "p"}, "rows:3")
    assert TASK.parse({"problem": "p", "solution": "so \\boxed{\\frac{1}{2}}"}, "rows:3")["answer"] == "\\frac{1}{2}"
    assert not TASK.has_reference(TASK.parse({"problem": "p", "solution": "so \\boxed{}"}, "rows:3"))


@pytest.mark.skipif(not DATA.exists(), reason="the data is not here")
def test_the_real_rows_load_and_their_answers_are_right():
    rows = read_rows(DATA / "math" / "math500_test.jsonl", TASK)
    grades = TASK.grade_many(rows, [TASK.target(one) for one in rows])
    assert len(rows) == 500 and all(grade["solved"] == 1.0 for grade in grades)
    train = read_rows(DATA / "math" / "train.jsonl.gz", TASK)
    assert len(train) == 7500 and sum(not TASK.has_reference(one) for one in train) == 2
