"""A process reward model learns which lines are right, and RL is rewarded line by line by it."""

import dataclasses
import json
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import d1jax.train as command
from d1jax.config import UserError
from d1jax.config.parse import parse
from d1jax.data.examples import Problems
from d1jax.data.steps import StoredSteps
from d1jax.data.tokenizers import ByteTokenizer
from d1jax.diffusion.reward_model import step_scores, text_score_of_steps
from d1jax.generation.rows import as_steps, write
from d1jax.reward_model.loss import quality_of_steps, stepwise
from d1jax.reward_model.steps import ordered, pairs_of_texts
from d1jax.rl import loop
from d1jax.telemetry.metrics import read_metrics
from d1jax.training.context import build
from d1jax.weights.checkpoints import ocp
from tests.conftest import SMALL_RUN
from tests.reward_model.test_loop import RL, settings

# A line with an "a" is right, one with a "b" is wrong, wherever it stands.
ROWS = [
    {"prompt": f"{n}?", "completions": ["aba"[n % 3], "xa" if n % 2 else "xb"], "labels": [n % 3 != 1, n % 2 == 1]}
    for n in range(60)
]
STEPWISE = {"reward_model.loss": "stepwise"}
ARITHMETIC = {
    "task.name": "arithmetic", "task.options": "{terms: [2], words: false}", "task.train_rows": 8, "task.eval_rows": 2,
    "sampler.completion_length": 64, "sampler.block_length": 64, "sft.steps": 2,
}  # fmt: skip


def test_losses_and_scores_equal_plain_loops():
    rng = np.random.default_rng(0)
    score, label = rng.normal(size=(3, 4)).astype(np.float32), rng.integers(0, 2, (3, 4)).astype(np.float32)
    chance = 1 / (1 + np.exp(-score.astype(np.float64)))
    plain = [
        [-math.log(chance[row, place] if label[row, place] else 1 - chance[row, place]) for place in range(4)]
        for row in range(3)
    ]
    np.testing.assert_allclose(stepwise(score, label), plain, rtol=1e-5)
    tokens, step = rng.normal(size=(2, 6)).astype(np.float32), np.array([[0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1]])
    found = step_scores(tokens, step, np.array([5, 3]), 3)
    expected = [[tokens[0, :2].mean(), tokens[0, 2:5].mean(), 0], [tokens[1, 0], tokens[1, 1:3].mean(), 0]]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_text_scores_as_the_chance_that_all_its_lines_are_right():
    rng = np.random.default_rng(1)
    tokens, length = rng.normal(size=(20, 9)).astype(np.float32), rng.integers(1, 10, 20)
    breaks = rng.integers(0, 2, (20, 9))
    step = np.array(
        [[row[: min(place, n - 1)].sum() for place in range(9)] for row, n in zip(breaks, length, strict=True)]
    )
    expected = [
        math.prod(1 / (1 + math.exp(-score[:n][of[:n] == line].mean())) for line in range(of[n - 1] + 1))
        for score, of, n in zip(tokens, step, length, strict=True)
    ]
    np.testing.assert_allclose(text_score_of_steps(tokens, step, length), expected, rtol=1e-5)


def test_pairs_of_texts_are_of_one_problem():
    prompts = ["a", "a", "b", "b", "b", "c", "c"]
    label = np.array([[1, 0], [1, 1], [0, 0], [1, 0], [np.nan, np.nan], [1, np.nan], [1, 1]])
    rows = [{"prompt": prompt} for prompt in prompts]
    prompt_RP = np.array([[ord(prompt)] for prompt in prompts])
    texts = Problems(rows, prompt_RP, np.ones(7, int), np.zeros((7, 2), int), np.ones(7, bool))
    found = pairs_of_texts(StoredSteps(texts, np.full(7, 2), np.zeros((7, 2), int), label))
    assert found == {"right and wrong": [(1, 0)], "best and worst": [(1, 0), (3, 2)]}
    worth = ordered(np.array([2.0, 1.0, 0.0, 3.0, 0.0, 0.0, 0.0]), found["best and worst"])
    assert (worth["pairs"], worth["accuracy"]) == (2, 0.5) and worth["ci95"][0] < 0.5 < worth["ci95"][1]


def test_what_a_model_is_worth_is_counted_over_steps():
    score, label = np.array([2.0, -1.0, 0.0, 3.0, -1.0]), np.array([1.0, 0.0, 1.0, 0.0, 1.0])
    worth = quality_of_steps(score, label)
    wins = [(r > w) + 0.5 * (r == w) for r in score[label == 1] for w in score[label == 0]]
    assert worth["ranked"] == pytest.approx(np.mean(wins)) and worth["accuracy"] == pytest.approx((1 + 1 + 0.5) / 5)
    assert worth["right"] == 0.6 and worth["margin"] == pytest.approx(1 / 3 - 1) and worth["steps"] == 5
    assert math.isnan(quality_of_steps(score, np.ones(5))["ranked"])


def test_a_stage_learns_which_lines_are_right_and_resumes_exactly(tmp_path, interrupted):
    changes = {
        **STEPWISE,
        "lora.rank": 2,
        "reward_model.steps": 40,
        "checkpoint_every": 20,
        "reward_model.optimizer.learning_rate": 0.03,
    }
    assert command.main(settings(tmp_path, "whole", ROWS, **changes)) == 0
    rows = [row for row in read_metrics(tmp_path / "whole/metrics.jsonl") if row["stage"] == "judge"]
    assert rows[0]["loss"] == pytest.approx(math.log(2), rel=1e-5), "a head of zeros scores everything 0"
    worth = json.loads((tmp_path / "whole/evaluations/judge.reward_model.json").read_text())
    assert worth["steps"] == 12 and worth["accuracy"] == 1.0 and worth["ranked"] == 1.0
    assert worth["texts"] == {}, "a prompt has one text"
    with interrupted("judge", 20):
        assert command.main(settings(tmp_path, "stopped", ROWS, **changes)) == 130
    assert command.main(settings(tmp_path, "stopped", ROWS, **changes)) == 0
    one, other = (ocp.load_checkpointables(tmp_path / run / "checkpoints/judge/40") for run in ("whole", "stopped"))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_held_out_lines_that_are_all_right_have_no_order(tmp_path, capsys):
    rows = [{"prompt": f"{n}", "completions": ["a", "b"], "labels": [True, True]} for n in range(20)]
    stages = "[sft, {name: judge, kind: reward_model}, {name: look, kind: evaluate, samples: 2}]"
    assert command.main(settings(tmp_path, "run", rows, **STEPWISE, **{"reward_model.steps": 1, "stages": stages})) == 0
    told = capsys.readouterr().err
    assert "there are no pairs of a right and a wrong one; calibration error" in told and "nan" not in told
    report = (tmp_path / "run/report.html").read_text()
    assert ">judge</th><td>4 lines</td>" in report and "Several samples of a row" in report, "the last stages are in it"


def test_micro_batches_change_nothing(tmp_path):
    for parts in (1, 4):
        changes = {
            **STEPWISE,
            "reward_model.steps": 2,
            "reward_model.grad_accumulation_steps": parts,
            "reward_model.batch_size": 32,
        }
        assert command.main(settings(tmp_path, f"run{parts}", ROWS, **changes)) == 0
    one, other = (
        [row for row in read_metrics(tmp_path / f"run{parts}/metrics.jsonl") if row["stage"] == "judge"]
        for parts in (1, 4)
    )
    for a, b in zip(one, other, strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "rewards/accuracies"):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6)


def test_rl_is_rewarded_by_the_lines_of_its_texts(tmp_path, monkeypatch):
    stages = "[sft, {name: judge, kind: reward_model}, {name: rl, kind: rl, from: sft}]"
    changes = {
        **STEPWISE,
        "stages": stages,
        "rl.supervision": "{name: model_steps, model: judge}",
        "rl.advantage": "zscore",
        **RL,
    }
    seen = []
    compute = loop.compute_advantages
    monkeypatch.setattr(loop, "compute_advantages", lambda *given: seen.append((given, compute(*given))) or seen[-1][1])
    assert command.main(settings(tmp_path, "run", ROWS, **changes, **{"rl.reward_weights": "{format: 1}"})) == 0
    (_, rollout, reward_QG, graded, *_), found = seen[0]
    newline = ByteTokenizer().encode("\n")[0]
    assert graded.token_score_BC.shape == rollout.tokens_BC.shape
    for group in range(4):
        rows, of_steps = range(group * 4, group * 4 + 4), []
        for row in rows:
            length, steps, line = int(rollout.length_B[row]), {}, 0
            for place in range(length):
                steps.setdefault(line, []).append((place, graded.token_score_BC[row, place]))
                line += rollout.tokens_BC[row, place] == newline and place < length - 1
            of_steps.append(steps)
        gains = [
            {
                line: 1 / (1 + math.exp(-np.mean([score for _, score in tokens])))
                + (reward_QG[group, place] if line == max(steps) else 0)
                for line, tokens in steps.items()
            }
            for place, steps in enumerate(of_steps)
        ]
        every = [gain for of_row in gains for gain in of_row.values()]
        mean, std = np.mean(every), np.std(every, ddof=1)
        for row, steps, of_row in zip(rows, of_steps, gains, strict=True):
            for line, tokens in steps.items():
                later = sum((gain - mean) / (std + 1e-4) for other, gain in of_row.items() if other >= line)
                np.testing.assert_allclose([found[row, place] for place, _ in tokens], later, rtol=1e-3, atol=1e-4)


def test_a_task_that_judges_lines_labels_what_was_kept(tmp_path):
    flags = {**SMALL_RUN, **ARITHMETIC, "stages": "[sft, {name: keep, kind: generate}]", "run_dir": tmp_path / "run"}
    context = build(parse([f"--{key}={value}" for key, value in flags.items()]), lambda line: None)
    row, records = context.train.rows[0], []
    right = context.task.target(row)
    for text in (right, right.replace(f"={row['answer']}", "=77"), "no reasoning"):
        tokens = [*context.tokenizer.answer(text), context.tokenizer.special.end]
        records.append(
            {"row": 0, "prompt": context.task.prompt(row), "completion": text, "tokens": tokens, "reward": 0.0}
        )
    write(tmp_path / "keep.jsonl", records, {})
    found = as_steps(context, tmp_path / "keep.jsonl", 64, "judge.data")
    assert len(found) == 3 and (found.label_RK[2][:1] == 0).all() and np.isnan(found.label_RK[2][1:]).all()
    first, last = (right.split("\n").index(tag) + 1 for tag in ("<reasoning>", "<answer>"))
    for labels, label, solved in zip(found.label_RK[:2], (1.0, 0.0), (1.0, 1.0), strict=True):
        assert labels[first] == label and labels[last] == solved and (np.delete(labels, [first, last]) == 1).all()
    silent = SimpleNamespace(name="silent", prompt=context.task.prompt, judge_lines=lambda row, text: [None])
    context = dataclasses.replace(context, task=silent)
    write(tmp_path / "untold.jsonl", records, {})
    with pytest.raises(UserError, match="of no line of .*untold.jsonl whether it is right; train longer"):
        as_steps(context, tmp_path / "untold.jsonl", 64, "judge.data")
    with pytest.raises(UserError, match="more than the 20 of sampler.completion_length"):
        as_steps(context, tmp_path / "keep.jsonl", 20, "judge.data")


def test_rows_without_labelled_steps_and_tasks_that_judge_no_lines_are_refused(tmp_path, capsys):
    assert command.main(settings(tmp_path, "run", **STEPWISE)) == 2
    assert "have no labelled steps; task jsonl reads TRL's" in capsys.readouterr().err
    stages = "[sft, {name: keep, kind: generate}, {name: judge, kind: reward_model, data: [keep], loss: stepwise}]"
    assert (
        command.main(
            [f"--{key}={value}" for key, value in {**SMALL_RUN, "stages": stages, "run_dir": tmp_path / "two"}.items()]
        )
        == 2
    )
    assert "task 'sudoku' judges no single lines" in capsys.readouterr().err
