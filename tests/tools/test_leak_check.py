"""Protects: the leak check finds what is in both files and where, on made-up rows and on the published ones, and its exit code says so."""

import gzip
import importlib.util
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
HERE = pytest.mark.skipif(not DATA.exists(), reason="the data is not here")

_spec = importlib.util.spec_from_file_location("leak_check", ROOT / "tools" / "leak_check.py")
leak_check = importlib.util.module_from_spec(_spec)
sys.modules["leak_check"] = leak_check  # dataclasses looks it up
_spec.loader.exec_module(leak_check)

GRID, OTHER = "1234341221434321", "4321123434122143"


@pytest.fixture
def check(tmp_path, capsys):
    """`check(task, train, test, *flags)` -> (exit code, overlaps or what was told); rows or sources."""

    def call(task, train, test, *flags):
        sources = []
        for name, rows in (("train", train), ("test", test)):
            if not isinstance(rows, str):
                path = tmp_path / f"{name}.jsonl"
                path.write_text("".join(json.dumps(row) + "\n" for row in rows))
                rows = str(path)
            sources += [f"--{name}", rows]
        code = leak_check.main(["--task", task, *sources, *flags])
        said = capsys.readouterr()
        assert (said.out.count("\n"), said.err.count("\n")) == ((1, 0) if code < 2 else (0, 1))
        return code, json.loads(said.out) if code < 2 else said.err

    return call


def blank(grid, cells):
    return "".join("0" if place in cells else digit for place, digit in enumerate(grid))


def test_sudoku_by_puzzle_and_by_grid(check):
    train = [
        {"puzzle": blank(OTHER, {0}), "solution": OTHER},
        {"puzzle": blank(GRID, {1}), "solution": GRID},
        {"Puzzle": blank(GRID, {2}), "Solution": GRID},
    ]
    code, found = check("sudoku", train, [{"puzzle": blank(GRID, {2})}])  # its only completion is its grid
    assert code == 1 and found["rows"] == {"train": 3, "test": 1}
    assert found["overlaps"] == {
        "problem": {"keys": 1, "train": 1, "test": 1, "train_lines": [3], "test_lines": [1]},
        "solution": {"keys": 1, "train": 2, "test": 1, "train_lines": [2, 3], "test_lines": [1]},
    }
    code, found = check("sudoku", train[1:], [{"puzzle": blank(OTHER, {5})}])
    assert code == 0 and {one["keys"] for one in found["overlaps"].values()} == {0}


def test_countdown_by_numbers_in_any_order_and_target(check):
    train = [{"nums": [1, 2, 3], "target": 6}, {"nums": [3, 1, 2], "target": 7}, {"nums": [5, 5, 2, 1], "target": 9}]
    code, found = check("countdown", train, [{"input": "2,3,1", "output": "6"}, {"numbers": [5, 2, 2, 1], "target": 9}])
    assert code == 1
    assert found["overlaps"] == {"problem": {"keys": 1, "train": 1, "test": 1, "train_lines": [1], "test_lines": [1]}}


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("How many  apples?\n", "how many apples", True),
        ("Let $x^{2} = 1.$", "let $x^2=1$.", True),
        (r"$\left( x \right),$", "$(x)$", True),
        ("\uff11\uff12 apples", "12 apples", True),
        ("$x + 1$", "$x - 1$", False),
        ("1.5 apples", "15 apples", False),
        ("1,5 and 3", "15 and 3", False),
        ("7 apples", "8 apples", False),
        (r"$\leftarrow$", "$arrow$", False),
    ],
)
def test_texts_are_equal_but_for_their_layout(check, one, other, equal):
    code, found = check("jsonl", [{"prompt": one}], [{"prompt": other}])
    assert (code, found["overlaps"]["text"]["keys"]) == (int(equal), int(equal))


def test_a_run_of_words_is_found(check):
    shared = " ".join(f"word{number}" for number in range(14))
    train = [{"question": "something else"}, {"question": f"Before, {shared.upper()}!"}]
    test = [{"problem": "a short one"}, {"problem": f"{shared.replace(' ', ', ')} and after"}]
    code, found = check("math", train, test)
    assert code == 1 and found["overlaps"]["text"]["keys"] == 0
    assert found["overlaps"]["13-gram"] == {"keys": 2, "train": 1, "test": 1, "train_lines": [2], "test_lines": [2]}
    assert check("math", train, test, "--ngram", "15")[0] == 0
    code, found = check("math", train, test, "--ngram", "0")
    assert code == 0 and list(found["overlaps"]) == ["text"]


@given(st.lists(st.sampled_from("abc"), max_size=12), st.lists(st.sampled_from("abc"), max_size=12), st.integers(1, 5))
def test_n_grams_are_those_of_brute_force(first, second, n):
    runs = lambda row: {tuple(row[i:j]) for i in range(len(row)) for j in range(i, len(row) + 1) if j - i == n}  # noqa: E731
    keys = lambda text: list(leak_check.ngrams(text, n))  # noqa: E731
    found = leak_check.overlap([(1, " ".join(first))], [(1, " ".join(second))], keys)
    assert found["keys"] == len(runs(first) & runs(second))


def test_lines_are_those_of_the_file_and_as_many_as_asked(check, tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n" + b'{"text": "the same"}\n\n' * 5))
    code, found = check("jsonl", str(path), [{"text": "The same."}], "--lines", "2")
    assert code == 1 and found["overlaps"]["text"] == {
        "keys": 1, "train": 5, "test": 1, "train_lines": [2, 4], "test_lines": [1],
    }  # fmt: skip


def test_chats_and_named_fields_are_read(check):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is it?"}]
    assert check("jsonl", [{"messages": chat}], [{"prompt": [chat[1]]}])[0] == 1
    assert (
        check("jsonl", [{"asked": "What?", "text": "no"}], [{"asked": "what", "text": "yes"}], "--field", "asked")[0]
        == 1
    )


OWN = """
from d1jax.tasks.sudoku import Sudoku


class Mine(Sudoku):
    def problem_key(self, row):
        return "all the same"
"""


def test_a_task_of_the_users_own_says_what_is_the_same(check, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    rows = [{"puzzle": blank(GRID, {1}), "solution": GRID}], [{"puzzle": blank(OTHER, {1}), "solution": OTHER}]
    code, found = check(f"{tmp_path / 'own.py'}:Mine", *rows)
    assert code == 1 and [one["keys"] for one in found["overlaps"].values()] == [1, 0]


@pytest.mark.parametrize("task", ["sudoku", "countdown", "arithmetic"])
def test_generated_splits_share_nothing(check, task):
    code, found = check(task, "generated", "generated", "--rows", "100")
    assert code == 0 and found["rows"] == {"train": 100, "test": 100}


@pytest.mark.parametrize(
    ("task", "flags", "told"),
    [
        ("chess", [], "--task 'chess' is not one of sudoku, countdown, arithmetic, gsm8k"),
        ("nowhere.py:Mine", [], "there is no file 'nowhere.py'"),
        ("jsonl", ["--ngram", "-3"], "--ngram '-3' is not a whole number from 0 on"),
        ("jsonl", ["--lines", "few"], "--lines 'few' is not a whole number"),
        ("jsonl", ["--ngrams", "13"], "--ngrams is not one of --task, --train"),
        ("jsonl", ["--ngram", "13", "--ngram", "8"], "--ngram is given twice"),
        ("jsonl", ["--field", "asked"], "train.jsonl:1: asked = None: no text among the keys (prompt); name it with --field"),
        ("countdown", ["--ngram", "13"], "--ngram is for texts"),
        ("sudoku", ["--rows", "10"], "--rows is for sources that are generated"),
        ("sudoku", [], "train.jsonl:1: no puzzle among the keys"),
    ],
)  # fmt: skip
def test_mistakes_are_named(check, task, flags, told):
    code, said = check(task, [{"prompt": "a"}], [{"prompt": "b"}], *flags)
    assert code == 2 and said.startswith("error: ") and told in said


def test_sources_that_are_not_there_are_named(check, capsys):
    assert "nowhere.jsonl: no such file" in check("jsonl", "nowhere.jsonl", [{"prompt": "b"}])[1]
    assert "texts cannot be generated" in check("gsm8k", "generated", [{"prompt": "b"}])[1]
    assert "train.jsonl:1: the file holds no rows" in check("jsonl", [], [{"prompt": "b"}])[1]
    assert leak_check.main(["--task", "jsonl", "--train", "a.jsonl"]) == 2
    assert "--test is missing" in capsys.readouterr().err
    assert leak_check.main(["--help"]) == 0 and "--ngram 13" in capsys.readouterr().out


# -- the published rows --------------------------------------------------------------------------------------------------


@HERE
def test_every_grid_of_d1s_sudoku_test_is_trained_on_and_no_puzzle(check):
    train, test = str(DATA / "sudoku/d1_train_first20000.jsonl.gz"), str(DATA / "sudoku/d1_test_500.jsonl")
    code, found = check("sudoku", train, test)
    assert code == 1 and found["overlaps"]["problem"]["keys"] == 0
    assert (found["overlaps"]["solution"]["keys"], found["overlaps"]["solution"]["test"]) == (229, 500)


@HERE
def test_six_puzzles_of_spgs_sudoku_test_are_trained_on(check):
    train, test = str(DATA / "sudoku/d1_train_first20000.jsonl.gz"), str(DATA / "sudoku/spg_test_256.jsonl")
    assert check("sudoku", train, test)[1]["overlaps"]["problem"]["keys"] == 6


@HERE
def test_four_countdown_problems_are_trained_on(check):
    train, test = (
        str(DATA / "countdown/tinyzero_train_rows00000-19999.jsonl.gz"),
        str(DATA / "countdown/d1_test_cd3.jsonl"),
    )
    code, found = check("countdown", train, test)
    rows = [line - 1 for line in found["overlaps"]["problem"]["train_lines"]]
    assert code == 1 and rows == [133, 8498, 10965, 13886]


@HERE
def test_no_math500_problem_is_in_maths_training_rows(check):
    train, test = str(DATA / "math/train.jsonl.gz"), str(DATA / "math/math500_test.jsonl")
    assert check("math", train, test, "--ngram", "0") == (0, {
        "task": "math", "train": train, "test": test, "rows": {"train": 7500, "test": 500},
        "overlaps": {"text": {"keys": 0, "train": 0, "test": 0, "train_lines": [], "test_lines": []}},
    })  # fmt: skip


@HERE
def test_three_questions_of_s1k_are_of_math500(check):
    train, test = str(DATA / "s1k/s1k_questions_solutions_1000.jsonl.gz"), str(DATA / "math/math500_test.jsonl")
    code, found = check("s1k", train, test)
    ids = [line - 1 for line in found["overlaps"]["text"]["train_lines"]]
    assert code == 1 and ids == [81, 124, 181] and found["overlaps"]["13-gram"]["train"] == 37
