"""Protects: a stage that finds no pairs says so once, when it is known."""

import pytest

from d1jax.preference.loop import no_pairs


@pytest.mark.parametrize(
    ("tied", "step", "told"), [(1.0, 3, True), (0.95, 3, True), (0.5, 3, False), (1.0, 2, False), (1.0, 4, False)]
)
def test_a_stage_without_pairs_is_told_after_three_steps(tied, step, told):
    history = [{"pairs/tied": tied, "reward": 0.25}] * step
    lines = no_pairs(history, step, steps=10)
    assert len(lines) == told and all("no pair to learn from" in line for line in lines)


def test_a_shorter_stage_is_told_at_its_end():
    assert no_pairs([{"pairs/tied": 1.0, "reward": 0.0}] * 2, 2, steps=2)
