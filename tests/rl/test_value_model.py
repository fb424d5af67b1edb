"""The value model: what a value is, what it learns, and a whole run with it, which resumes exactly."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import d1jax.train as command
from d1jax.config import OptimizerConfig
from d1jax.config.advantage import Gae
from d1jax.config.parse import parse
from d1jax.models.reward_head import HEAD
from d1jax.models.sharding import make_mesh, replicated
from d1jax.rl import gae
from d1jax.rl.value_model import Rows, make_read, make_update, quality, token_loss
from d1jax.telemetry.metrics import read_metrics
from d1jax.training.likelihood import Scorer
from d1jax.training.optimizer import make_optimizer, new_state
from d1jax.weights.checkpoints import ocp
from tests.conftest import SMALL_RUN

PPO = {
    "stages": "[sft, rl]", "rl.steps": 3, "rl.prompts_per_step": 4, "rl.num_generations": 2, "rl.num_iterations": 2,
    "rl.estimator": "trajectory", "rl.advantage": "{name: gae, value_learning_rate: 1e-2}", "rl.reward_weights": "{cells: 1}",
}  # fmt: skip


def settings(run_dir, **changes):
    return [f"--{key}={value}" for key, value in {**SMALL_RUN, **PPO, "run_dir": run_dir, **changes}.items()]


def scored(toy, tiny, alignment="same_position", **advantage):
    """(config, scorer, variables with a random head, a batch)."""
    config = toy.small(toy.named("ppo"), advantage=Gae(value_learning_rate=1e-2, **advantage))
    model, variables = tiny(width=16, vocab_size=16, alignment=alignment)
    rng = np.random.default_rng(3)
    head = {"kernel": rng.normal(size=16).astype(np.float32), "bias": np.float32(0.2)}
    scorer = Scorer(model, config.estimator, toy.sampler, toy.special)
    return config, scorer, {**variables, HEAD: head}, toy.batch(np.zeros(8)).rollout


@pytest.mark.parametrize("alignment", ["same_position", "shifted"])
@pytest.mark.parametrize("shrink", [1, 3])
def test_a_value_is_read_in_the_state_that_the_token_was_unmasked_from(toy, tiny, oracle, alignment, shrink):
    config, scorer, variables, batch = scored(toy, tiny, alignment, shrink=shrink)
    found = np.asarray(make_read(scorer, config.advantage)(variables, batch))
    canvas, head = batch.canvas, variables[HEAD]
    forward = oracle(scorer.model, {"params": variables["params"]})
    for row in range(2):
        prompt = canvas.prompt_BP[row][: canvas.prompt_length_B[row]].tolist()
        completion, unmasked = canvas.completion_BC[row], batch.unmask_step_BC[row]
        end = next((place for place, token in enumerate(completion) if token == toy.special.end), len(completion) - 1)
        for place in range(end + 1):
            state = np.where(unmasked // shrink >= unmasked[place] // shrink, toy.special.mask, completion)
            hidden, _ = forward([*prompt, *state.tolist()])
            seen = hidden[len(prompt) + place - (alignment == "shifted")]
            np.testing.assert_allclose(found[row, place], seen @ head["kernel"] + head["bias"], rtol=1e-4, atol=1e-5)
        assert (found[row, end + 1 :] == 0).all(), "what stands behind the text has no value"


def test_the_loss_is_the_larger_of_the_two_squares():
    value, old, target = (np.array([[x]]) for x in (1.0, 0.0, 2.0))
    assert float(token_loss(value, old, target, 0.2)[0, 0]) == pytest.approx((0.2 - 2) ** 2 / 2)
    assert float(token_loss(value, old, -target, 0.2)[0, 0]) == pytest.approx((1 + 2) ** 2 / 2)


@pytest.mark.parametrize("parts", [1, 4])
def test_it_learns_the_returns_whatever_the_micro_batches(toy, tiny, parts):
    config, scorer, variables, batch = scored(toy, tiny, value_clip=10.0)
    config = dataclasses.replace(config, num_iterations=30, grad_accumulation_steps=parts)
    scorer = dataclasses.replace(scorer, parts=parts)
    mesh = make_mesh(parse([]).mesh)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=3e-2), 30)
    variables = jax.device_put(variables, replicated(mesh))
    state = new_state(optimizer, variables, mesh)
    update, read = make_update(scorer, optimizer, config, state), make_read(scorer, config.advantage)
    text = np.asarray(scorer.text_BC(batch))
    reward = np.linspace(-1, 1, len(text))
    step, text = gae.steps_of(batch.unmask_step_BC, text, 1)
    returns = gae.returns(reward, step, text, 1.0).astype(np.float32)
    before = np.asarray(read(variables, batch))
    rows = Rows(batch, before, returns, (text / text.sum()).astype(np.float32))
    after_state, metrics = update(state, {}, rows)
    after = np.asarray(read(after_state.trainable, batch))
    error = [((value - returns)[text] ** 2).mean() for value in (before, after)]
    assert int(metrics["nonfinite/total"]) == 0
    assert error[1] < 0.2 * error[0] and float(metrics["value/loss"]) < error[0] / 2
    explained = quality(after[text], returns[text])["value/explained_variance"]
    assert 0.5 < explained < 1, "the first state of all completions of a problem is one, and their rewards differ"
    assert quality(before[text], np.ones(text.sum())) == {
        "value/mean": pytest.approx(float(before[text].mean())),
        "value/explained_variance": 0.0,
    }


@pytest.mark.parametrize("rank", [2, 0])
def test_a_stopped_run_ends_with_the_same_policy_and_the_same_values(tmp_path, interrupted, rank, capsys):
    assert command.main(settings(tmp_path / "whole", **{"lora.rank": rank})) == 0
    assert "the value model's weights and Adam's two moments" in capsys.readouterr().err
    with interrupted("rl", 1):
        assert command.main(settings(tmp_path / "stopped", **{"lora.rank": rank})) == 130
    assert command.main(settings(tmp_path / "stopped", **{"lora.rank": rank})) == 0
    whole, stopped = (ocp.load_checkpointables(tmp_path / run / "checkpoints/rl/3") for run in ("whole", "stopped"))
    assert whole.keys() == {"trainable", "optimizer", "value_model"}
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(stopped), strict=True):
        np.testing.assert_array_equal(a, b)
    rows = [row for row in read_metrics(tmp_path / "whole/metrics.jsonl") if row["stage"] == "rl"]
    assert rows[0]["value/mean"] == 0.0, "the head starts at zero"
    assert rows[1]["value/mean"] != 0.0 and all(np.isfinite(row["value/loss"]) for row in rows)
    json.loads((tmp_path / "whole/summary.json").read_text())


def test_a_value_model_that_cannot_be_updated_ends_the_run(tmp_path, capsys):
    """Its loss grows out of all bounds: the policy would be trained on advantages of NaN, or on none."""
    changes = {
        "rl.advantage": "{name: gae, value_learning_rate: 1e30, value_clip: 1e30}",
        "max_bad_updates": 2,
        "rl.steps": 6,
    }
    assert command.main(settings(tmp_path / "run", **changes)) == 1
    assert "updates were NaN or infinite and were skipped" in capsys.readouterr().err
