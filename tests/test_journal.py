"""What a stage leaves behind when its policy collapses."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from d1jax.config import Config
from d1jax.journal import Journal
from d1jax.runtime.run_directory import RunDirectory
from d1jax.runtime.stopping import Diverged, StopRequest
from d1jax.telemetry.metrics import MetricsLog

START = {"trainable": {"w": jnp.zeros(3)}}


def values(step):
    return {"loss": float(step), "nonfinite/in_a_row": 0}


def journal_of(path, steps=9):
    config = dataclasses.replace(Config(), checkpoint_every=1)
    return Journal(RunDirectory(path), MetricsLog(path, tensorboard=False), StopRequest(), "rl", steps, config)


def test_a_collapsed_policy_is_set_aside_and_the_run_goes_on_from_before_it(tmp_path):
    with journal_of(tmp_path) as journal:
        items, first = journal.resume(START)
        assert first == 0 and journal.recent == []
        for step in range(1, 6):
            journal.record(step, values(step), watch=("loss",))
            if step < 5:
                journal.keep(step, {"trainable": {"w": jnp.full(3, float(step))}})
        assert [row["loss"] for row in journal.recent] == [1, 2, 3, 4, 5]
        with pytest.raises(Diverged) as stopped:
            journal.roll_back(5, 2, ["entropy 0 (below 0.1)"])
    message = str(stopped.value)
    assert "rl step 5" in message and "2 steps in a row it showed entropy 0 (below 0.1)" in message
    assert (
        "last good checkpoint is step 2; steps [3, 4] are now in" in message
        and "lower rl.optimizer.learning_rate" in message
    )
    assert sorted(path.name for path in (tmp_path / "checkpoints" / "rl").iterdir()) == ["1", "2"]
    assert sorted(path.name for path in (tmp_path / "collapsed" / "rl").iterdir()) == ["3", "4"]  # moved, not lost
    with journal_of(tmp_path) as journal:
        items, first = journal.resume(START)
        assert first == 2
        np.testing.assert_array_equal(items["trainable"]["w"], np.full(3, 2.0))


def test_without_a_checkpoint_from_before_it_says_so(tmp_path):
    with journal_of(tmp_path) as journal:
        journal.resume(START)
        journal.record(1, values(1), watch=())
        journal.keep(1, START)
        with pytest.raises(Diverged, match="No checkpoint of rl is from before"):
            journal.roll_back(2, 2, ["KL 9 (above 1)"])
    assert list((tmp_path / "checkpoints" / "rl").iterdir()) == []


def test_a_second_collapse_does_not_overwrite_the_first(tmp_path):
    for value in (1.0, 2.0):
        with journal_of(tmp_path) as journal:
            journal.resume(START)
            journal.keep(1, {"trainable": {"w": jnp.full(3, value)}})
            with pytest.raises(Diverged):
                journal.roll_back(1, 1, ["KL 9 (above 1)"])
    assert len(list((tmp_path / "collapsed" / "rl").iterdir())) == 2
