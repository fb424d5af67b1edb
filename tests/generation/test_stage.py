"""A generate stage keeps what is right and passes its filters, as rows that later stages learn from."""

import dataclasses
import hashlib
import json

import jax
import numpy as np
import pytest

from d1jax.config import Config, GenerateConfig, ModelConfig, SamplerConfig, TaskConfig, UserError
from d1jax.config.errors import Stopped
from d1jax.data.examples import joined
from d1jax.generation import rows, stage
from d1jax.models.transformer import initialize
from d1jax.tasks.task import DataError
from d1jax.training.context import build
from d1jax.training.stopping import StopRequest

KEEP = GenerateConfig(
    prompts=12,
    prompts_per_step=4,
    num_generations=4,
    accept={"even": 1.0},
    reward_weights={"zeros": 1.0},
    keep_per_prompt=2,
)


@dataclasses.dataclass(frozen=True)
class Even:
    """The task of a run, with a reward that some random texts earn: an even number of zeros."""

    inner: object

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def rewards(self, row, text):
        zeros = text.count("0")
        return {"even": float(zeros % 2 == 0), "zeros": float(zeros), "never": 0.0, "none": None}


@pytest.fixture(scope="module")
def context():
    model = ModelConfig(width=16, layers=1, heads=2, kv_heads=2, mlp_width=16, rope_theta=100)
    sampler = SamplerConfig(completion_length=20, block_length=20, steps=2)
    task = TaskConfig(train_rows=12, eval_rows=4)
    built = build(Config(model=model, sampler=sampler, task=task, generate=KEEP), lambda line: None)
    return dataclasses.replace(built, task=Even(built.task))


@pytest.fixture(scope="module")
def variables(context):
    return initialize(context.model, jax.random.key(0), context.mesh)


def kept(context, variables, path, stop=None, **changes):
    section = dataclasses.replace(context.config.generate, **changes)
    chosen = dataclasses.replace(context, config=dataclasses.replace(context.config, generate=section))
    with jax.set_mesh(context.mesh):
        stage.run(chosen, variables, "keep", path, stop or StopRequest())
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_only_right_and_different_completions_are_kept(context, variables, tmp_path):
    found = kept(context, variables, tmp_path / "keep.jsonl")
    assert found and all(row["completion"].count("0") % 2 == 0 for row in found)
    texts = {}
    for row in found:
        texts.setdefault(row["row"], []).append(row["completion"])
        assert row["prompt"] == context.task.prompt(context.train.rows[row["row"]])
    assert all(len(found) == len(set(found)) <= 2 for found in texts.values())


def test_the_same_seed_and_stage_keep_the_same_rows_and_a_finished_one_is_not_done_again(context, variables, tmp_path):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    assert kept(context, variables, first) == kept(context, variables, second)
    stop = StopRequest()
    stop.signum = 15  # would end a stage that samples
    assert kept(context, variables, first, stop) == kept(context, variables, second, stop)
    first.with_suffix(".json").unlink()  # killed between the rows and their record
    assert kept(context, variables, first) == kept(context, variables, second, stop)


def test_rows_that_were_changed_are_refused(context, variables, tmp_path):
    path = tmp_path / "keep.jsonl"
    found = kept(context, variables, path)
    path.write_text("".join(json.dumps(row) + "\n" for row in found[1:]))
    for use in (lambda: kept(context, variables, path), lambda: rows.as_problems(context, path, 20)):
        with pytest.raises(
            UserError, match=rf"keep.jsonl: not the {len(found)} rows that this run has kept; put them back"
        ):
            use()


def test_no_more_problems_are_sampled_than_were_asked_for(context, variables, tmp_path, capsys):
    whole = kept(context, variables, tmp_path / "all.jsonl", prompts=4, prompts_per_step=4)
    one = kept(context, variables, tmp_path / "one.jsonl", prompts=1, prompts_per_step=4)
    assert (
        one == [row for row in whole if row["row"] == whole[0]["row"]]
        and " of 4 completions" in capsys.readouterr().err
    )


def test_no_problem_has_more_than_its_share_where_the_rows_come_round_again(context, variables, tmp_path):
    found = kept(context, variables, tmp_path / "keep.jsonl", prompts=24, keep_per_prompt=1)
    places = [row["row"] for row in found]
    assert len(places) == len(set(places))


def test_where_nothing_is_right_nothing_is_written(context, variables, tmp_path):
    with pytest.raises(DataError, match="none of 48 completions is kept; dropped: 48 by never below 1. Sample more"):
        kept(context, variables, tmp_path / "keep.jsonl", accept={"never": 1.0})
    assert not (tmp_path / "keep.jsonl").exists()


def test_a_signal_leaves_no_half_of_a_file(context, variables, tmp_path):
    stop = StopRequest()
    stop.signum = 15
    with pytest.raises(Stopped, match="keep, after 0 of 12 problems"):
        kept(context, variables, tmp_path / "keep.jsonl", stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("columns", [20, 24])
def test_kept_rows_are_what_sft_learns_from(context, variables, tmp_path, columns):
    path = tmp_path / "keep.jsonl"
    found = kept(context, variables, path)
    problems = rows.as_problems(context, path, columns)
    assert (
        len(problems) == len(found)
        and problems.target_RC.shape == (len(found), columns)
        and problems.has_target_R.all()
    )
    end = context.tokenizer.special.end
    for row, target_C, prompt_P in zip(found, problems.target_RC, problems.prompt_RP, strict=True):
        assert (
            target_C[: len(row["tokens"])].tolist() == row["tokens"] and (target_C[len(row["tokens"]) :] == end).all()
        )
        np.testing.assert_array_equal(prompt_P, context.train.prompt_RP[row["row"]])


@pytest.mark.parametrize(
    "damage",
    [
        {"tokens": None},
        {"tokens": [10**6]},
        {"tokens": ["a"]},
        {"row": 99},
        {"row": -1},
        {"prompt": "?"},
        {"reward": None},
    ],
)
def test_a_damaged_row_is_named(context, variables, tmp_path, damage):
    path = tmp_path / "keep.jsonl"
    found = kept(context, variables, path)
    path.write_text("".join(json.dumps(row) + "\n" for row in [found[0], {**found[0], **damage}]))
    signed(path)
    with pytest.raises(UserError, match=r"keep.jsonl:2: no row that this run has kept"):
        rows.as_problems(context, path, 20)


def test_a_completion_that_is_too_long_for_its_columns_is_told(context, variables, tmp_path):
    path = tmp_path / "keep.jsonl"
    kept(context, variables, path)
    with pytest.raises(UserError, match="more than the 4 of sft.completion_length"):
        rows.as_problems(context, path, 4)


def signed(path):
    """As if the changed rows were what the stage had written."""
    record = json.loads(path.with_suffix(".json").read_text())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_suffix(".json").write_text(json.dumps({**record, "sha256": digest}))


def test_every_drop_has_its_reason_and_the_counts_add_up(context, variables, tmp_path, capsys):
    path = tmp_path / "keep.jsonl"
    found = kept(context, variables, path, accept={"even": 1.0}, filters=("tokens:19", "finished"), keep_per_prompt=1)
    record = json.loads(path.with_suffix(".json").read_text())
    assert record["sampled"] == 48 == len(found) + sum(record["dropped"].values())
    assert {"even below 1", "tokens:19"} & record["dropped"].keys()
    told = capsys.readouterr().err
    assert f"kept {len(found)} of 48 completions" in told and "by even below 1" in told
    for row in found:
        assert row["reward"] == row["rewards"]["zeros"] == row["completion"].count("0")


def test_without_accept_everything_distinct_is_kept_with_its_reward(context, variables, tmp_path):
    found = kept(context, variables, tmp_path / "keep.jsonl", accept={}, keep_per_prompt=0)
    assert len({(row["row"], row["completion"]) for row in found}) == len(found) > 24
    assert {row["rewards"]["even"] for row in found} == {0.0, 1.0}


def test_a_reward_that_does_not_apply_is_not_earned(context, variables, tmp_path):
    with pytest.raises(DataError, match="48 by none below 0"):
        kept(context, variables, tmp_path / "keep.jsonl", accept={"none": 0.0})


def test_rows_of_several_sources_are_learnt_together(context, variables, tmp_path):
    path = tmp_path / "keep.jsonl"
    kept(context, variables, path)
    one = rows.as_problems(context, path, 24)
    both = joined([one, context.train], end=context.tokenizer.special.end)
    assert len(both) == len(one) + len(context.train) and both.target_RC.shape[1] == 24
    np.testing.assert_array_equal(both.target_RC[: len(one)], one.target_RC)
    np.testing.assert_array_equal(both.target_RC[len(one) :, :20], context.train.target_RC)
    assert (both.target_RC[len(one) :, 20:] == context.tokenizer.special.end).all()


def test_a_process_that_another_one_writes_for_does_not_look_for_the_file(monkeypatch, tmp_path):
    monkeypatch.setattr("d1jax.files._writes", False)
    rows.write(tmp_path / "keep.jsonl", [{"row": 0}], {})
    assert list(tmp_path.iterdir()) == []
