"""Protects: stored generations are graded without a model, to the published figures, and mistakes name file, line and cure."""

import json
from pathlib import Path

import pytest

from d1jax import evaluate
from d1jax.config import UserError
from d1jax.evaluation.regrade import regrade
from d1jax.tasks.task import DataError

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "d1_eval_baselines"
HERE = pytest.mark.skipif(not DATA.exists(), reason="the data is not here")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@HERE
def test_gsm8k_is_at_least_as_good_as_the_published_parser():
    found = {
        one["gen_length"]: one["correct"] for one in regrade(str(DATA / "gsm8k_llada8b_instruct.jsonl.gz"), "gsm8k")
    }
    assert found == {128: 791, 256: 876, 512: 888}


@HERE
def test_sudoku_equals_the_published_cells():
    found = regrade(str(DATA / "sudoku_llada8b_instruct.jsonl.gz"), "sudoku")
    assert [one["cells_correct"] for one in found] == [240, 137, 112] and {one["cells"] for one in found} == {2048}
    assert [one["correct"] for one in found] == [1, 0, 0]


def test_both_forms_of_rows_and_of_files_are_read(tmp_path, capsys):
    theirs = [{"question": "q", "ground_truth": 18.0, "generations": "<answer>18</answer><|eot_id|>", "gen_length": 128},
              {"question": "q", "ground_truth": None, "generations": "<answer>18</answer>", "gen_length": 128}]  # fmt: skip
    plain = [
        {"prompt": "q", "answer": "18", "completion": "\\boxed{18}"},
        {"prompt": "q", "answer": "#### 7", "completion": "8"},
    ]
    (tmp_path / "d1.json").write_text(json.dumps({"metrics": {}, "generations": theirs}))
    assert regrade(str(tmp_path / "d1.json"), "gsm8k")[0]["correct"] == 1
    assert evaluate.main(["--regrade", write(tmp_path / "rows.jsonl", plain), "--task", "gsm8k"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert {key: line[key] for key in ("task", "gen_length", "n", "correct", "accuracy")} == {
        "task": "gsm8k", "gen_length": None, "n": 2, "correct": 1, "accuracy": 0.5,
    }  # fmt: skip


def test_countdown_and_math_rows_are_read(tmp_path):
    rows = [
        {
            "question": "Numbers: [1, 2, 3]",
            "ground_truth": [[1, 2, 3], 7],
            "generations": "\\boxed{1 + 2 * 3}",
            "gen_length": 9,
        }
    ]
    assert regrade(write(tmp_path / "a.jsonl", rows), "countdown")[0]["correct"] == 1
    rows = [{"question": "p", "ground_truth": "\\frac12", "generations": "\\boxed{0.5}", "gen_length": 9}]
    assert regrade(write(tmp_path / "b.jsonl", rows), "math")[0]["correct"] == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "q", "ground_truth": 1}], r"rows.jsonl:1: has no text as \"generations\""),
        ([{"generations": "x", "ground_truth": 1}], r"rows.jsonl:1: question = None"),
        ([{"question": "q", "ground_truth": "many", "generations": "x"}], r"rows.jsonl:1: answer ends with 'many'"),
        ([{"question": "q", "ground_truth": 1, "generations": "x", "gen_length": "long"}], "gen_length = 'long'"),
        ([], "holds no rows"),
    ],
)
def test_a_row_that_cannot_be_graded_is_named(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        regrade(write(tmp_path / "rows.jsonl", rows), "gsm8k")


def test_an_unknown_task_and_a_missing_file_end_with_two(tmp_path, capsys):
    with pytest.raises(UserError, match="--task 'gsm' cannot grade stored generations; choices: sudoku, countdown"):
        regrade("x", "gsm")
    assert evaluate.main(["--regrade", str(tmp_path / "no.jsonl"), "--task", "gsm8k"]) == 2
    assert evaluate.main(["--regrade", "x"]) == 2 and "write --regrade FILE --task NAME" in capsys.readouterr().err
