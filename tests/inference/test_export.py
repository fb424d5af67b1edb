"""An export stage writes once, goes on after a kill between any two of its steps, and never over what is not its own."""

import json

import jax
import numpy as np
import pytest

from d1jax.config import ExportConfig, UserError
from d1jax.inference import export as module
from d1jax.inference.export import check_export, export, is_exported
from d1jax.inference.policy import load_pretrained


@pytest.fixture
def policy(write_checkpoint):
    return load_pretrained(write_checkpoint()[0])


@pytest.mark.parametrize("form", ["huggingface", "d1jax"])
def test_what_is_exported_loads_as_the_same_weights(policy, tmp_path, form):
    out, record = tmp_path / "out", tmp_path / "exports" / "out.json"
    export(policy, ExportConfig(form=form), "rl_1", out, record)
    assert json.loads(record.read_text()) == {"out": str(out), "weights": "rl_1"}
    for one, other in zip(
        jax.tree.leaves(policy.variables), jax.tree.leaves(load_pretrained(out).variables), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_a_run_that_was_killed_before_or_after_the_checkpoint_goes_on(policy, tmp_path, monkeypatch):
    out, record = tmp_path / "out", tmp_path / "exports" / "out.json"

    def killed(*given, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_pretrained", killed)
    with pytest.raises(KeyboardInterrupt):
        export(policy, ExportConfig(), "rl", out, record)
    assert not is_exported(out, record)
    monkeypatch.undo()
    check_export(ExportConfig(), "publish", out, record)
    export(policy, ExportConfig(), "rl", out, record)
    assert is_exported(out, record)
    before = (out / "config.json").stat().st_mtime_ns
    monkeypatch.setattr(module, "save_pretrained", killed)  # a finished one is not written again
    check_export(ExportConfig(), "publish", out, record)
    export(policy, ExportConfig(), "rl", out, record)
    assert (out / "config.json").stat().st_mtime_ns == before


def test_what_lies_there_already_is_refused_before_anything_is_trained(tmp_path):
    out, record = tmp_path / "out", tmp_path / "exports" / "out.json"
    out.mkdir()
    check_export(ExportConfig(), "publish", out, record)
    (out / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="stage 'publish': .*out exists already; choose another directory"):
        check_export(ExportConfig(), "publish", out, record)
