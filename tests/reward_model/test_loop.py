"""A reward model stage learns which text is better, resumes exactly, is replayed, and is asked by later stages."""

import json

import jax
import numpy as np
import pytest

import d1jax.train as command
from d1jax.config import UserError
from d1jax.config.parse import parse
from d1jax.config.reward_model import RewardModelConfig
from d1jax.data.pairs import split_by_prompt
from d1jax.data.tokenizers import SpecialTokens
from d1jax.diffusion.canvas import Canvas
from d1jax.diffusion.reward_model import RewardModel, served, text_scores, token_scores
from d1jax.models.reward_head import HEAD
from d1jax.rl import loop
from d1jax.telemetry.metrics import read_metrics
from d1jax.training.context import build, of_stages
from d1jax.weights.checkpoints import ocp
from tests.conftest import SMALL_RUN

# The better text has an "a" where the worse one has a "b".
PAIRS = [
    {"prompt": f"{n}?", "chosen": "xya"[: n % 3 + 1] + "a" * 3, "rejected": "xyb"[: n % 3 + 1] + "b" * (n % 2 + 2)}
    for n in range(60)
]
STAGE = {
    "task.name": "jsonl", "task.train_rows": 0, "tokenizer": "bytes", "model.width": 16, "sampler.completion_length": 8,
    "sampler.block_length": 8, "sft.steps": 1, "sft.batch_size": 8, "reward_model.steps": 40, "reward_model.batch_size": 16,
    "reward_model.optimizer.learning_rate": 0.01, "checkpoint_every": 100,
}  # fmt: skip
RL = {"rl.steps": 2, "rl.prompts_per_step": 4, "rl.num_generations": 4, "rl.num_iterations": 1}


def settings(tmp_path, run="run", records=PAIRS, **changes):
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    train.write_text("".join(json.dumps(record) + "\n" for record in records))
    test.write_text(json.dumps({"prompt": "99?", "answer": "100"}) + "\n")
    stages = {"stages": "[sft, {name: judge, kind: reward_model}]"}
    made = {
        **SMALL_RUN,
        **STAGE,
        **stages,
        "task.train": train,
        "task.eval_sets": f"{{test: {test}}}",
        "task.eval_rows": 0,
    }
    return [f"--{key}={value}" for key, value in {**made, "run_dir": tmp_path / run, **changes}.items()]


def test_a_score_is_the_mean_of_the_states_of_the_text_times_the_head(tiny, oracle):
    model, variables = tiny(width=16)
    rng = np.random.default_rng(0)
    head = {"kernel": rng.normal(size=16).astype(np.float32), "bias": np.float32(0.3)}
    prompt, text = [3, 1, 4], [5, 9, 2, 11]  # 11 ends the text
    canvas = Canvas(np.array([[5, 9, 2, 11, 11, 11]]), np.array([[3, 1, 4, 0]]), np.array([3]))
    found = text_scores(model, {**variables, HEAD: head}, canvas, SpecialTokens(mask=12, end=11))
    hidden, _ = oracle(model, variables)([*prompt, *text, 11, 11])
    expected = np.mean([hidden[3 + place] @ head["kernel"] + 0.3 for place in range(4)])
    np.testing.assert_allclose(found, [expected], rtol=1e-5)


@pytest.mark.parametrize("loss", ["pairwise", "pointwise"])
def test_a_stage_learns_to_order_pairs_that_it_has_not_seen(tmp_path, loss, capsys):
    assert command.main(settings(tmp_path, **{"reward_model.loss": loss})) == 0
    rows = [row for row in read_metrics(tmp_path / "run/metrics.jsonl") if row["stage"] == "judge"]
    assert rows[0]["loss"] == pytest.approx(np.log(2), rel=1e-5), "a head of zeros scores everything 0"
    worth = json.loads((tmp_path / "run/evaluations/judge.reward_model.json").read_text())
    assert worth["pairs"] == 6 and worth["accuracy"] == 1.0 and worth["margin"] > 0.5
    assert "judge: on 6 held-out pairs 100.0% are ordered rightly" in capsys.readouterr().err


def test_single_texts_need_the_pointwise_loss(tmp_path):
    records = [{"prompt": f"{n}?", "completion": "a" if n % 2 else "b", "label": bool(n % 2)} for n in range(30)]
    assert command.main(settings(tmp_path, records=records)) == 2
    one = [{"prompt": "1", "chosen": "a", "rejected": letter} for letter in "bc"]
    assert command.main(settings(tmp_path, records=one)) == 2
    assert not (tmp_path / "run").exists(), "before anything is done"
    assert command.main(settings(tmp_path, "other", records, **{"reward_model.loss": "pointwise"})) == 0


def test_a_stopped_stage_ends_with_the_same_weights_and_adapters_are_learnt_alone(tmp_path, interrupted):
    changes = {"lora.rank": 2, "reward_model.steps": 4, "checkpoint_every": 2, "task.too_long": "drop"}
    assert command.main(settings(tmp_path, "whole", **changes)) == 0
    with interrupted("judge", 2):
        assert command.main(settings(tmp_path, "stopped", **changes)) == 130
    assert command.main(settings(tmp_path, "stopped", **changes)) == 0
    one, other = (
        ocp.load_checkpointables(tmp_path / run / "checkpoints/judge/4")["trainable"] for run in ("whole", "stopped")
    )
    assert one.keys() == {"lora", HEAD}
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_later_stages_ask_the_model_and_its_scores_are_those_of_a_pass_by_hand(tmp_path, monkeypatch):
    stages = (
        "[sft, {name: judge, kind: reward_model}, {name: keep, kind: generate, from: sft, accept: {'model:judge': -100},"
        " keep_per_prompt: 0, prompts: 8, prompts_per_step: 8, num_generations: 4, rollout_batch_size: 16,"
        " reward_weights: {'model:judge': 2}},"
        " {name: rl, kind: rl, from: sft}, {name: again, kind: reward_model, from: judge, data: [keep, task], steps: 3, replay: 0.25}]"
    )
    changes = {"stages": stages, "rl.reward_weights": "{'model:judge': 1, format: 0.5}", **RL}
    changes |= {"reward_model.steps": 10}
    asked = {}
    scores = RewardModel.scores
    monkeypatch.setattr(
        RewardModel,
        "scores",
        lambda self, canvas: asked.setdefault(len(asked), (self, canvas)) and scores(self, canvas),
    )
    assert command.main(settings(tmp_path, **{k: v for k, v in changes.items() if k != "reward_model.steps"})) == 0
    run = tmp_path / "run"
    kept = [json.loads(line) for line in (run / "generated/keep.jsonl").read_text().splitlines()]
    assert kept and all(row["reward"] == pytest.approx(2 * row["rewards"]["model:judge"], rel=1e-6) for row in kept)
    judge = next(model for model, canvas in asked.values())
    config = parse(settings(tmp_path, **{k: v for k, v in changes.items() if k != "reward_model.steps"}))
    context = build(config, lambda line: None)
    with jax.set_mesh(context.mesh):
        for row in kept[:3]:
            tokens = (row["tokens"] + [context.tokenizer.special.end] * 8)[:8]
            place = row["row"]
            canvas = Canvas(
                np.array([tokens] * 8), context.train.prompt_RP[[place] * 8], context.train.prompt_length_R[[place] * 8]
            )
            by_hand = scores(judge, canvas)[0]
            np.testing.assert_allclose(row["rewards"]["model:judge"], by_hand, rtol=1e-4, atol=1e-5)
    rows = [row for row in read_metrics(run / "metrics.jsonl") if row["stage"] == "rl"]
    assert len(rows) == 2 and all("rewards/model:judge/mean" in row and "rewards/format/mean" in row for row in rows)
    expected = rows[0]["rewards/model:judge/mean"] + 0.5 * rows[0]["rewards/format/mean"]
    assert rows[0]["reward"] == pytest.approx(expected, rel=1e-5)
    again = [row for row in read_metrics(run / "metrics.jsonl") if row["stage"] == "again"]
    assert len(again) == 3 and again[0]["loss"] != pytest.approx(np.log(2), rel=1e-3), (
        "it goes on from the first one's head"
    )
    summary = json.loads((run / "summary.json").read_text())
    assert [stage["name"] for stage in summary["stages"]] == ["sft", "rl"], "a reward model is no policy"


@pytest.mark.parametrize("loss", ["pairwise", "stepwise"])
def test_rl_with_its_scores_equals_rl_with_the_same_numbers_from_a_file(tmp_path, monkeypatch, loss):
    stages = "[sft, {name: judge, kind: reward_model}, {name: rl, kind: rl, from: sft}]"
    given = {**RL, "stages": stages, "reward_model.steps": 5, "reward_model.loss": loss}
    table = {}
    graded = loop.fetch_and_grade

    def recording(*args):
        rollout, found = graded(*args)
        if "model:judge" in found.parts_B:
            asked = (f"{row['prompt']} {text!r}" for row, text in zip(args[2].rows, found.texts, strict=True))
            table.update(zip(asked, found.parts_B["model:judge"].tolist(), strict=True))
        return rollout, found

    monkeypatch.setattr(loop, "fetch_and_grade", recording)
    texts = PAIRS if loss == "pairwise" else [{"completions": ["a", "xb"], "labels": [True, False]}] * 60
    two = [{**text, "prompt": "?!"[place % 2]} for place, text in enumerate(texts)]  # one can be held out
    assert command.main(settings(tmp_path, "model", two, **given, **{"rl.reward_weights": "{'model:judge': 1}"})) == 0
    file = tmp_path / "numbers.json"
    file.write_text(json.dumps(table))
    (tmp_path / "stored.py").write_text(
        f"import json\nTABLE = json.load(open({str(file)!r}))\n"
        "def stored(prompts, completions, **columns):\n"
        "    return [TABLE[f'{prompt} {text!r}'] for prompt, text in zip(prompts, completions)]\n"
    )
    weights = f"{{'{tmp_path / 'stored.py'}:stored': 1}}"
    assert command.main(settings(tmp_path, "file", two, **given, **{"rl.reward_weights": weights})) == 0
    one, other = (
        ocp.load_checkpointables(tmp_path / run / "checkpoints/rl/2")["trainable"] for run in ("model", "file")
    )
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_replay_takes_its_share_and_no_held_out_prompt():
    config = RewardModelConfig(data=("new", "old", "older"), replay=0.25, batch_size=32)
    assert config.counts() == (24, 4, 4) and RewardModelConfig().counts() == (32,)


def test_pairs_are_split_by_prompt(tmp_path):
    repeated = [*PAIRS, *({**pair, "chosen": pair["chosen"] + "!"} for pair in PAIRS)]
    context = of_stages(build(parse(settings(tmp_path, records=repeated)), lambda line: None), lambda line: None)[
        "judge"
    ]
    (pairs,) = context.judged_sources
    learnt, held = split_by_prompt(pairs, 0.1, seed=3)
    assert not learnt.prompts() & held.prompts() and len(held.prompts()) == 6 and len(held.better) == 12
    assert len(learnt.better) + len(held.better) == 120 and learnt.matched and held.matched
    assert (
        split_by_prompt(pairs, 0.1, seed=3)[1].prompts()
        == held.prompts()
        != split_by_prompt(pairs, 0.1, seed=4)[1].prompts()
    )
    with pytest.raises(UserError, match="texts of one prompt only"):
        split_by_prompt(held.where(lambda key: key == sorted(held.prompts())[0]), 0.1, 0)


def test_a_model_that_is_served_scores_as_it_did_when_it_was_measured(tiny):
    model, variables = tiny(dtype="bfloat16")
    head = {"kernel": np.linspace(-1, 1, model.config.width, dtype=np.float32), "bias": np.float32(0.123456)}
    stored = {**variables, HEAD: jax.tree.map(jax.numpy.asarray, head)}
    canvas = Canvas(np.array([[3, 4, 5, 6]]), np.array([[1, 2]]), np.array([2]))
    found = token_scores(model, served(stored, model.config), canvas)
    np.testing.assert_array_equal(found, token_scores(model, stored, canvas))
