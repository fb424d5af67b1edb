"""python -m d1jax.evaluate: the table of a run again, what it is of, and its user's mistakes."""

import json

import pytest

from d1jax import evaluate


def test_the_table_says_what_it_is_of(small_run, tmp_path, capsys):
    out = tmp_path / "table.json"
    assert (
        evaluate.main(["--run", str(small_run), "--sampler.steps", "4", "--task.eval-rows=5", "--out", str(out)]) == 0
    )
    said = capsys.readouterr()
    what = f"{small_run / 'checkpoints/sft/2'}: stage sft, step 2, 5 rows of held_out, 20 tokens in 4 denoising steps, greedy"
    assert f"evaluating {what}\n" in said.err, "before it begins"
    (done,) = [line for line in said.err.splitlines() if line.startswith(f"evaluated {what}, ")]
    assert done.endswith(" s")
    assert "held_out" in said.out and json.loads(out.read_text())["stages"][0]["n"] == 5


def test_an_adaptive_schedule_is_named(small_run, capsys):
    assert evaluate.main(["--run", str(small_run), "--sampler.schedule", "threshold"]) == 0
    assert "20 tokens in schedule threshold, greedy" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--rl.steps", "3"], "evaluate does not read rl.steps; it reads task, model"),
        (["--sft.steps", "3"], "evaluate does not read sft.steps"),
        (["--rl", "wd1"], "evaluate does not read rl"),
        (["--sampler.schedule.threshold", "0.5"], "belongs to sampler.schedule = threshold or klass, not to even"),
        (["--sampler.top_k", "5"], "sampler.top_k = 5: without effect here, read only with a temperature above 0"),
        (["--out", "nowhere/table.json"], "--out 'nowhere/table.json': there is no directory 'nowhere'"),
    ],
)
def test_what_evaluation_does_not_read_is_refused(small_run, capsys, flags, told):
    assert evaluate.main(["--run", str(small_run), *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and told in error


def test_the_version_is_told(capsys):
    assert evaluate.main(["--version"]) == 0 and capsys.readouterr().out.startswith("d1jax ")


def test_a_checkpoint_is_named_once(small_run, capsys):
    assert evaluate.main(["--checkpoint", str(small_run / "checkpoints/sft/2"), "--stage", "sft"]) == 2
    assert "--checkpoint names run, stage and step; leave --stage out" in capsys.readouterr().err
