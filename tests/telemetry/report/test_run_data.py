"""What a run says of itself: its stages in order, by any name, and its headline set, whatever task it has."""

from html import unescape

import pytest

from d1jax.telemetry.report.build import report_html
from d1jax.telemetry.report.results import results, verdict
from d1jax.telemetry.report.run_data import RunData, Stage
from d1jax.telemetry.report.wording import stage_name

FREE = """
stages:
- {name: cold_start, kind: sft}
- {name: rl_1, kind: rl}
- {name: rl_2, kind: rl}
"""


@pytest.mark.parametrize(
    ("config", "stages"),
    [
        ("stages: [sft, rl]", [("sft", "sft"), ("rl", "rl")]),
        ("stages: [rl]", [("rl", "rl")]),
        (FREE, [("cold_start", "sft"), ("rl_1", "rl"), ("rl_2", "rl")]),
        ("stages: [{name: rl}]", [("rl", "rl")]),
        ("stages: {a: b}", []), ("stages: [3, null, {kind: rl}]", []), ("stages: ]", []), ("\x00", []), ("- 1", []), ("", []),
    ],
)  # fmt: skip
def test_stages_are_those_of_the_configuration(config, stages):
    assert RunData("run", config=config).stages == tuple(Stage(*one) for one in stages)


def test_without_a_configuration_stages_are_those_that_left_something_behind():
    rows = ({"stage": "warm", "step": 1, "loss": 1.0}, {"stage": "polish", "step": 1, "reward": 0.5})
    found = RunData("run", summary={"stages": [{"name": "warm"}]}, metrics=rows).stages
    assert found == (Stage("warm", "sft"), Stage("polish", "rl"))


def test_names_of_stages_read_well():
    names = ("sft", "rl", "rl_1", "cold_start", "base", "Mine")
    assert [stage_name(name) for name in names] == ["SFT", "RL", "RL 1", "cold start", "Base model", "Mine"]


def free_run():
    rows = [{"stage": "cold_start", "step": step, "loss": 1 / step, "eval/mine/solved": 0.1} for step in (1, 2)]
    for name in ("rl_1", "rl_2"):
        rows += [{"stage": name, "step": step, "reward": 0.5, "loss": 0.1, "time/rollout_s": 1.0} for step in (1, 2, 3)]
    scores = {
        "n": 10,
        "solved_rate": 0.5,
        "solved_rate_ci95": [0.2, 0.8],
        "well_formed": 0.75,
        "nfe": 1.0,
        "words": 12.5,
    }
    stages = [{"name": name, "sets": {"mine": scores}} for name in ("cold_start", "rl_1", "rl_2")]
    summary = {
        "task": "my_task",
        "primary_set": "mine",
        "stages": stages,
        "wall_seconds": {"rl_2": 9.0, "cold_start": 3.0},
    }
    return RunData("run", config=FREE, summary=summary, metrics=tuple(rows))


def test_a_run_with_stages_and_a_task_of_a_users_own():
    html = unescape(report_html(free_run()))
    titles = [part.split("</span>")[0] for part in html.split('<span class="name">')[1:]]
    assert titles == [
        "cold start loss", "Solved, during cold start", "Reward, RL 1", "Reward, RL 2", "RL 1 loss", "RL 2 loss",
        "Time per phase, RL 1", "Time per phase, RL 2",
    ]  # fmt: skip
    assert "cold start before the arrow, RL 2 after it" in html and "task my_task" in html
    assert "Wall time: cold start 3.0\u202fs, RL 2 9.0\u202fs." in html
    assert verdict(free_run()).startswith("50.0\u202f% → 50.0\u202f% of 10 mine problems solved")


def test_grades_are_rates_and_counts_are_not():
    found = results(free_run())
    assert found.measures == ["well_formed", "nfe", "words"]
    assert found.sets["mine"][0].others == ["75.0\u202f%", "1.00", "12.5"]


@pytest.mark.parametrize("run", [
    RunData("run", summary={"primary_set": "mine"}),
    RunData("run", config="task: {eval_sets: {mine: a.jsonl, other: b.jsonl}}"),
    RunData("run", metrics=({"stage": "rl", "step": 1, "eval/mine/parsed": 1.0, "eval/mine/solved": 0.5},)),
])  # fmt: skip
def test_the_headline_set_is_what_the_run_says(run):
    assert run.primary_set == "mine"


def test_an_interrupted_run_of_another_set_reports_its_last_evaluation():
    run = RunData("run", metrics=({"stage": "rl_1", "step": 2, "eval/my_set/solved": 0.5},))
    assert verdict(run) == "50.0\u202f% of my set problems solved at RL 1 step 2; no final evaluation is recorded."
