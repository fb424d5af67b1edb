"""The section of reward models: what their records hold, and nothing where a record is missing or damaged."""

import pytest

from d1jax.telemetry.report.build import report_html
from d1jax.telemetry.report.reward_models import reward_model_rows
from d1jax.telemetry.report.run_data import RunData

PAIRS = {"step": 8, "pairs": 1200, "accuracy": 0.825, "ci95": [0.8, 0.85], "margin": 1.5, "calibration_error": 0.04}
LINES = {
    "step": 8,
    "steps": 90,
    "right": 0.4,
    "accuracy": 0.7,
    "ranked": 0.9,
    "margin": float("nan"),
    "calibration_error": 0.1,
    "texts": {"right and wrong": {"pairs": 40, "accuracy": 0.85, "ci95": [0.7, 0.9]}},
}


def test_a_row_for_each_model():
    run = RunData(name="run", summary={"reward_models": {"judge": PAIRS, "lines": LINES}})
    judge, lines, texts = reward_model_rows(run)
    assert (judge["stage"], judge["held_out"], judge["accuracy"], judge["high"], judge["ranked"]) == (
        "judge", "1,200 pairs", 0.825, 0.85, None,
    )  # fmt: skip
    assert (lines["held_out"], lines["ranked"], lines["margin"], lines["low"]) == ("90 lines", 0.9, None, None)
    assert (texts["stage"], texts["held_out"], texts["accuracy"], texts["low"], texts["margin"]) == (
        "lines", "40 pairs of texts, right and wrong", 0.85, 0.7, None,
    )  # fmt: skip
    page = report_html(run)
    assert "Reward models" in page and "[80.0, 85.0]" in page


@pytest.mark.parametrize(
    "damage", [None, 3, {}, {"x": None}, {"x": {"accuracy": "nan", "ci95": [1]}}, {"x": {"texts": {"y": 1}}}]
)
def test_a_damaged_record_leaves_the_rest_of_the_page(damage):
    page = report_html(RunData(name="run", summary={"reward_models": damage}))
    assert page.rstrip().endswith("</html>")
