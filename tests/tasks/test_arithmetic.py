"""Arithmetic: every worked line and answer against Python's own arithmetic, where a wrong text loses what, and the split."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.tasks import TASKS, make
from d1jax.tasks.arithmetic import MOST_LINES, Arithmetic, operations
from d1jax.tasks.task import DataError
from tests.tasks.expression_oracle import oracle

BARE, INSTRUCT, HARD = Arithmetic(), Arithmetic(style="instruct", words=False), Arithmetic(terms=(2, 4, 8), largest=9)
ROW = {"problem": "7+5*3", "answer": "22"}
GOOD = "<reasoning>\nfirst 5*3=15\nthen 7+15=22\n</reasoning>\n<answer>\n22\n</answer>"
EVERYTHING_RIGHT = {"solved": 1.0, "answered": 1.0, "format": 1.0, "steps": 1.0}

PROBLEMS = st.lists(st.tuples(st.sampled_from("+-*"), st.integers(1, 20)), min_size=2, max_size=8).map(
    lambda terms: "".join(f"{op}{number}" for op, number in terms)[1:]
)
WORKED = PROBLEMS.filter(lambda problem: min(value for *_, value in operations(problem)) >= 0)


def row_of(problem):
    return Arithmetic(terms=tuple(range(2, 9))).parse({"problem": problem}, "here")


def worked(*lines, answer="22"):
    return "<reasoning>\n" + "\n".join(lines) + f"\n</reasoning>\n<answer>\n{answer}\n</answer>"


def steps(*lines, row=ROW):
    return BARE.rewards(row, worked(*lines))["steps"]


def test_a_row_is_shown():
    assert BARE.prompt(ROW) == "7+5*3=" and BARE.target(ROW) == GOOD
    assert INSTRUCT.target(ROW) == GOOD.replace("first ", "").replace("then ", "")
    prompt = INSTRUCT.prompt(ROW)
    assert prompt.endswith("\n\n7+5*3=") and "</reasoning>" in prompt and "</answer>" in prompt and "22" not in prompt
    assert TASKS["arithmetic"] is Arithmetic and make("arithmetic", terms=[2, 3]).terms == (2, 3)


@given(PROBLEMS)
def test_operations_end_with_the_value_that_python_gives(problem):
    done = operations(problem)
    assert done[-1][3] == oracle(problem)
    assert all(value == {"+": a + b, "-": a - b, "*": a * b}[op] for a, op, b, value in done)
    kinds = "".join("*" if op == "*" else "+" for _, op, _, _ in done)
    assert re.fullmatch(r"\**\+*", kinds) and len(done) == len(re.findall("[0-9]+", problem)) - 1


@given(WORKED, st.booleans(), st.sampled_from(["bare", "instruct"]))
def test_every_target_is_all_right_and_every_line_of_it_is_true(problem, words, style):
    task, row = Arithmetic(style=style, words=words), row_of(problem)
    text = task.target(row)
    lines = text.partition("<reasoning>\n")[2].partition("\n</reasoning>")[0].split("\n")
    for line in lines:
        left, right = re.fullmatch(r"(?:first |then )?([0-9]+[-+*][0-9]+)=([0-9]+)", line).groups()
        assert oracle(left) == int(right)
    # A problem such as 2*2+2*2 has the same line twice, and the second says nothing new.
    bare = [re.sub("[a-z ]", "", line) for line in lines]
    expected = EVERYTHING_RIGHT | {"steps": len(set(bare)) / len(bare)}
    assert task.rewards(row, text) == task.grade(row, text) == expected
    assert task.offer(row, text) == row["answer"] == str(oracle(problem))
    assert set(text + BARE.prompt(row)) <= set(task.alphabet)


@given(WORKED, st.integers(-200, 200))
def test_another_answer_is_wrong(problem, other):
    row = row_of(problem)
    text = BARE.target(row).replace(f"<answer>\n{row['answer']}\n", f"<answer>\n{other}\n")
    assert BARE.rewards(row, text)["solved"] == float(other == int(row["answer"]))
    assert BARE.rewards(row, text)["answered"] == 1.0


@given(WORKED, st.data())
def test_a_line_with_another_result_is_wrong(problem, data):
    row = row_of(problem)
    results = [value for *_, value in operations(problem)]
    place = data.draw(st.integers(0, len(results) - 1))
    other = data.draw(st.integers(0, 999).filter(lambda number: number != results[place]))
    lines = INSTRUCT.target(row).split("\n")
    lines[1 + place] = f"{lines[1 + place].partition('=')[0]}={other}"
    assert BARE.rewards(row, "\n".join(lines))["steps"] < 1.0


@pytest.mark.parametrize(
    ("lines", "share"),
    [
        (["5*3=15", "7+15=22"], 1.0),
        (["first: 5 * 3 = 15", "so 7+15=22"], 1.0),
        (["5*3=15"], 0.5),
        (["5*3=15", "5*3=15"], 0.5),
        (["5*3=15", "so 5 * 3=15", "7+15=22"], 2 / 3),
        (["5*3=16", "7+16=23"], 0.5),  # the wrong result is used rightly
        (["5*3=15", "7+15=23", "7+15=22"], 2 / 3),
        (["7+5=12", "12*3=36"], 1.0),  # true, but not the order of the operations: `solved` is 0
        (["1+1=2", "2+2=4"], 0.0),  # true, but of other numbers
        (["7+5*3=22"], 0.0),
        (["22=22", "15=5*3"], 0.0),
        (["5*3=fifteen", "=", "x"], 0.0),
        (["5*3=15=15", "5*3==15"], 0.0),
        ([], 0.0),
    ],
)
def test_which_lines_are_right(lines, share):
    assert steps(*lines) == pytest.approx(share)


def test_lines_outside_of_the_reasoning_are_not_looked_at():
    assert BARE.rewards(ROW, "5*3=15\n7+15=22")["steps"] == 0.0
    assert BARE.rewards(ROW, GOOD + "\n7*3=22")["steps"] == 1.0
    assert BARE.rewards(ROW, GOOD.partition("\n</reasoning>")[0])["steps"] == 1.0  # cut off by the length limit
    assert steps(*["5*3=15"] * (MOST_LINES + 1)) == 0.0


def test_the_format_is_asked_for_exactly_once():
    assert BARE.rewards(ROW, GOOD)["format"] == 1.0
    answer, reasoning = GOOD.split("\n</reasoning>\n")[::-1]
    for text in (answer, reasoning, f"{answer}\n{reasoning}\n</reasoning>", GOOD + GOOD, GOOD + "x", "", "22"):
        assert BARE.rewards(ROW, text)["format"] == 0.0
    assert BARE.rewards(ROW, answer)["solved"] == 1.0


@pytest.mark.parametrize("task", [BARE, INSTRUCT, HARD, Arithmetic(operators="*", largest=9, terms=(2,), limit=50)])
def test_generated_rows_keep_their_bounds_and_are_read_back(task):
    for split, count in (("train", 30), ("test", 5)):
        rows = task.generate(split, count, 3)
        assert len({row["problem"] for row in rows}) == count
        assert rows[:4] == task.generate(split, 4, 3) and rows != task.generate(split, count, 4)
        for row in rows:
            numbers = [int(number) for number in re.findall("[0-9]+", row["problem"])]
            assert len(numbers) in task.terms and all(1 <= number <= task.largest for number in numbers)
            assert all(0 <= value <= task.limit for *_, value in operations(row["problem"]))
            assert set(row["problem"]) - set("0123456789") <= set(task.operators)
            assert row == task.parse(row, "here") == task.parse({"problem": row["problem"] + " ="}, "here")


def test_splits_share_no_problem_and_the_split_seed_moves_them():
    keys = {
        split: {BARE.problem_key(row) for seed in (0, 1) for row in BARE.generate(split, 1500, seed)}
        for split in ("train", "test")
    }
    assert not keys["train"] & keys["test"]
    moved = Arithmetic(split_seed=1)
    assert {moved.problem_key(row) for row in moved.generate("test", 1000, 0)} & keys["train"]


@pytest.mark.parametrize(("one", "other", "same"), [
    ("5+7-3", "7-3+5", True), ("2*3+4", "4+3*2", True), ("5+7-3", "3+7-5", False), ("2*3+4", "2*4+3", False), ("1+23", "12+3", False),
])  # fmt: skip
def test_problems_that_differ_in_order_alone_are_the_same(one, other, same):
    assert (BARE.problem_key({"problem": one}) == BARE.problem_key({"problem": other})) == same
    assert BARE.solution_key(ROW) is None and BARE.has_reference(ROW)


def test_rows_that_are_left_out_or_refused():
    assert BARE.parse({"problem": "1+2"}, "f:1") is None
    assert BARE.parse({"problem": "07 + 5 * 3 =", "answer": 22}, "f:1") == ROW
    for record, told in (
        ({}, "f:1: problem = None"),
        ({"problem": "7+(5*3)"}, r"f:1: problem = '7\+\(5\*3\)': 2 to 8 whole numbers"),
        ({"problem": "+".join(["1"] * 9)}, "2 to 8 whole numbers"),
        ({"problem": "3-5+4"}, "has the result -2"),
        ({"problem": "7+5*3", "answer": 36}, r"f:1: answer = 36, but 7\+5\*3=22"),
    ):
        with pytest.raises(DataError, match=told):
            BARE.parse(record, "f:1")


def test_stored_generations_are_read():
    for question in ("7+5*3=", INSTRUCT.prompt(ROW)):
        assert BARE.from_stored({"prompt": question, "answer": None, "completion": GOOD}, "f:1") == ROW
    with pytest.raises(DataError, match="problem = 'none'"):
        BARE.from_stored({"prompt": "none", "answer": None, "completion": ""}, "f:1")


@pytest.mark.parametrize(("options", "told"), [
    ({"terms": ()}, "terms"), ({"terms": (1,)}, "terms"), ({"terms": (9,)}, "terms"), ({"operators": "+/"}, "operators = '\\+/'"),
    ({"operators": ""}, "operators"), ({"largest": 0}, "largest = 0"), ({"limit": 2.5}, "limit = 2.5"), ({"style": "loud"}, "style"),
])  # fmt: skip
def test_bad_configuration(options, told):
    with pytest.raises(ValueError, match=f"arithmetic: {told}"):
        Arithmetic(**options)


def test_more_rows_than_there_are_problems():
    with pytest.raises(ValueError, match=r"count = 500, but after \d+ distinct train problems with terms = \(2,\)"):
        Arithmetic(terms=(2,), largest=5).generate("train", 500, 0)


def test_baselines_are_graded():
    assert BARE.grade(ROW, BARE.baselines(ROW)["add_all"])["answered"] == 1.0
    added = {"problem": "7+5+3", "answer": "15"}
    assert [BARE.grade(added, text)["solved"] for text in BARE.baselines(added).values()] == [0.0, 1.0]


@given(
    st.one_of(st.text(), st.text("0123456789+-*=\n<>/ fist", max_size=80)),
    st.sampled_from(["{}", GOOD.replace("7+15=22", "{}")]),
)
def test_judging_never_raises_and_gives_shares(text, form):
    rewards = BARE.rewards(ROW, form.replace("{}", text))
    assert rewards.keys() == EVERYTHING_RIGHT.keys() and all(0.0 <= value <= 1.0 for value in rewards.values())


@pytest.mark.parametrize(
    "text",
    [
        "<reasoning>" * 100_000,
        "<reasoning>" + "9**" * 300_000,
        "<reasoning>" + "5*3=15\n" * 200_000,
        "<reasoning>" + "a" * 10**6 + "=1",
        "<reasoning>" + " " * 10**6 + "5",
        "<reasoning>5*3=" + "9" * 10**6,
        "<reasoning>5*3" + "=" * 10**6,
        "<reasoning>" + "(" * 10**6,
        "9" * 10**6,
        "\ud800" * 9,
    ],
)
def test_hostile_texts_are_judged(text):
    """A text that is not judged in bounded time and memory would hang here."""
    rewards = BARE.rewards(ROW, text)
    assert rewards["solved"] == rewards["format"] == rewards["steps"] == 0.0


def test_lines_are_judged_by_themselves_the_answer_by_what_is_right_and_the_rest_by_the_format():
    task = Arithmetic(words=False)
    row = {"problem": "2+3*4", "answer": "14"}
    right = task.target(row)
    assert task.judge_lines(row, right) == [True] * 7
    wrong = task.judge_lines(row, right.replace("=14", "=15"))
    assert [place for place, label in enumerate(wrong) if not label] == [2]
    wrong = task.judge_lines(row, right.replace("\n14\n", "\n7\n"))
    assert [place for place, label in enumerate(wrong) if not label] == [5]
    assert task.judge_lines(row, "<reasoning>\n3*4=12\n3*4=12\n") == [False, True, False, False], "said twice"
    assert task.judge_lines(row, "14") == [False] and task.judge_lines(row, "") == [False]
    assert task.judge_lines(row, "<answer>14</answer>") == [True]
    many = "<reasoning>" + "\n3*4=12" * 40
    assert set(task.judge_lines(row, many)) == {False}
