"""Protects: several tasks in one run keep their weights, their prompts and their own rewards."""

import json
import math
from collections import Counter

import pytest

from d1jax.config import Config, SamplerConfig, Stage, TaskConfig
from d1jax.rollouts.rewards import reward_rows
from d1jax.tasks import make
from d1jax.training.context import build, of_stages

SUDOKU = {"train": "generated", "test": "generated", "weight": 3}


def mixture(tmp_path):
    rows = [{"prompt": f"{n}+1?", "answer": str(n + 1)} for n in range(20)]
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "sudoku": SUDOKU,
        "sums": {"name": "jsonl", "train": str(path), "test": str(path), "judge": "exact", "style": "bare"},
    }


def test_rows_are_drawn_by_the_weights(tmp_path):
    task = make("mixture", tasks=mixture(tmp_path))
    assert Counter(row["task"] for row in task.generate("train", 40, 0)) == {"sudoku": 30, "sums": 10}
    assert task.generate("train", 40, 0) == task.generate("train", 40, 0) != task.generate("train", 40, 1)


def test_each_row_has_the_rewards_of_its_task(tmp_path):
    task = make("mixture", tasks=mixture(tmp_path))
    rows = task.generate("train", 40, 0)
    texts = [task.target(row) or "4" for row in rows]
    parts, failures, *_ = reward_rows(task, rows, texts, {"solved": 1.0})
    assert not failures and set(parts) >= {"solved", "sudoku/solved", "sums/solved", "sudoku/cells"}
    for place, row in enumerate(rows):
        assert math.isnan(parts["sums/solved"][place]) == (row["task"] == "sudoku")
        assert parts["solved"][place] == parts[f"{row['task']}/solved"][place]
    grades = task.grade_many(rows, texts)
    assert all(
        math.isnan(one["sums/solved"]) == (row["task"] == "sudoku") for one, row in zip(grades, rows, strict=True)
    )


def test_a_run_of_several_tasks_is_built(tmp_path):
    config = Config(
        tokenizer="bytes",
        sampler=SamplerConfig(completion_length=40, block_length=40),
        task=TaskConfig(
            name="mixture", style="instruct", train_rows=16, eval_rows=8, options={"tasks": mixture(tmp_path)}
        ),
    )
    context = build(config, lambda line: None)
    assert {row["task"] for row in context.train.rows} == {"sudoku", "sums"} and len(context.eval_sets["held_out"]) > 0


def test_a_stage_with_fewer_tasks_under_other_labels_learns_no_problem_that_is_evaluated(tmp_path):
    parts = mixture(tmp_path)
    task = TaskConfig(
        name="mixture",
        style="instruct",
        train_rows=40,
        eval_sets={"test": "generated"},
        eval_rows=24,
        options={"tasks": parts},
    )
    own = {"name": "mixture", "options": {"tasks": {"adding": parts["sums"]}}, "train_rows": 20}
    file = tmp_path / "own.jsonl"
    asked = [json.loads(line)["prompt"] for line in (tmp_path / "sums.jsonl").read_text().splitlines()]
    file.write_text("".join(json.dumps({"prompt": f" {prompt.upper()}", "answer": "1"}) + "\n" for prompt in asked))
    stages = (
        "sft",
        Stage("more", "rl", shared={"task": own}),
        Stage("other", "rl", shared={"task": {"name": "jsonl", "train": str(file), "train_rows": 0}}),
    )
    sampler = SamplerConfig(completion_length=128, block_length=128, steps=8)
    context = build(Config(task=task, tokenizer="bytes", sampler=sampler, stages=stages), log=lambda line: None)
    evaluated = {row["row"]["prompt"] for row in context.eval_sets["test"].rows if row["task"] == "sums"}
    contexts = of_stages(context, lambda line: None)
    learnt = {row["row"]["prompt"] for row in contexts["more"].train.rows}
    assert len(evaluated) == 6 and learnt and not learnt & evaluated
    alone = {row["prompt"].strip().casefold() for row in contexts["other"].train.rows}
    assert alone and not alone & {prompt.casefold() for prompt in evaluated}, "a task of another name poses them, too"


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({}, "mixture: tasks is empty"),
        ({"a": {"name": "sudoku"}}, "tasks.a = .*: write {name: TASK"),
        ({"a": {**SUDOKU, "name": "sudoko"}}, "did you mean 'sudoku'"),
        ({"sudoku": {**SUDOKU, "weight": 0}}, "tasks.sudoku.weight = 0 must be a number above 0"),
        ({"sudoku": {**SUDOKU, "blankss": 3}}, "has no option 'blankss'"),
    ],
)
def test_a_mixture_that_cannot_be_is_told(tasks, message):
    with pytest.raises(ValueError, match=message):
        make("mixture", tasks=tasks)


def test_a_batch_without_a_row_of_a_task_still_has_its_rewards(tmp_path):
    task = make("mixture", tasks=mixture(tmp_path))
    sums = [row for row in task.generate("train", 40, 0) if row["task"] == "sums"][:3]
    parts, failures, rewarded, *_ = reward_rows(task, sums, ["4"] * 3, {"solved": 1.0, "cells": 0.5})
    assert not failures and rewarded.all() and all(math.isnan(value) for value in parts["cells"])
