"""Code: rows as they are published, the program that a text offers, and the rewards of the papers."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.tasks.code import Code
from d1jax.tasks.code_answers import blocks, code_format, completed, offered_code, parses, uses_forbidden, xml_format
from d1jax.tasks.jsonl import read_rows
from d1jax.tasks.task import DataError

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="shared/data is absent")

CODE, BARE, TAGGED = Code(), Code(style="bare"), Code(tags=True)
RECORD = {
    "prompt": "Write a function that adds one.",
    "test_list": ["assert add(1) == 2", "assert add(2) == 3", "assert add(-1) == 0", "assert add(0.5) == 1.5"],
    "solution": "def add(x):\n    return x + 1",
}
STUB = 'import math\n\ndef helper(x):\n    return x\n\n\ndef root(x: float) -> float:\n    """Square root."""\n'
HUMANEVAL = {
    "task_id": "HumanEval/x", "prompt": STUB, "entry_point": "root", "canonical_solution": "    return math.sqrt(helper(x))\n",
    "test": "def check(candidate):\n    assert candidate(4) == 2\n",
}  # fmt: skip


def row_of(record, task=CODE):
    return task.parse(record, "rows.jsonl:1")


def fenced(code, label="python"):
    return f"```{label}\n{code}\n```"


# -- rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "tests"),
    [
        (RECORD, 4),
        ({"question": "q", "test_cases": ["assert f(1) == 2"]}, 1),  # AceCode
        ({"question": "q", "test_cases": '["assert f(1) == 2", "assert f(2) == 3"]'}, 2),
        ({"problem": "q", "tests": "assert f(1) == 2"}, 1),
        ({"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}], "tests": ["assert f(1) == 2"]}, 1),
        ({"text": "q", "code": "def f(x): return x + 1", "test_setup_code": "", "test_list": ["assert f(1) == 2"]}, 1),
        ({"question": "q", "solution": "def f(x):\n  return x + 1",
          "test": "from solution import f\n\ndef test_a():\n    assert f(1) == 2\n\ndef test_b():\n    assert f(2) == 3\n"}, 2),
        (HUMANEVAL, 1),
    ],
    ids=["trl", "acecode", "json", "text", "chat", "mbpp", "kodcode", "humaneval"],
)  # fmt: skip
def test_rows_of_every_kind_are_read_and_their_solutions_pass(record, tests):
    row = row_of(record)
    assert len(row["tests"]) == tests and CODE.has_reference(row)
    solution = row["solution"] or "def f(x): return x + 1"
    assert CODE.grade(row, fenced(solution)) == {"solved": 1.0, "pass_rate": 1.0, "code_format": 1.0}
    wrong = fenced("def f(x): return 0\nadd = root = f")
    assert CODE.grade(row, wrong)["solved"] == 0.0


def test_the_order_is_program_then_setup_then_test():
    row = row_of(
        {
            "text": "q",
            "test_setup_code": "b = a + 1",
            "test_imports": ["import math"],
            "test_list": ["assert math.floor(b) == 2"],
        }
    )
    assert CODE.grade(row, fenced("a = 1"))["solved"] == 1.0


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "no question"),
        ({"prompt": "q"}, "neither tests nor a solution"),
        ({"prompt": "q", "tests": [{"input": "1", "output": "2"}]}, "a list of Python texts was expected"),
        ({"prompt": 3, "test": "def check(c): pass", "entry_point": "f"}, "HumanEval's rows"),
    ],
)
def test_bad_rows_are_named_with_file_line_and_cure(record, message):
    with pytest.raises(DataError, match=message) as error:
        row_of(record)
    assert str(error.value).startswith("rows.jsonl:1: ")


def test_a_row_without_tests_is_for_sft_only():
    row = row_of({"prompt": "q", "solution": "x = 1"})
    assert not CODE.has_reference(row)
    assert CODE.target(row) == "```python\nx = 1\n```"
    assert CODE.grade(row, CODE.target(row))["solved"] == 0.0


@pytest.mark.parametrize("field", [{"seconds": 0}, {"megabytes": 1}, {"shown_tests": -1}, {"style": "other"}])
def test_bad_settings_are_refused(field):
    with pytest.raises(ValueError, match="code: "):
        Code(**field)


def test_prompts_show_the_question_and_as_many_tests_as_asked_for():
    row = row_of(RECORD)
    assert RECORD["prompt"] in CODE.prompt(row) and "```python" in CODE.prompt(row)
    for count in (0, 1, 3, 9):
        assert Code(shown_tests=count).prompt(row).count("assert ") == min(count, 4)
    assert BARE.prompt(row).startswith(RECORD["prompt"])
    assert BARE.prompt(row_of(HUMANEVAL)) == STUB
    assert STUB.strip() in CODE.prompt(row_of(HUMANEVAL))
    assert "<answer>" in TAGGED.prompt(row)


@pytest.mark.parametrize("task", [CODE, BARE, TAGGED], ids=["instruct", "bare", "tags"])
@pytest.mark.parametrize("record", [RECORD, HUMANEVAL], ids=["tests", "humaneval"])
def test_targets_are_solved(task, record):
    row = row_of(record, task)
    assert task.rewards(row, task.target(row))["solved"] == 1.0
    assert not set(task.prompt(row) + task.target(row)) - set(task.alphabet)


# -- extraction --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (fenced("a"), "a"),
        (f"first {fenced('a')}\n", "a"),
        ("Write ```x = 1``` here.", None),
        (f"one\n{fenced('a')}\ntwo\n{fenced('b')}\nend", "b"),
        (f"{fenced('a')}\nIt prints\n```\n3\n```", "a"),
        (f"{fenced('a')}\n```bash\npip\n```", "a"),
        (fenced("a", "Python"), "a"),
        (fenced("a", "py"), "a"),
        (fenced("a", ""), "a"),
        (fenced("a", "bash"), None),
        ("```python\na", "a"),
        (f"{fenced('a')}\nagain:\n```python\nb", "a"),
        ("```python\n    return 1```", "    return 1"),
        (f"{fenced('a')}\n<answer>\n{fenced('b')}\n</answer>\n{fenced('c')}", "b"),
        (f"<reasoning>\n{fenced('a')}\n</reasoning>\n<answer>\n```python\nb", "b"),
        ("```python\r\na\r\nb\r\n```\r\n", "a\nb"),
        (f"{fenced('a')}<|im_end|>", "a"),
        ("```python\nx = '''```a```'''\n```", "x = '''```a```'''"),
        ("", None),
        ("words", None),
    ],
)
def test_the_program_that_a_text_offers(text, code):
    assert offered_code(text, "instruct") == code


def test_without_a_fence_a_bare_text_is_the_program():
    assert offered_code("x = 1\n", "bare") == "x = 1"
    assert offered_code("    return 1", "bare") == "    return 1"
    assert offered_code(" \n", "bare") is None


LINES = st.lists(
    st.sampled_from(["x = 1", "    return x", "", "# `a` and ``b``", "s = '<answer>'", "def f(x):"]), min_size=1
)


@given(
    LINES,
    st.sampled_from(["", "Here it is.\n", "<reasoning>\nso\n</reasoning>\n"]),
    st.sampled_from(["", "\n", "\nDone."]),
)
def test_a_program_in_any_documented_layout_is_found(lines, before, after):
    code = "\n".join(lines)
    if "<answer>" not in code:
        assert offered_code(f"{before}<answer>\n{fenced(code)}\n</answer>{after}", "instruct") == code
    for label in ("python", "py", ""):
        assert offered_code(f"{before}{fenced(code, label)}{after}", "instruct") == code
    assert offered_code(f"{before}```python\n{code}", "instruct") == code.rstrip()


PIECES = st.lists(
    st.sampled_from(
        ["```", "```python", "\n", "x", "<answer>", "</answer>", " ", "'", "(", "\0", "\ud800", "<reasoning>"]
    )
)


@given(PIECES.map("".join) | st.text())
def test_every_text_is_judged(text):
    for style in ("bare", "instruct"):
        code = offered_code(text, style)
        assert code is None or code in text.replace("\r\n", "\n")
    assert code_format(text) in (0.0, 0.5, 1.0)
    assert 0.0 <= xml_format(text) <= 1.0
    assert uses_forbidden(text) in (False, True)
    assert all(block.last >= block.first for block in blocks(text))


@pytest.mark.parametrize(
    "piece", ["```", "```\n", "```python\n", "<answer>", "(", "a.", "-", "\n", "'''", "```python\nx\n```\n"]
)
def test_a_megabyte_of_anything_takes_no_long_time(piece):
    text = piece * (2**20 // len(piece))
    offered_code(text, "bare")
    code_format(text)
    xml_format(text)
    uses_forbidden(text)


# -- completion of HumanEval's stubs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "    return math.sqrt(helper(x))",
        "return math.sqrt(helper(x))",
        "def root(x):\n    return math.sqrt(helper(x))",
        "from math import sqrt\ndef root(x):\n    return sqrt(x)",
        STUB + "    return math.sqrt(x)",
        "import math\nroot = math.sqrt",
        "from math import sqrt as root",
    ],
)
def test_a_body_and_a_whole_function_complete_a_stub(code):
    assert parses(completed(STUB, "root", code))
    assert CODE.grade(row_of(HUMANEVAL), fenced(code))["solved"] == 1.0


# -- rewards -----------------------------------------------------------------------------------------------------------

GOOD = "def add(x):\n    return x + 1"
HALF = "def add(x):\n    return abs(x) + 1 if x != 0.5 else 0"


@pytest.mark.parametrize(
    ("text", "rewards"),
    [
        (fenced(GOOD), {"solved": 1.0, "pass_rate": 1.0, "code_format": 1.0, "diffucoder": 2.5, "xml_format": 0.0}),
        (fenced(HALF), {"solved": 0.0, "pass_rate": 0.5, "code_format": 1.0, "diffucoder": 1.5}),
        (fenced("def add(x:"), {"solved": 0.0, "pass_rate": 0.0, "code_format": 0.5, "diffucoder": 0.25}),
        (f"{fenced(GOOD)}\nThat is all.", {"solved": 1.0, "code_format": 0.0, "diffucoder": 0.0}),
        (f"```python\n{GOOD}", {"solved": 1.0, "code_format": 0.0, "diffucoder": 0.0}),
        (fenced("import os\n" + GOOD), {"solved": 1.0, "pass_rate": 1.0, "allowed_pass_rate": 0.0}),
        ("", {"solved": 0.0, "pass_rate": 0.0, "code_format": 0.0, "diffucoder": 0.0, "allowed_pass_rate": 0.0}),
    ],
)
def test_rewards_of_diffucoder(text, rewards):
    found = CODE.rewards(row_of(RECORD), text)
    assert {name: found[name] for name in rewards} == rewards


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (fenced("x = 1"), 1.0),
        (fenced("x = 1") + "\n\n \n", 1.0),
        ("Text first.\n" + fenced("x = 1") + "<|im_end|>", 1.0),
        ("```python  \nx = 1\n```", 1.0),
        (fenced("x = "), 0.5),
        (fenced("x = 1", "py"), 0.0),
        (fenced("x = 1", ""), 0.0),
        (fenced("x = 1") + "\nText behind.", 0.0),
        (fenced("x = 1") + "\n" + fenced("x = 1"), 0.0),
        ("```python\nx = 1", 0.0),
        (fenced(""), 0.0),
        ("x = 1", 0.0),
        ("Use ``` here.\n" + fenced("x = 1"), 0.0),
    ],
)
def test_code_format(text, value):
    assert code_format(text) == value


def test_xml_format_of_d1():
    full = f"<reasoning>\nso\n</reasoning>\n<answer>\n{fenced('x = 1')}\n</answer>"
    assert xml_format(full) == 1.0
    assert xml_format(full.replace("```python\n", "").replace("\n```", "")) == 0.0
    assert xml_format(full.replace("<reasoning>\n", "")) == 0.875
    assert xml_format(full.replace("</answer>", "")) == 0.375
    assert xml_format(fenced("x = 1")) == 0.0


@pytest.mark.parametrize(
    ("code", "forbidden"),
    [
        ("import os", True),
        ("import numpy, os.path as p", True),
        ("from pathlib import Path", True),
        ("__import__('re')", True),
        ("sys.exit()", True),
        ("import sys(", True),
        ("import math", False),
        ("self.os = 1", False),
        ("x = 'import os'", False),
        ("import osmosis", False),
    ],
)
def test_forbidden_modules(code, forbidden):
    assert uses_forbidden(code) is forbidden


def test_many_are_judged_as_one_by_one_and_the_names_are_always_the_same():
    row = row_of(RECORD)
    texts = [fenced(GOOD), "", fenced(HALF), "```python\nimport sys; sys.exit(0)\n```", fenced("x" * 10)]
    rows = [row] * len(texts)
    assert CODE.rewards_many(rows, texts) == [CODE.rewards(row, text) for text in texts]
    assert CODE.grade_many(rows, texts) == [CODE.grade(row, text) for text in texts]
    assert len({tuple(rewards) for rewards in CODE.rewards_many(rows, texts)}) == 1
    assert CODE.rewards_many([], []) == []


def test_the_self_test_names_the_rows_whose_solution_does_not_pass():
    broken = {**RECORD, "solution": "def add(x): return 1 / 0"}
    rows = [row_of(record) for record in (RECORD, broken, HUMANEVAL, {"prompt": "q", "solution": "x"})]
    assert CODE.self_test(rows) == [(1, "error: ZeroDivisionError: division by zero")]


# -- the real files ----------------------------------------------------------------------------------------------------

FILES = [
    ("humaneval/HumanEval", 164, []),
    ("humaneval/HumanEvalPlus-OriginFmt", 164, [32]),  # broken upstream
    ("mbpp/mbpp", 974, []),
    ("mbpp/sanitized-mbpp", 427, []),
    ("mbpp/MbppPlus-OriginFmt", 378, []),
]


@needs_data
@pytest.mark.parametrize(("name", "count", "broken"), FILES, ids=[f"{name}-" for name, _, _ in FILES])
def test_published_solutions_pass_and_broken_ones_do_not(name, count, broken):
    rows = read_rows(DATA / f"{name}.jsonl.gz", CODE)
    assert len(rows) == count
    assert [place for place, _ in CODE.self_test(rows)] == broken
    nothing = [{**row, "solution": None} for row in rows]
    assert CODE.self_test(nothing) == []
    # The functions are there and give nothing back.
    returns = [fenced(f"{row['solution']}\n{_emptied(row['solution'])}") for row in rows[:150]]
    solved = sum(grades["solved"] for grades in CODE.grade_many(rows[:150], returns))
    assert solved <= 1


def _emptied(solution):
    import ast

    names = [node.name for node in ast.parse(solution).body if isinstance(node, ast.FunctionDef)]
    return "\n".join(f"def {name}(*a, **k): return '<nothing>'" for name in names)


@pytest.mark.parametrize(
    ("test", "message"),
    [("f(1) == 2", "checks nothing"), ("# todo", "checks nothing"), ("assert (f(1) == 2, 'msg')", "checks nothing"),
     ("def test_a():\n    assert f(1) == 2", "checks nothing"), ("assert f(1) = 2", "is no Python")],
)  # fmt: skip
def test_a_test_that_every_program_passes_is_refused(test, message):
    with pytest.raises(DataError, match=message):
        Code().parse({"prompt": "q", "test_list": ["assert f(2) == 3", test]}, "rows:1")
