"""The metrics file: what is written is what is read, also after a kill in the middle of a line."""

import json
import math

import numpy as np
import pytest

from d1jax.telemetry.metrics import MetricsLog, format_metrics, read_metrics


@pytest.fixture
def log(tmp_path):
    with MetricsLog(tmp_path) as log:
        yield log


def steps(path):
    return [(row["stage"], row["step"]) for row in read_metrics(path)]


def test_round_trip_keeps_every_bit_and_the_type(log):
    values = {"loss": 0.1 + 0.2, "tiny": 5e-324, "count": 3, "array": np.float32(0.1), "flag": np.bool_(True)}
    log.write("sft", np.int64(7), values)
    row = read_metrics(log.path)[0]
    assert row == {
        "stage": "sft", "step": 7, "loss": 0.30000000000000004, "tiny": 5e-324, "count": 3,
        "array": float(np.float32(0.1)), "flag": 1,
    }  # fmt: skip
    assert isinstance(row["count"], int)


def test_a_line_is_on_disk_before_the_log_is_closed(log):
    log.write("sft", 1, {"loss": 1.0})
    assert log.path.read_text().endswith("\n")


def test_non_finite_values_are_valid_json_and_read_back(log):
    log.write("rl", 1, {"a": math.nan, "b": math.inf, "c": -math.inf})
    raw = json.loads(log.path.read_text(), parse_constant=lambda name: pytest.fail(f"bare {name} is not JSON"))
    assert raw == {"stage": "rl", "step": 1, "a": "nan", "b": "inf", "c": "-inf"}
    row = read_metrics(log.path)[0]
    assert math.isnan(row["a"]) and row["b"] == math.inf and row["c"] == -math.inf


@pytest.mark.parametrize("value", ["1.0", None, np.zeros(2), [1.0]])
def test_a_value_that_is_no_scalar_is_refused_by_name(log, value):
    with pytest.raises(ValueError, match="kl .*rl step 4"):
        log.write("rl", 4, {"kl": value})


def test_reserved_names_are_refused(log):
    with pytest.raises(ValueError, match="'step'"):
        log.write("rl", 4, {"step": 5.0})


def test_reading_leaves_out_a_torn_last_line_only(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "sft", "step": 1}\n{"stage": "sft", "ste')
    assert steps(path) == [("sft", 1)]
    path.write_text('{"stage": "sft", "ste\n{"stage": "sft", "step": 2}\n')
    with pytest.raises(ValueError, match="line 1"):
        read_metrics(path)


def test_reading_a_torn_multibyte_character_and_no_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_bytes(b'{"stage": "sft", "step": 1}\n{"stage": "\xc3')
    assert steps(path) == [("sft", 1)]


def test_opening_again_appends_and_drops_the_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "sft", "step": 1}\n{"stage": "sft", "step": 2, "lo')
    with MetricsLog(tmp_path) as log:
        log.write("sft", 2, {"loss": 1.0})
    assert steps(path) == [("sft", 1), ("sft", 2)]


def test_opening_again_keeps_a_last_line_that_only_lacks_its_newline(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "sft", "step": 1}')
    with MetricsLog(tmp_path) as log:
        log.write("sft", 2, {})
    assert steps(path) == [("sft", 1), ("sft", 2)]


def test_rewind_drops_later_steps_unknown_stages_and_goes_on(log):
    for stage, last in (("sft", 3), ("rl", 4), ("other", 1)):
        for step in range(1, last + 1):
            log.write(stage, step, {"loss": math.inf})
    log.rewind({"sft": 3, "rl": 2})
    expected = [("sft", 1), ("sft", 2), ("sft", 3), ("rl", 1), ("rl", 2)]
    assert steps(log.path) == expected
    assert read_metrics(log.path)[-1]["loss"] == math.inf
    log.write("rl", 3, {"loss": 0.5})
    assert steps(log.path) == [*expected, ("rl", 3)]
    assert [p.name for p in log.path.parent.iterdir()] == ["metrics.jsonl"], "no temporary file is left"


def test_rewind_to_nothing(log):
    log.write("sft", 1, {})
    log.rewind({})
    assert log.path.read_text() == ""


def test_format_metrics_is_short():
    text = format_metrics({"loss": 1.23456789, "lr": 1e-6, "n": 12345678, "tokens": 45678.9, "bad": math.nan})
    assert text == "loss 1.235  lr 1e-06  n 12345678  tokens 45679  bad nan"
