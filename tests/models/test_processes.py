"""Several processes: they learn what one learns, decide alike, and end together, whichever of them fails."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from d1jax import files, train
from d1jax.config import Config, ExportConfig, Stage, UserError
from d1jax.config.parse import parse
from d1jax.evaluation import sampled
from d1jax.inference import export
from d1jax.models import joining, processes
from d1jax.telemetry import command_line
from d1jax.telemetry.metrics import read_metrics
from d1jax.weights.checkpoints import Checkpoints
from d1jax.weights.run import RunDirectory, read_record, read_records

ROOT = Path(__file__).resolve().parents[2]
FOUR_METHODS = """
stages:
  - {name: base, kind: sft}
  - {name: d1, kind: rl}
  - name: coupled
    kind: rl
    estimator: {name: coupled, counts: independent, low: 0.2, high: 0.8, full_mask: true}
    prompt_mask: 0.0
    advantage: rloo
    loss_aggregation: group_bnpo
    kl: {name: loss, coefficient: 0.01}
  - name: espo
    kind: rl
    estimator: {name: coupled, samples: 2}
    policy_loss: {name: ppo, level: sequence_mean, clip_low: 0.0004, clip_high: 0.0004}
    kl: {name: loss, coefficient: 0.003, estimator: k2, level: sequence}
    prompt_mask: 0.0
  - {name: vrpo, kind: preference, writer: reference, estimator: {name: elbo, samples: 4}}
  - {name: after, kind: evaluate, samples: 2, rows: 4}
task: {name: sudoku, train_rows: 64, eval_rows: 16}
model: {width: 16, layers: 1, heads: 4, kv_heads: 2, mlp_width: 16, rope_theta: 100}
sampler: {completion_length: 20, block_length: 20, steps: 2}
sft: {steps: 2, batch_size: 16}
rl: {steps: 2, prompts_per_step: 4, num_generations: 4, num_iterations: 2, reward_weights: {clues: 1, cells: 1}}
preference: {steps: 2, prompts_per_step: 8, num_generations: 4, reward_weights: {clues: 1, cells: 1}}
checkpoint_every: 1
evaluation: {batch_size: 16, every: 1}
mesh: {data: 2, fsdp: 2, tensor: 2}
"""

OTHER_STAGES = """
stages:
  - {name: base, kind: sft}
  - {name: samples, kind: generate}
  - {name: judge, kind: reward_model, data: [samples]}
  - name: ppo
    kind: rl
    estimator: trajectory
    advantage: {name: gae, value_learning_rate: 1e-3}
    kl: {name: loss, coefficient: 0.01}
  - {name: out, kind: export}
task:
  name: mixture
  train_rows: 64
  eval_rows: 16
  options:
    tasks:
      grids: {name: "mine.py:Fussy", train: generated, test: generated}
      sums: {name: countdown, train: generated, test: generated}
model: {width: 16, layers: 1, heads: 4, kv_heads: 2, mlp_width: 16, rope_theta: 100}
lora: {rank: 2}
sampler: {completion_length: 20, block_length: 20, steps: 2}
sft: {steps: 2, batch_size: 16}
generate: {prompts: 16, prompts_per_step: 8, num_generations: 4, accept: {}, keep_per_prompt: 0, reward_weights: {"mine.py:odd": 1}}
reward_model: {steps: 2, batch_size: 8, pairs_per_prompt: 0}
rl:
  steps: 2
  prompts_per_step: 8
  num_generations: 2
  rollout_batch_size: 8
  reward_weights: {"model:judge": 1, grids/cells: 1, "mine.py:picky": 1}
checkpoint_every: 1
evaluation: {batch_size: 16}
mesh: {data: 2, fsdp: 2, tensor: 2}
"""
MINE = """
import os
from pathlib import Path

from d1jax.tasks.sudoku import Sudoku

def late(look, seen=set()):
    def first_in_vain(path):
        fresh = Path(path).parent.name in ("evaluations", "generated", "exports") and (look, str(path)) not in seen
        seen.add((look, str(path)))
        return not fresh and look(path)
    return first_in_vain

# As where NFS tells this machine of a file late.
if os.environ.get("LATE") == os.environ.get("JAX_PROCESS_ID", "none"):
    Path.exists, Path.is_dir = late(Path.exists), late(Path.is_dir)

class Fussy(Sudoku):
    def rewards(self, row, text):
        if sum(map(ord, text)) % 3 == 1:
            raise ValueError("a text that I cannot read")
        return super().rewards(row, text)

def odd(completions, **_):
    return [sum(map(ord, text)) % 2 for text in completions]

def picky(completions, **_):
    if any(sum(map(ord, text)) % 11 == 1 for text in completions):
        raise ValueError("a batch that I cannot read")
    return odd(completions)
"""

SHORT = [
    "--config", "run.yaml", "--run_dir", "run",
    "--stages", "[{name: base, kind: sft}, {name: d1, kind: rl}]", "--rl.num_iterations", "1",
]  # fmt: skip


# -- in one process --------------------------------------------------------------------------------------------------------


def test_one_process_asks_nobody():
    assert processes.count() == 1 and processes.is_first()
    assert processes.gathered({"a": 0.1}) == [{"a": 0.1}]
    assert processes.divided(lambda some: list(range(10))[some], 10) == list(range(10))
    assert processes.first_only(lambda: 3) == 3


@pytest.fixture
def second_of_two(monkeypatch) -> list[Any]:
    """This process is the second of two; what the first one would answer to the next questions."""
    answers: list[Any] = []
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "place", lambda: 1)
    monkeypatch.setattr(processes, "gathered", lambda value: [answers.pop(0), value])
    return answers


def test_what_is_agreed_is_the_answer_of_the_first_process(second_of_two):
    second_of_two += [True, {"step": 2}]
    assert processes.agreed(lambda: pytest.fail("only the first one looks")) is True
    assert processes.agreed(lambda: pytest.fail("only the first one looks")) == {"step": 2}


def test_a_process_that_does_not_see_a_file_yet_decides_as_the_first_one_does(second_of_two, tmp_path):
    run = RunDirectory(tmp_path)
    stage = Stage("judge", "reward_model")
    second_of_two += [True, True, True, [1, 2]]
    assert train._is_measured(stage, Config(stages=(stage,)), run)
    sampled.run(None, {}, "after", "base", run.sampled("after"))
    export.export(None, ExportConfig(), "base", run.exported("out"), tmp_path / "exports/out.json")
    assert Checkpoints(tmp_path / "checkpoints").steps() == [1, 2]
    assert not second_of_two


def test_files_that_never_come_are_named(monkeypatch):
    monkeypatch.setattr(processes, "SEEN_SECONDS", 0.02)
    seen = iter([False, True])
    processes.wait_until(lambda: next(seen), lambda: "it")
    with pytest.raises(UserError, match="samples.jsonl, which the first process has written, is not there"):
        processes.wait_until(lambda: False, lambda: "samples.jsonl")


def test_a_program_that_has_joined_processes_by_itself_takes_its_part(second_of_two, monkeypatch, tmp_path, capsys):
    ended = []
    monkeypatch.setattr(joining, "_takes_part", False)
    monkeypatch.setattr(files, "_writes", True)
    monkeypatch.setattr(joining, "_watch", lambda: ended.append("watched"))
    monkeypatch.setattr(joining, "fail", lambda problem, code: ended.append((str(problem), code)))
    with command_line.in_all_processes():
        files.write_json(tmp_path / "a.json", 1)
        print("not said")
        assert not joining.is_joined_by_hand(), "once"
    print("said")
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == "said\n"
    assert ended == ["watched"]
    with command_line.in_all_processes():
        raise UserError("config: rl.steps")
    assert ended[1:3] == ["watched", ("config: rl.steps", 2)], ended


@given(rows=st.integers(0, 1000), count=st.integers(1, 17))
def test_parts_cover_all_rows_once_and_differ_by_one_at_most(rows, count):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "count", lambda: count)
        bounds = processes.bounds(rows)
    sizes = np.diff(bounds)
    assert (bounds[0], bounds[-1], len(sizes)) == (0, rows, count)
    assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize(
    "given, told",
    [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS is missing"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_COORDINATOR_ADDRESS": "h:1"}, "JAX_PROCESS_ID is missing"),
        ({"JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0", "JAX_COORDINATOR_ADDRESS": "h:1"}, "'two' is no number"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2", "JAX_COORDINATOR_ADDRESS": "h:1"}, "count from 0 to 1"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1", "JAX_COORDINATOR_ADDRESS": "host"}, "names no port"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1", "JAX_COORDINATOR_ADDRESS": "localhost:9"}, "not answer"),
        (
            {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1", "JAX_COORDINATOR_ADDRESS": "localhost:port"},
            "names no port",
        ),
        (
            {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0", "JAX_COORDINATOR_ADDRESS": "localhost:99999"},
            "names no port",
        ),
        ({}, "JAX finds no cluster here"),
    ],
)
def test_what_cannot_be_joined_is_named(monkeypatch, given, told):
    def nothing_found(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", nothing_found)
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=told):
        joining.start(seconds=1)


def test_a_port_in_use_is_named(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        address = f"localhost:{taken.getsockname()[1]}"
        for name, value in (("COORDINATOR_ADDRESS", address), ("NUM_PROCESSES", "2"), ("PROCESS_ID", "0")):
            monkeypatch.setenv(f"JAX_{name}", value)
        with pytest.raises(UserError, match=f"cannot listen at JAX_COORDINATOR_ADDRESS = {address}"):
            joining.start(seconds=1)


def test_what_differs_between_processes_is_named(monkeypatch):
    monkeypatch.setattr(processes, "gathered", lambda named: [named, {**named, "rl.steps": 3}])
    with pytest.raises(UserError, match="rl.steps is 3 in process 1 and 2 in process 0"):
        processes.check_equal({"seed": 0, "rl.steps": 2})


# -- in two ----------------------------------------------------------------------------------------------------------------


def start(
    arguments: Sequence[Sequence[str]], folder: Path, module: str = "train", command: Sequence[str] = ()
) -> list[subprocess.Popen]:
    """A process for each list of arguments of a command, of four devices each."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    shared = {
        "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4", "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": str(ROOT),
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(len(arguments)),
    }  # fmt: skip
    command = command or [sys.executable, "-m", f"d1jax.{module}", "--distributed"]
    return [
        subprocess.Popen(
            [*command, *own],
            cwd=folder,
            env={**os.environ, **shared, "JAX_PROCESS_ID": str(place)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        for place, own in enumerate(arguments)
    ]


def ended(running: Sequence[subprocess.Popen]) -> tuple[list[int], list[str]]:
    """(exit codes, what each wrote to standard error)."""
    told = [one.communicate(timeout=400)[1] for one in running]
    return [one.returncode for one in running], told


def together(arguments: Sequence[str], folder: Path) -> tuple[list[int], list[str]]:
    return ended(start([arguments, arguments], folder))


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """A folder with the run of two processes."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "run.yaml").write_text(FOUR_METHODS)
    codes, told = together(["--config", "run.yaml", "--run_dir", "two"], folder)
    assert codes == [0, 0], told
    assert "continues" not in told[0] and "sft" not in told[1], "one process speaks"
    return folder


def assert_alike(
    ours: Path,
    theirs: Path,
    tolerance: float,
    files: Sequence[str] = ("samples.jsonl", "evaluations/after.sampled.jsonl"),
) -> None:
    """Two runs have the same metrics, times aside, and the same texts; confidences, which are rounded, to their last decimal."""
    rows, others = read_metrics(ours / "metrics.jsonl"), read_metrics(theirs / "metrics.jsonl")
    assert [(row["stage"], row["step"]) for row in rows] == [(row["stage"], row["step"]) for row in others]
    for row, other in zip(rows, others, strict=True):
        names = {name for name in row if not name.startswith("time/") and name != "stage"}
        assert row.keys() == other.keys()
        for name in names:
            np.testing.assert_allclose(row[name], other[name], rtol=tolerance, atol=tolerance, err_msg=name)
    for file in files:
        for row, other in zip(read_records(ours / file), read_records(theirs / file), strict=True):
            found, expected = (one.pop("confidence", []) for one in (row, other))
            assert row == other
            np.testing.assert_allclose(found, expected, rtol=0, atol=1.01e-4 if tolerance else 0)


def test_two_processes_learn_what_one_learns(two):
    train.run(parse(["--config", str(two / "run.yaml"), "--run_dir", str(two / "one")]))
    assert_alike(two / "two", two / "one", 1e-5)


def test_devices_that_are_cut_otherwise_learn_the_same(two):
    cut = ["--mesh.data", "1", "--mesh.fsdp", "2", "--mesh.tensor", "4"]
    train.run(parse(["--config", str(two / "run.yaml"), "--run_dir", str(two / "cut"), *cut]))
    assert_alike(two / "two", two / "cut", 1e-5)


def test_two_processes_evaluate_what_was_trained(two):
    flags = ["--run", "two", "--stage", "d1", "--out", "table.json"]
    codes, told = ended(start([flags, flags], two, "evaluate"))
    assert codes == [0, 0], told
    (found,) = json.loads((two / "table.json").read_text())["stages"]
    kept = json.loads((two / "two" / "summary.json").read_text())["stages"]
    assert found == next(stage for stage in kept if stage["name"] == "d1")


@pytest.mark.parametrize("count, tolerance", [(2, 0.0), (1, 1e-5)])
def test_a_run_that_was_cut_goes_on_with_two_processes_or_with_one(two, tmp_path, count, tolerance):
    shutil.copytree(two / "two", tmp_path / "cut")
    (tmp_path / "run.yaml").write_text(FOUR_METHODS)
    for left in ("coupled", "espo", "vrpo", "after"):
        for path in (tmp_path / "cut" / "evaluations").glob(f"{left}.*"):
            path.unlink()
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "coupled" / "2")
    for left in ("espo", "vrpo"):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / left)
    if count == 1:
        train.run(parse(["--config", str(tmp_path / "run.yaml"), "--run_dir", str(tmp_path / "cut")]))
    else:
        codes, told = together(["--config", "run.yaml", "--run_dir", "cut"], tmp_path)
        assert codes == [0, 0], told
    assert_alike(two / "two", tmp_path / "cut", tolerance)


def test_two_processes_learn_what_one_learns_in_stages_of_every_other_kind(tmp_path, monkeypatch):
    """Kept rows, a reward model that later rewards, a value model and an export; with adapters, a mixture and rewards that raise."""
    (tmp_path / "run.yaml").write_text(OTHER_STAGES)
    (tmp_path / "mine.py").write_text(MINE)
    codes, told = together(["--config", "run.yaml", "--run_dir", "two"], tmp_path)
    assert codes == [0, 0], told
    assert "a text that I cannot read" in told[0] and "a batch that I cannot read" in told[0], told[0]
    assert "base:" not in told[1], "one process speaks"
    with contextlib.chdir(tmp_path):
        train.run(parse(["--config", "run.yaml", "--run_dir", "one"]))
    assert_alike(tmp_path / "two", tmp_path / "one", 1e-5, files=())
    shown = [[row["pieces"] for row in read_records(tmp_path / run / "samples.jsonl")] for run in ("two", "one")]
    assert shown[0] == shown[1] and len(shown[0]) == 16
    kept = [read_records(tmp_path / run / "generated" / "samples.jsonl") for run in ("two", "one")]
    assert kept[0] == kept[1] and len(kept[0]) > 16
    worth = [read_record(tmp_path / run / "evaluations" / "judge.reward_model.json") for run in ("two", "one")]
    assert worth[0].keys() == worth[1].keys()
    assert worth[0]["margin"] == pytest.approx(worth[1]["margin"], abs=1e-6)
    weights = [load_file(tmp_path / run / "exports" / "out" / "model.safetensors") for run in ("two", "one")]
    assert weights[0].keys() == weights[1].keys()
    for name in weights[0]:
        np.testing.assert_allclose(weights[0][name], weights[1][name], rtol=1e-5, atol=1e-6, err_msg=name)
    names = [{path.name for path in (tmp_path / run / "exports" / "out").iterdir()} for run in ("two", "one")]
    assert names[0] == names[1]

    # A process that hears of files late decides as the first one does.
    before = (tmp_path / "two" / "metrics.jsonl").read_text()
    monkeypatch.setenv("LATE", "1")
    codes, told = together(["--config", "run.yaml", "--run_dir", "two"], tmp_path)
    assert codes == [0, 0], told
    assert (tmp_path / "two" / "metrics.jsonl").read_text() == before


def test_processes_with_different_settings_say_which(tmp_path):
    (tmp_path / "run.yaml").write_text(FOUR_METHODS)
    flags = ["--config", "run.yaml", "--run_dir", "run"]
    codes, told = ended(start([[*flags, "--rl.steps", "2"], [*flags, "--rl.steps", "3"]], tmp_path))
    assert codes == [2, 2]
    assert all("rl.steps is 3 in process 1 and 2 in process 0" in one or "rl.steps is 2 in" in one for one in told)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["--only", "--from"])
def test_processes_that_do_different_stages_say_so(tmp_path, flag):
    (tmp_path / "run.yaml").write_text(FOUR_METHODS)
    codes, told = ended(start([[*SHORT, flag, "base"], SHORT], tmp_path))
    assert codes == [2, 2], told
    assert all(f"{flag} is" in one for one in told)
    assert not (tmp_path / "run").exists()


def test_one_that_is_asked_to_stop_stops_both_and_they_continue(tmp_path):
    (tmp_path / "run.yaml").write_text(FOUR_METHODS)
    running = start([SHORT, SHORT], tmp_path)
    until = time.monotonic() + 300
    while not (tmp_path / "run" / "checkpoints" / "base").exists() and time.monotonic() < until:
        time.sleep(0.1)
    running[1].send_signal(signal.SIGTERM)
    codes, told = ended(running)
    assert codes == [143, 143], told
    codes, told = together(SHORT, tmp_path)
    assert codes == [0, 0], told
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [(row["stage"], row["step"]) for row in rows] == [("base", 1), ("base", 2), ("d1", 1), ("d1", 2)]


BY_HAND = """
import os, sys
import jax
count, place = (int(os.environ[f"JAX_{name}"]) for name in ("NUM_PROCESSES", "PROCESS_ID"))
jax.distributed.initialize(os.environ["JAX_COORDINATOR_ADDRESS"], count, place)
from d1jax import train
from d1jax.config.parse import parse
train.run(parse(sys.argv[1:]))
print("after", flush=True)
"""


@pytest.mark.parametrize("fails", [False, True])
def test_a_program_that_joins_processes_by_itself_is_as_the_command(tmp_path, fails):
    (tmp_path / "run.yaml").write_text(FOUR_METHODS)
    (tmp_path / "by_hand.py").write_text(BY_HAND)
    flags = [*SHORT[:4], "--stages", "[{name: base, kind: sft}]"]
    other = [*flags, "--seed", "1"] if fails else flags
    running = start([flags, other], tmp_path, command=[sys.executable, "by_hand.py"])
    out = [one.communicate(timeout=400) for one in running]
    if fails:
        assert [one.returncode for one in running] == [2, 2], out
        assert all("seed is" in told for _, told in out)
        return
    assert [one.returncode for one in running] == [0, 0], out
    assert all(printed.endswith("after\n") for printed, _ in out), "a program goes on, and may speak"
    assert "solved" in out[0][0] and "solved" not in out[1][0]
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [(row["stage"], row["step"]) for row in rows] == [("base", 1), ("base", 2)], "one writes"


def test_a_task_that_fails_in_one_ends_both_with_its_words(tmp_path):
    (tmp_path / "run.yaml").write_text(FOUR_METHODS)
    (tmp_path / "mine.py").write_text(
        "import os\nfrom d1jax.tasks.sudoku import Sudoku\n\nclass Mine(Sudoku):\n    def grade(self, row, text):\n"
        "        if os.environ['JAX_PROCESS_ID'] == '1' and text:\n            raise RuntimeError('only here')\n"
        "        return super().grade(row, text)\n"
    )
    codes, told = together([*SHORT, "--task.name", "mine.py:Mine"], tmp_path)
    assert codes == [2, 2], told
    assert all("process 1" in one and "only here" in one for one in told)
