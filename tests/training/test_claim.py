"""A run directory belongs to one configuration and one process, and never holds half a file."""

import dataclasses
import os

import pytest

from d1jax.config import Config, RlConfig, TaskConfig, UserError
from d1jax.models import processes
from d1jax.training.claim import check_data, check_shared, claim
from d1jax.weights.run import open_run, read_record


def test_new_directory_keeps_its_configuration(tmp_path):
    config = Config(run_dir=str(tmp_path / "run"))
    run, lock = claim(config)
    lock.close()
    assert open_run(run.path)[1] == config
    claim(config)[1].close()  # the same configuration may go on


@pytest.mark.parametrize("there", [None, "seed: 1"])
def test_a_process_that_does_not_see_the_run_directory_says_so(tmp_path, monkeypatch, there):
    run, lock = claim(Config(run_dir=str(tmp_path / "run")))
    lock.close()
    check_shared(run)
    monkeypatch.setattr(processes, "SEEN_SECONDS", -1)
    monkeypatch.setattr(processes, "agreed", lambda _: "seed: 0")
    if there is None:
        run.config.unlink()
    else:
        run.config.write_text(there)
    with pytest.raises(UserError, match="put run_dir on storage that all processes see"):
        check_shared(run)


def test_another_configuration_is_refused_and_named(tmp_path):
    config = Config(run_dir=str(tmp_path / "run"))
    run, lock = claim(config)
    lock.close()
    (run.checkpoints("sft") / "20").mkdir(parents=True)
    changed = dataclasses.replace(config, seed=7, rl=RlConfig(steps=99))
    with pytest.raises(UserError) as error:
        claim(changed)
    assert "seed: 0 -> 7" in str(error.value) and "rl.steps: 40 -> 99" in str(error.value)


def test_before_the_first_checkpoint_the_configuration_may_be_corrected(tmp_path):
    claim(Config(run_dir=str(tmp_path / "run")))[1].close()
    corrected = Config(run_dir=str(tmp_path / "run"), seed=7)
    run, lock = claim(corrected)
    lock.close()
    assert open_run(run.path)[1] == corrected


def test_a_corrected_configuration_starts_without_what_the_old_one_left(tmp_path):
    config = Config(run_dir=str(tmp_path / "run"))
    run, lock = claim(config)
    lock.close()
    run.source.mkdir()
    (run.source / "tokenizer.json").write_text("{}")
    run.origin.write_text("{}")
    claim(dataclasses.replace(config, seed=1))[1].close()
    assert not run.source.exists() and not run.origin.exists()


def test_order_of_evaluation_sets_is_kept_and_counts(tmp_path):
    sets = {"zebra": "generated", "ant": "generated"}
    config = Config(run_dir=str(tmp_path / "run"), task=TaskConfig(eval_sets=sets))
    run, lock = claim(config)
    lock.close()
    assert list(open_run(run.path)[1].task.eval_sets) == ["zebra", "ant"]
    (run.checkpoints("sft") / "20").mkdir(parents=True)
    other = dataclasses.replace(config, task=TaskConfig(eval_sets=dict(reversed(sets.items()))))
    with pytest.raises(UserError, match="task.eval_sets"):
        claim(other)


def test_saved_steps(tmp_path):
    run, lock = claim(Config(run_dir=str(tmp_path / "run")))
    lock.close()
    for name in ("sft/20", "sft/100", "sft/40.orbax-checkpoint-tmp", "rl"):
        (run.path / "checkpoints" / name).mkdir(parents=True)
    assert run.saved_steps(("sft", "rl", "other")) == {"sft": 100, "rl": 0}


def test_moved_run_may_continue(tmp_path):
    claim(Config(run_dir=str(tmp_path / "old")))[1].close()
    os.rename(tmp_path / "old", tmp_path / "new")
    claim(Config(run_dir=str(tmp_path / "new")))[1].close()


def test_two_processes_cannot_share_a_run(tmp_path):
    config = Config(run_dir=str(tmp_path / "run"))
    _, lock = claim(config)
    with pytest.raises(UserError, match="in use by another process"):
        claim(config)
    lock.close()


def test_a_directory_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="no config.yaml"):
        claim(Config(run_dir=str(tmp_path)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["thesis.txt"]
    with pytest.raises(UserError, match="is a file"):
        claim(Config(run_dir=str(tmp_path / "thesis.txt")))


def test_open_run_names_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="no run directory"):
        open_run(tmp_path)


@pytest.mark.parametrize("name", ["run\0", "x" * 300, "file/run", "/proc/run"])
def test_a_directory_that_cannot_be_made_is_a_mistake_of_the_configuration(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="run_dir .* cannot be made or written to"):
        claim(Config(run_dir=str(tmp_path / name)))


def test_a_refused_configuration_does_not_keep_the_lock(tmp_path):
    config = Config(run_dir=str(tmp_path / "run"))
    run, lock = claim(config)
    lock.close()
    (run.checkpoints("sft") / "20").mkdir(parents=True)
    with pytest.raises(UserError) as refused:
        claim(dataclasses.replace(config, seed=7))
    claim(config)[1].close()
    assert "seed: 0 -> 7" in str(refused.value)


def data(digest, rows=2):
    return {"task.train": {"source": "rows.jsonl", "rows": rows, "sha256": digest * 64}}


def test_other_rows_than_the_run_began_with_are_refused(tmp_path):
    run, lock = claim(Config(run_dir=str(tmp_path / "run")))
    lock.close()
    assert check_data(run, data("a")) is None
    assert check_data(run, data("b")) is None  # nothing has been learnt from the others
    (run.checkpoints("sft") / "20").mkdir(parents=True)
    assert check_data(run, data("b")) is None
    with pytest.raises(UserError) as refused:
        check_data(run, data("c", rows=3))
    message = str(refused.value)
    assert "task.train: rows.jsonl is not what it was" in message
    assert f"2 rows with sha256 {'b' * 16} then, 3 rows with {'c' * 16} now" in message


def test_a_run_from_before_rows_were_recorded_goes_on_with_a_line(tmp_path):
    run, lock = claim(Config(run_dir=str(tmp_path / "run")))
    lock.close()
    (run.checkpoints("sft") / "20").mkdir(parents=True)
    assert "before runs recorded their rows" in check_data(run, data("a"))
    assert check_data(run, data("a")) is None
    with pytest.raises(UserError):
        check_data(run, data("b"))


@pytest.mark.parametrize("text", ["", '{"step": 1', "[1]", '{"a": 1, "a": 2}', "\0\0"])
def test_a_cut_record_is_named(tmp_path, text):
    file = tmp_path / "rl.json"
    file.write_text(text)
    with pytest.raises(UserError, match="rl.json: not readable as JSON objects .*move it away"):
        read_record(file)
