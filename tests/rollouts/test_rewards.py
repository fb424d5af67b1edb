"""No text and no task takes a run down."""

import math

import numpy as np
import pytest

from d1jax.models import processes
from d1jax.rollouts.rewards import RewardFn, reward_rows, total_rewards
from d1jax.tasks.sudoku import Sudoku
from d1jax.tasks.task import DataError

ODD = {"nan": math.nan, "inf": math.inf, "list": [1.0, 0.0], "none": None}


class Moody:
    """A task whose rewards misbehave as its text says."""

    name = "moody"

    def rewards(self, row, text):
        if text == "raise":
            raise RuntimeError("boom")
        if text == "nothing":
            return None
        return {"good": ODD.get(text, 1.0), "other": 0.5}


def test_a_pattern_that_is_too_slow_is_named_and_its_other_texts_count(monkeypatch):
    monkeypatch.setattr("d1jax.tasks.reward_functions.PATTERN_SECONDS", 0.02)
    name = "regex:^(a|aa|a?b)+$"
    found = reward_rows(Sudoku(), Sudoku().generate("train", 2, 0), ["a" * 60 + "!", "aa"], [name])
    assert found.parts_B[name].tolist() == [0.0, 1.0] and found.rewarded_B.all()
    assert found.failures == [f"reward {name!r}, 2 texts: in 1 of them the search took too long"]


def test_failures_are_zero_and_named():
    texts = ["fine", "raise", "nan", "inf", "list", "none"]
    parts, failures, *_ = reward_rows(Moody(), [{}] * 6, texts, {"good": 1.0})
    assert failures == [
        "task 'moody', row 1: rewards raised RuntimeError: boom",
        "task 'moody', row 2: reward 'good' is nan, not a finite number",
        "task 'moody', row 3: reward 'good' is inf, not a finite number",
        "task 'moody', row 4: reward 'good' is [1.0, 0.0], not a finite number",
    ]
    assert parts["good"][:5].tolist() == [1.0, 0, 0, 0, 0] and parts["other"].tolist() == [0.5, 0, 0, 0, 0, 0.5]
    assert np.isnan(parts["good"][5]), "None: the reward does not apply to this row"
    assert total_rewards(parts, {"good": 1.0, "other": 1.0})[5] == 0.5


def test_a_reward_that_the_task_does_not_have_is_an_error():
    with pytest.raises(DataError, match="moody.*row 0.*missing.*good"):
        reward_rows(Moody(), [{}], ["fine"], {"missing": 1.0})


def test_rewards_that_are_no_mapping_are_an_error():
    with pytest.raises(DataError, match="moody.*row 7.*returned a NoneType; return {name: number}"):
        reward_rows(Moody(), [{}], ["nothing"], {"good"}, ids=[7])


def test_a_judge_remembers_what_went_wrong_with_any_text():
    judge = RewardFn(Moody(), [{}] * 2, [30, 31], {"good": 2.0, "other": 1.0})
    assert judge(["fine", "raise"]).tolist() == [2.5, 0.0]
    assert judge.parts(["nan", "fine"])["good"].tolist() == [0.0, 1.0]
    assert [line.split(":")[0] for line in judge.failures] == ["task 'moody', row 31", "task 'moody', row 30"]


def test_parts_that_cancel_leave_no_rounding():
    parts = {"a": np.array([1.0, 0.0, 1.0]), "b": np.array([1.0, 0.0, 0.0]), "c": np.array([1.0, 0.0, 0.0])}
    total = total_rewards(parts, {"a": 0.1, "b": 0.2, "c": -0.3})
    assert total.tolist() == [0.0, 0.0, 0.1]


def test_total_is_the_weighted_sum():
    task = Sudoku()
    rows = task.generate("train", 4, 0)
    texts = [task.target(rows[0]), "nonsense", task.target(rows[2]), ""]
    parts, failures, *_ = reward_rows(task, rows, texts, {"solved": 1.0, "units": 0.5})
    assert failures == []
    np.testing.assert_allclose(total_rewards(parts, {"solved": 1.0, "units": 0.5}), [1.5, 0.0, 1.5, 0.0])


def test_a_function_that_fails_beside_a_reward_that_works_stops_nothing(tmp_path):
    path = tmp_path / "own.py"
    path.write_text("def broken(completions, **columns):\n    raise RuntimeError('boom')\n")
    task, names = Sudoku(), [f"{path}:broken"]
    rows = task.generate("test", 3, seed=0)
    texts = [task.target(row) for row in rows]
    alone = reward_rows(task, rows, texts, names)
    beside = reward_rows(task, rows, texts, ["solved", *names])
    assert not alone.rewarded_B.any() and beside.rewarded_B.all() and beside.parts_B["solved"].all()
    assert len(alone.failures) == 1 and "boom" in alone.failures[0], "one line a function, not one a text"


def test_the_part_of_a_process_that_has_no_texts_has_no_rewards():
    found = reward_rows(Sudoku(), [], [], ["cells", "length_penalty:3"], [])
    assert found.failures == [] and not found.rewarded_B.any()
    assert all(values_B.shape == (0,) for values_B in found.parts_B.values())


def test_a_function_that_fails_in_one_of_several_processes_has_failed_on_the_whole_batch(tmp_path, monkeypatch):
    """One process would have given all of these texts 0."""
    path = tmp_path / "own.py"
    path.write_text("def fussy(completions, **columns):\n    return [1 / len(text) for text in completions]\n")
    task, name = Sudoku(), f"{path}:fussy"
    rows, texts = task.generate("test", 4, seed=0), ["a", "bb", "", "d"]
    alone = RewardFn(task, rows, range(4), {name: 1.0})
    whole = alone.parts(texts)

    def part_of(place):
        with monkeypatch.context() as patch:
            patch.setattr(processes, "own_part", lambda count: slice(2 * place, 2 * place + 2))
            return RewardFn(task, rows, range(4), {name: 1.0})._own_part(texts, 0)

    both = [part_of(0), part_of(1)]
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "gathered", lambda _: both)
    judge = RewardFn(task, rows, range(4), {name: 1.0})
    assert judge.parts(texts)[name].tolist() == whole[name].tolist() == [0.0] * 4
    assert judge.any_rewarded == alone.any_rewarded is False
