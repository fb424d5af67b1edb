"""More steps of a stage: as if they had been asked for from the start, or refused with the reason."""

import json

import jax
import numpy as np
import pytest

from d1jax import train
from d1jax.config import UserError
from d1jax.config.parse import parse
from d1jax.config.stored import from_yaml
from d1jax.inference.policy import load_pretrained
from d1jax.telemetry.metrics import read_metrics
from d1jax.training.longer import check_longer, only_longer
from d1jax.weights.run import RunDirectory

SETTINGS = {
    "task.train_rows": 32, "task.eval_rows": 8, "model.width": 8, "model.layers": 1, "model.heads": 2, "model.kv_heads": 2,
    "model.mlp_width": 8, "sampler.steps": 2, "sft.batch_size": 8, "evaluation.batch_size": 8,
    "sft.optimizer.schedule": "constant", "sft.optimizer.warmup_steps": 2,
}  # fmt: skip
RL = {"rl.prompts_per_step": 2, "rl.num_generations": 4, "rl.num_iterations": 1}


def run(directory, **changes):
    settings = {
        **SETTINGS,
        **(RL if "rl" in changes["stages"] else {}),
        "run_dir": directory,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    return train.run(parse([f"--{key}={value}" for key, value in settings.items()]))


def learnt(directory):
    rows = read_metrics(directory / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


@pytest.mark.parametrize("stages", ["[sft]", "[sft, rl]"])
def test_a_longer_run_is_the_run_that_was_long_from_the_start(tmp_path, capsys, stages):
    def steps(number):
        last = "rl" if "rl" in stages else "sft"
        return {f"{last}__steps": number, **({"sft__steps": 1} if last == "rl" else {})}

    run(tmp_path / "whole", stages=stages, **steps(4))
    run(tmp_path / "grown", stages=stages, **steps(2))
    capsys.readouterr()
    result = run(tmp_path / "grown", stages=stages, **steps(4))
    last = result["stages"][-1]
    assert "steps 2 -> 4: continues after step 2 with the optimizer's state" in capsys.readouterr().err
    assert learnt(tmp_path / "grown") == learnt(tmp_path / "whole")
    one, two = (load_pretrained(tmp_path / name).variables for name in ("grown", "whole"))
    assert all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(two)))
    assert last["step"] == 4, "the evaluation is of the new last step"
    assert (tmp_path / "grown" / "evaluations" / f"{last['name']}.step2.json").exists()
    stored = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert result["stages"] == stored["stages"]
    assert getattr(from_yaml(tmp_path / "grown" / "config.yaml"), last["name"]).steps == 4


def test_a_stage_from_which_a_later_one_has_begun_stays_as_it_is(tmp_path):
    run(tmp_path / "run", stages="[sft, rl]", sft__steps=1, rl__steps=1)
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(
        UserError, match="sft.steps 1 -> 2: stage 'rl' has begun from the weights of sft step 1 already"
    ):
        run(tmp_path / "run", stages="[sft, rl]", sft__steps=2, rl__steps=1)
    with pytest.raises(UserError, match="has begun from"):
        run(tmp_path / "run", stages="[sft, rl]", sft__steps=2, rl__steps=2)
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before
    assert (tmp_path / "run" / "evaluations" / "rl.json").exists()


def test_a_schedule_that_depends_on_the_number_of_steps_says_what_would_change(tmp_path):
    changes = {"stages": "[sft]", "sft.optimizer.schedule": "linear", "sft.optimizer.learning_rate": "0.01"}
    run(tmp_path / "run", sft__steps=4, **changes)
    with pytest.raises(UserError, match=r"linear goes down to zero .* \(the last one 0.00833 instead of 0.005\)"):
        run(tmp_path / "run", sft__steps=8, **changes)


def test_a_mapping_in_another_order_is_another_configuration():
    """Which evaluation set is first says which one is the headline."""
    sets = ("{a: generated, b: generated}", "{b: generated, a: generated}")
    old, same, turned = (
        parse([f"--task.eval_sets={names}", f"--sft.steps={steps}"])
        for names, steps in ((sets[0], 4), (sets[0], 5), (sets[1], 5))
    )
    assert only_longer(old, same) and not only_longer(old, turned)


def test_fewer_steps_or_another_change_beside_are_refused_as_before(tmp_path):
    run(tmp_path / "run", stages="[sft]", sft__steps=2)
    for change in ({"sft__steps": 1}, {"sft__steps": 3, "seed": 1}):
        with pytest.raises(UserError, match="holds a run with another configuration"):
            run(tmp_path / "run", stages="[sft]", **change)


@pytest.mark.parametrize(
    ("kind", "left"),
    [
        ("generate", "generated/later.jsonl"),
        ("evaluate", "evaluations/later.sampled.json"),
        ("export", "exports/later.json"),
    ],
)
def test_a_stage_is_not_made_longer_under_what_was_made_of_it(tmp_path, kind, left):
    """The later stage itself is left out here: what counts is that its file is there."""
    settings = {"stages": f"[sft, {{name: later, kind: {kind}}}]", "sft.steps": 2, "run_dir": tmp_path}
    old = parse([f"--{key}={value}" for key, value in settings.items()])
    new = parse([f"--{key}={value}" for key, value in {**settings, "sft.steps": 4}.items()])
    directory = RunDirectory(tmp_path)
    check_longer(directory, old, new)
    assert not directory.begun
    (tmp_path / left).parent.mkdir()
    (tmp_path / left).write_text("{}\n")
    assert directory.begun
    with pytest.raises(UserError, match="stage 'later' has begun from the weights of sft step 2 already"):
        check_longer(directory, old, new)
