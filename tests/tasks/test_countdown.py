"""Countdown: its generator, its layouts, and the judge against Python's own arithmetic."""

import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.tasks import expressions
from d1jax.tasks.countdown import Countdown
from d1jax.tasks.expressions import solve
from d1jax.tasks.jsonl import read_rows
from d1jax.tasks.task import DataError
from tests.tasks.expression_oracle import TREES, full, oracle

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="shared/data is absent")

BARE, INSTRUCT, BOTH = Countdown(), Countdown(style="instruct"), Countdown(numbers=(3, 4))
ROW = {"numbers": [44, 19, 35], "target": 98, "solution": "44+19+35"}


def test_division_by_zero_has_no_value():
    tree = expressions.parse("5/(3-3)")
    assert tree is not None and expressions.evaluate(tree) is None
    assert BARE.grade({"numbers": [5, 3, 3], "target": 5}, "5/(3-3)") == {
        "solved": 0.0,
        "parsed": 0.0,
        "numbers_used": 0.0,
    }


@pytest.mark.parametrize(
    "text",
    [
        "9**9**9**9",
        "(" * 100_000,
        "(" * 100_000 + "1" + ")" * 100_000,
        "9" * 1_000_000,
        "1+" * 500_000 + "1",
        "(" * 99 + "1" + ")" * 99,
        "<answer>" * 100_000,
        "\\boxed{" * 100_000,
        "=" * 100_000,
        " " * 1_000_000,
        "999999*" * 15 + "999999",
        "\\times" * 100_000,
    ],
)
@pytest.mark.parametrize("form", ["{}", "<answer>{}</answer>", "<answer>{}", "<answer>\\boxed{{{}}}</answer>"])
def test_adversarial_texts_are_judged_at_once(text, form):
    start = time.perf_counter()
    for task in (BARE, INSTRUCT):
        assert task.rewards(ROW, form.format(text)) == {"solved": 0.0, "numbers": 0.0}
        assert task.grade(ROW, form.format(text))["solved"] == 0.0
    assert time.perf_counter() - start < 3.0


@given(
    st.one_of(st.text(), st.text("0123456789+-*/()=×÷−· \\{}", max_size=40), TREES.map(full)),
    st.sampled_from(["{}", "<answer>{}</answer>", "<answer>{}", "\\boxed{{{}}}", "<answer>\\boxed{{{}}}</answer>"]),
)
def test_judging_never_raises(text, form):
    for task in (BARE, INSTRUCT):
        rewards, grade = task.rewards(ROW, form.format(text)), task.grade(ROW, form.format(text))
        assert list(rewards) == ["solved", "numbers"] and list(grade) == ["solved", "parsed", "numbers_used"]
        assert {*rewards.values(), *grade.values()} <= {0.0, 1.0}
        assert rewards["solved"] + rewards["numbers"] == grade["numbers_used"] <= grade["parsed"]


@given(st.permutations([44, 19, 35]), st.lists(st.sampled_from("+-*/"), min_size=2, max_size=2), st.booleans())
def test_solved_means_what_python_says(numbers, ops, nested):
    a, b, c = numbers
    text = f"{a}{ops[0]}({b}{ops[1]}{c})" if nested else f"{a}{ops[0]}{b}{ops[1]}{c}"
    solved = oracle(text) == 98
    assert BARE.rewards(ROW, text) == {"solved": float(solved), "numbers": float(not solved)}


@pytest.mark.parametrize(
    ("text", "bare", "instruct"),
    [
        ("44+19+35", 1.0, 0.0),
        ("44+19+35=98", 1.0, 0.0),
        ("<answer>\n44 + 19 + 35\n</answer>", 1.0, 1.0),
        ("<answer>\\boxed{44+19+35}</answer>", 1.0, 1.0),
        ("so \\boxed{44+19+35}.", 1.0, 1.0),
        ("\\boxed{44+19+35} <answer>1</answer>", 0.0, 0.0),
        ("<answer>44+19+35", 0.0, 0.0),
        ("<answer>44+19+35</answer><answer>", 1.0, 1.0),
        ("<answer>44+54</answer>", 0.0, 0.0),
        ("<answer>44+19+35+0</answer>", 0.0, 0.0),
        ("<answer>98</answer>", 0.0, 0.0),
        ("<answer>2**4-3</answer>", 0.0, 0.0),
    ],
)
def test_where_the_answer_is_read(text, bare, instruct):
    assert BARE.rewards(ROW, text)["solved"] == bare
    assert INSTRUCT.rewards(ROW, text)["solved"] == instruct


def test_numbers_reward_needs_an_expression_with_the_given_numbers():
    assert BARE.rewards(ROW, "44+19-35") == {"solved": 0.0, "numbers": 1.0}
    for text in ("44+19", "44+19+35+35", "44,19,35", "44+19+35)", "word", "44*19+34"):
        assert BARE.rewards(ROW, text) == {"solved": 0.0, "numbers": 0.0}
    twice = {"numbers": [5, 5, 3], "target": 28}
    assert BARE.rewards(twice, "5*5+3")["solved"] == 1.0
    assert BARE.rewards(twice, "5+3")["numbers"] == BARE.rewards(twice, "5*5+3*3")["numbers"] == 0.0


@pytest.mark.parametrize("task", [BARE, INSTRUCT, BOTH])
@pytest.mark.parametrize("split", ["train", "test"])
def test_generated_rows_are_solved_by_their_own_target(task, split):
    rows = task.generate(split, 300, 3)
    assert len({task.problem_key(row) for row in rows}) == 300
    assert {len(row["numbers"]) for row in rows} == set(task.numbers)
    for row in rows:
        text = task.target(row)
        assert task.rewards(row, text) == {"solved": 1.0, "numbers": 0.0}
        assert set(task.grade(row, text).values()) == {1.0}
        assert row == task.parse(row, "here")
        assert 10 <= row["target"] <= 100 and all(1 <= number <= 99 for number in row["numbers"])
        if task.style == "bare":
            assert set(task.prompt(row) + text) <= set(task.alphabet)


@pytest.mark.parametrize("task", [BARE, BOTH])
def test_generator_is_deterministic_and_a_longer_list_begins_with_the_shorter(task):
    rows = task.generate("train", 600, 7)
    assert rows == task.generate("train", 600, 7)
    assert rows[:30] == task.generate("train", 30, 7)
    assert rows[:400] == task.generate("train", 400, 7)
    assert rows[:30] != task.generate("train", 30, 8)
    assert task.generate("train", 0, 7) == []


def test_splits_share_no_problem_and_the_split_seed_moves_them():
    keys = {
        split: {BARE.problem_key(row) for seed in (0, 1) for row in BARE.generate(split, 2500, seed)}
        for split in ("train", "test")
    }
    assert not keys["train"] & keys["test"]
    moved = {Countdown(split_seed=1).problem_key(row) for row in Countdown(split_seed=1).generate("test", 1000, 0)}
    assert moved & keys["train"]


def test_ten_percent_of_the_problems_are_for_test():
    share = np.mean([BARE._split_of(f"1,2,{n}=10") == "test" for n in range(5000)])
    assert abs(share - 0.1) < 0.02


def test_numbers_have_the_histogram_of_the_public_training_file():
    rows = BARE.generate("train", 8000, 5)
    shares = np.bincount([number // 10 for row in rows for number in row["numbers"]]) / (3 * len(rows))
    np.testing.assert_allclose(shares[[0, 1, 2, 9]], [0.141, 0.116, 0.104, 0.077], atol=0.012)


def test_prompts_and_keys():
    assert BARE.prompt(ROW) == "44,19,35=98:" and BARE.target(ROW) == "44+19+35"
    prompt = INSTRUCT.prompt(ROW)
    assert "44, 19, 35" in prompt and "98" in prompt and "<answer>" in prompt and "44+19+35" not in prompt
    assert INSTRUCT.target(ROW) == "<answer>\n44+19+35\n</answer>"
    assert BARE.target({"numbers": [1, 2, 3], "target": 6}) is None
    assert (
        BARE.problem_key(ROW)
        == BARE.problem_key({"numbers": [35, 44, 19], "target": 98})
        != BARE.problem_key({**ROW, "target": 97})
    )
    assert BARE.solution_key(ROW) is None
    assert BARE.rewards(ROW, BARE.baselines(ROW)["add_all"])["solved"] == 1.0
    assert INSTRUCT.rewards(ROW, INSTRUCT.baselines(ROW)["add_all"])["solved"] == 1.0


def test_parse_reads_the_published_layouts():
    bare = {"numbers": [44, 19, 35], "target": 98}
    assert BARE.parse({"index": 0, "nums": [44, 19, 35], "target": 98, "solution": "44 + (19 + 35)"}, "f:1") == ROW
    assert BARE.parse({"nums": [44, 19, 35], "target": 98, "solution": None}, "f:1") == bare
    assert BARE.parse({"input": "44,19,35", "output": "98"}, "f:1") == bare
    dream = BARE.parse({"input": "15,44,79,50", "output": "44-15=29,79-29=50"}, "f:1")
    assert dream == {"numbers": [15, 44, 79], "target": 50, "solution": "79-(44-15)"}


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({}, "numbers = None"),
        ({"nums": [1, 2, 3]}, "target = None"),
        ({"nums": "1;2;3", "target": 6}, "nums = '1;2;3'"),
        ({"nums": [1, 2, -3], "target": 6}, "whole numbers"),
        ({"nums": [1, 2, 3.5], "target": 6}, "whole numbers"),
        ({"nums": [True, 2, 3], "target": 6}, "whole numbers"),
        ({"nums": [[1], 2, 3], "target": 6}, "whole numbers"),
        ({"nums": [], "target": 6}, "whole numbers"),
        ({"nums": [1, 2, 3], "target": [6, 7]}, "give one integer"),
        ({"nums": [1, 2, 3], "target": 6, "solution": "1+2+4"}, "does not make 6 from [1, 2, 3]"),
        ({"nums": [1, 2, 3], "target": 7, "solution": "1+2+3"}, "does not make 7"),
        ({"nums": [1, 2, 3], "target": 6, "solution": "six"}, "does not make 6"),
        ({"nums": [1, 2, 3], "target": 6, "solution": 6}, "does not make 6"),
        ({"input": "1,2,3", "output": "6,7"}, "give one integer (the target), or steps"),
        ({"input": "1,2,3"}, "output = None"),
        ({"input": "15,44,79,50", "output": "44-15=29,79-30=49"}, "does not make 50"),
        ({"input": "15,44,79,51", "output": "44-15=29,79-29=51"}, "does not make 51"),
        ({"input": "15,44,79,50", "output": "44-15=29"}, "does not make 50"),
    ],
)
def test_parse_complains_with_the_place(record, says):
    with pytest.raises(DataError) as caught:
        BARE.parse(record, "rows.jsonl:12")
    assert str(caught.value).startswith("rows.jsonl:12: ") and says in str(caught.value)


def test_parse_leaves_out_what_the_task_is_not_configured_for():
    assert BARE.parse({"nums": [1, 2, 3, 4], "target": 10}, "rows.jsonl:12") is None


def test_bad_configuration():
    with pytest.raises(ValueError, match="countdown: style = 'chat'"):
        Countdown(style="chat")
    for numbers in ((), (1,), (3, 7)):
        with pytest.raises(ValueError, match="give one or more sizes"):
            Countdown(numbers=numbers)
    with pytest.raises(ValueError, match="3 and 4 numbers can be generated"):
        Countdown(numbers=(5,)).generate("train", 1, 0)
    with pytest.raises(ValueError, match="split = 'dev'"):
        BARE.generate("dev", 1, 0)


@needs_data
def test_real_files_parse_and_their_solutions_count():
    task = Countdown(numbers=(3, 4, 5))
    counts = {}
    for path in sorted((DATA / "countdown").iterdir()):
        rows = read_rows(path, task)
        solutions = [row for row in rows if "solution" in row]
        assert all(task.rewards(row, task.target(row))["solved"] == 1.0 for row in solutions)
        counts[path.name] = (len(rows), len(solutions))
    assert counts == {
        "d1_test_cd3.jsonl": (256, 0),
        "dream_cd3_test.jsonl.gz": (1000, 1000),
        "dream_cd4_test.jsonl.gz": (1000, 1000),
        "dream_cd5_test.jsonl.gz": (1000, 1000),
        "tinyzero_train_rows00000-19999.jsonl.gz": (20_000, 11_264),
    }


@needs_data
def test_overlap_of_the_public_files_by_problem_key():
    task = Countdown(numbers=(3, 4))
    test = {task.problem_key(row) for row in read_rows(DATA / "countdown" / "d1_test_cd3.jsonl", task)}
    train = read_rows(DATA / "countdown" / "tinyzero_train_rows00000-19999.jsonl.gz", task)
    assert [i for i, row in enumerate(train) if task.problem_key(row) in test] == [133, 8498, 10965, 13886]
    three = [row for row in train if len(row["numbers"]) == 3]
    assert len({task.problem_key(row) for row in three}) == 9867
    assert all(solve(row["numbers"], row["target"]) is not None for row in three[:1000])
