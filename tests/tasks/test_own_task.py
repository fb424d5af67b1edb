"""A task of a user's own: one file, and its name in the config."""

import pytest

from d1jax.config import Config, TaskConfig, UserError
from d1jax.config.task import TASK_NAMES
from d1jax.tasks import TASKS, make
from d1jax.training.context import build

MINE = """
from dataclasses import dataclass
from typing import ClassVar

from d1jax.tasks.sudoku import Sudoku


@dataclass(frozen=True)
class Mine(Sudoku):
    name: ClassVar[str] = "mine"

    def rewards(self, row, text):
        return {**super().rewards(row, text), "short": float(len(text) < 10)}


class Half:
    name = "half"
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


def test_the_names_of_the_configuration_are_those_of_the_table():
    assert set(TASK_NAMES) == set(TASKS)


def test_a_class_of_a_file_is_a_task(file):
    config = Config(task=TaskConfig(name=f"{file}:Mine", train_rows=20, eval_rows=4))
    context = build(config)
    assert context.task.name == "mine" and len(context.train) == 20
    assert context.task.rewards(context.train.rows[0], "")["short"] == 1.0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.py:Mine", "there is no file 'nowhere.py'"),
        ("FILE:Other", "has no class 'Other'"),
        ("FILE:Half", "Half lacks alphabet, columns, generate"),
        ("sudoko", "did you mean 'sudoku'"),
    ],
)
def test_what_is_no_task_is_told(file, name, message):
    with pytest.raises(ValueError, match=message):
        make(name.replace("FILE", str(file)), style="bare", split_seed=0)


def test_a_file_that_cannot_be_executed_is_told_in_a_line(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("1 / 0")
    with pytest.raises(UserError, match="config: task: task.name = .* raised ZeroDivisionError"):
        build(Config(task=TaskConfig(name=f"{path}:Mine")))


def test_a_file_that_came_with_a_run_is_not_executed(tmp_path):
    (tmp_path / "run" / "source").mkdir(parents=True)
    path = tmp_path / "run" / "task.py"
    path.write_text(f"open({str(tmp_path / 'EXECUTED')!r}, 'w')")
    with pytest.raises(UserError, match="a file of the run itself, which is not executed"):
        build(Config(task=TaskConfig(name=f"{path}:Mine")), saved=tmp_path / "run" / "source")
    assert not (tmp_path / "EXECUTED").exists()


def own(tmp_path, body):
    path = tmp_path / "odd.py"
    path.write_text(f"from d1jax.tasks.sudoku import Sudoku\n\n\nclass Odd(Sudoku):\n    {body}\n")
    return Config(task=TaskConfig(name=f"{path}:Odd", train_rows=4, eval_rows=2))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def generate(self, *_): raise KeyError('x')", r"generate raised KeyError: 'x' \(.*odd.py:5\)"),
        ("def prompt(self, row): raise SystemExit(0)", "prompt raised SystemExit: 0"),
        ("def __init__(self, **_): raise OSError('no disk')", "Odd raised OSError: no disk"),
        ("def problem_key(self, row): return 1 / 0", "problem_key raised ZeroDivisionError"),
        ("def grade(self, row, text): return {}", r"grade returned \{\}; return \{'solved'"),
        ("def grade(self, row, text): raise IndexError", "grade raised IndexError"),
    ],
)
def test_what_its_code_raises_is_told_before_anything_is_compiled(tmp_path, body, message):
    with pytest.raises(ValueError, match=message):
        build(own(tmp_path, body))


def test_a_file_that_exits_does_not_end_the_command_as_if_it_were_done(tmp_path):
    (tmp_path / "exits.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(ValueError, match=r"exits.py raised SystemExit: 0"):
        make(f"{tmp_path}/exits.py:Mine", style="bare", split_seed=0)


def test_a_dataclass_with_postponed_annotations_works(tmp_path):
    path = tmp_path / "json.py"  # also the name of a library
    path.write_text("from __future__ import annotations\n" + MINE)
    assert make(f"{path}:Mine", style="bare", split_seed=0).name == "mine"
    import json

    assert hasattr(json, "loads")


def test_its_code_is_part_of_what_a_run_began_with(file):
    config = Config(task=TaskConfig(name=f"{file}:Mine", train_rows=4, eval_rows=2))
    before = build(config).data["task.name"]
    file.write_text(MINE.replace("< 10", "< 12"))
    after = build(config).data["task.name"]
    assert before["source"] == after["source"] == str(file) and before["sha256"] != after["sha256"]
