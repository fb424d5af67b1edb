"""What a user is told when something in a run was changed or damaged between two commands: a line, and the right exit code."""

import json
import os
import shutil

import jax
import pytest

from d1jax import evaluate, generate, train
from d1jax.config.errors import CannotSave

PROBLEMS = [([1, 2, 3], 6), ([2, 3, 4], 9), ([4, 5, 6], 15), ([1, 5, 7], 13)]
SETTINGS = {
    "stages": "[sft]", "task.name": "countdown", "task.train_rows": 0, "task.eval_rows": 4, "model.width": 16, "model.layers": 1,
    "model.heads": 2, "model.kv_heads": 2, "model.mlp_width": 16, "sampler.completion_length": 12, "sampler.block_length": 12,
    "sampler.steps": 2, "sft.steps": 2, "sft.optimizer.schedule": "constant", "sft.batch_size": 8,
    "evaluation.batch_size": 8, "checkpoint_every": 1,
}  # fmt: skip


def write_rows(file, problems):
    rows = [{"nums": nums, "target": target, "solution": "+".join(map(str, nums))} for nums, target in problems]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damage")
    write_rows(folder / "rows.jsonl", PROBLEMS)
    assert command(folder) == 0
    return folder


@pytest.fixture
def folder(finished, tmp_path, monkeypatch):
    """A copy of the run, which is found in the same place."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path


def command(folder, **settings):
    flags = {**SETTINGS, "run_dir": folder / "run", "task.train": "rows.jsonl", **settings}
    before = os.getcwd()
    os.chdir(folder)
    try:
        return train.main([f"--{key}={value}" for key, value in flags.items()])
    finally:
        os.chdir(before)


def said(capsys):
    """The error, which is one line."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_other_rows_under_the_same_name_are_refused(folder, capsys):
    assert command(folder) == 0
    write_rows(folder / "rows.jsonl", [*PROBLEMS[:3], ([1, 5, 8], 14)])
    assert command(folder) == 2
    assert "task.train: rows.jsonl is not what it was when the run in" in said(capsys)


def test_a_longer_run_that_is_refused_leaves_the_run_as_it_was(folder, capsys):
    before = {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()}
    write_rows(folder / "rows.jsonl", [*PROBLEMS[:3], ([1, 5, 8], 14)])
    assert command(folder, **{"sft.steps": 4}) == 2
    assert "task.train: rows.jsonl is not what it was when the run in" in said(capsys)
    assert {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()} == before
    write_rows(folder / "rows.jsonl", PROBLEMS)
    assert command(folder) == 0  # the former command still finds its finished run


def test_an_evaluation_on_other_rows_than_the_run_was_measured_on_says_so(tmp_path, capsys):
    write_rows(tmp_path / "rows.jsonl", PROBLEMS)
    write_rows(tmp_path / "test.jsonl", [([7, 8, 9], 24)])
    sets = f"{{test: {tmp_path / 'test.jsonl'}}}"
    assert command(tmp_path, **{"task.eval_sets": sets}) == 0
    run = ["--run", str(tmp_path / "run")]
    write_rows(tmp_path / "test.jsonl", [([7, 8, 10], 25)])
    capsys.readouterr()
    assert evaluate.main(run) == 0
    assert "note: task.eval_sets.test: " in capsys.readouterr().err
    assert evaluate.main([*run, "--task.eval_rows", "1"]) == 0  # other rows were asked for
    assert "note: " not in capsys.readouterr().err


def test_a_damaged_newest_checkpoint_is_named_by_readers_and_gone_back_from_by_training(folder, capsys):
    run = folder / "run"
    before = json.loads((run / "summary.json").read_text())["stages"]
    os.truncate(run / "checkpoints" / "sft" / "2" / "_CHECKPOINT_METADATA", 20)
    for main, arguments in (
        (evaluate.main, ["--run", str(run)]),
        (generate.main, ["--model", str(run), "--prompt", "1,2,3=6:", "--length", "4"]),
    ):
        assert main(arguments) == 2
        line = said(capsys)
        assert "checkpoint of step 2 is damaged" in line and "the last good one is step 1" in line
    shutil.rmtree(run / "evaluations")
    assert command(folder) == 0 and (run / "damaged" / "sft" / "2").is_dir()
    assert json.loads((run / "summary.json").read_text())["stages"] == before  # the lost step was done again
    assert evaluate.main(["--run", str(run)]) == 0


@pytest.mark.parametrize("name", ["sft.json", "sft.samples.jsonl"])
def test_a_cut_evaluation_is_named(folder, capsys, name):
    file = folder / "run" / "evaluations" / name
    os.truncate(file, file.stat().st_size // 2)
    assert command(folder) == 2 and f"{file}: not readable as JSON objects" in said(capsys)
    file.unlink()
    assert command(folder) == 0


@pytest.mark.parametrize("seed", [2**32, 2**64])
def test_a_seed_of_more_than_32_bits_is_refused(folder, capsys, seed):
    assert command(folder, seed=seed) == 2 and f"seed = {seed} is more than {2**32 - 1}" in said(capsys)


@pytest.mark.parametrize(
    "error, code, line",
    [
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 99 bytes\nand a page more"), 1, "out of memory (RESOURCE_EXHAUSTED: 99 b"),
        (OSError(28, "No space left on device"), 1, "No space left on device; what was saved is good"),
        (CannotSave("rl step 3: gone"), 1, "rl step 3: gone"),
        (KeyboardInterrupt(), 130, None),
    ],
    ids=["memory", "disk", "directory", "Ctrl-C"],
)  # fmt: skip
def test_what_ends_a_run_is_a_line_and_a_code(tmp_path, capsys, monkeypatch, error, code, line):
    def fail(config, again_from, only):
        raise error

    monkeypatch.setattr(train, "run", fail)
    assert command(tmp_path) == code
    assert line is None or line in said(capsys)
