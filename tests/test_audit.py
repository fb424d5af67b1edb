"""The audit's command: a run in, a table, numbers and a page out; and its user's mistakes."""

import json

import pytest

import d1jax.audit as command
from d1jax.config import Config
from d1jax.evaluation.estimators import candidates

SMALL = ["--rows", "12", "--samples", "4", "--truth_samples", "32"]


@pytest.fixture
def finished(small_run):
    return small_run


@pytest.fixture
def few(monkeypatch):
    """Three of the estimators: most of the time is compilation."""
    chosen = [c for c in candidates(20) if c.name in ("one_step p=0.15", "elbo exact K=2", "coupled exact K=1")]
    monkeypatch.setattr(command, "candidates", lambda length: list(chosen))


def test_a_run_is_audited_and_again_the_same(finished, few, tmp_path, capsys):
    out = tmp_path / "new" / "audit"
    assert command.main([f"--run={finished}", *SMALL, "--out", str(out), "--sampler.steps=4"]) == 0
    printed = capsys.readouterr().out
    result = json.loads((out / "audit.json").read_text())
    assert [row["name"] for row in result["estimators"]] == ["one_step p=0.15", "elbo exact K=2", "coupled exact K=1"]
    assert all(row["shared"]["largest"] == 0 for row in result["estimators"])
    assert [pair["decoupled"] for pair in result["pairs"]] == ["elbo exact K=2"]
    assert all(line in printed for line in result["findings"]) and "coupled exact K=1" in printed
    setting = result["setting"]
    assert (setting["stage"], setting["step"], setting["rows"], setting["sampler"]["steps"]) == ("sft", 2, 12, 4)
    assert {"jax", "devices", "d1jax"} <= set(result["environment"])
    assert "Findings" in (out / "audit.html").read_text() and not list(out.glob("*.tmp"))
    again = tmp_path / "again"
    assert (
        command.main([f"--run={finished}", *SMALL, f"--out={again}", "--sampler.steps=4", "--stage=sft", "--step=2"])
        == 0
    )
    assert (again / "audit.json").read_text() == (out / "audit.json").read_text()


def test_the_estimators_of_method_files_join_the_table_once(tmp_path):
    (tmp_path / "a.yaml").write_text("estimator: {name: elbo, samples: 7}\nprompt_mask: 0.0\n")
    (tmp_path / "b.yaml").write_text("estimator: {name: elbo, samples: 7}\nprompt_mask: 0.0\nnum_iterations: 2\n")
    (tmp_path / "known.yaml").write_text("prompt_mask: 0.0\n")
    (found,) = command._of_files(tmp_path, Config(), candidates(20))
    assert (found.name, found.estimator.samples, found.prompt_mask) == ("a", 7, 0.0)


@pytest.mark.parametrize(
    "flags, told",
    [
        ([], "--run DIR"),
        (["--run"], "has no value"),
        (["--run", "nowhere"], "no run directory"),
        (["--run", "RUN", "--samples", "5"], "--samples 5 must be a whole number, a multiple of 2, at least 4"),
        (["--run", "RUN", "--rows", "many"], "--rows many"),
        (["--run", "RUN", "--rows", "1"], "at least 2"),
        (["--run", "RUN", "--truth_samples", "16"], "a multiple of 16, at least 32"),
        (["--run", "RUN", "--step", "2"], "needs --stage"),
        (["--run", "RUN", "--stage", "sft", "--step", "7"], "7"),
        (["--run", "RUN", "--stage", "rl"], "rl"),
        (["--run", "RUN", "--methods", "EMPTY"], "no .yaml files"),
        (["--run", "RUN", "--only", "coupld"], "--only 'coupld' is part of no estimator's name; there are one_step"),
        (["--run", "RUN", "--out", "FILE"], "cannot be made a directory"),
        (["--run", "RUN", "--sampler.stepz", "4"], "sampler.stepz"),
        (["--run", "RUN", "--model.width", "16"], "model.width"),
        (["--run", "RUN", "--rl.steps", "16"], "audit does not read rl.steps"),
    ],
)
def test_mistakes_end_with_two_and_a_sentence(finished, tmp_path, capsys, flags, told):
    (tmp_path / "file").write_text("")
    names = {"RUN": str(finished), "EMPTY": str(tmp_path), "FILE": str(tmp_path / "file")}
    assert command.main([names.get(flag, flag) for flag in flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and told in error and "Traceback" not in error


def test_help_costs_nothing(capsys):
    assert command.main(["--help"]) == 0
    assert "--truth_samples" in capsys.readouterr().out
