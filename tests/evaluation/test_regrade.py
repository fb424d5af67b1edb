"""Stored generations graded again: the published figures, both layouts, and a user's mistakes in one line with file, line and cure."""

import gzip
import json
from pathlib import Path

import pytest

from d1jax import evaluate
from d1jax.evaluation.regrade import regrade

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="shared/data is absent")

EGGS = {"question": "Eggs?", "ground_truth": 18.0, "generations": "<answer>\\boxed{18}</answer><|eot_id|><|endoftext|>"}
SUDOKU = {
    "question": "Solve the following Sudoku puzzle: 4320004330100004\n",
    "ground_truth": "4321124334122134",
    "generations": "a\n<answer>\n4321124334122134\n</answer><|eot_id|>",
    "gen_length": 128,
}
ADDS = {"prompt": "Write f, which adds one.", "test_list": ["assert f(1) == 2", "assert f(2) == 3"]}
RIGHT = "def f(x):\n    return x + 1"


def lines(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@needs_data
def test_gsm8k_of_d1():
    results = regrade(DATA / "d1_eval_baselines" / "gsm8k_llada8b_instruct.jsonl.gz", "gsm8k")
    assert [(one["gen_length"], one["n"], one["correct"]) for one in results] == [
        (128, 1130, 791),
        (256, 1130, 876),
        (512, 1130, 888),
    ]
    assert all(one["without_reference"] == 2 and one["accuracy"] == one["correct"] / 1130 for one in results)


@needs_data
def test_sudoku_of_d1_has_the_published_cells_and_beside_them_ours():
    results = regrade(DATA / "d1_eval_baselines" / "sudoku_llada8b_instruct.jsonl.gz", "sudoku")
    assert [(one["n"], one["correct"], one["puzzles"], one["solved"]) for one in results] == [
        (2048, 240, 256, 1), (2048, 137, 256, 0), (2048, 112, 256, 0),
    ]  # fmt: skip
    assert [round(one["cell_accuracy"], 3) for one in results] == [0.117, 0.067, 0.055]


def test_both_layouts_and_a_length_a_line(tmp_path, capsys):
    plain = {"prompt": "Eggs?", "answer": "... #### 1,800", "completion": "so \\boxed{1800}"}
    path = lines(
        tmp_path / "rows.jsonl.gz",
        [{**EGGS, "gen_length": 256}, {**EGGS, "ground_truth": 19, "gen_length": 128}, plain],
    )
    assert evaluate.main(["--regrade", str(path), "--task", "gsm8k"]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert told == [
        {"task": "gsm8k", "gen_length": length, "n": 1, "correct": correct, "accuracy": float(correct)}
        for length, correct in ((128, 0), (256, 1), (None, 1))
    ]


def test_the_file_of_d1_itself(tmp_path):
    path = tmp_path / "gsm8k_generations.json"
    path.write_text(
        json.dumps({"generations": [EGGS, {**EGGS, "ground_truth": None}], "metrics": {}, "gen_length": 64}, indent=1)
    )
    (told,) = regrade(path, "gsm8k")
    assert told == {"task": "gsm8k", "gen_length": 64, "n": 2, "correct": 1, "accuracy": 0.5, "without_reference": 1}


def test_math_and_countdown(tmp_path):
    maths = [
        {"question": "?", "ground_truth": "\\frac{1}{2}", "generations": "\\boxed{0.5}<|endoftext|>"},
        {"question": "?", "ground_truth": "x+1", "generations": "<answer>1+x</answer>"},
        {"prompt": "?", "answer": "3", "completion": "4"},
    ]
    (told,) = regrade(lines(tmp_path / "m.jsonl", maths), "math")
    assert (told["n"], told["correct"]) == (3, 2)
    text = "<answer>\\boxed{44 + 19 + 35}</answer><|eot_id|>"
    countdown = [
        {"question": "Numbers: [44, 19, 35]\nTarget: 98", "ground_truth": [[44, 19, 35], 98], "generations": text},
        {"question": "Numbers: [44, 19, 35]\nTarget: 98", "ground_truth": None, "generations": text},
        {"prompt": "Numbers: 44, 19, 35\nTarget: 98\n\nFind", "answer": 98, "completion": text},
        {"prompt": "44,19,35=98:", "answer": None, "completion": "<answer>44+19</answer>"},
    ]
    (told,) = regrade(lines(tmp_path / "c.jsonl", countdown), "countdown")
    assert (told["n"], told["correct"]) == (4, 3)


def test_any_valid_completion_of_a_puzzle_counts_as_solved(tmp_path):
    puzzle, other = "0000000034122143", "1234432134122143"
    record = {"prompt": f"Puzzle: {puzzle}", "answer": "4321123434122143", "completion": f"<answer>{other}</answer>"}
    (told,) = regrade(lines(tmp_path / "s.jsonl", [record]), "sudoku")
    assert told["solved"] == 1 and told["own_cell_accuracy"] == 1.0 and told["cell_accuracy"] < 1.0


def test_programs_are_run_against_the_tests_of_their_row(tmp_path):
    rows = [
        {**ADDS, "completion": f"```python\n{RIGHT}\n```<|endoftext|>", "gen_length": 64},
        {**ADDS, "generations": "```python\ndef f(x):\n    return 2\n```", "gen_length": 64},
        {**ADDS, "solution": RIGHT, "completion": "I do not know.", "gen_length": 64},
        {**ADDS, "completion": RIGHT, "gen_length": 128},
    ]
    path = lines(tmp_path / "code.jsonl", rows)
    told = [(one["gen_length"], one["n"], one["correct"]) for one in regrade(path, "code")]
    assert told == [(64, 3, 1), (128, 1, 0)], "what is graded is the completion, and a program has a fence"
    told = [(one["gen_length"], one["n"], one["correct"]) for one in regrade(path, "code", style="bare")]
    assert told == [(64, 3, 1), (128, 1, 1)]


def test_a_benchmark_names_the_task_that_grades(tmp_path, capsys):
    record = {
        "prompt": "def f(x):\n", "entry_point": "f", "completion": "    return x + 1",
        "test": "def check(candidate):\n    assert candidate(1) == 2\n",
    }  # fmt: skip
    path = lines(tmp_path / "humaneval.jsonl", [record])
    assert evaluate.main(["--regrade", str(path), "--task", "humaneval", "--style", "bare"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"task": "humaneval", "gen_length": None, "n": 1, "correct": 1, "accuracy": 1.0}
    assert regrade(lines(tmp_path / "m.jsonl", [{**EGGS, "ground_truth": "18"}]), "math500")[0]["correct"] == 1


@needs_data
def test_a_published_row_of_mbpp_with_a_completion(tmp_path):
    with gzip.open(DATA / "mbpp" / "mbpp.jsonl.gz", "rt") as file:
        published = [json.loads(line) for line, _ in zip(file, range(2), strict=False)]
    rows = [{**published[0], "completion": f"```python\n{published[place]['code']}\n```"} for place in (0, 1)]
    (told,) = regrade(lines(tmp_path / "mbpp.jsonl", rows), "mbpp")
    assert (told["n"], told["correct"]) == (2, 1)


@pytest.mark.parametrize(
    ("rows", "task", "told"),
    [
        ([{"prompt": "q", "completion": RIGHT}], "code", "FILE:1: the row has neither tests nor a solution; a row is"),
        ([{**ADDS, "completion": "a"}, {"prompt": "q", "solution": RIGHT, "completion": "a"}], "code",
         "FILE:2: no tests among the keys ('prompt', 'solution', 'completion'); copy the test fields of the data set into"),
        ([ADDS], "code", "FILE:1: no generated text among the keys ('prompt', 'test_list'); write it under generations or completion"),
        ([{**ADDS, "completion": [RIGHT]}], "code", "FILE:1: completion = ["),
        ([{"question": "q", "generations": "a"}], "gsm8k", "FILE:1: no 'ground_truth' among the keys ('question', 'generations'); a"),
        ([EGGS, {"prompt": "q", "answer": "3"}], "gsm8k", "FILE:2: no 'completion' among the keys"),
        ([{"question": "q", "ground_truth": 3}], "gsm8k", "FILE:1: no 'generations' among the keys"),
        ([{**EGGS, "generations": ["a", "b"]}], "gsm8k", "FILE:1: generations = ['a', 'b']: a text was expected; write one row for each"),
        ([{**EGGS, "ground_truth": "many"}], "gsm8k", "FILE:1: the stored answer = 'many' states no number"),
        ([{**EGGS, "gen_length": "long"}], "gsm8k", "FILE:1: gen_length = 'long'"),
        ([{**SUDOKU, "question": "Solve it"}], "sudoku", "FILE:1: puzzle = 'Solveit' is not a 4x4 grid"),
        ([{**EGGS, "ground_truth": [1]}], "countdown", "FILE:1: neither the reference [1] is [[numbers], target]"),
        ([], "gsm8k", "FILE:1: the file holds no rows"),
        ([EGGS], "gsm9k", "--task 'gsm9k' is not one of sudoku"),
        ([EGGS], "traces", "--task 'traces' cannot read stored generations; those of sudoku, countdown, arithmetic, gsm8k, math, code can"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_one_line(tmp_path, capsys, rows, task, told):
    path = lines(tmp_path / "rows.jsonl", rows)
    assert evaluate.main([f"--regrade={path}", f"--task={task}"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and not said.out
    assert told.replace("FILE", str(path)) in said.err


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--regrade", "nowhere.jsonl", "--task", "gsm8k"], "nowhere.jsonl: no such file"),
        (["--regrade", "nowhere.json", "--task", "gsm8k"], "nowhere.json: no such file"),
        (["--regrade", "x.jsonl"], "--regrade needs the task that grades"),
        (["--regrade", "x.jsonl", "--task", "gsm8k", "--limit", "3"], "--regrade does not read --limit"),
        (["--regrade"], "--regrade has no value"),
        (["--regrade", "x.jsonl", "--task", "code", "--style", "loose"], "style = 'loose' is not one of"),
        (
            ["--regrade", "x.jsonl", "--task", "math500", "--style", "bare"],
            "--style bare: without effect with --task math500",
        ),
    ],
)
def test_mistakes_in_the_command_are_told(capsys, argv, told):
    assert evaluate.main(argv) == 2
    assert told in capsys.readouterr().err


def test_a_broken_file_is_told_with_its_line(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(EGGS) + "\n{broken\n")
    assert evaluate.main(["--regrade", str(path), "--task", "gsm8k"]) == 2
    assert f"{path}:2: not valid JSON" in capsys.readouterr().err
