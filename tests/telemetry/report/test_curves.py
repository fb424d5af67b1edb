"""Protects: every kind of stage that trains has its learning curves."""

import pytest

from d1jax.telemetry.report.curves import curves
from d1jax.telemetry.report.run_data import RunData

CONFIG = "stages: [sft, {name: dpo_1, kind: preference}]\n"


@pytest.mark.parametrize("config", [CONFIG, "stages: [sft, preference]\n"])
def test_a_preference_stage_shows_its_margins_and_rewards(config):
    stage = "dpo_1" if "dpo_1" in config else "preference"
    rows = tuple(
        {"stage": stage, "step": step, "loss": 0.6, "reward": 0.1 * step, "rewards/margins": 0.2 * step,
         "rewards/accuracies": 0.5, "pairs/tied": 0.1, "grad_norm": 1.0, "time/update_s": 0.1}
        for step in (1, 2, 3)
    )  # fmt: skip
    titles = {drawing.title for drawing in curves(RunData("run", config=config, metrics=rows))}
    assert {"Reward", "Margin of the chosen", "Chosen above rejected", "Pairs without a difference"} <= titles


def test_a_count_that_is_always_zero_has_no_panel():
    rows = [{"stage": "rl", "step": step, "reward": 1.0, "completions/reflection_words": 0.0} for step in (1, 2)]
    named = {curve.title for curve in curves(RunData(name="run", config="stages: [rl]", metrics=tuple(rows)))}
    assert "Reward" in named and "Reflection words" not in named
    rows[1]["completions/reflection_words"] = 0.5
    named = {curve.title for curve in curves(RunData(name="run", config="stages: [rl]", metrics=tuple(rows)))}
    assert "Reflection words" in named
