"""A rollout batch in parts: the same rows, and each part graded while the next is under way."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from d1jax.config import Config, RlConfig
from d1jax.config.parse import parse
from d1jax.diffusion.rollout import Rollout
from d1jax.evaluation.decode import decoding_copy
from d1jax.rollouts.generate import Failures, Generator, fetch_and_grade
from d1jax.tasks.task import DataError
from d1jax.training.context import build
from d1jax.training.stage_log import Clock
from d1jax.weights.run import RunDirectory
from d1jax.weights.variables import start_variables
from tests.conftest import SMALL_RUN

ROLLOUT = {"rl.prompts_per_step": 8, "rl.num_generations": 4, "rl.reward_weights": "{cells: 1}", "stages": "[sft, rl]"}


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    return build(parse([f"--{key}={value}" for key, value in {**SMALL_RUN, **ROLLOUT}.items()]), lambda line: None)


@pytest.mark.parametrize("size", [4, 8, 16, 32])
def test_parts_hold_the_rows_of_the_whole(context, size, tmp_path):
    with jax.set_mesh(context.mesh):
        variables = start_variables(context, RunDirectory(tmp_path))
        whole, parted = (drawn(context, variables, rows) for rows in (0, size))
    assert len(parted[0]) == 32 // size and len(whole[0]) == 1
    for name, one, other in zip(whole[1]._fields, whole[1], parted[1], strict=True):
        if np.issubdtype(one.dtype, np.floating):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(one, other, err_msg=name)
    assert whole[2].texts == parted[2].texts
    np.testing.assert_array_equal(whole[2].reward_QG, parted[2].reward_QG)
    assert whole[2].parts_B.keys() == parted[2].parts_B.keys()


def drawn(context, variables, size):
    config = dataclasses.replace(context.config.rl, rollout_batch_size=size)
    generate = Generator(context, config)
    prompts, clock = generate.prompts(3), Clock()
    parts = generate(variables, prompts, jax.random.key(5))
    rollout, graded = fetch_and_grade(context, {"cells": 1.0}, prompts, parts, 4, clock)
    assert clock.laps.keys() == {"time/rollout_s", "time/reward_s"} and min(clock.laps.values()) > 0
    return parts, rollout, graded


class Task:
    """Two rewards, of which the second applies to the first part only."""

    name, columns = "recorded", None

    def __init__(self, events):
        self.events = events

    def rewards_many(self, rows, texts):
        self.events.append(f"graded {len(texts)}")
        return [{"a": float(row["n"]), **({"b": 1.0} if row["n"] < 2 else {})} for row in rows]


def test_every_part_is_handed_over_before_the_first_is_graded_and_graded_before_the_next_is_fetched(monkeypatch):
    events = []

    def sample(variables, prompts, noise):
        at = int(noise.row_ids_B[0])
        events.append(f"handed over {at}")
        return at

    def fetch(handed_over):
        at, _ = handed_over
        events.append(f"fetched {at}")
        rows = np.zeros((2, 3))
        return Rollout(*[rows] * 5, np.array([3, 3]), *[np.zeros(2)] * 2, rows), ({}, None)

    monkeypatch.setattr("d1jax.models.sharding.fetch", fetch)
    monkeypatch.setattr("d1jax.rollouts.generate.decode.texts_of", lambda context, rollout: ["x", "y"])
    monkeypatch.setattr("d1jax.rollouts.generate.sharding.shard_batch", lambda mesh, x: x)
    rows = [{"n": n} for n in range(4)]
    train = Problems(rows)
    context = SimpleNamespace(
        config=Config(), train=train, mesh=None, task=Task(events), reward_models={}, step_model=None,
        sampler=lambda temperature, record_entropy: SimpleNamespace(sample=sample),
    )  # fmt: skip
    generate = Generator(context, RlConfig(prompts_per_step=4, num_generations=2, rollout_batch_size=2))
    prompts = generate.prompts_of(range(4))
    parts = generate({}, prompts, None)
    _, graded = fetch_and_grade(context, {"a": 2.0}, prompts, parts, 2, Clock())
    waited = [f"{what} {n}" for n in (0, 2, 4, 6) for what in ("fetched", "graded")]
    assert events[:4] == ["handed over 0", "handed over 2", "handed over 4", "handed over 6"]
    assert events[4:] == [line if "fetched" in line else "graded 2" for line in waited]
    np.testing.assert_array_equal(graded.reward_QG, [[0, 0], [2, 2], [4, 4], [6, 6]])
    np.testing.assert_array_equal(graded.parts_B["b"], [1, 1, 1, 1, *[np.nan] * 4])


class Problems:
    """The rows of a context."""

    def __init__(self, rows):
        self.rows = rows
        self.prompt_RP, self.prompt_length_R = np.zeros((len(rows), 2), np.int32), np.ones(len(rows), np.int32)

    def __len__(self):
        return len(self.rows)


def test_a_stage_ends_where_nothing_can_be_rewarded_for_many_steps_and_counts_the_others():
    failures = Failures("rl", limit=2)
    bad = SimpleNamespace(judge=SimpleNamespace(failures=["task 'x', row 1: boom"], any_rewarded=False))
    good = SimpleNamespace(judge=SimpleNamespace(failures=[], any_rewarded=True))
    assert failures.note(1, bad) == ["step 1: task 'x', row 1: boom; it counts as 0 (1 such texts)"]
    assert failures.note(2, good) == []
    failures.note(3, bad)
    with pytest.raises(DataError, match="rl step 4: no text of the last 2 steps could be rewarded.*boom"):
        failures.note(4, bad)


@pytest.mark.parametrize("kept", ["gathered", "as_trained"])
def test_weights_are_gathered_for_decoding_and_no_token_changes(tmp_path, kept):
    settings = {**SMALL_RUN, **ROLLOUT, "run_dir": tmp_path, "mesh.data": 1, "mesh.fsdp": 4, "mesh.tensor": 2}
    arguments = [f"--{key}={value}" for key, value in {**settings, "mesh.rollout_weights": kept}.items()]
    context = build(parse(arguments))
    with jax.set_mesh(context.mesh):
        variables = start_variables(context, RunDirectory(tmp_path))
        copy = decoding_copy(context, variables)
        generate = Generator(context, context.config.rl)
        prompts = generate.prompts(0)
        texts = [jax.device_get(generate(weights, prompts, jax.random.key(3))[0]) for weights in (variables, copy)]
    named = str([leaf.sharding.spec for leaf in jax.tree.leaves(copy)])
    assert ("fsdp" in named) == (kept == "as_trained") and "tensor" in named
    np.testing.assert_array_equal(texts[0].tokens_BC, texts[1].tokens_BC)
