"""What benchmarks/methods.py promises: equal cost, counted as written, and no run done twice."""

import dataclasses
import importlib

import pytest


@pytest.fixture(scope="module")
def plan():
    return importlib.import_module("methods_plan")


@pytest.fixture(scope="module")
def runner():
    return importlib.import_module("methods_runner")


# On 20 tokens in two steps, of a row: nfe, and views x (3 mu + mu of the reference + (mu - 1) of the old policy), worked out by hand.
BY_HAND = {
    "d1": (2, 1 * (36 + 12 + 11)),
    "coupled_grpo": (2, 3 * (6 + 2 + 1)),
    "wd1": (2, 1 * 24),  # neither old policy nor reference
    "just_grpo": (20, 20 * 3),  # a view and a step for each token, one inner update
    "d2": (2, 2 * (12 + 4 + 3)),  # no more segments than steps
    "tracerl": (2, 1 * (12 + 3)),  # two steps are one segment; KL to the old policy
    "ppo_kl": (2, 2 * (12 + 3 + 2)),  # two states; policy and reference once for the penalty in the reward
    "cispo": (2, 1 * (12 + 3)),  # no KL
    "online_rft": (2, 3),
    "vrpo": (2, 8 * (3 + 1)),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_forward_passes(plan, name):
    flags = ("--sampler.steps", "2")
    config, _ = plan.method_config("sudoku", plan.method_file(name), flags)
    rollout, update = BY_HAND[name]
    assert (plan.rollout_passes(config), plan.update_passes(config)) == (rollout, update)
    stage = plan.stage_of(config)
    trained = 2 / stage.num_generations if name == "vrpo" else 1  # of a group, the best and the worst row
    assert plan.row_passes(config) == stage.prompts_per_step * stage.num_generations * (rollout + trained * update)


def test_every_run_spends_the_budget_to_half_a_step(plan):
    runs, _ = plan.plan_runs(seeds=(1,))
    assert {run.arm for run in runs} >= {"d1", "coupled_grpo", "just_grpo", "vrpo", "p 0.5", "mu 1, fresh masks"}
    for run in runs:
        step = plan.row_passes(run.config)
        assert abs(run.spends - run.budget) <= step / 2
        assert run.spends == plan.stage_of(run.config).steps * step


def test_what_is_shared_is_equal_and_what_it_changed_is_said(plan):
    base = plan.base_config("sudoku")
    config, changed = plan.method_config("sudoku", plan.method_file("coupled_grpo"))
    assert all(getattr(config.rl, name) == getattr(base.rl, name) for name in plan.SHARED)
    assert config.rl.policy_loss.clip_low == 0.5 and config.rl.num_iterations == 2
    assert changed["rl.temperature"] == "1.2 -> 1.0"
    preference = plan.stage_of(plan.method_config("sudoku", plan.method_file("vrpo"))[0])
    assert all(getattr(preference, name) == getattr(base.rl, name) for name in plan.SHARED)


def test_arms_of_equal_settings_share_a_run(plan):
    runs, _ = plan.plan_runs(("sudoku",), (1,))
    digests = {run.arm: run.digest for run in runs}
    assert digests["d1"] == digests["mu 12, fresh masks"] != digests["d1_fixed_mask"]
    assert digests["d1_fixed_mask"] == digests["mu 12, fixed masks"]


def test_a_digest_sees_the_parameters_of_a_choice(plan):
    (run,), _ = plan.plan_runs(("sudoku",), (1,), [plan.method_file("d1")], ablations=False)
    kl = dataclasses.replace(run.config.rl.kl, coefficient=0.5)
    other = dataclasses.replace(run.config, rl=dataclasses.replace(run.config.rl, kl=kl))
    assert dataclasses.replace(run, config=other).digest != run.digest


def result(run, solved=0.5):
    before, after = ({how: {"solved": x} for how in ("shared", "sampled")} for x in (0.25, solved))
    return {"steps": 1, "before": before, "after": after, "seconds": 1.0}


def test_what_is_done_is_not_done_again(plan, runner, tmp_path):
    runs, _ = plan.plan_runs(("sudoku",), (1, 2), [plan.method_file("d1")], ablations=False)
    # another arm of the same settings, as an ablation has it
    runs.append(dataclasses.replace(runs[0], arm="the same"))
    done = []

    def carry_out(todo):
        for run in todo:
            done.append((run.arm, run.seed))
            yield run, result(run) if len(done) == 1 else RuntimeError("killed")

    assert runner.finish_all(runs, tmp_path, carry_out) == 1
    assert done == [("d1", 1), ("d1", 2)]
    assert [row["arm"] for row in runner.collected(runs, tmp_path)] == ["d1", "the same"]

    def carry_out_all(todo):
        for run in todo:
            done.append((run.arm, run.seed))
            yield run, result(run)

    assert runner.finish_all(runs, tmp_path, carry_out_all) == 0
    assert done == [("d1", 1), ("d1", 2), ("d1", 2)]
    assert runner.finish_all(runs, tmp_path, carry_out_all) == 0
    assert len(done) == 3
    assert len(runner.collected(runs, tmp_path)) == 3


def test_the_report_keeps_what_was_written_by_hand(plan, runner):
    report = importlib.import_module("methods_report")
    runs, _ = plan.plan_runs(("sudoku",), (1, 2, 3), [plan.method_file("d1")], ablations=True)
    rows = []
    for run in runs:
        train = {"reward": 1.0, "diverged": run.seed == 2}
        solved = 0.5 + 0.01 * run.seed
        scores = {how: {"solved": solved, "cell_accuracy": 0.9} for how in ("shared", "sampled")}
        before = {how: {"solved": 0.25, "cell_accuracy": 0.8} for how in ("shared", "sampled")}
        one = {**runner.identity(run), "before": before, "after": scores, "train": train, "seconds": 3.0}
        rows.append(one | {"environment": {"jax": "0"}})
    settings = {"sudoku": plan.settings_of(plan.base_config("sudoku"))}
    data = {"seeds": [1, 2, 3], "settings": settings, "left_out": ["sudoku / x: why"], "runs": rows}
    text = report.page(data, "What we saw.")
    assert "What we saw." in text and "diverged 1 of 3" in text and "sudoku / x: why" in text
    assert "+27.0 ± 2.5" in text  # 26, 27, 28 points; 4.303 x 1 / sqrt 3
    pictures = report.pictures(data, set(plan.ablation_arms()))
    assert set(pictures) == {"methods_sudoku.svg", "ablation_inner_updates.svg", "ablation_prompt_mask.svg"}
    assert all(svg.startswith("<svg xmlns") for svg in pictures.values())


@pytest.mark.parametrize(("values", "mean", "half"), [((1.0, 2.0, 3.0), 2.0, 2.4843), ((1.0, 3.0), 2.0, 12.706)])
def test_intervals_by_student(benchmarks, values, mean, half):
    report = importlib.import_module("methods_report")
    assert report.mean_and_half(values) == (pytest.approx(mean), pytest.approx(half, abs=1e-3))
