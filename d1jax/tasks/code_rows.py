"""Rows of code data sets as they are published, in one form: HumanEval, MBPP, EvalPlus, KodCode, AceCode, and TRL's prompts."""

import ast
import json
from collections.abc import Iterable
from typing import Any

from d1jax.tasks.code_answers import tree_of
from d1jax.tasks.task import DataError, Row

_QUESTION = ("question", "text", "problem", "prompt")
_TESTS = ("test_list", "test_cases", "tests", "test")
_SOLUTION = ("solution", "code", "canonical_solution", "completion")
_CURE = (
    'a row is {"prompt": "Write a function f ...", "test_list": ["assert f(1) == 2", ...]} with an optional "solution"'
)


def read_row(record: dict[str, Any], where: str) -> Row:
    """One record as {question, stub, entry_point, tests, shown, setup, suite, solution}.

    `stub` and `entry_point` are HumanEval's, else None. `setup` runs between the program and each of `tests`; `suite` says
    that the one test is a whole file of checks. `shown` are assertions that a prompt may quote. Raises DataError.
    """
    if isinstance(record.get("entry_point"), str) and isinstance(record.get("test"), str):
        return _humaneval(record, where)
    question = _question(record, where)
    setup = "\n".join([*_texts(record, "test_imports", where), *_texts(record, "test_setup_code", where)]).strip("\n")
    solution = next((record[key] for key in _SOLUTION if isinstance(record.get(key), str)), None)
    shown = _texts(record, "test_list", where)
    suite = isinstance(record.get("test"), str) and record["test"].strip() != ""
    if suite and shown:  # EvalPlus: the published assertions are in the prompt, the large test is what counts
        tests = [record["test"]]
    elif suite:
        setup, tests = _pytest(record["test"])
        shown = [line.strip() for test in tests for line in test.split("\n") if line.strip().startswith("assert ")]
        suite = False
    else:
        key = next((key for key in _TESTS if record.get(key)), "test_list")
        shown = tests = _texts(record, key, where)
        for test in tests:
            _check_test(test, f"{where}: {key}")
    if not tests and solution is None:
        raise DataError(f"{where}: the row has neither tests nor a solution; {_CURE}")
    return {
        "question": question, "stub": None, "entry_point": None, "tests": list(tests), "shown": list(shown),
        "setup": _newlines(setup), "suite": suite, "solution": None if solution is None else _newlines(solution),
    }  # fmt: skip


def _check_test(test: str, where: str) -> None:
    """Raises DataError for a test that any program passes, or none: it must assert something, or call something that may."""
    tree = tree_of(test)
    if tree is None:
        raise DataError(f"{where}: {test[:60]!r} is no Python; write assert f(1) == 2")
    checks = [
        node
        for statement in tree.body
        if not isinstance(statement, ast.FunctionDef | ast.ClassDef)
        for node in ast.walk(statement)
        if isinstance(node, ast.Assert | ast.Raise) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call))
    ]
    if not checks or any(isinstance(node, ast.Assert) and isinstance(node.test, ast.Tuple) for node in checks):
        raise DataError(f"{where}: {test[:60]!r} checks nothing, so every program would pass; write assert f(1) == 2")


def _humaneval(record: dict[str, Any], where: str) -> Row:
    stub, entry_point = record.get("prompt"), record["entry_point"]
    if not isinstance(stub, str) or not entry_point.isidentifier():
        raise DataError(
            f"{where}: prompt = {stub!r:.40}, entry_point = {entry_point!r:.40}: HumanEval's rows have the beginning of "
            "a program in prompt and the name of its function in entry_point"
        )
    body = record.get("canonical_solution")
    return {
        "question": stub, "stub": stub, "entry_point": entry_point, "shown": [], "setup": "",
        "tests": [f"{record['test']}\ncheck({entry_point})"],
        "suite": "inputs = " in record["test"],  # EvalPlus: hundreds of inputs
        "solution": f"{stub}{body}" if isinstance(body, str) and body.strip() else None,
    }  # fmt: skip


def _question(record: dict[str, Any], where: str) -> str:
    for key in _QUESTION:
        value = record.get(key)
        if isinstance(value, list):  # TRL's conversational form
            turns = [turn for turn in value if isinstance(turn, dict) and turn.get("role") in ("system", "user")]
            value = "\n\n".join(turn["content"] for turn in turns if isinstance(turn.get("content"), str))
        if isinstance(value, str) and value.strip():
            return _newlines(value).strip()
    raise DataError(f"{where}: no question among the keys {', '.join(record)[:80] or '(none)'}; {_CURE}")


def _texts(record: dict[str, Any], key: str, where: str) -> list[str]:
    """A text, a list of texts, or a list of texts in JSON, as a list without blanks."""
    value = record.get(key)
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            pass  # a test that begins with a list
    if isinstance(value, str):
        value = [value]
    if value is None:
        return []
    if not isinstance(value, Iterable) or not all(isinstance(one, str) for one in value):
        raise DataError(
            f"{where}: {key} = {value!r:.60}: a list of Python texts was expected, such as assert f(1) == 2; tests of "
            f"inputs and outputs have to be written as such; {_CURE}"
        )
    return [_newlines(one) for one in value if one.strip()]


def _pytest(text: str) -> tuple[str, list[str]]:
    """(what all tests share, one call a test function) of a file for pytest; the file as one test where it has none."""
    tree = tree_of(text)
    names = [
        node.name
        for node in (tree.body if tree is not None else ())
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test") and not node.args.args
    ]
    if not names:
        return "", [text]
    bodies = [f"{_source(text, name, tree)}\n{name}()" for name in names]
    tested = {name: None for name in names}
    shared = [node for node in tree.body if getattr(node, "name", None) not in tested]
    return "\n".join(ast.unparse(node) for node in shared), bodies


def _source(text: str, name: str, tree: ast.Module) -> str:
    # The last of several of one name is the one that pytest runs, too.
    return [ast.unparse(node) for node in tree.body if getattr(node, "name", None) == name][-1]


def _newlines(text: str) -> str:
    return text.replace("\r\n", "\n")
