"""The section of evaluate stages: what their records hold, and nothing where a record is missing or damaged."""

import pytest

from d1jax.telemetry.report.build import report_html
from d1jax.telemetry.report.run_data import RunData
from d1jax.telemetry.report.sampled import sampled_charts, sampled_rows


def point(value):
    return {"value": value, "ci95": [value - 0.1, value + 0.1]}


RECORD = {
    "weights": "rl_1", "rows": 64, "samples": 4, "temperature": 0.6, "tokens": 31.5, "avg": point(0.25),
    "pass": {"1": point(0.25), "2": point(0.4), "4": point(0.5)}, "maj": {"1": point(0.25), "4": point(0.3)},
    "steps": {"16": point(0.5), "8": point(0.4)},
    "temperatures": {
        "0.6": {"avg": point(0.25), "pass": {"1": point(0.25), "4": point(0.5)}, "local_ar": 0.7, "global_ar": 0.8},
        "1.4": {"avg": point(0.2), "pass": {"1": point(0.2), "4": point(0.6)}, "local_ar": None, "global_ar": 0.6},
    },
}  # fmt: skip


def run_of(sampled):
    return RunData(name="run", config="", summary={"sampled": sampled}, metrics=(), samples=(), notices=())


def test_a_line_for_each_stage_and_a_row_of_the_table():
    run = run_of({"before": RECORD, "after_rl": {**RECORD, "weights": "rl_2"}})
    passes, majorities, steps, once, often, local, over = sampled_charts(run)
    assert once.data["series"][0]["y"] == [0.25, 0.2] and often.data["series"][0]["y"] == [0.5, 0.6]
    assert local.data["series"][0]["x"] == [0.6] and over.data["series"][0]["y"] == [0.8, 0.6]
    assert [line.name for line in passes.lines] == ["before", "after RL"]
    assert passes.data["series"][0]["x"] == [1, 2, 4] and majorities.data["series"][0]["y"] == [0.25, 0.3]
    assert steps.data["series"][0]["x"] == [8, 16] and steps.data["series"][0]["y"] == [0.4, 0.5]
    first = sampled_rows(run)[0]
    assert (first["stage"], first["weights"], first["avg"], first["low"], first["tokens"]) == (
        "before",
        "RL 1",
        0.25,
        0.15,
        31.5,
    )
    page = report_html(run)
    assert "Several samples of a row" in page and "25.0" in page and "[15.0, 35.0]" in page


@pytest.mark.parametrize(
    "damage",
    [
        None,
        3,
        {},
        {"x": None},
        {
            "x": {
                "avg": 3,
                "pass": [1],
                "maj": {"a": 1},
                "steps": {"4": {"value": "nan"}},
                "temperatures": {"hot": 3, "1": {}},
            }
        },
    ],
)
def test_a_damaged_record_leaves_the_rest_of_the_page(damage):
    page = report_html(run_of(damage))
    assert page.rstrip().endswith("</html>")


def test_names_are_escaped():
    page = report_html(run_of({"<b>x": {**RECORD, "weights": "<img src=x>"}}))
    assert "<b>x" not in page and "<img src=x>" not in page
