"""Worked reasoning: what is read, what the model is shown, and which answers are equal."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.tasks import TASKS, Traces, read_source
from d1jax.tasks.task import DataError

INSTRUCT, BARE = Traces(), Traces(style="bare")
S1K = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "s1k" / "s1k_questions_solutions_1000.jsonl.gz"

RECORD = {
    "question": "What is half of three {quarters}?",
    "thinking_trajectories": ["Three quarters, halved.", "another"],
    "attempt": "It is \\(\\boxed{\\frac{3}{8}}\\).",
    "solution": "Halve 3/4 to get $\\boxed{3/8}$.",
}
ROW = INSTRUCT.parse(RECORD, "here")
PIECES = st.lists(
    st.sampled_from(
        ["<reasoning>", "</reasoning>", "<answer>", "</answer>", "\\boxed{", "\\frac{", "\\text{", "{", "}"]
        + ["$", "\\(", "\\)", ".", ",", "/", "-", "0", "1", "000", " ", "\n", "x", "\u0661", "²"]
    ),
    max_size=16,
).map("".join)


def row(answer):
    return {"question": "?", "reasoning": None, "attempt": None, "answer": answer}


def solved(answer, offer):
    return INSTRUCT.grade(row(answer), f"<answer>{offer}</answer>")["solved"] == 1.0


# -- references ---


@pytest.mark.parametrize(
    ("record", "answer"),
    [
        ({"answer": "48+24=<<48+24=72>>72.\n#### 72"}, "72"),
        ({"answer": "a\n#### 1,080\n"}, "1,080"),
        ({"answer": "72"}, "72"),
        ({"answer": 72}, "72"),
        ({"answer": 0.5}, "0.5"),
        ({"answer": "so it is \\boxed{7}, as " + "long " * 20}, "7"),
        ({"answer": "no", "solution": "\\boxed{3}"}, "3"),
        ({"answer": "4", "solution": "long " * 20}, "4"),
        ({"answer": "4", "attempt": "\\boxed{5}"}, "4"),
        ({"solution": "worked out\n#### 9"}, "9"),
        ({"answer": "long " * 20}, None),
        ({"answer": "#### a heading\n" + "long " * 20}, None),
        ({"answer": "worked\n####"}, None),
        ({"answer": True}, None),
        ({"answer": ["72"]}, None),
        ({"answer": None}, None),
        ({}, None),
    ],
    ids=str,
)
def test_the_reference_is_read_wherever_rows_of_the_field_keep_it(record, answer):
    row = INSTRUCT.parse({"question": "?", **record}, "here")
    assert row["answer"] == answer and INSTRUCT.has_reference(row) is (answer is not None)
    if answer is not None:
        assert INSTRUCT.grade(row, f"<answer>{answer}</answer>")["solved"] == 1.0


# -- reading -----------------------------------------------------------------------------------------------------------


def test_a_record_becomes_a_row():
    assert ROW == {
        "question": "What is half of three {quarters}?",
        "reasoning": "Three quarters, halved.",
        "attempt": "It is \\(\\boxed{\\frac{3}{8}}\\).",
        "answer": "3/8",
    }


@pytest.mark.parametrize(
    ("more", "reasoning"),
    [
        ({}, None),
        ({"thinking": " hm \n"}, "hm"),
        ({"thinking": " "}, None),
        ({"thinking": "b", "thinking_trajectories": ["a"]}, "a"),
        ({"thinking": "b", "thinking_trajectories": []}, "b"),
        ({"thinking": "b", "thinking_trajectories": [" "]}, "b"),
        ({"thinking": "b", "thinking_trajectories": None}, "b"),
        ({"thinking": None}, None),
    ],
)
def test_where_reasoning_comes_from(more, reasoning):
    assert INSTRUCT.parse({"question": "?", **more}, "here")["reasoning"] == reasoning


@pytest.mark.parametrize(
    ("solution", "attempt", "answer"),
    [
        ("first \\boxed{1}, then \\boxed{2}", "\\boxed{3}", "2"),
        ("128", "\\boxed{3}", "128"),
        ("long " * 20, "so \\boxed{3}", "3"),
        ("two\nlines", "so \\boxed{3}", "3"),
        ("\\boxed{}" + "long " * 20, "7", "7"),
        (None, " 7 ", "7"),
        ("", "7", "7"),
        (None, "long " * 20, None),
        ("long " * 20, None, None),
        (None, None, None),
        ("x" * 40, None, "x" * 40),
        ("x" * 41, None, None),
    ],
)
def test_where_the_short_answer_comes_from(solution, attempt, answer):
    record = {"question": "?", "solution": solution, "attempt": attempt}
    assert INSTRUCT.parse(record, "here")["answer"] == answer


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({}, "question = None: a question was expected among the keys (none)"),
        ({"prompt": "?"}, "question = None: a question was expected among the keys prompt"),
        ({"question": " \n"}, "a question was expected among the keys question"),
        ({"question": 7}, "question = 7: a text was expected; write it as a JSON string"),
        ({"question": "?", "attempt": ["x"]}, "attempt = ['x']: a text was expected"),
        ({"question": "?", "solution": 12}, "solution = 12: a text was expected"),
        ({"question": "?", "thinking": {}}, "thinking = {}: a text was expected"),
        ({"question": "?", "thinking_trajectories": "x"}, "thinking_trajectories = 'x': a list of texts was expected"),
        ({"question": "?", "thinking_trajectories": ["x", 1]}, 'write ["..."], or put a single text under "thinking"'),
        ({"question": "?", "thinking_trajectories": [1] * 10_000}, "thinking_trajectories = [1, 1"),
    ],
)
def test_complaints_name_the_place_the_value_and_the_cure(record, says):
    with pytest.raises(DataError) as caught:
        INSTRUCT.parse(record, "rows.jsonl:3")
    assert str(caught.value).startswith("rows.jsonl:3: ")
    assert says in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.skipif(not S1K.exists(), reason="no s1K here")
def test_the_questions_of_s1k_are_read():
    rows = read_source(str(S1K), INSTRUCT)
    assert len(rows) == 1000
    assert sum(row["answer"] is not None for row in rows) > 600
    for row in rows:
        assert INSTRUCT.target(row) is None  # this copy has no traces
        assert row["question"] in INSTRUCT.prompt(row)
        if row["answer"] is not None:
            assert solved(row["answer"], f"so \\boxed{{{row['answer']}}}")


# -- prompts and targets -----------------------------------------------------------------------------------------------


def test_prompts():
    assert BARE.prompt(ROW) == ROW["question"]
    prompt = INSTRUCT.prompt(ROW)
    assert prompt.endswith("\n\n" + ROW["question"])
    for tag in ("<reasoning>", "</reasoning>", "<answer>", "</answer>"):
        assert tag in prompt


def test_the_target_is_the_layout_of_d1():
    expected = (
        "<reasoning>\nThree quarters, halved.\n</reasoning>\n<answer>\nIt is \\(\\boxed{\\frac{3}{8}}\\).\n</answer>"
    )
    for task in (INSTRUCT, BARE):
        assert task.target(ROW) == expected
        assert set(task.prompt(ROW) + expected) <= set(task.alphabet)
        assert task.grade(ROW, expected) == {"solved": 1.0, "answered": 1.0}
        assert task.rewards(ROW, expected) == {"solved": 1.0, "format": 1.0}


@pytest.mark.parametrize("missing", ["reasoning", "attempt"])
def test_no_target_without_both_halves(missing):
    assert INSTRUCT.target({**ROW, missing: None}) is None


# -- judging -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "offer"),
    [
        ("128", "128"),
        ("128", " $128$. "),
        ("128", "$128.$"),
        ("128", "\\( 128 \\)"),
        ("128", "$$128$$"),
        ("128", "\\[128\\]"),
        ("128", "128.0"),
        ("128", "+128"),
        ("128", "256/2"),
        ("1750.0", "1,750"),
        ("1,234,567.5", "1234567.5"),
        ("0.5", "1/2"),
        ("0.5", ".5"),
        ("-\\frac{1}{4}", "-0.25"),
        ("\\frac{2}{4}", "\\dfrac{1}{2}"),
        ("0", "-0"),
        ("\\text{even}", "even"),
        ("even", "$\\text{even}$."),
        ("(x, y) = (7, 5)", "(x,y)=(7,5)"),
        ("any even  integer", "any even integer"),
        ("128", "I think \\boxed{7}, no: \\boxed{128}"),
        ("9" * 100, "9" * 100),
    ],
)
def test_equal_answers(answer, offer):
    assert solved(answer, offer)


@pytest.mark.parametrize(
    ("answer", "offer"),
    [
        ("128", "129"),
        ("128", "12 8"),
        ("128", "the answer is 128"),
        ("128", "127 \\boxed{127} 128"),
        ("11/2", "1\\frac{1}{2}"),
        ("1/0", "2/0"),
        ("1", "1/0"),
        ("1234", "12,34"),
        ("100", "1e2"),
        ("100", "1_00"),
        ("1", "\u0661"),
        ("no where", "nowhere"),
        ("$x$ or $y$", "x or y"),
        ("ABC", "abc"),
        ("N = 21", "21"),
        ("128", ""),
        (".", ""),
        (None, ""),
        (None, "128"),
    ],
)
def test_other_answers(answer, offer):
    assert not solved(answer, offer)


@pytest.mark.parametrize(
    ("text", "instruct", "bare"),
    [
        ("", 0.0, 0.0),
        (" \n", 0.0, 0.0),
        ("128", 0.0, 1.0),
        ("\\boxed{128}", 0.0, 1.0),
        ("<answer>128", 0.0, 1.0),
        ("<answer> </answer>", 0.0, 0.0),
        ("<answer>128</answer>", 1.0, 1.0),
        ("<answer>7</answer><answer>128</answer> so", 1.0, 1.0),
    ],
)
def test_answered(text, instruct, bare):
    assert INSTRUCT.grade(row("128"), text)["answered"] == instruct
    assert BARE.grade(row("128"), text)["answered"] == bare


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<reasoning>a</reasoning><answer>b</answer>", 1.0),
        (" \n<reasoning>\na\n</reasoning>\n\n<answer>\nb\n</answer>\n ", 1.0),
        ("", 0.0),
        ("<answer>b</answer>", 0.0),
        ("<reasoning>a</reasoning>", 0.0),
        ("<answer>b</answer><reasoning>a</reasoning>", 0.0),
        ("<reasoning>a<answer>b</answer></reasoning>", 0.0),
        ("so <reasoning>a</reasoning><answer>b</answer>", 0.0),
        ("<reasoning>a</reasoning> so <answer>b</answer>", 0.0),
        ("<reasoning>a</reasoning><answer>b</answer> so", 0.0),
        ("<reasoning>a</reasoning><answer>b</answer><answer>c</answer>", 0.0),
        ("<reasoning>a</reasoning><reasoning>a</reasoning><answer>b</answer>", 0.0),
        ("<reasoning>a</reasoning><answer>b", 0.0),
    ],
)
def test_format(text, expected):
    assert INSTRUCT.rewards(row(None), text)["format"] == expected


@given(st.one_of(st.text(), PIECES), st.one_of(st.none(), st.text(), PIECES), st.sampled_from([INSTRUCT, BARE]))
def test_judging_never_raises(text, answer, task):
    for offered in (text, f"<answer>{text}</answer>"):
        for scores in (task.grade(row(answer), offered), task.rewards(row(answer), offered)):
            assert set(scores.values()) <= {0.0, 1.0}


@given(st.one_of(st.text(), PIECES))
def test_parsing_any_texts_gives_a_row(text):
    parsed = INSTRUCT.parse({"question": "?" + text, "thinking": text, "attempt": text, "solution": text}, "here")
    assert parsed["question"] in INSTRUCT.prompt(parsed)
    assert (INSTRUCT.target(parsed) is None) == (not text.strip())


@pytest.mark.parametrize(
    "piece",
    [
        "<reasoning>",
        "<answer>",
        "</answer>",
        "\\boxed{",
        "$",
        "\\text{",
        "9",
        "1,",
        ".",
        "/",
        " ",
        "\\frac{1}",
        "\\frac",
        "\\left",
        "^ ",
    ],
)
def test_repeated_pieces_are_judged(piece):
    """What is linear takes a moment; anything that is not would take the suite's patience."""
    for text in (piece * 100_000, f"<answer>{piece * 100_000}</answer>"):
        assert INSTRUCT.rewards(row("128"), text)["solved"] == BARE.rewards(row("128"), text)["solved"] == 0.0


# -- the rest of the protocol ------------------------------------------------------------------------------------------


def test_the_task_is_in_the_table():
    assert TASKS["traces"] is Traces
    assert len(set(INSTRUCT.alphabet)) == len(INSTRUCT.alphabet) == 96


def test_rows_cannot_be_generated():
    with pytest.raises(ValueError, match="traces: rows cannot be generated; name a file or a hub dataset"):
        INSTRUCT.generate("train", 1, 0)


def test_style_is_checked():
    with pytest.raises(ValueError, match="traces: style = 'chat' is not one of bare, instruct"):
        Traces(style="chat")


def test_keys_and_baselines():
    spaced = INSTRUCT.parse({"question": " WHAT is\nhalf  of three {quarters}?"}, "here")
    assert INSTRUCT.problem_key(spaced) == INSTRUCT.problem_key(ROW) != INSTRUCT.problem_key(row(None))
    assert INSTRUCT.solution_key(ROW) is None
    (text,) = INSTRUCT.baselines(ROW).values()
    assert INSTRUCT.grade(ROW, text) == {"solved": 0.0, "answered": 0.0}


@pytest.mark.parametrize(
    ("stored", "plainer"),
    [
        (r"10,\!080", "10080"),
        (r"\frac43", r"\frac{4}{3}"),
        (r"\frac43", "4/3"),
        (r"\dfrac{4}3", r"\tfrac4{3}"),
        (r"\frac{\sqrt3}2", r"\frac{\sqrt{3}}{2}"),
        (r"\left(1, 2\right)", "(1, 2)"),
        (r"\left[\,0,\;1\right)", "[0, 1)"),
        (r"\$36", "36"),
        (r"90^\circ", "90"),
        (r"90^{\circ}", "90"),
        (r"5\ cm", "5 cm"),
    ],
)
def test_layout_is_no_part_of_an_answer(stored, plainer):
    row = INSTRUCT.parse({"question": "q", "solution": rf"\boxed{{{stored}}}"}, "x")
    assert INSTRUCT.grade(row, f"<answer>{plainer}</answer>")["solved"] == 1.0


@pytest.mark.parametrize(
    ("stored", "other"),
    [
        (r"\frac43", r"\frac{3}{4}"),
        (r"1\frac12", "1/2"),
        (r"\leftarrow", "arrow"),
        (r"90^\circ C", "90"),
        (r"(1,2)", "(2,1)"),
    ],
)
def test_layout_hides_no_difference(stored, other):
    row = INSTRUCT.parse({"question": "q", "solution": rf"\boxed{{{stored}}}"}, "x")
    assert INSTRUCT.grade(row, f"<answer>{other}</answer>")["solved"] == 0.0
