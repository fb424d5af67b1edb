"""Reading rows: what is accepted, and that each complaint names the file, the line and the cure."""

import gzip
import json
import os

import pytest

from d1jax.tasks import Countdown, Sudoku
from d1jax.tasks.jsonl import read_rows
from d1jax.tasks.task import DataError

GOOD = '{"puzzle": "0321003004002100"}'


def write(tmp_path, text, name="rows.jsonl"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def complaint(path, task=None):
    with pytest.raises(DataError) as caught:
        read_rows(path, task or Sudoku())
    return str(caught.value)


def test_plain_and_gzipped_files_give_the_same_rows(tmp_path):
    text = f"\n{GOOD}\n   \n" + json.dumps({"Puzzle": "4320004330100004", "Solution": "4321124334122134"}) + "\n\n"
    plain = read_rows(write(tmp_path, text), Sudoku())
    packed = read_rows(write(tmp_path, gzip.compress(text.encode()), "rows.jsonl.gz"), Sudoku())
    assert (
        plain
        == packed
        == [{"puzzle": "0321003004002100"}, {"puzzle": "4320004330100004", "solution": "4321124334122134"}]
    )


def test_windows_files_are_read(tmp_path):
    assert len(read_rows(write(tmp_path, b"\xef\xbb\xbf" + f"{GOOD}\r\n{GOOD}".encode()), Sudoku())) == 2


def test_last_line_without_newline_counts(tmp_path):
    assert len(read_rows(write(tmp_path, f"{GOOD}\n{GOOD}"), Sudoku())) == 2


def test_missing_file(tmp_path):
    path = tmp_path / "nowhere.jsonl"
    assert complaint(path).startswith(f"{path}: no such file; check the path")


def test_folder_instead_of_file(tmp_path):
    assert complaint(tmp_path).startswith(f"{tmp_path}:1: cannot be read")


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_empty_file(tmp_path, text):
    path = write(tmp_path, text)
    assert complaint(path) == f"{path}:1: the file holds no rows; write one JSON object per line"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"puzzle": ', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1, 2]", "a JSON object was expected, not a list"),
        ("null", "a JSON object was expected, not a NoneType"),
        ('{"puzzle": "0321003004002100", "puzzle": "4320004330100004"}', "key 'puzzle' stands there twice"),
        ('{"puzzle": "0321003004002100", "more": {"a": 1, "a": 1}}', "key 'a' stands there twice"),
        ('{"question": "?"}', "no puzzle among the keys"),
        ('{"puzzle": "0321"}', "is not a 4x4 grid"),
    ],
)
def test_bad_line_is_named_and_blank_lines_count(tmp_path, line, says):
    path = write(tmp_path, f"{GOOD}\n\n{line}\n{GOOD}\n")
    message = complaint(path)
    assert message.startswith(f"{path}:3: ")
    assert says in message
    assert len(message) < 500


def test_unpackable_gzip(tmp_path):
    path = write(tmp_path, GOOD, "rows.jsonl.gz")
    assert complaint(path).startswith(f"{path}:1: cannot be unpacked")


def test_truncated_and_corrupt_gzip(tmp_path):
    packed = gzip.compress("\n".join([GOOD] * 3).encode())
    truncated = write(tmp_path, packed[:-10], "truncated.jsonl.gz")
    assert "cannot be unpacked" in complaint(truncated)
    corrupt = write(tmp_path, packed[:12] + b"\xff" * 6 + packed[18:], "corrupt.jsonl.gz")
    assert "cannot be unpacked" in complaint(corrupt)


def test_not_utf8(tmp_path):
    path = write(tmp_path, GOOD.encode() + b"\n\xff\xfe\n")
    message = complaint(path)
    assert message.startswith(f"{path}:") and "not UTF-8" in message


def test_the_task_names_the_line_too(tmp_path):
    path = write(tmp_path, '{"nums": [44, 19, 35], "target": 98}\n{"nums": [1, 2, "x"], "target": 3}\n')
    assert complaint(path, Countdown()).startswith(f"{path}:2: ")


def test_rows_that_the_task_leaves_out_are_not_rows(tmp_path):
    path = write(tmp_path, '{"nums": [44, 19, 35], "target": 98}\n{"nums": [1, 2], "target": 3}\n')
    assert [row["target"] for row in read_rows(path, Countdown())] == [98]
    assert "all 1 rows are outside" in complaint(write(tmp_path, '{"nums": [1, 2], "target": 3}\n'), Countdown())


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    assert "is a pipe" in complaint(tmp_path / "rows.jsonl")


def test_a_path_with_a_nul_is_refused():
    assert "cannot hold a NUL" in complaint("rows\0.jsonl")
