"""Another model writes what a run learns from: of another size, and with another tokenizer."""

import json
import shutil

import jax
import numpy as np
import pytest

import d1jax.train as command
from d1jax.config.parse import parse
from d1jax.data.tokenizers import ByteTokenizer, CharacterTokenizer
from d1jax.generation.stage import UNWRITABLE, rewritten
from d1jax.generation.teacher import same_tokens, with_teacher
from d1jax.training.context import build, of_stages
from d1jax.weights.checkpoints import ocp
from tests.conftest import SMALL_RUN


def settings(run_dir, teacher, **changes):
    keep = f"{{name: keep, kind: generate, teacher: {teacher}, accept: {{}}, num_generations: 2, prompts: 4, prompts_per_step: 4}}"
    given = {
        **SMALL_RUN,
        "stages": f"[{keep}, {{name: student, kind: sft, data: [keep]}}]",
        "run_dir": run_dir,
        **changes,
    }
    return [f"--{key}={value}" for key, value in given.items()]


@pytest.mark.parametrize("tokenizer", ["bytes", "characters"])
def test_a_smaller_student_learns_what_a_teacher_has_written(small_run, tmp_path, tokenizer):
    student = {"model.width": 16, "model.heads": 1, "model.kv_heads": 1, "tokenizer": tokenizer}
    assert command.main(settings(tmp_path / "run", small_run, **student)) == 0
    kept = [json.loads(line) for line in (tmp_path / "run/generated/keep.jsonl").read_text().splitlines()]
    assert 4 <= len(kept) <= 8
    reads = ByteTokenizer() if tokenizer == "bytes" else CharacterTokenizer("01234\n")
    assert all(reads.decode(row["tokens"]) == row["completion"] for row in kept)
    record = json.loads((tmp_path / "run/generated/keep.json").read_text())
    assert record["teacher"] == {"path": str(small_run), "stage": "sft", "step": 2}
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert [stage["name"] for stage in summary["stages"]] == ["student"]


def test_tokenizers_are_compared_by_what_a_token_means():
    assert same_tokens(CharacterTokenizer("ab"), CharacterTokenizer("ab"))
    assert not same_tokens(CharacterTokenizer("ab"), CharacterTokenizer("ba"))
    assert not same_tokens(ByteTokenizer(), CharacterTokenizer("ab"))


def test_the_weights_of_the_step_that_is_named_write(small_run, tmp_path):
    named = small_run / "checkpoints/sft/1"
    context = build(parse(settings(tmp_path / "run", named)), lambda line: None)
    _, variables = with_teacher(of_stages(context)["keep"], "keep")
    step = ocp.load_checkpointables(named)["trainable"]
    for a, b in zip(jax.tree.leaves(variables), jax.tree.leaves(step), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_finished_stage_needs_its_teacher_no_more(small_run, tmp_path, capsys):
    teacher = shutil.copytree(small_run, tmp_path / "teacher")
    given = {"sft.optimizer.schedule": "constant"}
    assert command.main(settings(tmp_path / "run", teacher, **given)) == 0
    shutil.rmtree(teacher)
    assert command.main(settings(tmp_path / "run", teacher, **given, **{"sft.steps": 3})) == 0
    assert command.main([*settings(tmp_path / "run", teacher, **given, **{"sft.steps": 3}), "--from", "keep"]) == 2
    assert "no such directory" in capsys.readouterr().err
    assert (tmp_path / "run/generated/keep.jsonl").exists(), "what cannot be made again stays"


def test_a_text_ends_in_other_tokens_where_the_teacher_has_ended_it():
    class Chatting(ByteTokenizer):
        def answer(self, text):
            return [*self.encode(text), self.special.end]

    for tokenizer in (ByteTokenizer(), Chatting()):
        end = tokenizer.special.end
        assert rewritten(tokenizer, "ab", has_end_token=True) == ([97, 98, end], None)
        assert rewritten(tokenizer, "ab", has_end_token=False) == ([97, 98], None), "one that was cut off has no end"
    assert rewritten(CharacterTokenizer("ab"), "abc", has_end_token=True) == ([], UNWRITABLE)


def test_a_teacher_that_cannot_write_is_refused_before_anything_is_done(small_run, tmp_path, capsys):
    run, unsaved = tmp_path / "run", tmp_path / "unsaved"
    shutil.copytree(small_run, unsaved, ignore=shutil.ignore_patterns("checkpoints"))
    judged = (
        f"[sft, {{name: judge, kind: reward_model, data: [task]}}, {{name: keep, kind: generate, teacher: {small_run},"
        " accept: {}, reward_weights: {'model:judge': 1}}]"
    )
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"{n % 5}{n // 5}", "chosen": "1", "rejected": "2"}) + "\n" for n in range(9))
    )
    test = tmp_path / "test.jsonl"
    test.write_text(json.dumps({"prompt": "44", "answer": "1"}) + "\n")
    own = {
        "task.name": "jsonl",
        "task.train": rows,
        "task.eval_sets": f"{{test: {test}}}",
        "task.train_rows": 0,
        "task.eval_rows": 0,
    }
    for given, told in (
        (settings(run, tmp_path / "nowhere"), "keep.teacher = '" + str(tmp_path / "nowhere")),
        (settings(run, run), "is this run itself"),
        (
            settings(run, small_run / "checkpoints/sft/9"),
            "stage 'sft' has no checkpoint of step 9; the last one is that of step 2",
        ),
        (settings(run, small_run / "checkpoints/judge/1"), "has no checkpoint of stage 'judge'; choices: sft"),
        (settings(run, unsaved), "has no checkpoint yet"),
        (settings(run, small_run, stages=judged, tokenizer="bytes", **own), "whose tokenizer is another one"),
    ):
        assert command.main(given) == 2
        assert told in capsys.readouterr().err
    assert not run.exists()
