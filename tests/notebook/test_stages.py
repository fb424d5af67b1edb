"""Training and evaluation from Python; the page that shows it is run as it stands."""

import dataclasses
import inspect
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import d1jax
from d1jax.config import LoraConfig, OptimizerConfig, RlConfig, SftConfig, Softmax, TaskConfig, UserError
from d1jax.config.errors import Diverged
from d1jax.inference.policy import load_pretrained
from d1jax.models.sharding import AXES
from d1jax.models.transformer import Transformer
from d1jax.notebook import given
from d1jax.tasks.task import DataError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "notebook.md"
PUZZLE, ANSWER = "4130\n0300\n1004\n0000\n", "4132\n2341\n1324\n3214\n"
QUIET = {"log": lambda line: None}
FEW = RlConfig(steps=2, prompts_per_step=2, num_generations=4, num_iterations=1)


@pytest.fixture(scope="module")
def policy(small_run):
    return load_pretrained(small_run, mesh=one_device())


def one_device():
    return jax.make_mesh((1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1])


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def test_every_line_of_the_page_runs(small_run, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(small_run, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    # On one of the eight devices of the tests, over which batches of one row do not divide.
    monkeypatch.setattr(d1jax, "load_pretrained", lambda path: load_pretrained(path, mesh=one_device()), raising=False)
    names: dict[str, object] = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(compile(code, str(PAGE), "exec"), names)
    assert capsys.readouterr().out.rstrip().endswith("True")


def test_the_names_are_functions_and_modules():
    for name in ("sft", "rl", "evaluate", "masked_loss", "sample", "watch", "infill"):
        assert callable(getattr(d1jax, name)) and "policy" in inspect.signature(getattr(d1jax, name)).parameters, name
    import d1jax.evaluate as command
    import d1jax.sft.loop as loop

    assert command.main and loop.train and d1jax.sft.loop is loop
    assert set(dir(d1jax)) == set(d1jax.__all__) and "Any" not in dir(d1jax)


def test_sft_lowers_the_loss_and_leaves_the_given_policy_alone(policy):
    before = jax.tree.map(jnp.copy, policy.variables)
    settings = SftConfig(steps=30, batch_size=4)
    tuned = d1jax.sft(policy, [(PUZZLE, ANSWER)] * 4, settings, **QUIET)
    assert [step["step"] for step in tuned.metrics] == list(range(1, 31))
    assert same(policy.variables, before) and not same(tuned.policy.variables, before)
    pairs = [(PUZZLE, ANSWER)] * 32
    assert d1jax.masked_loss(tuned.policy, pairs) < d1jax.masked_loss(policy, pairs) - 0.1


def test_an_adapter_stays_beside_the_weights_and_is_trained_on(policy):
    settings, lora = SftConfig(steps=2, batch_size=1), LoraConfig(rank=2)
    tuned = d1jax.sft(policy, [(PUZZLE, ANSWER)], settings, lora=lora, **QUIET).policy
    assert tuned.model.lora == lora and same(tuned.variables["params"], policy.variables["params"])
    again = d1jax.sft(tuned, [(PUZZLE, ANSWER)], settings, lora=lora, **QUIET).policy
    assert same(again.variables["params"], policy.variables["params"])
    moved = [
        float(jnp.abs(a - b).max())
        for a, b in zip(*map(jax.tree.leaves, (again.variables, tuned.variables)), strict=True)
    ]
    assert 0 < max(moved) < 0.02, "a fresh adapter would lie further away"
    whole = d1jax.sft(tuned, [(PUZZLE, ANSWER)], settings, **QUIET).policy  # all weights: the adapter is merged first
    assert "lora" not in whole.variables and whole.model.lora.rank == 0


def test_rl_is_repeatable_and_takes_rewards_by_name(policy):
    def reward(row, text):
        assert set(row) == {"prompt"}
        return {"lines": text.count("\n") / 20, "other": 1.0}

    method = RlConfig(**{**vars(FEW), "reward_weights": {"lines": 2.0, "other": 0.5}})
    one, two = (d1jax.rl(policy, [PUZZLE, "1\n"], method, reward=reward, seed=3, **QUIET) for _ in range(2))
    assert same(one.policy.variables, two.policy.variables)
    for step in one.metrics:
        assert step["reward"] == pytest.approx(2 * step["rewards/lines/mean"] + 0.5)


def test_evaluation_counts_what_is_solved(policy):
    texts = d1jax.sample(policy, [PUZZLE, "1\n"]).text
    found = d1jax.evaluate(policy, [(PUZZLE, texts[0]), ("1\n", "no")])
    assert (found["n"], found["solved_rate"], found["texts"]) == (2, 0.5, texts)
    graded = d1jax.evaluate(policy, [PUZZLE], grade=lambda row, text: {"solved": 0.0, "length": len(text) / 100})
    assert graded["length"] == len(texts[0]) / 100


def test_a_task_is_graded_by_its_own_rules(policy, small_run):
    stored = json.loads((small_run / "summary.json").read_text())["stages"][0]
    found = d1jax.evaluate(policy, TaskConfig(train_rows=32, eval_rows=8))
    assert found["n"] == 8 and found["cell_accuracy"] == pytest.approx(stored["cell_accuracy"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("one text", "give a list"),
        ([], "at least one"),
        ([("a", "b", "c")], "row 0 is no prompt"),
        ([{"question": "a"}], "row 0 is no prompt"),
        ([""], "row 0 is no prompt"),
        ([("hello", "1")], "cannot be written"),
    ],
)
def test_data_that_cannot_be_is_named(policy, data, message):
    with pytest.raises(UserError, match=message):
        d1jax.evaluate(policy, data)


def test_without_an_answer_there_is_nothing_to_compare_with(policy):
    with pytest.raises(UserError, match="has no answer to compare with; give reward= or grade="):
        d1jax.evaluate(policy, [PUZZLE])


def test_impossible_settings_are_refused(policy):
    with pytest.raises(UserError, match="rl.num_generations = 1"):
        d1jax.rl(policy, [PUZZLE], RlConfig(num_generations=1), reward=lambda row, text: 0.0)


def test_a_bf16_policy_is_trained_in_fp32_and_stays_so(policy, tmp_path):
    d1jax.save_pretrained(policy, tmp_path / "out")
    half = load_pretrained(tmp_path / "out", dtype="bfloat16", mesh=one_device())
    tuned = d1jax.sft(half, [(PUZZLE, ANSWER)], SftConfig(steps=1, batch_size=1), **QUIET)
    dtypes = {str(x.dtype) for x in jax.tree.leaves(tuned.policy.variables)}
    assert (
        dtypes == {"float32"}
        and tuned.policy.config.param_dtype == "float32"
        and tuned.policy.config.dtype == "bfloat16"
    )
    assert tuned.policy.logits([[1, 2]]).shape == policy.logits([[1, 2]]).shape


# -- what users hand over ------------------------------------------------------------------------------------------------


def arrays(policy, rows, **sections):
    return given.context_of(given.setup_of(policy, ("sft",), **sections), given.rows_of(rows), None).train


@pytest.mark.parametrize("answers", [[ANSWER], [ANSWER, "1\n"], ["", ANSWER], [""]])
def test_the_end_of_every_answer_is_taught(policy, answers):
    """Through column sampler.completion_length, the longest one's too: or a text would never end."""
    end = policy.tokenizer.special.end
    rows = arrays(policy, [(PUZZLE, answer) for answer in answers])
    lengths = [len(policy.tokenizer.answer(answer)) for answer in answers]
    assert rows.target_RC.shape == (len(answers), policy.sampler.completion_length) == (len(answers), 20)
    assert lengths == [np.flatnonzero(row == end)[0] if end in row else 20 for row in rows.target_RC]
    assert arrays(policy, [(PUZZLE, "1")], sft=SftConfig(completion_length=8)).target_RC.shape == (1, 8)


def test_an_empty_answer_is_an_answer(policy):
    pairs = [(PUZZLE, "")]
    assert np.isfinite(d1jax.masked_loss(policy, pairs))
    assert d1jax.sft(policy, pairs, SftConfig(steps=1, batch_size=1), **QUIET).metrics[0]["loss"] > 0


def test_an_answer_that_is_longer_than_what_is_learnt_is_refused(policy):
    for run in (d1jax.masked_loss, d1jax.sft):
        with pytest.raises(UserError, match="has 40 tokens, more than the 20 of sampler.completion_length"):
            run(policy, [(PUZZLE, ANSWER * 2)])


def test_a_batch_of_the_loss_may_have_any_number_of_rows(small_run):
    """On eight devices three rows do not divide, and nothing asks them to."""
    loss = d1jax.masked_loss(load_pretrained(small_run), [(PUZZLE, ANSWER)] * 3)
    assert np.isfinite(loss)


@pytest.mark.parametrize(
    "kind", [float, int, bool, np.float32, np.int64, np.bool_, jnp.float32], ids=lambda kind: kind.__name__
)
def test_any_number_is_a_reward_and_a_grade(policy, kind):
    found = d1jax.rl(
        policy,
        [PUZZLE],
        dataclasses.replace(FEW, steps=1, prompts_per_step=1),
        reward=lambda row, text: kind(1),
        **QUIET,
    )
    assert found.metrics[0]["reward"] == 1.0 and found.metrics[0]["rewards/failures"] == 0
    assert d1jax.evaluate(policy, [PUZZLE], grade=lambda row, text: kind(1))["solved_rate"] == 1.0


@pytest.mark.parametrize(
    ("grade", "message"),
    [(None, "NoneType"), (5.0, r"solved = 5.0 is not in \[0, 1\]"), (float("nan"), "solved = nan"), ("right", "right"),
     ({"length": 0.5}, "has no 'solved', only"), ({"solved": 1, "length": 30}, "length = 30.0 is not in"), ([1, 2], "list")],
)  # fmt: skip
def test_what_is_no_grade_is_named(policy, grade, message):
    with pytest.raises(UserError, match=message):
        d1jax.evaluate(policy, [PUZZLE], grade=lambda row, text: grade)


def test_a_reward_that_always_fails_ends_the_training_and_says_why(policy):
    def reward(row, text):
        return row["gold"]

    method = dataclasses.replace(FEW, steps=40)
    with pytest.raises(DataError, match="rl step 10: no text of the last 10 steps could be rewarded.*KeyError: 'gold'"):
        d1jax.rl(policy, [PUZZLE], method, reward=reward, **QUIET)
    with pytest.raises(DataError, match="rl step 2: no text of the last 2 steps"):
        d1jax.rl(policy, [PUZZLE], FEW, reward=reward, **QUIET)


def test_a_reward_that_fails_now_and_then_is_counted(policy):
    calls = []

    def reward(row, text):
        calls.append(text)
        return float("nan") if len(calls) % 4 == 0 else 1.0

    found = d1jax.rl(policy, [PUZZLE], FEW, reward=reward, **QUIET)
    assert [step["rewards/failures"] for step in found.metrics] == [2, 2]


def test_rl_needs_answers_where_nothing_else_can_judge(policy):
    with pytest.raises(UserError, match="row 0, '4130.*has no answer"):
        d1jax.rl(policy, [PUZZLE], FEW)
    with pytest.raises(UserError, match="row 0, '4130.*has no answer to learn from"):
        d1jax.sft(policy, [PUZZLE])


def test_data_may_be_any_iterable(policy):
    pairs = [(PUZZLE, ANSWER)] * 2
    assert d1jax.evaluate(policy, (pair for pair in pairs)) == d1jax.evaluate(policy, pairs)
    for wrong in (None, 3, {"prompt": PUZZLE}, "text"):
        with pytest.raises(UserError, match="give a list"):
            d1jax.evaluate(policy, wrong)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (RlConfig(negative_control="shuffled"), "rl: negative_control = 'shuffled' is not one of"),
        (RlConfig(steps=2.5), "rl: steps = 2.5 is no int"),
        (RlConfig(optimizer=OptimizerConfig(learning_rate="1e-3")), "rl: optimizer.learning_rate = '1e-3' is no float"),
        (RlConfig(fresh_masks=False, num_iterations=1), "rl.fresh_masks = False: without effect here"),
        (RlConfig(advantage=Softmax(0.0)), "rl.advantage.scale = 0.0 must be above 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_setting_is_checked_like_one_of_a_file(policy, section, message):
    with pytest.raises(UserError, match=message):
        d1jax.rl(policy, [(PUZZLE, ANSWER)], section)


def test_a_task_or_sampler_that_cannot_be_is_refused(policy):
    with pytest.raises(UserError, match="task.name = 'nonsense' is not one of"):
        d1jax.sft(policy, TaskConfig(name="nonsense"))
    with pytest.raises(UserError, match="sampler.top_k = 5: without effect here"):
        d1jax.evaluate(policy, [(PUZZLE, ANSWER)], sampler=dataclasses.replace(policy.sampler, top_k=5))


def test_grades_have_the_same_names_in_every_row(policy):
    for rows in ([{"solved": 1, "short": 1}, {"solved": 0}], [{"solved": 1}, {"solved": 0, "short": 1}]):
        grades = iter(rows)
        with pytest.raises(DataError, match=r"row 0 .*, row 1 .*; every row has the same names"):
            d1jax.evaluate(policy, [PUZZLE, "1\n"], grade=lambda row, text, grades=grades: next(grades))
    for name in ("n", "nfe", "texts"):
        with pytest.raises(DataError, match="none of them n, solved_rate"):
            d1jax.evaluate(policy, [PUZZLE], grade=lambda row, text, name=name: {"solved": 1, name: 0.5})


def test_a_table_is_no_list_of_rows(policy):
    class Table(dict):
        columns = ("prompt", "answer")

        def to_dict(self, how):
            return [dict(prompt=PUZZLE, answer=ANSWER)]

    with pytest.raises(UserError, match=r'give table.to_dict\("records"\)'):
        d1jax.evaluate(policy, Table(prompt=[PUZZLE]))
    assert d1jax.evaluate(policy, Table().to_dict("records"))["n"] == 1


def test_training_needs_no_room_for_what_is_not_sampled(policy):
    """A model of 30 positions and a prompt of 20 tokens: 8 more fit, and neither 20 nor the 128 of a policy without a sampler do."""
    narrow = dataclasses.replace(
        policy, model=Transformer(dataclasses.replace(policy.config, max_positions=30)), sampler=None
    )
    settings = SftConfig(steps=1, batch_size=1, completion_length=8)
    assert np.isfinite(d1jax.sft(narrow, [(PUZZLE, "12\n")], settings, **QUIET).metrics[0]["loss"])
    with pytest.raises(UserError, match="more than the 30 positions"):
        d1jax.sft(narrow, [(PUZZLE, "12\n")], SftConfig(steps=1, batch_size=1, completion_length=20))


def test_a_judge_beside_a_task_is_refused(policy):
    with pytest.raises(UserError, match="beside task 'sudoku', which judges its rows itself"):
        d1jax.evaluate(policy, TaskConfig(eval_rows=2), grade=lambda row, text: 1.0)


def test_a_task_is_read_with_the_rules_of_a_run(policy):
    """Rewards that it does not have, and the training rows that are evaluated on."""
    with pytest.raises(UserError, match=r"names \['style'\], which sudoku does not have"):
        d1jax.rl(policy, TaskConfig(train_rows=4, eval_rows=2), RlConfig(reward_weights={"style": 1.0}))
    one = TaskConfig(train_rows=4, train="generated", eval_rows=2, eval_sets={"part": "share:0.9"})
    assert len(given.context_of(given.setup_of(policy, ("sft",), one), one, None, QUIET["log"]).train) < 4


def test_a_stage_in_which_no_update_was_good_is_no_success(policy):
    broken = jax.tree.map(lambda x: x * jnp.nan, policy.variables)
    with pytest.raises(Diverged, match="sft step 2: all 2 updates of the stage were NaN or infinite"):
        d1jax.sft(
            dataclasses.replace(policy, variables=broken), [(PUZZLE, ANSWER)], SftConfig(steps=2, batch_size=1), **QUIET
        )


def test_a_policy_of_a_run_names_the_run(policy, small_run):
    assert repr(policy).endswith(f"from {str(small_run)!r})")
