"""Intervals against SciPy, grades and their mistakes, the table."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from d1jax.evaluation.grade import baseline_scores, score_texts, table
from d1jax.evaluation.statistics import wilson_interval
from d1jax.tasks.task import DataError


def graded_by(grade, **rest):
    return SimpleNamespace(task=SimpleNamespace(name="toy", grade=grade, **rest))


PROBLEMS = SimpleNamespace(rows=["a", "b", "c", "d"])


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_is_wilsons(counts):
    solved, n = counts
    expected = stats.binomtest(solved, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(solved, n) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_of_nothing_nothing_is_known():
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_scores_are_means_of_the_grades_of_each_row_with_its_text():
    context = graded_by(lambda row, text: {"solved": float(row == text), "parsed": float(text != "")})
    scores = score_texts(context, PROBLEMS, ["a", "x", "", "d"])
    assert scores.pop("solved_rate_ci95") == pytest.approx(wilson_interval(2, 4))
    assert scores == {"n": 4, "solved_rate": 0.5, "parsed": 0.75}


@pytest.mark.parametrize(
    ("grade", "told"),
    [
        (lambda row, text: {"solved": 1.0} | ({"extra": 1.0} if row == "c" else {}), "row 2 ['extra', 'solved']"),
        (lambda row, text: {"solved": 1.0, "nfe": 1.0}, "row 0 ['nfe', 'solved']"),
    ],
)
def test_grades_of_other_names_are_refused(grade, told):
    with pytest.raises(DataError) as caught:
        score_texts(graded_by(grade), PROBLEMS, ["x"] * 4)
    assert "task 'toy'" in str(caught.value) and told in str(caught.value)


def test_baselines_are_graded_like_a_model():
    context = graded_by(
        lambda row, text: {"solved": float(row == text)}, baselines=lambda row: {"copy": row, "always a": "a"}
    )
    found = baseline_scores(context, PROBLEMS)
    assert {name: scores["solved_rate"] for name, scores in found.items()} == {"copy": 1.0, "always a": 0.25}


def test_the_table_has_a_line_for_each_stage_and_baseline_and_a_column_for_each_grade():
    score = {"n": 4, "solved_rate": 0.5, "solved_rate_ci95": [0.15, 0.85], "parsed": 0.75, "nfe": 8.0}
    lines = table([{"name": "sft", "sets": {"held_out": score}}], {"held_out": {"copy": score}}).splitlines()
    assert lines[0].split() == ["held_out", "n", "solved", "95", "%", "interval", "parsed"]
    assert [line.split()[0] for line in lines[1:]] == ["sft", "copy"]
    assert lines[1].split()[1:] == ["4", "50.0%", "15.0%", "..", "85.0%", "75.0%"]
