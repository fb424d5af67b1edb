"""The main job from its command line: learns, resumes exactly, stops cleanly, and tells mistakes apart."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

import d1jax.evaluate as evaluate
import d1jax.train as command
from d1jax.config.parse import parse
from d1jax.inference.policy import load_pretrained
from d1jax.telemetry.metrics import read_metrics
from d1jax.training.stage_log import StageLog
from d1jax.weights.checkpoints import ocp
from d1jax.weights.source import open_source

ROOT = Path(__file__).resolve().parents[1]
TINY = {
    "task.train_rows": 64, "task.eval_rows": 16, "model.width": 16, "model.layers": 1, "model.heads": 2, "model.kv_heads": 2,
    "model.mlp_width": 16, "model.rope_theta": 100, "sampler.completion_length": 20, "sampler.block_length": 20,
    "sampler.steps": 2, "sft.steps": 6, "sft.batch_size": 16, "rl.steps": 6, "rl.prompts_per_step": 4, "rl.num_generations": 4,
    "rl.num_iterations": 3, "rl.kl": "{name: loss, coefficient: 0.01}", "rl.reward_weights": "{clues: 1, cells: 1}", "checkpoint_every": 2,
    "evaluation.batch_size": 16,
}  # fmt: skip


def flags(run_dir: Path, **settings) -> list[str]:
    return [f"--{key}={value}" for key, value in {**TINY, "run_dir": run_dir, **settings}.items()]


def environment() -> dict[str, str]:
    """As in the tests' own process, so that both compute the same bits and share what they compile."""
    same = {
        "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "JAX_NUMPY_RANK_PROMOTION": "raise",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    return {**os.environ, **same}


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def call(main: Callable[[list[str]], int], argv: list[str], folder: Path) -> Done:
    """A command in this process, called in `folder`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    return Done(code, out.getvalue(), err.getvalue())


def train(run_dir: Path, **settings) -> Done:
    return call(command.main, flags(run_dir, **settings), run_dir.parent)


def start(run_dir: Path, **settings) -> subprocess.Popen:
    """A process of its own, for what only a process shows: kill -9, and signals."""
    return subprocess.Popen(
        [sys.executable, "-m", "d1jax.train", *flags(run_dir, **settings)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=run_dir.parent,
    )


def wait_for_step(process: subprocess.Popen, run_dir: Path, stage: str, step: int) -> None:
    """Until the metrics say that `step` of `stage` was done."""
    for _ in range(3000):
        if any(line["stage"] == stage and line["step"] >= step for line in read_metrics(run_dir / "metrics.jsonl")):
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError(f"{stage} step {step} never came")


def learnt(run_dir: Path) -> list[dict]:
    """The metrics without the clock."""
    lines = read_metrics(run_dir / "metrics.jsonl")
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in lines]


def parameters(run_dir: Path, stage: str, step: int) -> dict:
    return ocp.load_checkpointables(run_dir / "checkpoints" / stage / str(step))


def assert_same_run(one: Path, other: Path) -> None:
    assert learnt(one) == learnt(other)
    for stage in ("sft", "rl"):
        a, b = parameters(one, stage, 6), parameters(other, stage, 6)
        assert a.keys() == b.keys()
        for name in a:
            leaves_a, leaves_b = (_leaves(tree[name]) for tree in (a, b))
            assert leaves_a.keys() == leaves_b.keys()
            for path in leaves_a:
                np.testing.assert_array_equal(leaves_a[path], leaves_b[path], err_msg=f"{stage} {name} {path}")
        assert json.loads((one / f"evaluations/{stage}.json").read_text()) == json.loads(
            (other / f"evaluations/{stage}.json").read_text()
        )


def _leaves(tree, path=()) -> dict:
    if isinstance(tree, dict):
        return {k: v for name, child in tree.items() for k, v in _leaves(child, (*path, name)).items()}
    if isinstance(tree, list | tuple):
        return {k: v for i, child in enumerate(tree) for k, v in _leaves(child, (*path, i)).items()}
    return {} if tree is None else {path: np.asarray(tree)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    done = train(run_dir)
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.mark.smoke
def test_a_run_leaves_everything_it_promises(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert [stage["name"] for stage in summary["stages"]] == ["sft", "rl"]
    for stage in summary["stages"]:
        low, high = stage["solved_rate_ci95"]
        assert stage["n"] == 16 and 0 <= low <= stage["solved_rate"] <= high <= 1 and 0 <= stage["cell_accuracy"] <= 1
        order = stage["sets"]["held_out"]["decoding_order"]
        assert (
            order["heat_map"]["columns"] == len(order["first_step"]["entropy"]) == 20
            and order["first_step"]["rows"] == 16
        )
        assert "decoding_order" not in stage
    assert {"constant", "first_candidate"} <= set(summary["baselines"]["held_out"])
    assert "<html" in (finished / "report.html").read_text()
    samples = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
    assert {sample["stage"] for sample in samples} == {"sft", "rl"} and len(samples) == 16
    assert all(sample["columns"] == 4 and "\n" not in sample["pieces"] for sample in samples)
    assert all(len(sample["pieces"]) == len(sample["reveal_step"]) <= 20 for sample in samples)
    lines = read_metrics(finished / "metrics.jsonl")
    assert [(line["stage"], line["step"]) for line in lines] == [(s, i) for s in ("sft", "rl") for i in range(1, 7)]
    wanted = {
        "reward", "reward_std", "rewards/solved/mean", "rewards/cells/mean", "frac_reward_zero_std", "kl", "entropy", "loss",
        "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "ratio/mean", "mask/prompt_frac", "grad_norm",
        "learning_rate", "completions/mean_length", "completions/clipped_ratio", "completions/distinct_per_group",
        "time/rollout_s", "time/reward_s", "time/update_s", "nonfinite/total", "decoding/local_ar_1", "decoding/global_ar_4",
    }  # fmt: skip
    assert wanted <= set(lines[-1])
    assert all(line["ratio/first"] == 1.0 for line in lines if line["stage"] == "rl")
    assert 0.0 < lines[-1]["mask/prompt_frac"] < 0.5


def test_a_finished_run_only_prints_its_table(finished):
    before = {path: path.read_bytes() for path in finished.glob("*.jsonl")}
    again = train(finished)
    assert again.returncode == 0 and "held_out" in again.stdout and "first_candidate" in again.stdout
    assert before == {path: path.read_bytes() for path in finished.glob("*.jsonl")}


@pytest.mark.parametrize(("stage", "step"), [("sft", 3), ("rl", 3)])
def test_killed_run_resumes_bit_for_bit(finished, tmp_path, stage, step):
    """kill -9 between checkpoints, then the same command: metrics, weights, moments and evaluations as if nothing had been."""
    run_dir = tmp_path / "killed"
    process = start(run_dir)
    wait_for_step(process, run_dir, stage, step)
    process.kill()
    process.communicate()
    again = train(run_dir)
    assert again.returncode == 0, again.stderr
    assert_same_run(finished, run_dir)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_leaves(finished, tmp_path, signum):
    run_dir = tmp_path / "stopped"
    process = start(run_dir)
    wait_for_step(process, run_dir, "rl", 1)
    process.send_signal(signum)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signum and "Traceback" not in err and "the same command continues" in err
    saved = sorted(int(path.name) for path in (run_dir / "checkpoints/rl").iterdir())
    assert saved and learnt(run_dir)[-1]["step"] == saved[-1]
    assert train(run_dir).returncode == 0
    assert learnt(finished) == learnt(run_dir)


def test_another_mesh_learns_the_same(finished, tmp_path):
    """The first update of each stage agrees to rounding; later ones diverge slowly, because sums are cut differently."""
    run_dir = tmp_path / "cut"
    done = train(run_dir, **{"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2})
    assert done.returncode == 0, done.stderr
    for one, eight in zip(learnt(finished), learnt(run_dir), strict=True):
        if one["stage"] == "sft":
            np.testing.assert_allclose(one["loss"], eight["loss"], rtol=1e-3)


def test_a_cut_run_goes_on_on_another_mesh(finished, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    for step in (4, 6):
        shutil.rmtree(run_dir / "checkpoints" / "rl" / str(step))
    for path in (run_dir / "evaluations").glob("rl.*"):
        path.unlink()
    done = train(run_dir, **{"mesh.data": 1, "mesh.fsdp": 4, "mesh.tensor": 2})
    assert done.returncode == 0, done.stderr
    for before, after in zip(learnt(finished), learnt(run_dir), strict=True):
        assert (before["stage"], before["step"]) == (after["stage"], after["step"])
        if after["stage"] == "rl" and after["step"] == 3:  # texts are drawn alike; what is learnt differs by rounding
            np.testing.assert_allclose(before["reward"], after["reward"], rtol=1e-4)
            np.testing.assert_allclose(before["loss"], after["loss"], rtol=1e-3, atol=1e-5)


def test_lora_trains_adapters_only_and_merges(tmp_path):
    run_dir = tmp_path / "lora"
    done = train(run_dir, **{"lora.rank": 2, "sft.grad_accumulation_steps": 2, "rl.grad_accumulation_steps": 2})
    assert done.returncode == 0, done.stderr
    saved = parameters(run_dir, "rl", 6)
    assert set(saved["trainable"]) == {"lora"} and "reference" not in saved
    kl = [line["kl"] for line in learnt(run_dir) if line["stage"] == "rl"]
    assert kl[0] < kl[-1]
    table = call(evaluate.main, [f"--run={run_dir}"], tmp_path)
    assert table.returncode == 0, table.stderr
    assert table.stdout.strip() in done.stdout


def test_evaluate_repeats_the_table(finished, tmp_path):
    out = tmp_path / "table.json"
    done = call(evaluate.main, [f"--run={finished}", f"--out={out}"], tmp_path)
    assert done.returncode == 0, done.stderr
    summary, again = json.loads((finished / "summary.json").read_text()), json.loads(out.read_text())
    assert again["stages"] == summary["stages"] and again["baselines"] == summary["baselines"]
    checkpoint = finished / "checkpoints" / "rl" / "4"
    changed = [f"--checkpoint={checkpoint}", f"--out={out}", "--sampler.steps=4", "--task.eval_rows=8"]
    done = call(evaluate.main, changed, tmp_path)
    assert done.returncode == 0, done.stderr
    (stage,) = json.loads(out.read_text())["stages"]
    assert stage["name"] == "rl" and stage["step"] == 4 and stage["n"] == 8 and stage["nfe"] == 4


def test_a_run_goes_on_from_another(finished, tmp_path):
    run_dir = tmp_path / "more"
    done = train(run_dir, stages="[rl]", init_from=finished, **{"rl.steps": 2})
    assert done.returncode == 0, done.stderr
    other = train(tmp_path / "wider", stages="[rl]", init_from=finished, **{"model.width": 32})
    assert other.returncode == 2 and "model.width = 16 (here: 32)" in other.stderr
    assert json.loads((run_dir / "init_from.json").read_text()) == {"stage": "rl", "step": 6}
    longer = ["--task.style=instruct", "--sampler.completion_length=60", "--sampler.block_length=60"]
    wrong = call(evaluate.main, [f"--run={finished}", *longer], tmp_path)
    assert wrong.returncode == 2 and "another tokenizer" in wrong.stderr, wrong.stderr


def test_the_checkpoint_is_selected_on_validation_and_the_test_set_is_evaluated_once(tmp_path, monkeypatch):
    """SFT's step 2 of 4 is the best on validation: RL, evaluate, init_from and the report take that one."""
    solved = iter([0.2, 0.9, 0.5, 0.1, 0.3, 0.4])
    watched = []

    def watch(context, variables):
        watched.append(context.config.watched_set)
        return {"eval/validation/solved": next(solved)}

    monkeypatch.setattr("d1jax.evaluation.grade.watch", watch)
    monkeypatch.setattr("d1jax.rl.loop.watch", watch)
    begun, rl_train = [], command.TRAIN["rl"]

    def rl(context, start, log):
        begun.append(start)
        return rl_train(context, start, log)

    monkeypatch.setitem(command.TRAIN, "rl", rl)
    settings = {
        "task.eval_sets": "{test: generated, validation: 'share:0.25'}", "evaluation.select": "validation",
        "evaluation.every": 1, "checkpoint_every": 100, "sft.steps": 4, "rl.steps": 2, "rl.num_iterations": 1,
    }  # fmt: skip
    run_dir = tmp_path / "run"
    done = train(run_dir, **settings)
    assert done.returncode == 0, done.stderr
    assert watched == ["validation"] * 6
    assert "sft: step 2 goes on, the best of 4 checkpoints on validation (90.0% solved)" in done.stderr
    summary = json.loads((run_dir / "summary.json").read_text())
    assert [(stage["name"], stage["step"]) for stage in summary["stages"]] == [("sft", 2), ("rl", 2)]
    assert summary["primary_set"] == "test" and set(summary["stages"][0]["sets"]) == {"test", "validation"}
    second = parameters(run_dir, "sft", 2)["trainable"]
    for path, found in _leaves(begun[0]).items():
        np.testing.assert_array_equal(found, _leaves(second)[path])
    report = (run_dir / "report.html").read_text()
    assert "SFT: step 2 goes on, the best of 4 checkpoints on validation (90.0" in report
    again = evaluate.evaluate({"run": str(run_dir)}, [])
    assert [(stage["name"], stage["step"]) for stage in again["stages"]] == [("sft", 2), ("rl", 2)]
    assert again["stages"][0]["sets"] == {name: scores for name, scores in summary["stages"][0]["sets"].items()}
    # Of a finished run nothing is done again; a longer stage selects again.
    assert train(run_dir, **settings).returncode == 0
    solved = iter([0.95])
    longer = train(run_dir, **{**settings, "rl.steps": 3})
    assert longer.returncode == 0 and "rl: step 3 goes on, the best of 3 checkpoints" in longer.stderr, longer.stderr
    assert open_source(run_dir).identity() == {"stage": "rl", "step": 3}
    assert json.loads((run_dir / "evaluations/rl.step2.json").read_text())["selected"]["step"] == 2


PIPELINE = """[
  {name: grids, kind: sft},
  {name: sums, kind: sft, task: {name: countdown, train_rows: 32}, sampler: {completion_length: 24, block_length: 24}},
  {name: drawn, kind: generate, from: grids, accept: {}, keep_per_prompt: 0, prompts: 8, prompts_per_step: 8},
  {name: again, kind: sft, from: start, data: [task, drawn]},
  {name: samples, kind: evaluate, samples: 3, rows: 5, steps: [2, 1], temperatures: [0.5]},
  {name: out, kind: export, from: sums, weights_dtype: bfloat16},
  {name: rl_sums, kind: rl, from: sums, task: {name: countdown, train_rows: 32},
   sampler: {completion_length: 24, block_length: 24}}]"""


def test_a_pipeline_of_stages_with_rows_and_weights_of_their_own_stops_and_continues(tmp_path, monkeypatch):
    """Each stage starts from the weights that it names; all are evaluated on the rows of the run; a stop between two changes nothing."""
    begun = {}
    for kind, real in command.TRAIN.items():
        monkeypatch.setitem(
            command.TRAIN, kind, lambda seen, start, log, real=real: real(seen, begun.setdefault(log.stage, start), log)
        )
    settings = {
        "stages": PIPELINE, "tokenizer": "bytes", "rl.kl": "none", "sft.steps": 3, "rl.steps": 2, "rl.num_iterations": 1,
        "rl.reward_weights": "{numbers: 1}",
    }  # fmt: skip
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    done = train(whole, **settings)
    assert done.returncode == 0, done.stderr
    first = _leaves(parameters(whole, "grids", 3)["trainable"])
    assert _leaves(begun["sums"]).keys() == first.keys()
    for stage, source in (("sums", "grids"), ("rl_sums", "sums")):
        expected = _leaves(parameters(whole, source, 3)["trainable"])
        for path, found in _leaves(begun[stage]).items():
            np.testing.assert_array_equal(found, expected[path], err_msg=f"{stage} {path}")
    for path, found in _leaves(begun["again"]).items():
        np.testing.assert_array_equal(found, _leaves(begun["grids"])[path])
    summary = json.loads((whole / "summary.json").read_text())
    assert [stage["name"] for stage in summary["stages"]] == ["grids", "sums", "again", "rl_sums"]
    assert all(stage["n"] == 16 and "cell_accuracy" in stage for stage in summary["stages"])  # Sudoku's grades
    assert {"task.train", "sums.task.train", "rl_sums.task.train"} <= json.loads(
        (whole / "data.json").read_text()
    ).keys()

    def stop(seen, start, log):
        raise KeyboardInterrupt

    real = command.TRAIN["rl"]
    monkeypatch.setitem(command.TRAIN, "rl", stop)
    assert train(stopped, **settings).returncode == 130
    monkeypatch.setitem(command.TRAIN, "rl", real)
    assert train(stopped, **settings).returncode == 0
    assert learnt(whole) == learnt(stopped)
    for name in ("generated/drawn.jsonl", "evaluations/samples.sampled.json", "evaluations/samples.sampled.jsonl"):
        assert (whole / name).read_bytes() == (stopped / name).read_bytes()
    sampled = summary["sampled"]["samples"]
    assert (sampled["weights"], sampled["rows"], sampled["samples"]) == ("again", 5, 3)
    assert set(sampled["pass"]) == {"1", "2", "3"} and set(sampled["steps"]) == {"2", "1"}
    assert set(sampled["temperatures"]) == {"1", "0.5"}
    assert (
        sampled["temperatures"]["1"]["avg"] == sampled["avg"]
        and sampled["temperatures"]["1"]["pass"] == sampled["pass"]
    )
    assert 0 <= sampled["temperatures"]["0.5"]["local_ar"] <= sampled["temperatures"]["0.5"]["global_ar"] <= 1
    assert "samples, weights of again: 5 rows of held_out x 3 samples" in done.stdout
    exported = load_pretrained(whole / "exports/out")
    sums = _leaves(parameters(whole, "sums", 3)["trainable"]["params"])
    for path, found in _leaves(exported.variables["params"]).items():
        np.testing.assert_array_equal(found, sums[path].astype(jnp.bfloat16))
    one, other = (json.loads((run / "summary.json").read_text())["stages"] for run in (whole, stopped))
    assert one == other
    changed = train(stopped, **{**settings, "stages": PIPELINE.replace("from: grids", "from: sums")})
    assert changed.returncode == 2 and "--from drawn does drawn, again, samples, out, rl_sums again" in changed.stderr
    again = {**settings, "stages": PIPELINE.replace("prompts: 8, prompts_per", "prompts: 4, prompts_per")}
    before = parameters(stopped, "sums", 3)
    for flag in (["--from", "drawn", "--only", "drawn"], ["--only", "again"], []):
        done = call(command.main, [*flags(stopped, **again), *flag], stopped.parent)
        assert done.returncode == 0, done.stderr
        if flag:
            assert len(json.loads((stopped / "summary.json").read_text())["stages"]) == (2 if "drawn" in flag else 3)
    assert len((stopped / "generated/drawn.jsonl").read_text().splitlines()) < len(
        (stopped / "redone/1/generated/drawn.jsonl").read_text().splitlines()
    )
    for path, found in _leaves(parameters(stopped, "sums", 3)).items():
        np.testing.assert_array_equal(found, _leaves(before)[path])
    names = [row["stage"] for row in read_metrics(stopped / "metrics.jsonl")]
    assert list(dict.fromkeys(names)) == ["grids", "sums", "again", "rl_sums"] and len(names) == 3 + 3 + 3 + 2
    assert call(command.main, [*flags(stopped, **again), "--from", "sum"], stopped.parent).returncode == 2


@pytest.mark.parametrize("control", ["zero_advantages", "shuffled_rewards"])
def test_negative_controls(finished, tmp_path, control):
    run_dir = tmp_path / control
    settings = {"stages": "[rl]", "init_from": finished, "rl.negative_control": control, "rl.kl": "none"}
    done = train(run_dir, **settings)
    assert done.returncode == 0, done.stderr
    before, after = (_leaves(parameters(d, s, 6)["trainable"]) for d, s in ((finished, "rl"), (run_dir, "rl")))
    same = [np.array_equal(before[path], after[path]) for path in before]
    assert all(same) if control == "zero_advantages" else not any(same)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rl.stepz": 5}, "did you mean 'rl.steps'"),
        ({"rl.num_generations": 1}, "rl.num_generations = 1"),
        ({"sampler.block_length": 7}, "does not divide sampler.completion_length"),
        ({"sampler.completion_length": 10, "sampler.block_length": 10}, "a target of the training rows has 20 tokens"),
        ({"task.train": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"task.eval_sets": "{mine: broken.jsonl}"}, "broken.jsonl:2"),
        ({"rl.reward_weights": "{sloved: 1}"}, "choices: "),
        ({"mesh.data": 3}, "does not cover 8 devices"),
        ({"init_from": "no/such/run"}, "no such directory"),
    ],
)
def test_mistakes_are_told_before_anything_starts(tmp_path, settings, message):
    (tmp_path / "broken.jsonl").write_text(
        '{"Puzzle": "0321003004002100", "Solution": "4321123434122143"}\n{"Puzzle": \n'
    )
    done = train(tmp_path / "run", **settings)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_mistake_that_is_found_late_does_not_block_the_directory(tmp_path):
    wrong = train(tmp_path / "run", **{"lora.rank": 2, "lora.targets": "[lm_head]"})
    assert wrong.returncode == 2 and "lm_head" in wrong.stderr and "choices" in wrong.stderr
    assert train(tmp_path / "run", stages="[sft]").returncode == 0


def test_another_configuration_in_the_same_directory_is_refused(finished):
    done = train(finished, **{"rl.num_generations": 8})
    assert done.returncode == 2 and "rl.num_generations: 4 -> 8" in done.stderr


def test_run_that_diverges_stops_and_keeps_its_last_good_checkpoint(tmp_path):
    run_dir = tmp_path / "nan"
    done = train(
        run_dir,
        **{
            "sft.optimizer.learning_rate": 1e30,
            "sft.optimizer.clip_norm": 0,
            "sft.optimizer.warmup_steps": 2,
            "sft.steps": 20,
            "max_bad_updates": 3,
        },
    )
    assert done.returncode == 1 and "NaN or infinite" in done.stderr and "sft step" in done.stderr
    assert sorted(p.name for p in (run_dir / "checkpoints" / "sft").iterdir())[0] == "2"
    assert "were not finite and were skipped" in (run_dir / "report.html").read_text()


def test_a_collapsed_policy_stops_the_run_and_says_what_was_seen(finished, tmp_path):
    """A limit that every text breaks."""
    settings = {"rl.collapse.repeated_tokens": 1e-9, "rl.collapse.patience": 2, "checkpoint_every": 1}
    done = train(tmp_path / "run", stages="[rl]", init_from=finished, **settings)
    assert done.returncode == 1 and "rl step 2: the policy has collapsed" in done.stderr, done.stderr
    assert "repeated tokens" in done.stderr and "Traceback" not in done.stderr
    assert list((tmp_path / "run" / "checkpoints" / "rl").iterdir()) == []
    assert [path.name for path in (tmp_path / "run" / "collapsed" / "rl").iterdir()] == ["1"]
    assert "checked: ratio is one" in done.stderr


PAIRS = {
    "preference.steps": 4, "preference.prompts_per_step": 8, "preference.num_generations": 4,
    "preference.reward_weights": "{clues: 1, cells: 1}",
}  # fmt: skip
VARIANTS = {
    "preferences": {"stages": "[{name: dpo, kind: preference}]", **PAIRS},
    "preferences of the policy's own": {"stages": "[preference]", "preference.writer": "policy", **PAIRS},
    "process rewards, moving reference, a subset of positions": {
        "stages": "[rl]", "rl.steps": 4, "rl.supervision": "{name: commit_steps, parts: 2}", "rl.advantage": "zscore",
        "rl.reference": "{name: moving, every: 2, mix: 0.6}", "rl.estimator": "{name: autoregressive, subset: 0.25}",
    },
    "penalty in the reward": {
        "stages": "[{name: ppo, kind: rl}]", "rl.kl": "reward", "rl.estimator": "{name: trajectory, shrink: 1}",
        "rl.prompt_mask": 0, "rl.num_iterations": 1,
    },
}  # fmt: skip


def stopping_at(record, step: int):
    """StageLog.log_metrics as if SIGTERM came in a step."""

    def recorded(self, now, values, watch):
        record(self, now, values, watch)
        if now == step:
            self._stop.signum = signal.SIGTERM

    return recorded


@pytest.mark.parametrize("name", VARIANTS)
def test_every_way_of_the_loop_learns_and_resumes_exactly(finished, tmp_path, monkeypatch, name):
    settings = {"init_from": finished, **VARIANTS[name]}
    stage = parse(flags(tmp_path, **settings)).stage_names[0]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = train(whole, **settings)
    assert done.returncode == 0, done.stderr
    assert ("checked: ratio is one" in done.stderr) == (stage in ("rl", "ppo"))
    with monkeypatch.context() as patch:
        patch.setattr(StageLog, "log_metrics", stopping_at(StageLog.log_metrics, step=1))
        stopped = train(parts, **settings)
    assert stopped.returncode == 143 and len(learnt(parts)) == 1, stopped.stderr
    assert train(parts, **settings).returncode == 0
    assert learnt(whole) == learnt(parts)
    a, b = (_leaves(parameters(run, stage, 4)["trainable"]) for run in (whole, parts))
    start_from = _leaves(parameters(finished, "rl", 6)["trainable"])
    for path in a:
        np.testing.assert_array_equal(a[path], b[path])
    assert any(not np.array_equal(a[path], start_from[path]) for path in a)


def test_help_is_readable(tmp_path):
    done = call(command.main, ["--help"], tmp_path)
    assert done.returncode == 0 and "--rl.prompt_mask" in done.stdout and "[0.15]" in done.stdout
