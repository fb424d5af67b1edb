"""GSM8K: what is read, what the model is shown, which texts are right, and d1's rewards point for point."""

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.tasks import TASKS, make, read_source
from d1jax.tasks.gsm8k import Gsm8k
from d1jax.tasks.task import DataError

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="shared/data is absent")

INSTRUCT, BARE = Gsm8k(), Gsm8k(style="bare")
RECORD = {"question": "How many {clips}?", "answer": "She sold 48/2 = <<48/2=24>>24.\nIn all <<48+24=72>>72.\n#### 72"}
ROW = INSTRUCT.parse(RECORD, "here")
GOOD = "<reasoning>\na\n</reasoning>\n<answer>\n72\n</answer>\n"


def row(number):
    return {"question": "?", "solution": None, "number": number}


def solved(number, text):
    return INSTRUCT.grade(row(number), text)["solved"] == 1.0


def test_a_row_is_read_and_shown():
    assert ROW == {"question": "How many {clips}?", "solution": "She sold 48/2 = 24.\nIn all 72.", "number": "72"}
    assert BARE.prompt(ROW) == "How many {clips}?"
    prompt = INSTRUCT.prompt(ROW)
    assert prompt.endswith("\n\nHow many {clips}?") and "</reasoning>" in prompt and "</answer>" in prompt
    assert INSTRUCT.target(ROW) == "<reasoning>\nShe sold 48/2 = 24.\nIn all 72.\n</reasoning>\n<answer>\n72\n</answer>"
    assert BARE.target(ROW) == "She sold 48/2 = 24.\nIn all 72.\n#### 72"
    assert TASKS["gsm8k"] is Gsm8k and make("gsm8k", style="bare", split_seed=3).style == "bare"


@pytest.mark.parametrize(
    ("answer", "number", "solution"),
    [
        ("72", "72", None),
        (72, "72", None),
        (0.5, "0.5", None),
        ("a\n#### 1,080\n", "1,080", "a"),
        ("#### -7", "-7", None),
        (None, None, None),
    ],
)
def test_plain_answers_are_read(answer, number, solution):
    assert INSTRUCT.parse({"question": "q", "answer": answer}, "x") == {
        "question": "q",
        "solution": solution,
        "number": number,
    }


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"answer": "3"}, "f:7: question = None: a text was expected among the keys answer"),
        ({"question": " ", "answer": "3"}, "f:7: question = ' '"),
        ({"question": "q", "answer": "no number"}, "f:7: answer = 'no number' states no number; write e.g. 18"),
        ({"question": "q", "answer": "a #### "}, "states no number"),
        ({"question": "q", "answer": True}, "f:7: answer = True states no number"),
        ({"question": "q", "answer": float("nan")}, "states no number"),
        ({"question": "q", "answer": ["3"]}, "states no number"),
        ({"question": "q", "answer": 10**80}, "states no number"),
    ],
)
def test_mistakes_are_told(record, told):
    with pytest.raises(DataError, match=f"{told}"):
        INSTRUCT.parse(record, "f:7")


def test_other_mistakes_are_told():
    with pytest.raises(ValueError, match="style = 'loud'"):
        Gsm8k(style="loud")
    with pytest.raises(ValueError, match="hub:openai/gsm8k"):
        INSTRUCT.generate("train", 1, 0)


def test_the_prompt_may_be_in_words_of_the_users_own():
    short = make("gsm8k", style="instruct", template="{question}\n")
    assert short.prompt(ROW) == "How many {clips}?\n" and short.target(ROW) == INSTRUCT.target(ROW)
    for template in ("no place", "{problem}", 7):
        with pytest.raises(ValueError, match="template = .* has no {question}"):
            Gsm8k(template=template)
    with pytest.raises(ValueError, match="bare.*leave template out"):
        Gsm8k(style="bare", template="Q: {question}")


@given(st.integers(-(10**7), 10**7), st.integers(-(10**7), 10**7), st.booleans())
def test_a_right_answer_is_accepted_and_a_wrong_one_is_not(number, other, grouped):
    written = f"{number:,}" if grouped else str(number)
    for text in (
        GOOD.replace("72", written),
        f"so \\boxed{{{written}}}",
        f"<answer>${written}.00</answer>",
        f"a\n#### {written}",
    ):
        assert solved(str(number), text) and solved(f"{number:,}", text)
        assert solved(str(other), text) == (other == number)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "72",
        "so it is 72",
        "<answer>seventy</answer>",
        "<answer>72 or 73</answer>",
        "<answer>72</answer><answer>73</answer>",
    ],
)
def test_what_is_not_right(text):
    assert not solved("72", text)
    assert not solved(None, GOOD)


def test_a_row_without_an_answer_has_no_reference():
    assert not INSTRUCT.has_reference(row(None)) and INSTRUCT.has_reference(ROW)
    assert INSTRUCT.target(row("3")) is None and INSTRUCT.solution_key(ROW) is None
    assert INSTRUCT.problem_key({"question": "How  many\nCats?"}) == INSTRUCT.problem_key(
        {"question": "how many cats?"}
    )
    assert INSTRUCT.offer(ROW, GOOD.replace("72", "72.0")) == "72" and INSTRUCT.offer(ROW, "") is None


def test_baselines_are_graded():
    asked = {"question": "He has 1,200 eggs and sells 72. How many?", "solution": None, "number": "72"}
    answers = INSTRUCT.baselines(asked)
    assert [INSTRUCT.grade(asked, text)["solved"] for text in answers.values()] == [0.0, 1.0]
    assert INSTRUCT.baselines({"question": "none?"}).keys() == answers.keys()


def d1(text, number="72"):
    rewards = INSTRUCT.rewards(row(number), text)
    return [
        round(rewards[f"d1_{name}"], 9) for name in ("correct", "integer", "xml_count", "soft_format", "strict_format")
    ]


LONG = "<reasoning>\n" + "a" * 672 + "\n</reasoning>\n<answer>\n72\n</answer>"


@pytest.mark.parametrize(
    ("text", "points"),
    [
        (GOOD, [2.0, 0.5, 0.5, 0.0, 0.5]),
        (GOOD + "\n", [2.0, 0.5, 0.498, 0.0, 0.5]),
        (GOOD + "more", [2.0, 0.5, 0.492, 0.0, 0.0]),
        (GOOD.rstrip("\n"), [2.0, 0.5, round(0.5 - 0.001 * len(GOOD.rstrip("\n")) + 0.001, 9), 0.0, 0.0]),
        (LONG, [2.0, 0.5, round(0.5 - 0.001 * len(LONG) + 0.001, 9), 0.0, 0.0]),
        ("<reasoning>a</reasoning> <answer>72</answer> x", [2.0, 0.5, 0.0, 0.5, 0.0]),
        ("<reasoning>a</reasoning>b</reasoning>\n\n<answer>72</answer>", [2.0, 0.5, 0.0, 0.5, 0.0]),
        ("<reasoning>a\nb</reasoning><answer>72</answer>", [2.0, 0.5, 0.0, 0.0, 0.0]),
        ("72", [2.0, 0.5, 0.0, 0.0, 0.0]),
        ("<answer>18.0</answer>", [0.0, 0.0, 0.0, 0.0, 0.0]),
        ("<answer>7<answer>72</answer>", [2.0, 0.5, 0.0, 0.0, 0.0]),
        ("", [0.0, 0.0, 0.0, 0.0, 0.0]),
    ],
)  # fmt: skip
def test_rewards_of_d1_are_those_of_its_released_code(text, points):
    assert d1(text) == points


def test_d1_compares_letters_and_d1jax_numbers():
    assert d1("<answer>1080</answer>", "1,080")[0] == 0.0 and d1("<answer>1,080</answer>", "1,080")[:2] == [2.0, 0.0]
    assert solved("1,080", "<answer>1080</answer>")


def test_format_and_names():
    assert INSTRUCT.rewards(ROW, GOOD)["format"] == 1.0 and INSTRUCT.rewards(ROW, GOOD + "x")["format"] == 0.0
    assert INSTRUCT.rewards(ROW, GOOD).keys() == INSTRUCT.rewards(ROW, "").keys()


@pytest.mark.parametrize(
    "text",
    [
        "<reasoning></reasoning><answer>" * 100_000,
        "\n</answer>" * 300_000,
        "</answer>" * 300_000,
        "9" * 10**6,
        "\ud800" * 9,
    ],
)
def test_hostile_texts_are_fast(text):
    began = time.perf_counter()
    assert INSTRUCT.rewards(ROW, text)["solved"] == 0.0
    assert time.perf_counter() - began < 3


@needs_data
@pytest.mark.parametrize(("name", "count"), [("train", 7473), ("test", 1319)])
def test_every_published_solution_is_right(name, count):
    for task in (INSTRUCT, BARE):
        rows = read_source(str(DATA / "gsm8k" / f"{name}.jsonl.gz"), task)
        assert len(rows) == count
        assert all(task.grade(row, task.target(row))["solved"] for row in rows)
        assert not any("<<" in task.target(row) for row in rows)
