"""Lines of a text as steps, and the labels that they have."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.config.parse import parse
from d1jax.data.examples import Problems
from d1jax.data.steps import stored_steps
from d1jax.data.tokenizers import ByteTokenizer
from d1jax.tasks.rows import Rows
from d1jax.tasks.task import DataError
from d1jax.training.context import build, of_stages
from tests.reward_model.test_loop import settings

TOKENIZER = ByteTokenizer()
labels = st.lists(st.tuples(st.text("ab", min_size=0, max_size=3), st.sampled_from([True, False, None])), min_size=1)


def problems(count):
    return Problems(
        [{}] * count, np.zeros((count, 1), int), np.ones(count, int), np.zeros((count, 1), int), np.ones(count)
    )


@given(labels)
def test_a_line_has_its_label_and_the_end_token_belongs_to_the_last(lines):
    text = "\n".join(line for line, _ in lines)
    ids = [*TOKENIZER.answer(text), TOKENIZER.special.end]
    found = stored_steps(problems(1), [0], [ids], [[label for _, label in lines]], len(ids) + 2, TOKENIZER)
    expected = np.array([np.nan if label is None else float(label) for _, label in lines])
    np.testing.assert_array_equal(found.label_RK[0], expected)
    assert found.step_RC[0, : len(ids)].tolist() == [text[:place].count("\n") for place in range(len(ids))]


class Merging(ByteTokenizer):
    """Breaks and what stands between them are one token, as in a vocabulary of merges."""

    def pieces(self, ids):
        return [{1: "a\n", 2: "\n\n", 3: "b\nc"}.get(token, "d") for token in ids]


def test_lines_that_one_token_holds_are_one_step_which_is_wrong_if_one_of_them_is():
    # "d" "a\n" | "\n\n" | "b\nc" | "d" : lines "da", "", "", "b", "cd"
    found = stored_steps(problems(1), [0], [[0, 1, 2, 3, 0]], [[True, None, None, True, False]], 5, Merging())
    assert found.step_RC[0].tolist() == [0, 0, 1, 2, 3]
    np.testing.assert_array_equal(found.label_RK[0], [1, np.nan, 0, 0])


def test_rows_of_trls_stepwise_type():
    record = {"prompt": "q", "completions": ["1+1=2", "so\n2"], "labels": [True, False]}
    row = Rows().parse(record, "rows.jsonl:1")
    assert Rows().steps(row) == [("1+1=2", True), ("so\n2", False)] and Rows().target(row) == "1+1=2"
    assert Rows().steps({"prompt": "q"}) == []


@pytest.mark.parametrize(
    ("completions", "given", "told"),
    [
        (["a", "b"], [True], "2 steps and labels 1 labels"),
        (["a"], ["yes"], "write true or false"),
        (["a", " "], [True, True], "step 1 is blank"),
        (["a"], None, "1 steps and labels no labels"),
        ([], [], "0 steps"),
    ],
)
def test_steps_without_a_label_each_are_refused_with_their_line(completions, given, told):
    with pytest.raises(DataError, match=f"rows.jsonl:7: .*{told}"):
        Rows().parse({"prompt": "q", "completions": completions, "labels": given}, "rows.jsonl:7")


def test_a_break_at_the_end_of_a_step_is_not_judged_in_its_place(tmp_path):
    records = [{"prompt": f"{n}?", "completions": ["x\n", "\na\n\n"], "labels": [True, False]} for n in range(4)]
    flags = settings(tmp_path, records=records, **{"reward_model.loss": "stepwise"})
    context = of_stages(build(parse(flags), lambda line: None), lambda line: None)["judge"]
    (found,) = context.judged_sources  # lines: x, "", "", a, "", ""
    np.testing.assert_array_equal(found.label_RK, [[1, np.nan, np.nan, 0, np.nan, np.nan]] * 4)


def test_a_step_of_several_lines_is_judged_by_its_last(tmp_path):
    records = [{"prompt": f"{n}?", "completions": ["x", "a\nb"], "labels": [True, False]} for n in range(4)]
    flags = settings(tmp_path, records=records, **{"reward_model.loss": "stepwise"})
    context = of_stages(build(parse(flags), lambda line: None), lambda line: None)["judge"]
    (found,) = context.judged_sources
    np.testing.assert_array_equal(found.label_RK, [[1, np.nan, 0]] * 4)
    assert found.length_R.tolist() == [6] * 4 and found.step_RC[0].tolist() == [0, 0, 1, 1, 2, 2, 2, 2]
