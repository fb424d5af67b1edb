"""The section of plain text: what the records hold, and nothing where a record is missing or damaged."""

import pytest

from d1jax.telemetry.report.build import report_html
from d1jax.telemetry.report.curves import curves
from d1jax.telemetry.report.decoding_order import order_curves
from d1jax.telemetry.report.results import verdict
from d1jax.telemetry.report.run_data import RunData
from d1jax.telemetry.report.texts import text_rows

ORDER = {
    "local_ar": {"1": 0.5, "2": 0.4},
    "global_ar": {"1": 0.6},
    "first_step": {"entropy": [1.0, 2.0], "confidence": [0.5, 0.2]},
}
RECORD = {
    "step": 30,
    "before": {
        "by": "next tokens",
        "sets": {"code": {"bits_per_byte": 1.25, "error": 0.02, "windows": 96, "samples": 1}},
    },
    "after": {
        "by": "ELBO",
        "sets": {"code": {"bits_per_byte": 2.5, "error": 0.03, "windows": 1096, "samples": 4, "order": ORDER}},
    },
}
METRICS = tuple(
    {
        "stage": "adapt",
        "step": step,
        "loss": 5.0 - step,
        "validation/code/bits_per_byte": 3.0 - step,
        "mask/opened": 0.5 * step,
    }
    for step in (1, 2)
)


def run_of(texts, metrics=()):
    return RunData(name="run", config="", summary={"texts": texts}, metrics=metrics, samples=(), notices=())


def test_a_row_before_and_a_row_after_and_a_sentence():
    run = run_of({"adapt": RECORD})
    first, last = text_rows(run)
    assert (first["when"], first["by"], first["bits"], first["windows"], first["samples"]) == (
        "before", "next tokens", 1.25, "96", "1",
    )  # fmt: skip
    assert (last["when"], last["bits"], last["error"], last["windows"]) == ("after", 2.5, 0.03, "1,096")
    assert verdict(run) == "1.250 (next tokens) → 2.500 bits per byte of code text (ELBO)."
    page = report_html(run)
    assert "Plain text" in page and "2.500" in page and "1,096" in page and "Before and after" not in page


def test_curves_of_a_stage_on_text_and_of_its_order():
    run = run_of({"adapt": RECORD}, METRICS)
    titles = [drawing.title for drawing in curves(run)]
    assert "Bits per byte, during adapt" in titles and "Open part of the causal mask, adapt" in titles
    assert [line.name for line in order_curves(run)[0].lines] == ["adapt, code"]


@pytest.mark.parametrize(
    "damage",
    [
        None,
        3,
        {},
        {"adapt": None},
        {"adapt": {"after": 3}},
        {"adapt": {"after": {"sets": {"a": 1, "b": {"order": 4}}}}},
    ],
    ids=str,
)
def test_a_damaged_record_leaves_a_page(damage):
    run = run_of(damage)
    assert all(row["bits"] is None for row in text_rows(run))
    assert "No evaluation is recorded" in verdict(run) and report_html(run)
