"""What a stage and the later ones have left is moved aside, as a whole, and only where the stages before stay what they were."""

import dataclasses
import json

import pytest

from d1jax.config import Config, Stage, UserError
from d1jax.config.parse import parse
from d1jax.config.stored import from_yaml, to_yaml
from d1jax.training.claim import claim
from d1jax.training.redo import check_only, first_changed, is_finished, later_stages, set_aside
from d1jax.weights.run import RunDirectory

STAGES = "[sft, {name: keep, kind: generate}, {name: again, kind: sft, data: [keep], steps: 9}, {name: look, kind: evaluate}]"


def parsed(stages=STAGES, **settings):
    return parse(["--stages", stages, *(f"--{name.replace('__', '.')}={value}" for name, value in settings.items())])


@pytest.fixture
def run(tmp_path):
    """A run whose stages have all left something."""
    directory = RunDirectory(tmp_path / "run")
    for path in (
        "checkpoints/sft/100/x", "checkpoints/again/9/x", "evaluations/sft.json", "evaluations/again.json",
        "evaluations/again.samples.jsonl",
        "evaluations/again.step5.json", "generated/keep.jsonl", "generated/keep.json", "evaluations/look.sampled.json",
        "evaluations/look.sampled.jsonl", "damaged/again/3/x", "profiles/again/x", "metrics.jsonl",
    ):  # fmt: skip
        file = directory.path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}\n")
    directory.data.write_text(json.dumps({"task.train": {"sha256": "1"}, "again.task.train": {"sha256": "2"}}))
    directory.config.write_text(to_yaml(parsed()))
    return directory


@pytest.mark.parametrize(
    ("change", "first"),
    [
        ({}, None),
        ({"seed": 1}, "sft"),
        ({"sft__steps": 7}, "sft"),
        ({"generate__prompts": 5}, "keep"),
        ({"stages": STAGES.replace("steps: 9", "steps: 8")}, "again"),
        ({"stages": STAGES.replace("kind: evaluate", "kind: evaluate, from: sft")}, "look"),
        ({"stages": STAGES.replace("kind: generate", "kind: generate, task: {train_rows: 5}")}, "keep"),
        ({"stages": STAGES[:-1] + ", {name: more, kind: sft}]"}, "more"),
        ({"stages": "[sft, {name: keep, kind: generate}]"}, None),
        ({"rl__steps": 3}, None),  # no stage reads it
        ({"run_dir": "elsewhere"}, None),
    ],
)
def test_the_first_stage_that_would_be_another_one(change, first):
    assert first_changed(parsed(), parsed(**{"stages": STAGES, **change})) == first


def left(run):
    """What stages have left in a run."""
    files = (path.relative_to(run.path).as_posix() for path in run.path.rglob("*") if path.is_file())
    return sorted(path for path in files if not path.startswith("redone/") and "/" in path)


def test_a_stage_and_all_later_ones_are_moved_and_nothing_is_lost(run):
    before = left(run)
    new = parsed(STAGES.replace("steps: 9", "steps: 8"))
    (line,) = set_aside(run, from_yaml(run.config), new, "again")
    assert left(run) == ["checkpoints/sft/100/x", "evaluations/sft.json", "generated/keep.json", "generated/keep.jsonl"]
    aside = run.path / "redone" / "1"
    moved = sorted(path.relative_to(aside).as_posix() for path in aside.rglob("*") if path.is_file())
    assert sorted({*left(run), *moved} - {"config.yaml", "metrics.jsonl", "data.json"}) == before
    assert line == f"from again: what again, look had left is now in {aside}"
    assert from_yaml(run.config) == dataclasses.replace(new, run_dir=from_yaml(run.config).run_dir)
    assert from_yaml(aside / "config.yaml").section_of(Stage("again", "sft", {"steps": 9})).steps == 9
    assert json.loads(run.data.read_text()).keys() == {"task.train"}
    assert json.loads((aside / "data.json").read_text()).keys() == {"task.train", "again.task.train"}
    set_aside(run, new, new, "sft")
    assert (run.path / "redone/2/checkpoints/sft").is_dir() and left(run) == []


def test_a_stage_that_is_there_no_more_is_moved_too(run):
    set_aside(
        run, parsed(), parsed("[sft, {name: keep, kind: generate}, {name: other, kind: sft, data: [keep]}]"), "other"
    )
    assert not any("again" in path or "look" in path for path in left(run))


def test_a_change_before_the_stage_is_refused_and_nothing_is_moved(run):
    before = left(run)
    with pytest.raises(
        UserError, match="the configuration of stage 'sft', which comes before 'again', .*--from sft does it again"
    ):
        set_aside(run, parsed(), parsed(sft__steps=7), "again")
    assert left(run) == before


def test_an_unknown_stage_is_named(run):
    for use in (lambda: later_stages(parsed(), "rl"), lambda: check_only(run, parsed(), "rl")):
        with pytest.raises(UserError, match="no stage is named 'rl'; choices: sft, keep, again, look"):
            use()


def test_a_changed_configuration_says_what_would_be_done_again(run):
    changed = dataclasses.replace(parsed(STAGES.replace("steps: 9", "steps: 8")), run_dir=str(run.path))
    with pytest.raises(
        UserError, match="undo these; --from again does again, look again, and keeps what they had left in redone/"
    ):
        claim(changed)
    _, lock = claim(changed, again_from="again")
    lock.close()
    assert (run.path / "redone/1/checkpoints/again").is_dir()


def test_a_stage_alone_needs_those_before_it(run):
    config = parsed()
    assert [is_finished(run, config, stage) for stage in config.stages] == [True] * 4
    check_only(run, config, "look")
    (run.path / "generated/keep.json").unlink()
    with pytest.raises(UserError, match="--only look: stage 'keep' comes before it and is not finished; run it first"):
        check_only(run, config, "look")
    check_only(run, config, "keep")
    assert not is_finished(
        run, dataclasses.replace(config, sft=dataclasses.replace(Config().sft, steps=101)), config.stages[0]
    )
