"""MATH: what is read, what the model is shown, which texts are right, alone and in a batch, and d1's rewards."""

from pathlib import Path

import pytest

from d1jax.tasks import TASKS, maths, read_source
from d1jax.tasks.grading import equivalence
from d1jax.tasks.maths import Maths
from d1jax.tasks.task import DataError

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="shared/data is absent")

INSTRUCT, BARE = Maths(), Maths(style="bare")
RECORD = {
    "problem": "Add {x}.",
    "level": "Level 1",
    "solution": "It is $\\boxed{\\frac{1}{2}}$.",
    "answer": "\\frac{1}{2}",
}
ROW = INSTRUCT.parse(RECORD, "here")
GOOD = "<reasoning>\na\n</reasoning>\n<answer>\n\\boxed{0.5}\n</answer>"


def row(answer):
    return {"problem": "?", "solution": None, "answer": answer}


def test_a_row_is_read_and_shown():
    assert ROW == {"problem": "Add {x}.", "solution": "It is $\\boxed{\\frac{1}{2}}$.", "answer": "\\frac{1}{2}"}
    assert INSTRUCT.parse({key: RECORD[key] for key in ("problem", "solution")}, "x") == ROW, (
        "the last box is the answer"
    )
    assert BARE.prompt(ROW) == "Add {x}." and INSTRUCT.prompt(ROW).endswith("\n\nAdd {x}.")
    assert "in a \\boxed{} between <answer> and </answer>" in INSTRUCT.prompt(ROW)
    assert (
        INSTRUCT.target(ROW)
        == f"<reasoning>\n{ROW['solution']}\n</reasoning>\n<answer>\n\\boxed{{\\frac{{1}}{{2}}}}\n</answer>"
    )
    assert BARE.target(ROW) == ROW["solution"]
    assert BARE.target({**ROW, "solution": "Half."}) == "Half.\n\\boxed{\\frac{1}{2}}"
    assert INSTRUCT.target(row("2")) is None and TASKS["math"] is Maths
    assert INSTRUCT.parse({"problem": "p", "answer": 7}, "x")["answer"] == "7"
    assert not INSTRUCT.has_reference(INSTRUCT.parse({"problem": "p"}, "x"))


@pytest.mark.parametrize(
    "more", [{"answer": ""}, {"answer": " "}, {"solution": "so \\boxed{}."}, {"solution": "\\boxed{}", "answer": ""}]
)
def test_a_row_with_an_empty_box_is_left_out(more):
    assert INSTRUCT.parse({"problem": "p", **more}, "x") is None


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"answer": "3"}, "f:7: problem = None: a text was expected among the keys answer"),
        ({"problem": "p", "answer": ["3"]}, "f:7: answer = .* a text was expected; write it as a JSON string"),
        ({"problem": "p", "solution": 3}, "f:7: solution = 3"),
    ],
)
def test_mistakes_are_told(record, told):
    with pytest.raises(DataError, match=told):
        INSTRUCT.parse(record, "f:7")


def test_a_missing_library_is_told_when_the_task_is_made(monkeypatch):
    monkeypatch.setattr(equivalence.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="math-verify"):
        Maths()
    with pytest.raises(ValueError, match="cannot be generated"):
        INSTRUCT.generate("train", 1, 0)


def test_one_batch_says_what_single_rows_say():
    rows = [row("\\frac{1}{2}"), row("x+1"), row("2,3"), row("\\text{east}"), row(None), row("5")]
    texts = [GOOD, "so \\boxed{1+x}", "<answer>3, 2</answer>", "<answer>\\boxed{West}</answer>", GOOD, ""]
    assert [grade["solved"] for grade in INSTRUCT.grade_many(rows, texts)] == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert [INSTRUCT.grade(*pair) for pair in zip(rows, texts, strict=True)] == INSTRUCT.grade_many(rows, texts)
    assert [INSTRUCT.rewards(*pair) for pair in zip(rows, texts, strict=True)] == INSTRUCT.rewards_many(rows, texts)
    assert [grade["answered"] for grade in INSTRUCT.grade_many(rows, texts)] == [1.0, 1.0, 1.0, 1.0, 1.0, 0.0]
    assert INSTRUCT.offer(rows[0], "\\boxed{\\dfrac12}") == INSTRUCT.offer(rows[0], "<answer>$\\frac{1}{2}$</answer>")
    assert INSTRUCT.offer(rows[0], "") is None


def test_a_row_that_is_not_decided_is_wrong_and_counted(monkeypatch):
    monkeypatch.setattr(maths, "equivalent_many", lambda pairs: [None] * len(pairs))
    assert INSTRUCT.grade(row("x"), "\\boxed{y}") == {"solved": 0.0, "answered": 1.0, "undecided": 1.0}


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        (GOOD, (1.0, 1.0, 1.00)),
        ("<reasoning>a</reasoning><answer>0.5</answer>", (1.0, 0.0, 0.75)),
        ("so \\boxed{0.5}", (0.0, 0.0, 0.50)),
        ("\\boxed{0.5} <answer>0.5</answer>", (0.0, 0.0, 0.75)),
        ("so 0.5", (0.0, 0.0, 0.25)),
        ("<answer>\\boxed{0.5", (0.0, 0.0, 0.25)),
    ],
)
def test_formats(text, shape):
    rewards = INSTRUCT.rewards(ROW, text)
    assert (rewards["format"], rewards["boxed"], rewards["d1_boxed_format"]) == shape
    assert rewards.keys() == INSTRUCT.rewards(ROW, "").keys()


@pytest.mark.parametrize(
    ("answer", "text", "points"),
    [
        ("\\frac{1}{2}", "\\boxed{0.5}", 2.0), ("\\frac{1}{2}", "\\boxed{1/2}", 2.0), ("\\frac{1}{4}", "\\boxed{0.25}", 0.0),
        ("5", "\\boxed{x=5}", 2.0), ("5", "5", 2.0), ("5", "<answer>5</answer>", 0.0), ("5", "so \\boxed{5", 0.0),
        ("x+y", "\\boxed{y+x}", 0.0),
        ("10", "\\boxed{10\\%}", 2.0), ("\\sqrt{3}", "\\boxed{\\sqrt3}", 2.0), ("5", "\\boxed 5$", 2.0), ("5", "\\boxed{\\frac}", 0.0),
    ],
)  # fmt: skip
def test_d1_compares_letters_behind_its_normaliser(answer, text, points):
    assert INSTRUCT.rewards(row(answer), text)["d1_math_correct"] == points


def test_baselines_and_keys():
    assert [INSTRUCT.grade(row("2"), text)["solved"] for text in INSTRUCT.baselines(row("2")).values()] == [0.0, 1.0]
    assert (
        INSTRUCT.problem_key({"problem": "a  $n$\nb"})
        == INSTRUCT.problem_key({"problem": "a $n$ b"})
        != INSTRUCT.problem_key({"problem": "a $N$ b"})
    )
    assert INSTRUCT.solution_key(ROW) is None


@needs_data
@pytest.mark.parametrize(
    ("name", "count"), [("train.jsonl.gz", 7498), ("math500_test.jsonl", 500), ("test_minus_math500.jsonl.gz", 4500)]
)
def test_every_published_solution_is_right(name, count):
    for task in (INSTRUCT, BARE):
        rows = read_source(str(DATA / "math" / name), task)
        assert len(rows) == count
        assert all(grade["solved"] for grade in task.grade_many(rows, [task.target(row) for row in rows]))
