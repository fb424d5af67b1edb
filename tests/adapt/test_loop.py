"""Stages on plain text, run whole: an autoregressive model, what becomes of it, and exact continuation."""

import json

import jax
import numpy as np
import pytest

import d1jax.train as command
from d1jax import audit, evaluate, generate, load_pretrained, train
from d1jax.adapt.loop import opened
from d1jax.config import AdaptConfig, UserError
from d1jax.config.parse import parse
from d1jax.inference.policy import AUTOREGRESSIVE_SAMPLER, sampler_of
from d1jax.telemetry.metrics import read_metrics
from d1jax.weights.checkpoints import ocp

SMALL = {
    "stages": "[adapt]", "tokenizer": "bytes", "model.width": 8, "model.layers": 1, "model.heads": 2, "model.kv_heads": 1,
    "model.mlp_width": 8, "model.rope_theta": 100, "model.qkv_bias": True, "model.rope_full_precision": False,
    "model.alignment": "shifted", "adapt.steps": 4, "adapt.batch_size": 8, "adapt.length": 16, "adapt.validation_windows": 4,
    "adapt.validation_samples": 2, "adapt.order_windows": 3, "checkpoint_every": 1, "evaluation.every": 2,
    "adapt.optimizer.warmup_steps": 1,
}  # fmt: skip

CAUSAL = {
    "model.attention_mask": "causal",
    "adapt.validation_samples": None,
    "adapt.order_windows": None,
}  # which draws nothing
ARITHMETIC = {
    "task.name": "arithmetic", "task.train_rows": 32, "task.eval_rows": 8, "sft.steps": 2, "sft.batch_size": 8,
    "sampler.completion_length": 96, "sampler.block_length": 96, "sampler.steps": 4, "evaluation.batch_size": 8,
    "evaluation.every": 0,
}  # fmt: skip


def settings(text, run_dir, **changes):
    return {**SMALL, "adapt.data": f"{{{text}: 1}}", "run_dir": run_dir, **changes}


def flags(given):
    return [f"--{key}={value}" for key, value in given.items() if value is not None]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    rows = [{"text": f"def f{i}(x):\n    return x + {i}\n"} for i in range(60)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def causal(text, tmp_path_factory):
    """A finished run of an autoregressive model."""
    run_dir = tmp_path_factory.mktemp("causal") / "run"
    train.run(parse(flags(settings(text, run_dir, **CAUSAL))))
    return run_dir


def of_causal(text, causal, run_dir, **changes):
    given = {name: value for name, value in settings(text, run_dir, init_from=causal).items() if "model." not in name}
    return {**given, "model.alignment": "shifted", **changes}


def bits(run_dir, when):
    record = json.loads((run_dir / "evaluations/adapt.text.json").read_text())[when]
    return record["by"], record["sets"]["held_out"]["bits_per_byte"]


def weights(run_dir, step=4):
    return ocp.load_checkpointables(run_dir / f"checkpoints/adapt/{step}")["trainable"]["params"]


def test_an_adapted_model_begins_where_the_autoregressive_one_ended(text, causal, tmp_path):
    train.run(parse(flags(of_causal(text, causal, tmp_path / "run"))))
    (before_by, before), (after_by, after) = (bits(tmp_path / "run", when) for when in ("before", "after"))
    assert (before_by, after_by) == ("next tokens", "ELBO")
    assert before == bits(causal, "after")[1] and after != before
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["texts"]["adapt"]["after"]["sets"]["held_out"]["bits_per_byte"] == after and summary["stages"] == []
    order = json.loads((tmp_path / "run/evaluations/adapt.text.json").read_text())["after"]["sets"]["held_out"]["order"]
    assert order["heat_map"]["columns"] == order["heat_map"]["steps"] == 8 and order["first_step"]["rows"] == 3
    assert 0 <= order["local_ar"]["1"] <= 1 and 0 <= order["global_ar"]["1"] <= order["global_ar"]["4"] <= 1
    page = (tmp_path / "run/report.html").read_text()
    assert "Local autoregressiveness" in page
    assert f"{before:.3f}" in page and f"{after:.3f}" in page


def test_the_mask_is_opened_step_by_step(text, causal, tmp_path):
    train.run(parse(flags(of_causal(text, causal, tmp_path / "run", **{"adapt.anneal_steps": 4}))))
    assert [row["mask/opened"] for row in read_metrics(tmp_path / "run/metrics.jsonl")] == [0.25, 0.5, 0.75, 1.0]
    train.run(parse(flags(of_causal(text, causal, tmp_path / "at_once"))))
    first, second = (read_metrics(tmp_path / name / "metrics.jsonl")[0] for name in ("run", "at_once"))
    assert first["loss"] != second["loss"] and first["mask/frac"] == second["mask/frac"]


@pytest.mark.parametrize("steps, shares", [(0, [None] * 3), (1, [None] * 3), (3, [1 / 3, 2 / 3, None])])
def test_the_share_that_is_open(steps, shares):
    found = [opened(AdaptConfig(steps=5, anneal_steps=steps), step) for step in range(3)]
    assert [share if share is None else pytest.approx(share) for share in found] == shares


@pytest.mark.parametrize("streaming", [False, True])
def test_a_cut_run_goes_on_bit_for_bit(text, causal, tmp_path, interrupted, streaming):
    held = tmp_path / "held.txt"
    held.write_text("def g(y):\n    return y\n" * 20)
    more = {"adapt.streaming": True, "adapt.validation": f"{{held_out: {held}}}"} if streaming else {}
    whole, cut = (parse(flags(of_causal(text, causal, tmp_path / name, **more))) for name in ("whole", "cut"))
    train.run(whole)
    with interrupted("adapt", 3), pytest.raises(KeyboardInterrupt):
        train.run(cut)
    train.run(cut)
    for a, b in zip(
        jax.tree.leaves(weights(tmp_path / "whole")), jax.tree.leaves(weights(tmp_path / "cut")), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert bits(tmp_path / "whole", "after") == bits(tmp_path / "cut", "after")
    saved = sorted(path.name for path in (tmp_path / "cut").glob("streams/adapt/*.json"))
    assert saved == ([f"{step}.json" for step in (1, 2, 3, 4)] if streaming else [])


def test_a_stream_without_its_place_is_not_begun_again(text, causal, tmp_path, interrupted):
    held = tmp_path / "held.txt"
    held.write_text("def g(y):\n    return y\n" * 20)
    more = {"adapt.streaming": True, "adapt.validation": f"{{held_out: {held}}}"}
    config = parse(flags(of_causal(text, causal, tmp_path / "run", **more)))
    with interrupted("adapt", 2), pytest.raises(KeyboardInterrupt):
        train.run(config)
    (tmp_path / "run/streams/adapt/2.json").unlink()
    with pytest.raises(UserError, match=r"streams/adapt/2\.json is gone"):
        train.run(config)


def test_other_text_under_the_same_name_is_refused(text, tmp_path, interrupted, capsys):
    file = tmp_path / "text.jsonl"
    file.write_text(text.read_text())
    given = flags(settings(file, tmp_path / "run"))
    with interrupted("adapt", 2), pytest.raises(KeyboardInterrupt):
        train.run(parse(given))
    file.write_text(text.read_text().replace("return", "yield"))
    assert command.main(given) == 2
    assert "is not what it was when the run in" in capsys.readouterr().err


def test_micro_batches_and_devices_change_nothing(text, tmp_path):
    plain = train.run(parse(flags(settings(text, tmp_path / "plain"))))["texts"]
    for name, more in (
        ("parts", {"adapt.grad_accumulation_steps": 4, "mesh.data": 2, "mesh.fsdp": 1, "mesh.tensor": 4}),
        ("mesh", {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}),
    ):
        found = train.run(parse(flags(settings(text, tmp_path / name, **more))))["texts"]
        assert found["adapt"]["after"]["sets"]["held_out"]["bits_per_byte"] == pytest.approx(
            plain["adapt"]["after"]["sets"]["held_out"]["bits_per_byte"], rel=5e-5
        )


def test_an_adapter_is_trained_beside_the_adapted_weights(text, causal, tmp_path):
    run = parse(flags(of_causal(text, causal, tmp_path / "run", **{"lora.rank": 2})))
    train.run(run)
    assert set(ocp.load_checkpointables(tmp_path / "run/checkpoints/adapt/4")["trainable"]) == {"lora"}
    assert np.isfinite(bits(tmp_path / "run", "after")[1])


def test_instruction_tuning_follows_and_is_evaluated(text, causal, tmp_path):
    more = {"stages": "[adapt, sft]", **ARITHMETIC}
    result = train.run(parse(flags(of_causal(text, causal, tmp_path / "run", **more))))
    assert [stage["name"] for stage in result["stages"]] == ["adapt", "sft"]


def test_the_longer_run_measures_again(text, tmp_path):
    constant = {"adapt.optimizer.schedule": "constant", "adapt.steps": 2}
    train.run(parse(flags(settings(text, tmp_path / "run", **constant))))
    short = bits(tmp_path / "run", "after")
    train.run(parse(flags(settings(text, tmp_path / "run", **{**constant, "adapt.steps": 4}))))
    train.run(parse(flags(settings(text, tmp_path / "whole", **{**constant, "adapt.steps": 4}))))
    assert bits(tmp_path / "run", "after") == bits(tmp_path / "whole", "after") != short
    assert bits(tmp_path / "run", "before") == bits(tmp_path / "whole", "before")


# -- what is refused ------------------------------------------------------------------------------------------------------


def refused(capsys, given):
    assert command.main(flags(given)) == 2
    return capsys.readouterr().err


def test_an_autoregressive_model_is_adapted_first(text, causal, tmp_path, capsys):
    said = refused(capsys, of_causal(text, causal, tmp_path / "run", stages="[sft, adapt]"))
    assert (
        "is an autoregressive model, and stage 'sft' works on masked diffusion models; put a stage of kind adapt first"
        in said
    )


def test_no_other_stage_works_on_the_autoregressive_weights(text, causal, tmp_path, capsys):
    stages = "[adapt, {name: raw, kind: sft, from: start}]"
    given = of_causal(text, causal, tmp_path / "run", stages=stages, **ARITHMETIC)
    assert "is an autoregressive model, and stage 'raw' works on masked diffusion models" in refused(capsys, given)


def test_a_mask_is_opened_once(text, causal, tmp_path, capsys):
    more = {"adapt.anneal_steps": 2, "stages": "[adapt, {name: mid, kind: adapt}]"}
    said = refused(capsys, of_causal(text, causal, tmp_path / "run", **more))
    assert "stage 'mid': adapt.anneal_steps = 2 would hide from the model again" in said
    train.run(parse(flags(of_causal(text, causal, tmp_path / "open", **{"adapt.order_windows": 0}))))
    more = {"adapt.anneal_steps": 2, "init_from": tmp_path / "open"}
    said = refused(capsys, of_causal(text, causal, tmp_path / "run", **more))
    assert "sees both sides already, and adapt.anneal_steps = 2 would hide" in said


def test_every_stage_from_the_start_is_measured_against_the_autoregressive_model(text, causal, tmp_path):
    stages = "[{name: one, kind: adapt, anneal_steps: 2}, {name: two, kind: adapt, from: start, anneal_steps: 2}]"
    more = {"stages": stages, "adapt.order_windows": 0, "adapt.steps": 2}
    found = train.run(parse(flags(of_causal(text, causal, tmp_path / "run", **more))))["texts"]
    assert found["one"]["before"] == found["two"]["before"] and found["two"]["before"]["by"] == "next tokens"


def test_an_autoregressive_run_is_sampled_from_left_to_right_and_not_evaluated(causal, capsys):
    assert read_metrics(causal / "metrics.jsonl")[0]["mask/opened"] == 0
    assert load_pretrained(causal).sampler is None and sampler_of(causal) == AUTOREGRESSIVE_SAMPLER
    assert generate.main([f"--model={causal}", "--prompt=def", "--length=4"]) == 0
    for main in (evaluate.main, audit.main):
        assert main([f"--run={causal}"]) == 2
        assert "this model has attention_mask = causal" in capsys.readouterr().err


def test_a_causal_model_is_not_sampled_by_denoising(text, tmp_path, capsys):
    given = settings(text, tmp_path / "run", stages="[adapt, sft]", **CAUSAL)
    assert "stages ['sft'] work on models whose columns see all others" in refused(capsys, given)


def test_text_of_another_form_is_refused_before_anything_is_compiled(tmp_path, capsys):
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    assert "image.png is a binary file" in refused(capsys, settings(tmp_path / "image.png", tmp_path / "run"))
    (tmp_path / "empty.jsonl").write_text("")
    assert "fill no window" in refused(capsys, settings(tmp_path / "empty.jsonl", tmp_path / "run"))


def test_settings_of_masking_that_nothing_reads_are_refused(text, tmp_path, capsys):
    said = refused(capsys, settings(text, tmp_path / "run", **{**CAUSAL, "adapt.normalizer": "masked"}))
    assert "adapt.normalizer = 'masked': without effect here" in said
