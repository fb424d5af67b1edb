"""Protects: rows of anybody's own load in every form of TRL's datasets, and a row that cannot is named with its line."""

import json

import pytest

from d1jax.tasks import make
from d1jax.tasks.jsonl import read_rows
from d1jax.tasks.rows import Rows
from d1jax.tasks.task import DataError

USER, ASSISTANT = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
FORMS = {
    "prompt and answer": ({"prompt": "2+2?", "answer": 4}, "2+2?", None),
    "prompt only": ({"prompt": "2+2?"}, "2+2?", None),
    "prompt only, chat": ({"prompt": [USER]}, [USER], None),
    "prompt and completion": ({"prompt": "2+2?", "completion": "4"}, "2+2?", "4"),
    "prompt and completion, chat": ({"prompt": [USER], "completion": [ASSISTANT]}, [USER], "4"),
    "messages": ({"messages": [USER, ASSISTANT]}, [USER], "4"),
    "messages without an answer": ({"messages": [USER]}, [USER], None),
    "text": ({"text": "four"}, "", "four"),
    "preference": ({"prompt": "2+2?", "chosen": "4", "rejected": "5"}, "2+2?", "4"),
    "preference, implicit prompt": ({"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]}, [USER], "4"),
    "unpaired, wanted": ({"prompt": "2+2?", "completion": "4", "label": True}, "2+2?", "4"),
    "unpaired, not wanted": ({"prompt": "2+2?", "completion": "5", "label": False}, "2+2?", None),
    "a label of their own": ({"prompt": "2+2?", "answer": "4", "label": True}, "2+2?", None),
    "stepwise": ({"prompt": "2+2?", "completions": ["a", "b", "c"], "labels": [True, False, True]}, "2+2?", "a\nc"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_a_prompt_and_a_target(tmp_path, form):
    record, prompt, target = FORMS[form]
    (tmp_path / "rows.jsonl").write_text(json.dumps(record) + "\n")
    (row,) = read_rows(tmp_path / "rows.jsonl", Rows())
    assert Rows().prompt(row) == prompt and Rows().target(row) == target


def written(tmp_path, *records):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("name", [7, "seven", 7.5, ["a", 1]])
def test_two_rows_with_one_id_are_named_with_both_lines(tmp_path, name):
    one = {"prompt": "p", "answer": "a"}
    path = written(
        tmp_path, {**one, "id": name}, {**one, "id": "other"}, one, {"prompt": "q", "answer": "b", "id": name}
    )
    with pytest.raises(DataError) as raised:
        read_rows(path, Rows())
    assert str(raised.value).startswith(
        f"{path}:4: id = {name!r} is that of {path}:1, too; take one of the two rows out"
    )


def test_rows_without_an_id_and_with_ids_of_their_own_are_read(tmp_path):
    one = {"prompt": "p", "answer": "a"}
    path = written(tmp_path, one, one, {**one, "id": None}, {**one, "id": None}, {**one, "id": 1}, {**one, "id": "1"})
    assert len(read_rows(path, Rows())) == 6


def test_what_is_mapped_to_another_name_is_no_id(tmp_path):
    one = {"id": "What is 1 + 1?", "answer": "2"}
    assert len(read_rows(written(tmp_path, one, one), Rows(fields={"id": "prompt"}))) == 2


def test_fields_can_be_mapped_and_others_stay():
    task = make("jsonl", fields={"question": "prompt", "gold": "answer"}, judge="number")
    row = task.parse({"question": "q", "gold": "1,080", "level": 3}, "rows:1")
    assert row["prompt"] == "q" and row["level"] == 3
    assert task.grade(row, "\\boxed{1080}") == {"solved": 1.0, "score": 1.0, "format": 0.0}


@pytest.mark.parametrize(
    ("judge", "text", "solved"),
    [("exact", "4", 1.0), ("exact", "5", 0.0), ("number", "so 7. #### 4.0", 1.0), ("math", "\\boxed{2^2}", 1.0), ("regex:4$", "24", 1.0),
     ("none", "4", 0.0)],
)  # fmt: skip
def test_the_judge_decides(judge, text, solved):
    task = make("jsonl", judge=judge)
    row = task.parse({"prompt": "2+2?", "answer": "4"}, "rows:1")
    assert task.grade(row, text)["solved"] == solved
    assert task.rewards(row, text)["solved"] in (solved, None)


def test_a_row_without_an_answer_has_no_reference_where_one_is_compared():
    row = Rows().parse({"prompt": "q"}, "rows:1")
    assert not Rows().has_reference(row) and make("jsonl", judge="regex:x").has_reference(row)
    assert Rows().rewards(row, "x")["solved"] is None


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "q"}, "rows:7: has no prompt among question; a row is"),
        ({"prompt": ""}, "rows:7: prompt is empty"),
        ({"prompt": 3}, "rows:7: prompt = 3: a text was expected"),
        ({"prompt": [{"role": "user"}]}, "rows:7: prompt = .*: write messages"),
        ({"messages": [ASSISTANT]}, "has one turn of the assistant"),
        ({"prompt": "q", "answer": [1]}, r"rows:7: answer = \[1\]"),
        ({"prompt": "q", "completion": 3}, "rows:7: completion = 3: a text was expected; write it as a JSON string"),
        ({"prompt": "q", "chosen": 3}, "rows:7: chosen = 3"),
        ({"prompt": "q", "answer": True}, "rows:7: answer = True"),
        ({"prompt": "q", "answer": float("nan")}, "rows:7: answer = nan"),
        ({"prompt": "q", "answer": "  "}, "rows:7: answer is blank"),
        ({"prompt": "q", "completion": "x", "label": "false"}, "rows:7: label = 'false'"),
    ],
)
def test_a_row_that_cannot_be_is_named(record, message):
    with pytest.raises(DataError, match=message):
        Rows().parse(record, "rows:7")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"judge": None}, "judge = None: write a name"),
     ({"judge": "exakt"}, "judge = 'exakt' is not one of exact"), ({"fields": {"q": "promt"}}, "fields maps to 'promt'"),
     ({"judgee": "exact"}, "has no option 'judgee' .did you mean 'judge'")],
)  # fmt: skip
def test_an_option_that_cannot_be_is_told(options, message):
    with pytest.raises(ValueError, match=message):
        make("jsonl", **options)


# -- preferences -------------------------------------------------------------------------------------------------------

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
BAD = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "no"}]


@pytest.mark.parametrize(
    ("record", "prompt", "pair"),
    [
        ({"prompt": "hi", "chosen": "hello", "rejected": "no"}, "hi", ("hello", "no")),
        ({"chosen": TURNS, "rejected": BAD}, TURNS[:1], ("hello", "no")),
        ({"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": BAD[1:]}, TURNS[:1], ("hello", "no")),
        ({"prompt": "hi", "completion": "hello", "label": True}, "hi", ("hello", None)),
        ({"prompt": "hi", "completion": "no", "label": False}, "hi", (None, "no")),
        ({"prompt": TURNS[:1], "completion": BAD[1:], "label": False}, TURNS[:1], (None, "no")),
        (
            {"context": TURNS[:1], "completions": [
                {"rank": 1, "completion": BAD[1:]}, {"rank": 0, "completion": TURNS[1:]},
                {"rank": 2, "completion": [{"role": "assistant", "content": "!"}]},
            ]},
            TURNS[:1], ("hello", "!"),
        ),
        ({"prompt": "hi", "completion": "hello"}, "hi", (None, None)),
    ],
)  # fmt: skip
def test_preferences_of_every_form(record, prompt, pair):
    row = Rows().parse(record, "f:1")
    assert row["prompt"] == prompt and Rows().pair(row) == pair


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "hi", "chosen": "a", "rejected": 3}, "f:1: rejected = 3: a text was expected"),
        ({"prompt": "hi", "completion": None, "label": False}, "f:1: completion = None"),
        ({"context": "hi", "completions": [{"rank": 0, "completion": "a"}]}, "two or more"),
        (
            {"context": "hi", "completions": [{"rank": 0, "completion": "a"}, {"rank": "1", "completion": "b"}]},
            "ranks being whole",
        ),
        (
            {"context": "hi", "completions": [{"rank": 0, "completion": "a"}, {"rank": 0, "completion": "b"}]},
            "none is better",
        ),
    ],
)
def test_broken_preferences_are_named(record, message):
    with pytest.raises(DataError, match=message):
        Rows().parse(record, "f:1")
