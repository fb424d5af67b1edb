"""What a stage leaves behind when its policy collapses, and how it goes on from what was damaged since."""

import dataclasses
import os
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from d1jax.config import Config, Stage, StopOnCollapse, UserError
from d1jax.config.errors import CannotSave, Diverged
from d1jax.telemetry.metrics import MetricsLog, read_metrics
from d1jax.training.stage_log import StageLog, kept_steps, spans
from d1jax.training.stopping import StopRequest
from d1jax.weights.run import RunDirectory

START = {"trainable": {"w": jnp.zeros(3)}}


def values(step):
    return {"loss": float(step), "nonfinite/in_a_row": 0}


def journal_of(path, steps=9, **settings):
    rl = dataclasses.replace(settings.pop("rl", Config().rl), steps=steps)
    config = dataclasses.replace(Config(), checkpoint_every=1, rl=rl, **settings)
    return StageLog(RunDirectory(path), MetricsLog(path), StopRequest(), Stage("rl", "rl"), config)


def test_a_collapsed_policy_is_set_aside_and_the_run_goes_on_from_before_it(tmp_path):
    with journal_of(tmp_path) as journal:
        items, first = journal.resume(START)
        assert first == 0 and journal.recent == []
        for step in range(1, 6):
            journal.log_metrics(step, values(step), watch=("loss",))
            if step < 5:
                journal.save_checkpoint(step, {"trainable": {"w": jnp.full(3, float(step))}})
        assert [row["loss"] for row in journal.recent] == [1, 2, 3, 4, 5]
        with pytest.raises(Diverged) as stopped:
            journal.quarantine(5, 2, ["entropy 0 (below 0.1)"])
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
        journal.log_metrics(1, values(1), watch=())
        journal.save_checkpoint(1, START)
        with pytest.raises(Diverged, match="No checkpoint of rl is from before"):
            journal.quarantine(2, 2, ["KL 9 (above 1)"])
    assert list((tmp_path / "checkpoints" / "rl").iterdir()) == []


def test_a_second_collapse_does_not_overwrite_the_first(tmp_path):
    for value in (1.0, 2.0):
        with journal_of(tmp_path) as journal:
            journal.resume(START)
            journal.save_checkpoint(1, {"trainable": {"w": jnp.full(3, value)}})
            with pytest.raises(Diverged):
                journal.quarantine(1, 1, ["KL 9 (above 1)"])
    assert len(list((tmp_path / "collapsed" / "rl").iterdir())) == 2


# -- damage between stop and restart -----------------------------------------------------------------------------------


def begun(path, steps=4, **settings):
    """A run whose stage has done so many steps."""
    with journal_of(path, **settings) as journal:
        journal.resume(START)
        for step in range(1, steps + 1):
            journal.log_metrics(step, values(step), watch=())
            journal.save_checkpoint(step, {"trainable": {"w": jnp.full(3, float(step))}})
    return path / "checkpoints" / "rl"


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_it_goes_on(tmp_path, capsys):
    saved = begun(tmp_path)
    shutil.rmtree(saved / "4")
    (saved / "4").mkdir()
    shutil.rmtree(saved / "3" / "trainable")
    with journal_of(tmp_path) as journal:
        items, first = journal.resume(START)
        assert first == 2
        np.testing.assert_array_equal(items["trainable"]["w"], np.full(3, 2.0))
        assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
        journal.log_metrics(3, values(3), watch=())
        journal.save_checkpoint(3, START)  # the step can be saved again
    said = capsys.readouterr().err
    assert f"step 4 is damaged: {saved / '4' / '_CHECKPOINT_METADATA'} is missing" in said
    assert f"{saved / '3' / 'trainable'} is missing" in said and "going on from step 2" in said
    assert sorted(path.name for path in (tmp_path / "damaged" / "rl").iterdir()) == ["3", "4"]  # moved, not lost


def test_a_checkpoint_of_another_version_is_refused_and_stays_where_it_is(tmp_path):
    saved = begun(tmp_path)
    with journal_of(tmp_path) as journal, pytest.raises(UserError, match="another configuration or version of d1jax"):
        journal.resume({"trainable": {"w": jnp.zeros(5)}})
    assert len(list(saved.iterdir())) == 4 and not (tmp_path / "damaged").exists()


def test_where_every_checkpoint_is_damaged_the_stage_begins_again(tmp_path, capsys):
    saved = begun(tmp_path, steps=2)
    for step in ("1", "2"):
        shutil.rmtree(saved / step / "trainable")
    with journal_of(tmp_path) as journal:
        items, first = journal.resume(START)
    assert first == 0 and items is START and "the stage begins again" in capsys.readouterr().err


def test_a_step_beyond_the_last_one_is_refused(tmp_path):
    saved = begun(tmp_path)
    shutil.copytree(saved / "4", saved / "999")
    with (
        journal_of(tmp_path) as journal,
        pytest.raises(UserError, match=r"rl/999 is of step 999, but stage 'rl' has steps = 9"),
    ):
        journal.resume(START)


@pytest.mark.parametrize("cut, missing", [(5, "4"), (10**6, "1-4")])
def test_rows_of_metrics_that_are_missing_are_said(tmp_path, capsys, cut, missing):
    begun(tmp_path)
    file = tmp_path / "metrics.jsonl"
    os.truncate(file, max(file.stat().st_size - cut, 0))
    with journal_of(tmp_path) as journal:
        journal.resume(START)
    assert f"of the 4 steps that are saved: {missing};" in capsys.readouterr().err


def test_metrics_are_on_the_disk_before_the_checkpoint_is(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(os, "fsync", lambda handle: order.append("metrics"))
    with journal_of(tmp_path) as journal:
        journal.resume(START)
        journal.log_metrics(1, values(1), watch=())
        monkeypatch.setattr(journal._checkpoints, "save", lambda step, items: order.append("checkpoint"))
        journal.save_checkpoint(1, START)
    assert order == ["metrics", "checkpoint"]


@pytest.mark.parametrize("way", ["renamed", "removed"])
def test_a_run_directory_that_goes_away_stops_the_run(tmp_path, way):
    run = tmp_path / "run"
    with journal_of(run) as journal:
        journal.resume(START)
        journal.log_metrics(1, values(1), watch=())
        journal.save_checkpoint(1, START)
        if way == "renamed":
            run.rename(tmp_path / "elsewhere")
        else:
            shutil.rmtree(run)
        for write in (lambda: journal.log_metrics(2, values(2), watch=()), lambda: journal.save_checkpoint(2, START)):
            with pytest.raises(CannotSave, match="renamed or removed") as stopped:
                write()
        assert way == "removed" or str(tmp_path / "elsewhere" / "metrics.jsonl") in str(stopped.value)
    assert not run.exists()


def test_a_checkpoint_that_cannot_be_saved_is_told_in_a_line(tmp_path, monkeypatch):
    with journal_of(tmp_path) as journal:
        journal.resume(START)

        def full(step, items):
            raise OSError("no space left on device")

        monkeypatch.setattr(journal._checkpoints, "save", full)
        with pytest.raises(CannotSave, match="rl step 1: .*no space left on device.*the same command continues"):
            journal.save_checkpoint(1, START)


def test_a_stage_without_one_good_update_fails(tmp_path):
    with journal_of(tmp_path, steps=2, max_bad_updates=99) as journal:
        journal.resume(START)
        updates = 2 * Config().rl.num_iterations
        journal.log_metrics(1, {"nonfinite/in_a_row": updates // 2}, watch=())
        with pytest.raises(Diverged, match=f"all {updates} updates of the stage were NaN"):
            journal.log_metrics(2, {"nonfinite/in_a_row": updates}, watch=())
        journal.log_metrics(2, {"nonfinite/in_a_row": updates - 1}, watch=())  # one was good


def test_a_checkpoint_of_bad_updates_is_not_called_good(tmp_path):
    """Step 1 was saved after good updates, step 2 after bad ones: its weights are those of step 1."""
    updates = Config().rl.num_iterations
    with journal_of(tmp_path, max_bad_updates=2 * updates) as journal:
        journal.resume(START)
        for step, in_a_row in ((1, 0), (2, updates)):
            journal.log_metrics(step, {"nonfinite/in_a_row": in_a_row}, watch=())
            journal.save_checkpoint(step, START)
        with pytest.raises(Diverged, match="the last good checkpoint is step 1; .*lower rl.optimizer.learning_rate"):
            journal.log_metrics(3, {"nonfinite/in_a_row": 2 * updates}, watch=())


# -- which checkpoints stay --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "last, headline, look_back, kept",
    [
        (1, {}, 0, {50}),
        (2, {}, 0, {40, 50}),
        (1, {10: 0.5, 20: 0.7, 30: 0.6, 50: 0.1}, 0, {20, 50}),
        (1, {10: 0.7, 20: 0.7}, 0, {20, 50}),  # of equals the later
        (1, {45: 0.9}, 0, {50}),  # evaluated, but never saved
        (1, {}, 5, {40, 50}),  # a collapse that is seen at 51 began at 46
        (1, {}, 20, {30, 40, 50}),
        (1, {}, 99, {10, 20, 30, 40, 50}),
    ],
)
def test_kept_steps(last, headline, look_back, kept):
    assert kept_steps([10, 20, 30, 40, 50], last, headline, look_back) == kept


def test_keep_last_removes_what_nothing_needs_also_after_a_resume(tmp_path):
    settings = {"keep_last": 1, "rl": dataclasses.replace(Config().rl, collapse=StopOnCollapse(patience=1))}
    solved = {1: 0.1, 2: 0.9, 3: 0.3, 4: 0.2, 5: 0.0, 6: 0.0}
    for first, last in ((1, 4), (5, 6)):
        with journal_of(tmp_path, **settings) as journal:
            assert journal.resume(START)[1] == first - 1
            for step in range(first, last + 1):
                journal.log_metrics(step, values(step) | {"eval/held_out/solved": solved[step]}, watch=())
                journal.save_checkpoint(step, {"trainable": {"w": jnp.full(3, float(step))}})
    # The best, the last, and what a roll-back at step 7 would go to.
    assert sorted(path.name for path in (tmp_path / "checkpoints" / "rl").iterdir()) == ["2", "5", "6"]


# -- the checkpoint that is selected -----------------------------------------------------------------------------------

SELECTING = {
    "task": dataclasses.replace(Config().task, eval_sets={"test": "generated", "validation": "share:0.1"}),
    "evaluation": dataclasses.replace(Config().evaluation, every=2, select="validation"),
    "checkpoint_every": 100,
}


@pytest.mark.parametrize("keep_last", [0, 1])
def test_the_best_evaluated_checkpoint_is_selected_of_equals_the_later_also_after_a_resume(tmp_path, keep_last):
    solved = {2: 0.3, 4: 0.5, 6: 0.5, 8: 0.1, 9: 0.2}
    for first, last in ((1, 5), (5, 9)):  # step 5 is done again: its checkpoint was not due
        with selecting(tmp_path, keep_last) as journal:
            assert journal.resume(START)[1] == first - 1
            for step in range(first, last + 1):
                assert journal.evaluates(step) == (step in solved)  # and after the last step
                found = {"eval/validation/solved": solved[step]} if step in solved else {}
                journal.log_metrics(step, values(step) | found | {"eval/test/solved": 1.0 / step}, watch=())
                journal.save_checkpoint(step, START)
            chosen = journal.selected()
    assert chosen == {"set": "validation", "step": 6, "solved": 0.5, "candidates": solved}


def test_without_select_or_without_candidates_nothing_is_selected(tmp_path):
    with journal_of(tmp_path / "a") as journal:
        journal.resume(START)
        journal.log_metrics(1, values(1) | {"eval/held_out/solved": 1.0}, watch=())
        journal.save_checkpoint(1, START)
        assert journal.selected() is None
    with selecting(tmp_path / "b") as journal:
        assert journal.selected() is None


def selecting(path, keep_last=0):
    rl = dataclasses.replace(Config().rl, steps=9)
    config = dataclasses.replace(Config(), rl=rl, keep_last=keep_last, **SELECTING)
    return StageLog(RunDirectory(path), MetricsLog(path), StopRequest(), Stage("rl", "rl"), config)


def test_spans():
    assert spans([1, 2, 3, 7, 9, 10]) == "1-3, 7, 9-10" and spans([]) == ""


def test_metrics_that_the_devices_compute_are_written_one_step_late_and_before_a_checkpoint(tmp_path):
    steps = {}
    with journal_of(tmp_path) as journal:
        journal._config = dataclasses.replace(journal._config, checkpoint_every=3)
        journal.resume(START)
        for step in range(1, 10):
            on_device = {name: jnp.asarray(value, jnp.float32) for name, value in values(step).items()}
            journal.log_metrics(step, on_device, watch=("loss",))
            steps[step] = [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")][-1:]
            journal.save_checkpoint(step, START)
            if step % 3 == 0:
                assert read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == step
        assert journal.recent[-1]["loss"] == 9.0
    assert steps == {1: [], 2: [1], 3: [2], 4: [3], 5: [4], 6: [5], 7: [6], 8: [7], 9: [9]}


def test_metrics_that_are_asked_for_are_written(tmp_path):
    with journal_of(tmp_path) as journal:
        journal.resume(START)
        journal.log_metrics(1, {"loss": jnp.float32(2.0), "nonfinite/in_a_row": 0}, watch=())
        assert [row["loss"] for row in journal.recent] == [2.0]
