"""Stored pairs: what a file and a generate stage give, in which order they are met, and a stage that learns from them."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import d1jax.train as command
from d1jax.config import UserError
from d1jax.config.parse import parse
from d1jax.generation import rows as kept_rows
from d1jax.preference.pairs import Stored
from d1jax.telemetry.metrics import read_metrics
from d1jax.training.context import build, of_stages
from d1jax.training.pair_order import PairOrder
from tests.conftest import SMALL_RUN

PAIRS = [{"prompt": f"{n}+1=", "chosen": str(n + 1), "rejected": "no " * (n % 3 + 1)} for n in range(24)]
LABELS = [{"prompt": f"{n}+1=", "completion": str(n), "label": n % 3 == 0} for n in range(24)]
STAGE = {
    "stages": "[sft, {name: prefer, kind: preference}]", "task.name": "jsonl", "task.train_rows": 0, "tokenizer": "bytes",
    "sampler.completion_length": 16, "sampler.block_length": 16, "sft.steps": 1, "sft.batch_size": 8, "preference.steps": 3,
    "preference.prompts_per_step": 8, "preference.data": "task", "preference.estimator": "{name: elbo, samples: 2}",
}  # fmt: skip


def settings(tmp_path, records, **changes):
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    train.write_text("".join(json.dumps(record) + "\n" for record in records))
    test.write_text(json.dumps({"prompt": "99+1=", "answer": "100"}) + "\n")
    made = {**SMALL_RUN, **STAGE, "task.train": train, "task.eval_sets": f"{{test: {test}}}", "task.eval_rows": 0}
    return [f"--{key}={value}" for key, value in {**made, "run_dir": tmp_path / "run", **changes}.items()]


def stored(tmp_path, records, **changes):
    context = build(parse(settings(tmp_path, records, **changes)), lambda line: None)
    return of_stages(context, lambda line: None)["prefer"]


def texts(context, problems):
    return [context.tokenizer.decode(row.tolist()) for row in problems.target_RC]


def test_pairs_of_a_file_keep_their_prompts_and_meet_in_one_order(tmp_path):
    context = stored(tmp_path, PAIRS)
    assert (
        context.judged_sources[0].matched
        and len(context.judged_sources[0].better) == len(context.judged_sources[0].worse) == 24
    )
    make = Stored(PairOrder(context.judged_sources[0], 8, 0))
    seen = []
    for step in range(3):
        made = make(step, {}, jax.random.key(0), None)
        canvas = made.batch.canvas
        assert canvas.completion_BC.shape == (16, 16) and made.kept_Q.tolist() == [True] * 8 and made.values == {}
        np.testing.assert_array_equal(canvas.prompt_BP[:8], canvas.prompt_BP[8:])
        np.testing.assert_array_equal(made.batch.mask_ids_B, [*range(8), *range(8)])
        said = [context.tokenizer.decode(row.tolist()) for row in canvas.completion_BC]
        prompts = [
            context.tokenizer.decode(row[:length].tolist())
            for row, length in zip(canvas.prompt_BP[:8], canvas.prompt_length_B[:8], strict=True)
        ]
        for prompt, chosen, rejected in zip(prompts, said[:8], said[8:], strict=True):
            record = next(record for record in PAIRS if record["prompt"] == prompt)
            assert (chosen, rejected) == (record["chosen"], record["rejected"])
        seen += prompts
    assert sorted(seen) == sorted(record["prompt"] for record in PAIRS), "an epoch meets each pair once"


def test_single_texts_come_in_equal_numbers(tmp_path):
    context = stored(tmp_path, LABELS)
    (pairs,) = context.judged_sources
    assert not pairs.matched and (len(pairs.better), len(pairs.worse)) == (8, 16)
    made = Stored(PairOrder(context.judged_sources[0], 8, 0))(0, {}, jax.random.key(0), None)
    said = [context.tokenizer.decode(row.tolist()) for row in made.batch.canvas.completion_BC]
    assert all(int(text) % 3 == 0 for text in said[:8]) and all(int(text) % 3 for text in said[8:])


@pytest.mark.parametrize(
    ("records", "changes", "message"),
    [
        ([{"prompt": "a", "completion": "b"}], {}, "the rows of task 'jsonl' hold no preferences"),
        ([{"prompt": "a", "chosen": "b", "rejected": "b"}], {}, "row 0 .*has equal texts as chosen and rejected"),
        ([{"prompt": "a", "chosen": "b" * 99, "rejected": "b"}], {}, "row 0 .*a text has 99 tokens, more than the 16"),
        (
            [{"prompt": "a", "completion": "b", "label": True}],
            {},
            "1 better and 0 worse texts are left; both are needed",
        ),
        (
            [{"prompt": "a", "chosen": "b" * 99, "rejected": "b"}],
            {"task.too_long": "drop"},
            "0 better and 0 worse|every training row",
        ),
    ],
)
def test_rows_that_are_no_preferences_are_told_before_anything_starts(tmp_path, records, changes, message):
    changes = {"stages": "[{name: prefer, kind: preference}]", "init_from": tmp_path / "x", **changes}
    config = dataclasses.replace(parse(settings(tmp_path, records, **changes)), init_from="")
    with pytest.raises(UserError, match=message):
        of_stages(build(config, lambda line: None), lambda line: None)


def test_a_pair_that_is_too_long_is_left_out_and_counted(tmp_path):
    lines = []
    records = [*PAIRS, {"prompt": "long", "chosen": "b" * 99, "rejected": "b"}]
    changes = {"stages": "[{name: prefer, kind: preference}]", "init_from": "x", "task.too_long": "drop"}
    config = dataclasses.replace(parse(settings(tmp_path, records, **changes)), init_from="")
    context = of_stages(build(config, lines.append), lines.append)["prefer"]
    assert len(context.judged_sources[0].better) == 24
    assert "data: left out 1 of 25 rows of prefer.data that are too long (task.too_long: drop)" in lines


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_a_stage_learns_from_stored_pairs(tmp_path, loss):
    changes = {
        "preference.loss": f"{{name: {loss}, beta: 1}}",
        "preference.optimizer.learning_rate": 0.01,
        "preference.steps": 12,
    }
    assert command.main(settings(tmp_path, PAIRS, **changes)) == 0
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if row["stage"] == "prefer"]
    assert len(rows) == 12 and rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert rows[-1]["rewards/margins"] > 0.1 and rows[-1]["loss"] < rows[0]["loss"] - 0.02
    assert "pairs/tied" not in rows[0]


def test_what_a_generate_stage_kept_makes_pairs_of_best_and_worst(tmp_path):
    context = stored(tmp_path, PAIRS)
    path = tmp_path / "keep.jsonl"
    kept = [
        (0, "a", 1.0),
        (0, "bb", 3.0),
        (0, "c", 2.0),
        (1, "d", 1.0),
        (2, "e", 0.5),
        (2, "f", 0.5),
        (3, "g", 0.0),
        (3, "h", -1.0),
    ]
    made = [
        {
            "row": place, "prompt": context.task.prompt(context.train.rows[place]), "completion": text,
            "tokens": context.tokenizer.answer(text), "reward": reward, "rewards": {},
        }
        for place, text, reward in kept
    ]  # fmt: skip
    kept_rows.write(path, made, {})
    pairs = kept_rows.as_pairs(context, path, 16, "prefer.data")
    assert texts(context, pairs.better) == ["bb", "g"] and texts(context, pairs.worse) == ["a", "h"]
    np.testing.assert_array_equal(pairs.better.prompt_RP, context.train.prompt_RP[[0, 3]])
    kept_rows.write(path, made[3:6], {})
    with pytest.raises(UserError, match="prefer.data: no problem of .*keep.jsonl has completions of different rewards"):
        kept_rows.as_pairs(context, path, 16, "prefer.data")
    kept_rows.write(path, made, {})
    with pytest.raises(UserError, match="a completion has 2 tokens, more than the 1 of sampler.completion_length"):
        kept_rows.as_pairs(context, path, 1, "prefer.data")


def test_more_pairs_of_a_problem_take_the_next_best_and_the_next_worst(tmp_path):
    context = stored(tmp_path, PAIRS)
    rewards = {0: [1, 3, 0, 2, 1], 1: [1, 1, 0, 0], 2: [5]}
    made = [
        {
            "row": place, "prompt": context.task.prompt(context.train.rows[place]), "completion": f"{place}{number}",
            "tokens": context.tokenizer.answer(f"{place}{number}"), "reward": float(reward), "rewards": {},
        }
        for place, found in rewards.items()
        for number, reward in enumerate(found)
    ]  # fmt: skip
    kept_rows.write(tmp_path / "keep.jsonl", made, {})
    for most, better, worse in (
        (1, ["01", "10"], ["02", "12"]),
        (2, ["01", "03", "10", "11"], ["02", "00", "12", "13"]),
        (0, ["01", "03", "10", "11"], ["02", "00", "12", "13"]),
    ):
        pairs = kept_rows.as_pairs(context, tmp_path / "keep.jsonl", 16, "judge.data", most)
        assert texts(context, pairs.better) == better and texts(context, pairs.worse) == worse
