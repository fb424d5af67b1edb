"""Configuration: every way to write it, and every mistake with its cure."""

import dataclasses
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.config import Config, Even, RlConfig, SamplerConfig, Softmax, Stage, Threshold, UserError
from d1jax.config import parse as parsing
from d1jax.config.check import all_rules, check
from d1jax.config.help import describe_origins, help_text
from d1jax.config.no_effect import unread
from d1jax.config.parse import parse, parse_with_origins, section_names
from d1jax.config.setting import is_choice, settings, value_at
from d1jax.config.stored import differences, from_yaml, to_yaml
from d1jax.config.values import alternatives, build, hints_of, keys_of, plain
from d1jax.config.yaml_text import parse_yaml, write_yaml
from d1jax.training.context import build as build_context

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path for path in (ROOT / "configs").glob("**/*.yaml") if path.parent.name != "evaluations")


def leaves(part=None):
    """{full key: default} of every setting, of a choice its name, and of the parameters of the choice that is made."""
    return {name: value for name, value, _ in settings(Config() if part is None else part)}


@pytest.fixture
def write(tmp_path):
    def write(text, name="run.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def complaint(*argv):
    with pytest.raises(UserError) as caught:
        parse(argv)
    return str(caught.value)


# -- sources -----------------------------------------------------------------------------------------------------------


def test_the_defaults_are_a_valid_run():
    assert parse([]) == Config() == check(Config())
    few = dataclasses.replace(Config().task, train_rows=50, eval_rows=10)
    context = build_context(dataclasses.replace(Config(), task=few))
    assert len(context.train) == 50 and unread(Config()) == {}


def test_there_are_configurations():
    assert ROOT / "configs" / "quickstart.yaml" in FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_every_shipped_file_parses(path):
    section = {"models": "--model", "methods": "--rl", "preferences": "--preference"}.get(path.parent.name)
    if section:
        config = parse([section, str(path)])
    else:
        large = path.parent.name == "pipelines" or path.stem.endswith(("_8b", "_7b"))
        start = ["--init_from", "a/checkpoint"] if large else []
        config = parse(["--config", str(path), *start])
    for part in (config.model, config.lora, config.sampler):
        hash(part)  # they are static arguments of compiled functions


def test_sections_merge_over_the_defaults(write):
    config = parse(["--config", write("rl: {steps: 7, optimizer: {beta1: 0.5}}\nmodel: {width: 32}\n")])
    expected = Config()
    expected = dataclasses.replace(
        expected,
        model=dataclasses.replace(expected.model, width=32),
        rl=dataclasses.replace(expected.rl, steps=7, optimizer=dataclasses.replace(expected.rl.optimizer, beta1=0.5)),
    )
    assert config == expected


def test_mappings_that_are_values_are_replaced(write):
    config = parse(
        ["--config", write("rl: {reward_weights: {format: 0.5, cells: 2}}\ntask: {eval_sets: {a: x.jsonl}}\n")]
    )
    assert config.rl.reward_weights == {"format": 0.5, "cells": 2.0}
    assert config.task.eval_sets == {"a": "x.jsonl"}
    assert parse(["--rl.reward_weights", "{format: 1}"]).rl.reward_weights == {"format": 1.0}
    assert parse(["--rl.reward_weights.format", "1"]).rl.reward_weights == {"format": 1.0}


@pytest.mark.parametrize("before", [True, False], ids=["flag first", "file first"])
def test_flags_override_the_file_wherever_they_stand(write, before):
    flag, file = ["--rl.steps", "9"], ["--config", write("rl: {steps: 7, num_generations: 4}\n")]
    config = parse(flag + file if before else file + flag)
    assert (config.rl.steps, config.rl.num_generations) == (9, 4)


def test_later_files_and_later_flags_win(write):
    one, two = write("seed: 1\nrl: {steps: 2}\n", "one.yaml"), write("rl: {steps: 3}\n", "two.yaml")
    config = parse(["--config", one, f"--config={two}", "--max_bad_updates=4", "--max_bad_updates", "5"])
    assert (config.seed, config.rl.steps, config.max_bad_updates) == (1, 3, 5)


def test_flags_are_yaml_values():
    config = parse([
        "--stages", "[rl]", "--init_from", "x", "--lora.targets=[q_proj, ff_out]", "--lora.rank", "2",
        "--rl.fresh_masks", "false", "--run_dir=a=b",
        "--task.eval_sets", "{x: generated, y: rows.jsonl}",
    ])  # fmt: skip
    assert config.stages == (Stage("rl", "rl"),) and config.lora.targets == ("q_proj", "ff_out")
    assert config.rl.fresh_masks is False and config.run_dir == "a=b"
    assert list(config.task.eval_sets.items()) == [("x", "generated"), ("y", "rows.jsonl")]
    hash((config.model, config.lora, config.sampler))


@pytest.mark.parametrize("text", ["1e-6", "1.0e-6", "0.000001", "1E-06"])
def test_scientific_notation_is_a_number(write, text):
    for argv in (
        ["--rl.optimizer.learning_rate", text],
        ["--config", write(f"rl: {{optimizer: {{learning_rate: {text}}}}}")],
    ):
        value = parse(argv).rl.optimizer.learning_rate
        assert isinstance(value, float) and value == 1e-6
    assert parse(["--rl.reward_weights", f"{{solved: {text}}}"]).rl.reward_weights == {"solved": 1e-6}


@pytest.mark.parametrize(
    "text", ["1_1_1", "007", "1.10", "12:30:45", "yes", "exp #2", "true", "null", "''", "[a", "~", " x "]
)
def test_a_text_is_what_was_typed(write, text):
    assert parse(["--run_dir", text]).run_dir == text
    assert parse(["--task.eval_sets.my-set", text]).task.eval_sets == {"my-set": text}
    resolved = parse(["--run_dir", text])
    assert from_yaml(write(to_yaml(resolved), "resolved.yaml")) == resolved


@pytest.mark.parametrize(
    ("key", "text", "problem"),
    [
        ("rl.steps", "true", "is no int"),
        ("rl.steps", "010", "is no int"),
        ("rl.steps", "12:30", "is no int"),
        ("rl.steps", "4.0", "is no int"),
        ("rl.steps", "9" * 5000, "5000 digits"),
        ("rl.temperature", "true", "is no float"),
        ("rl.temperature", "{a: 1}", "is no float"),
        ("rl.fresh_masks", "1", "is no bool; write true or false"),
        ("rl.fresh_masks", "yes", "is no bool; write true or false"),
        ("task.held_out_by_solution", "[1]", "task.held_out_by_solution.0 = 1 is no text"),
        ("rl.reward_weights", "{solved: true}", "rl.reward_weights.solved = True is no float"),
    ],
)
def test_a_value_keeps_its_type(write, key, text, problem):
    assert problem in complaint(f"--{key}", text)
    section, name = key.split(".")
    assert problem in complaint("--config", write(f"{section}: {{{name}: {text}}}"))


@pytest.mark.parametrize("value", ["true", "1.10", "{a: b}", "[a]"])
def test_a_text_in_a_file_is_written_as_one(write, value):
    assert "is no text" in complaint("--config", write(f"run_dir: {value}"))
    assert parse(["--config", write("run_dir: 007")]).run_dir == "007"


def test_values_in_errors_are_cut_short(write):
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n"
    for one, two in zip("abcdefgh", "bcdefghi", strict=True):
        bomb += f"{two}: &{two} [{', '.join(['*' + one] * 9)}]\n"
    for text in ("run_dir: [" + "x, " * 10**4 + "]", "seed: " + "x" * 10**5, "run_dir: " + "[" * 500 + "]" * 500):
        assert len(complaint("--config", write(text))) < 500
    assert len(complaint("--config", write("task: {eval_sets: {" + bomb.replace("\n", ", ") + "}}"))) < 500


def test_files_include_files_next_to_them(write, tmp_path):
    (tmp_path / "parts").mkdir()
    write("{steps: 11, num_generations: 2}", "parts/rl.yaml")
    config = parse(["--config", write("seed: 3\nrl: !include parts/rl.yaml\n")])
    assert (config.seed, config.rl.steps, config.rl.num_generations) == (3, 11, 2)


def test_an_empty_file_is_the_defaults(write):
    assert parse(["--config", write("# nothing\n")]) == Config()


# -- mistakes in writing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("rl.stepz", "rl.steps"),
        ("model.kv_head", "model.kv_heads"),
        ("models.width", "model"),
        ("run_directory", "run_dir"),
        ("sampler.remask", "sampler.remasking"),
        # the right name in the wrong section
        ("rl.block_length", "sampler.block_length"),
        ("lora.dtype", "model.dtype"),
        ("mask_sharing", "rl.mask_sharing"),
        ("sft.num_iterations", "rl.num_iterations"),
        ("task.stages", "stages"),
        ("sft.learning_rate", "sft.optimizer.learning_rate"),
        ("rl.learning_rate", "rl.optimizer.learning_rate"),
        ("sft.mask_sharing", "rl.mask_sharing"),
        # a similar name in another section
        ("rl.block_lenght", "sampler.block_length"),
    ],
)
def test_an_unknown_key_suggests_the_one_that_was_meant(flag, meant):
    message = complaint(f"--{flag}", "1")
    unknown = flag.partition(".")[0] if flag == "models.width" else flag
    assert f"command line: --{flag}: unknown key '{unknown}' (did you mean '{meant}'?); choices: " in message


def test_an_unknown_key_like_nothing_lists_the_choices(write):
    path = write("lora: {zzz: 1}\n")
    assert complaint("--config", path) == f"{path}: unknown key 'lora.zzz'; choices: rank, alpha, targets"


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("model.dtype", "bfloat", "model.dtype = 'bfloat' is not one of float32, bfloat16 (did you mean 'bfloat16'?)"),
        (
            "rl.loss_aggregation",
            "dr-grpo",
            "rl.loss_aggregation = 'dr-grpo' is not one of bnpo, group_bnpo, grpo, dr_grpo, row_sum (did you mean 'dr_grpo'?)",
        ),
        ("model.dtype", "16", "model.dtype = '16' is not one of float32, bfloat16"),
        (
            "sampler.remasking",
            "null",
            "sampler.remasking = None is not one of low_confidence, topk_margin, entropy, random, left_to_right",
        ),
    ],
)
def test_a_misspelt_choice_suggests_the_one_that_was_meant(flag, value, message):
    assert complaint(f"--{flag}", value) == f"command line: --{flag}: {message}"


@pytest.mark.parametrize(
    ("argv", "fragments"),
    [
        (["--rl.steps", "many"], ["rl.steps", "'many'", "int"]),
        (["--rl.steps", "1.5"], ["rl.steps", "1.5", "int"]),
        (["--rl.fresh_masks", "maybe"], ["rl.fresh_masks", "bool"]),
        (["--rl.reward_weights", "{solved: x}"], ["rl.reward_weights.solved", "float"]),
        (["--rl.reward_weights", "3"], ["rl.reward_weights"]),
        (["--stages", "[sft, rll]"], ["stages.1", "'rll'", "sft, rl"]),
        (["--stages", "[sft, {name: a/b, kind: rl}]"], ["stages.1", "'a/b'", "letters, digits"]),
        (["--stages", "[sft, {name: a, kind: rl, stepz: 1}]"], ["stages.1", "'stepz'", "did you mean 'steps'"]),
        (["--stages", "[sft, {kind: rl}]"], ["stages.1", "name"]),
        (["--stages", "[sft, {name: audit, kind: sft}]"], ["'audit' is what d1jax calls something else"]),
        (["--stages", "[sft, {name: SFT, kind: sft}]"], ["has a name twice", "capitals"]),
        (["--stages", "[sft, {name: a, kind: sft, steps: -1}]"], ["stage 'a': sft.steps = -1 must be above 0"]),
        (
            ["--stages", "[{name: a, kind: sft, steps: 5}]", "--sft.steps", "9"],
            ["sft.steps = 9 has no effect: stage 'a' sets its own"],
        ),
        (["--rl.estimator", "{name: [elbo]}"], ["is not one of one_step"]),
        (["--rl.estimator.shrink", "2"], ["rl.estimator.shrink belongs to rl.estimator = trajectory, not to one_step"]),
        (
            ["--sampler.remasking", "random", "--sampler.remasking.temperature", "1"],
            ["belongs to sampler.remasking = low_confidence or topk_margin or entropy, not to random"],
        ),
        (
            ["--rl.estimator", "{name: coupled, shink: 2}"],
            ["did you mean 'rl.estimator.shrink'", "coupled has samples"],
        ),
        (["--rl.estimator", "[coupled]"], ["rl.estimator = ['coupled'] is not one of one_step, elbo"]),
        (["--stages", "rl"], ["stages = 'rl' is not a list; write [rl]"]),
        (["--lora.targets", "q_proj"], ["lora.targets = 'q_proj' is not a list; write [q_proj]"]),
        (["--task.held_out_by_solution", "a"], ["task.held_out_by_solution = 'a' is not a list; write [a]"]),
        (["--rl.steps", "null"], ["command line: --rl.steps: rl.steps has no value"]),
        (["--rl", "3"], ["'3' is no file; 'rl' is a section: write --rl FILE.yaml or --rl.key value"]),
        (["--rl.steps.x", "3"], ["rl.steps"]),
        (["--rl.steps"], ["command line: --rl.steps has no value"]),
        (["rl.steps", "3"], ["'rl.steps' is not a flag; write --section.key value"]),
        (["configs/quickstart.yaml"], ["is not a flag; write --config configs/quickstart.yaml"]),
        (
            ["--config", str(ROOT / "configs/methods/wd1.yaml")],
            ["settings of the section 'rl'; write --rl", "wd1.yaml"],
        ),
        (["--config", str(ROOT / "configs/models/dream_7b.yaml")], ["settings of the section 'model'; write --model"]),
        (["--rl", "wd1", "--rl", "spg"], ["--rl is given wd1 and spg; choose one"]),
        (["--stages", "[sft"], ["command line: --stages '[sft' is not a YAML value"]),
        (["--config"], ["command line: --config has no value"]),
        (["--config", "nowhere.yaml"], ["config file 'nowhere.yaml' does not exist"]),
        (["--config", "."], ["config file '.' does not exist"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_a_value_that_cannot_be_is_named(argv, fragments):
    message = complaint(*argv)
    assert all(fragment in message for fragment in fragments), message


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("rl: [1, 2", "not readable as YAML"),
        ("\trl: 1", "not readable as YAML"),
        ("rl: !include missing.yaml", "missing.yaml"),
        ("rl: !no_such_tag 3", "no_such_tag"),
        ("run_dir: !!python/name:os.system", "python/name"),
        ("seed: 1\nrl: {}\nseed: 2", "line 3: key 'seed' stands there twice, first in line 1; keep one"),
        ("rl: {steps: 1,\n  steps: 1}", "line 2: key 'steps' stands there twice, first in line 1"),
        ("rl: !include run.yaml", "50 files include each other"),
        ("? [a]\n: 1", "a key must be a name"),
        ("[" * 10**5, "RecursionError"),
        ("- 1\n- 2\n", "expected keys and values, found list"),
        ("rl:\n", "'rl' is a section; write 'rl.<key>' (got None)"),
        ("seed:\n", "seed has no value"),
        ("5: 3\n", "unknown key '5'"),
    ],
)
def test_a_malformed_file_is_named(write, text, fragment):
    path = write(text)
    message = complaint("--config", path)
    assert message.startswith(path) and fragment in message


@pytest.mark.parametrize("name", ["secret.txt", "secret.yaml", "pipe.yaml"])
def test_what_an_included_file_holds_is_not_told(write, tmp_path, name):
    for secret in ("password hunter2", "[hunter2", "hunter2: {", "- hunter2", "\t hunter2"):
        if name.startswith("pipe"):
            (tmp_path / name).exists() or os.mkfifo(tmp_path / name)
        else:
            write(secret, name)
        message = complaint("--config", write(f"rl: !include {name}"))
        assert name in message and "hunter2" not in message


def test_a_pipe_or_an_impossible_name_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (tmp_path / "pipe.yaml", "a\0b.yaml"):
        assert "does not exist" in complaint("--config", str(path))


def test_a_file_that_is_not_text_is_named(tmp_path):
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00rl")
    assert complaint("--config", str(path)).startswith(f"{path}: not readable as YAML")


# -- impossible combinations -------------------------------------------------------------------------------------------

WHOLE = [name for name, value in leaves().items() if type(value) is int]


def numbers():
    """(flags that make the choice, full name, type, bounds) of every number, of every choice."""
    for name, value, field in settings(Config()):
        if type(value) in (int, float):
            owner, _, key = name.rpartition(".")
            made = value_at(Config(), owner) if owner else None
            chosen = {owner: made.name} if is_choice(made) else {}
            yield chosen, name, type(value), field.metadata
    for path, hint in keys_of(Config):
        for cls in alternatives(hint).values():
            for field in dataclasses.fields(cls):
                if type(field.default) in (int, float):
                    yield {path: cls.name}, f"{path}.{field.name}", type(field.default), field.metadata


def out_of_bounds():
    """A case for every bound of every number."""
    for chosen, name, kind, limits in numbers():
        wrong = []
        if kind is float:
            wrong.append(("nan", "must be a finite number"))
        for key, by in (("above", 0), ("at_least", -1), ("below", 0), ("at_most", 1)):
            if limits.get(key) is not None:
                wrong.append((kind(limits[key] + by), ""))
        if kind is int:
            wrong.append((10**12, "is more than"))
        for value, message in wrong:
            text = ".nan" if value == "nan" else f"{value}"
            yield {**chosen, name: text}, f"{name} = {value} {message}".rstrip()


SIXTEEN = {"sampler.completion_length": "16", "sampler.block_length": "16", "sampler.steps": "8"}
IMPOSSIBLE = [
    *out_of_bounds(),
    ({"model.width": "100000", "model.layers": "4000"}, "model has 1.6e+14 parameters"),
    *(
        ({key: "1000000", "sampler.completion_length": "1000000", "sampler.block_length": "1000000"}, f"{key}")
        for key in ("sft.batch_size", "rl.prompts_per_step", "evaluation.batch_size")
    ),
    ({"adapt.batch_size": "1000000", "adapt.length": "1000000"}, "adapt.batch_size"),
    (
        {"stages": "[evaluate]", "init_from": "x", "evaluate.temperatures": "[0.5, 1.0]"},
        "evaluate.temperatures = [0.5, 1.0] must be different numbers above 0, and none evaluate.temperature = 1.0",
    ),
    ({"profile.steps": "2", "profile.start": "500"}, "no stage that trains has more than"),
    ({"stages": "[adapt]", "adapt.data": "{a.txt: 0}"}, "adapt.data = {'a.txt': 0.0} needs shares above 0"),
    ({"stages": "[adapt]", "adapt.low": "0.5", "adapt.high": "0.5"}, "adapt.low = 0.5 must be below adapt.high = 0.5"),
    (
        {"stages": "[adapt]", "adapt.grad_accumulation_steps": "3"},
        "adapt.grad_accumulation_steps = 3 does not divide adapt.batch_size = 32",
    ),
    ({"stages": "[adapt]", "adapt.anneal_steps": "101"}, "adapt.anneal_steps = 101 is more than adapt.steps = 100"),
    (
        {"stages": "[adapt, {name: mid, kind: adapt}]", "adapt.anneal_steps": "9"},
        "stage 'mid': adapt.anneal_steps = 9 would hide from the model again what a stage before it has opened",
    ),
    ({"stages": "[adapt]", "adapt.data": "{'hub:a/b': 1}"}, "adapt.data names ['hub:a/b'], which is read as it goes"),
    (
        {"stages": "[adapt]", "adapt.data": "{a.txt: 1}", "adapt.streaming": "true"},
        "adapt.streaming = true has no first windows to hold out",
    ),
    ({"model.attention_mask": "causal"}, "stages ['sft', 'rl'] work on models whose columns see all others"),
    ({"sampler.schedule": "time", "sampler.block_length": "8"}, "set sampler.block_length = 16"),
    ({"sampler.schedule": "entropy_bound"}, "set sampler.remasking = entropy (here: low_confidence)"),
    ({"sampler.schedule": "klass", "sampler.remasking": "random"}, "to an order that is not drawn (here: random)"),
    (
        {"sampler.schedule": "threshold", "sampler.remasking.temperature": "0.5"},
        "and sampler.remasking.temperature = 0",
    ),
    ({"sampler.cache": "dual", "sampler.guidance": "1"}, "sampler.cache = dual with guidance"),
    ({"sampler.schedule": "chance"}, "set sampler.remasking = random (here: low_confidence)"),
    (
        {
            "rl.advantage": "decoupled",
            "rl.kl": "reward",
            "rl.estimator": "{name: trajectory, shrink: 1}",
            "rl.prompt_mask": "0",
        },
        "rl.kl = reward with rl.advantage = decoupled",
    ),
    ({"model.param_dtype": "float16"}, "model.param_dtype = float16 is for reading checkpoints"),
    ({"run_dir": ""}, "run_dir is empty"),
    ({"stages": "[]"}, "stages is empty; write e.g. [sft, rl]"),
    ({"stages": "[sft, sft]"}, "stages = ['sft', 'sft'] has a name twice"),
    ({"stages": "[rl]"}, "stages begins with 'rl', from random weights; set init_from"),
    ({"task.eval_sets": "{}"}, "task.eval_sets is empty"),
    *(
        (
            {"stages": f"[sft, {kind}]", f"{kind}.rollout_batch_size": size},
            f"{kind}.rollout_batch_size = {size} must be a multiple of the 8",
        )
        for kind, size in (("rl", "12"), ("preference", "1024"), ("generate", "24"))
    ),
    (
        {"task.name": "soduku"},
        "jsonl, mixture (did you mean 'sudoku'?)",
    ),
    ({"task.name": "mine.py"}, "and not of the form my/file.py:Mine"),
    ({"task.train_rows": "0"}, "task.train_rows = 0 with generated rows; say how many"),
    ({"task.eval_rows": "0"}, "task.eval_rows = 0 with a generated evaluation set; say how many"),
    (
        {"task.held_out_by_solution": "[test]"},
        "task.held_out_by_solution = ['test'] names sets that are not in task.eval_sets",
    ),
    (
        {"evaluation.select": "valid", "evaluation.every": "5"},
        "evaluation.select = 'valid' is not in task.eval_sets; choices: ['held_out']",
    ),
    (
        {"evaluation.select": "held_out", "evaluation.every": "5"},
        "is the first of task.eval_sets, which the results are reported on",
    ),
    (
        {"evaluation.select": "b", "evaluation.every": "5", "task.eval_sets": "{a: generated, b: generated}"},
        "has the rows of another set of task.eval_sets; cut it from training",
    ),
    (
        {"evaluation.select": "b", "task.eval_sets": "{a: generated, b: 'share:0.1'}"},
        "with evaluation.every = 0 has one checkpoint to choose from",
    ),
    ({"model.heads": "6", "model.kv_heads": "6"}, "model.heads = 6 does not divide model.width = 64"),
    ({"model.width": "20"}, "model.head_size, or model.width / model.heads, = 5 is odd; RoPE rotates pairs"),
    ({"model.head_size": "7"}, "model.head_size, or model.width / model.heads, = 7 is odd; RoPE rotates pairs"),
    ({"model.rotary_columns": "3"}, "model.rotary_columns = 3 must be even and at most the"),
    (
        {"model.mlp": "moe", "model.mlp.dense_layers": "3"},
        "model.mlp.dense_layers = 3: model.layers = 3 leaves none for experts",
    ),
    (
        {"model.mlp": "moe", "model.mlp.experts_per_token": "9"},
        "model.mlp: experts_per_token = 9 is more than experts = 8",
    ),
    ({"model.mlp": "moe", "model.mlp.groups": "3"}, "model.mlp: groups = 3 does not divide experts = 8"),
    ({"model.mlp": "moe", "model.mlp.groups": "8"}, "model.mlp: groups = 8: a group is judged by its two best experts"),
    (
        {"model.mlp": "moe", "model.mlp.groups_per_token": "2"},
        "model.mlp: groups_per_token = 2 is more than groups = 1",
    ),
    (
        {"model.mlp": "moe", "model.mlp.groups": "4", "model.mlp.experts_per_token": "3"},
        "model.mlp: experts_per_token = 3, but groups_per_token = 1 of groups = 4 hold 2 experts",
    ),
    (
        {"model.mlp": "moe", "model.mlp.scaling": "2.0"},
        "model.mlp: groups and scaling are read by router = sigmoid alone",
    ),
    (
        {"model.mask_block": "8"},
        "model.mask_block = 8: model.attention_mask = block_causal has blocks",
    ),
    ({"model.attention_mask": "block_causal"}, "model.mask_block = 0: model.attention_mask = block_causal has blocks"),
    (
        {"model.attention_mask": "causal", "model.attention": "splash"},
        "model.attention = splash has no model.attention_mask but full; set it to auto or xla",
    ),
    ({"model.kv_heads": "3"}, "model.kv_heads = 3 does not divide model.heads = 4"),
    ({"sampler.block_length": "7"}, "sampler.block_length = 7 does not divide sampler.completion_length = 16; try 8"),
    (
        {"sampler.block_length": "4", "sampler.steps": "3"},
        "sampler.steps = 3 is fewer than the 4 blocks; every block needs a step",
    ),
    ({"sampler.steps": "17"}, "sampler.steps = 17 is more than the 16 tokens"),
    ({"sampler.block_length": "4", "sampler.steps": "7"}, "sampler.steps = 7 is not a multiple of the 4 blocks; try 4"),
    ({"rl.grad_accumulation_steps": "7"}, "rl.grad_accumulation_steps = 7 does not divide the 512 rows of a step"),
    ({"sft.grad_accumulation_steps": "7"}, "sft.grad_accumulation_steps = 7 does not divide sft.batch_size = 128"),
    (
        {"rl.estimator": "elbo", "rl.estimator.low": "0.8", "rl.estimator.high": "0.2"},
        "must satisfy 0 <= low < high <= 1",
    ),
    ({"rl.kl": "loss", "rl.kl.level": "sequence"}, "exp of a sum over tokens has no bound"),
    ({"rl.kl": "loss", "rl.kl.level": "relative"}, "set estimator = k2 and to = reference"),
    (
        {"rl.kl": "loss", "rl.kl.to": "old", "rl.reference": "moving"},
        "nothing looks at a reference",
    ),
    *(
        (
            {"rl.kl": "reward", "rl.prompt_mask": "0"} | other,
            "are the log-probabilities that the completions were drawn with",
        )
        for other in (
            {},
            {"rl.estimator": "elbo"},
            {"rl.estimator": "trajectory", "rl.estimator.shrink": "4"},
            {"rl.estimator": "trajectory", "rl.estimator.samples": "4"},
            # As many segments as sampler.steps says, which an adaptive schedule does not read.
            {"rl.estimator": "trajectory", "rl.estimator.samples": "4", "sampler.schedule": "threshold"},
            {"rl.estimator": "trajectory", "rl.estimator.shrink": "1", "rl.temperature": "0.9"},
            {"rl.estimator": "trajectory", "rl.estimator.shrink": "1", "rl.prompt_mask": "0.15"},
            {"rl.estimator": "trajectory", "rl.estimator.shrink": "1", "sampler.top_p": "0.9"},
            {"rl.estimator": "trajectory", "rl.estimator.shrink": "1", "sampler.cache": "dual"},
        )
    ),
    (
        {"rl.supervision": "text_steps", "rl.policy_loss.level": "sequence_mean"},
        "has one advantage, steps have several",
    ),
    ({"rl.supervision": "text_steps", "rl.policy_loss": "regression"}, "set rl.policy_loss to ppo"),
    ({"rl.supervision": "text_steps", "rl.advantage": "softmax"}, "set it to center or zscore"),
    (
        {"stages": "[sft, {name: keep, kind: generate, teacher: runs/other, from: sft}]"},
        "from = 'sft' with a teacher, which writes everything; leave one of them out",
    ),
    ({"rl.supervision": "model_steps"}, "model is empty; name a reward_model stage whose loss is stepwise"),
    (
        {
            "stages": "[sft, {name: judge, kind: reward_model}, {name: rl, kind: rl, from: sft}]",
            "rl.supervision": "{name: model_steps, model: judge}",
        },
        "it learns from whole texts; give that stage loss: stepwise",
    ),
    (
        {"rl.supervision": "{name: model_steps, model: judge}"},
        "no reward_model stage before it has that name",
    ),
    (
        {"rl.advantage": "gae", "rl.policy_loss": "{name: ppo, level: sequence_mean}"},
        "set rl.policy_loss to ppo, whose level is token",
    ),
    ({"rl.advantage": "gae", "rl.negative_control": "shuffled_rewards"}, "set rl.advantage to center"),
    ({"rl.advantage": "gae", "rl.supervision": "text_steps"}, "set it to center or zscore"),
    (
        {"rl.supervision": "text_steps", "rl.kl": "reward"},
        "the penalty is of a completion, not of a step",
    ),
    (
        {"rl.supervision": "text_steps", "rl.negative_control": "shuffled_rewards"},
        "steps of one text are not those of another",
    ),
    ({"rl.reward_weights": "{solved: 0, cells: 0.0}"}, "are all 0, so every reward is 0"),
    ({"rl.reward_weights": "{}"}, "rl.reward_weights is empty"),
    ({"rl.reference": "moving", "rl.kl": "loss", "lora.rank": "4"}, "rl.reference = moving with LoRA"),
    ({"rl.reference": "moving"}, "rl.reference = moving but nothing looks at a reference"),
    ({"rl.reward_weights": "{solved: .nan}"}, "rl.reward_weights = {'solved': nan} must be finite numbers"),
    ({"lora.rank": "4", "lora.targets": "[]"}, "lora.targets is empty"),
    ({"mesh.fsdp": "-1"}, "mesh: at most one axis may be -1"),
    (
        {"rl.estimator": "elbo", "rl.estimator.full_mask": "true", "rl.estimator.weight": "uniform"},
        "set weight = inverse",
    ),
    (
        {"rl.estimator": "elbo", "rl.estimator.full_mask": "true", "rl.estimator.upper_share": "0.5"},
        "set weight to inverse",
    ),
    (
        {"rl.estimator": "block", "rl.estimator.upper_share": "0.5", "rl.estimator.weight": "uniform"},
        "set weight to inverse",
    ),
    (
        {"rl.estimator": "coupled", "rl.estimator.low": "0.8", "rl.estimator.high": "0.2"},
        "must satisfy 0 <= low < high <= 1",
    ),
    (
        {"rl.estimator": "trajectory", "rl.estimator.shrink": "2", "rl.estimator.samples": "2"},
        "the number of segments follows from shrink",
    ),
    ({"preference.estimator.upper_share": "0.5"}, "go by the sign of an advantage, and a pair has none"),
    ({"preference.grad_accumulation_steps": "7"}, "does not divide the 64 pairs of a step"),
    ({"preference.reward_weights": "{}"}, "preference.reward_weights is empty"),
    ({"preference.reward_weights": "{solved: .nan}"}, "must be finite numbers"),
    (
        {"generate.filters": "[tokenz:3]"},
        "repetition, language, paragraph (did you mean 'tokens'",
    ),
    ({"generate.filters": "[finished:3]"}, "'finished:3' is written finished, without a number"),
    ({"generate.filters": "[tokens]"}, "'tokens' is written tokens:NUMBER"),
    ({"generate.filters": "['tokens:-3']"}, "'tokens:-3' has no positive number behind the colon"),
    ({"generate.reward_weights": "{}"}, "generate.reward_weights is empty"),
    ({"generate.reward_weights": "{solved: .inf}"}, "generate.reward_weights = {'solved': inf} must be finite"),
    (
        {"stages": "[sft, {name: b, kind: sft, from: rl}]"},
        "stage 'b': from = 'rl' is no stage before it that trains; choices: ['start', 'sft']",
    ),
    (
        {"stages": "[sft, {name: b, kind: rl, task: {eval_sets: {x: y.jsonl}}}]"},
        "stage 'b': evaluation sets belong to the run; write them in its section task",
    ),
    (
        {
            "stages": "[{name: p, kind: preference}]",
            "init_from": "x",
            "preference.data": "task",
            "preference.estimator": "trajectory",
        },
        "preference.estimator = trajectory looks at how a text was decoded, which stored pairs do not tell",
    ),
    ({"preference.loss": "{name: kto, desirable: 0, undesirable: 0}"}, "loss: desirable and undesirable are both 0"),
    (
        {"stages": "[{name: p, kind: preference}]", "init_from": "x", "preference.data": "keep"},
        "stage 'p' learns from 'keep', which is no generate stage before it",
    ),
    ({"reward_model.data": "[]"}, "reward_model.data = [] must name something, and nothing twice"),
    (
        {"reward_model.grad_accumulation_steps": "5"},
        "reward_model.grad_accumulation_steps = 5 does not divide the 32 pairs",
    ),
    (
        {"stages": "[sft, {name: a, kind: generate}, {name: m, kind: reward_model, data: [task, a], replay: 0.01}]"},
        "stage 'm': reward_model.replay = 0.01 of 32 pairs is less than one of each of ['a']",
    ),
    (
        {"stages": "[sft, {name: r, kind: rl, reward_weights: {'model:m': 1}}]"},
        "stage 'r' asks 'model:m', but no reward_model stage before it has that name; choices: []",
    ),
    (
        {
            "stages": "[sft, {name: m, kind: reward_model}, rl]",
            "rl.reward_weights": "{'model:m': 1}",
            "rl.supervision": "text_steps",
        },
        "rl.supervision = text_steps rewards unfinished texts by the task's rules, and a reward model judges whole ones",
    ),
    ({"evaluate.steps": "[4, 4]"}, "evaluate.steps = [4, 4] must be different numbers above 0"),
    (
        {"stages": "[sft, {name: e, kind: evaluate, steps: [3]}]", "sampler.block_length": "8", "sampler.steps": "4"},
        "stage 'e': evaluate.steps: sampler.steps = 3 is not a multiple of the 2 blocks",
    ),
    (
        {"stages": "[sft, {name: e, kind: evaluate, steps: [4]}]", "sampler.schedule": "threshold"},
        "stage 'e': evaluate.steps with sampler.schedule = threshold, which takes as many as it needs",
    ),
    (
        {"stages": "[sft, {name: e, kind: evaluate, task: {train_rows: 3}}]"},
        "the kind evaluate reads no task of its own",
    ),
    (
        {"stages": "[sft, {name: e, kind: export, sampler: {steps: 3}}]"},
        "the kind export reads no sampler of its own",
    ),
    ({"task.options": "{style: bare}"}, "task.options.style = 'bare' is set by task.style; give that"),
    ({"task.options": "{split_seed: 1}"}, "task.options.split_seed = 1 is set by task.seed; give that"),
    ({"sft.data": "[]"}, "sft.data = [] must name something, and nothing twice"),
    ({"sft.data": "[keep]"}, "stage 'sft' learns from 'keep', which is no generate stage before it"),
    ({"stages": "[sft, {name: a, kind: rl, num_generations: 1}]"}, "rl.num_generations = 1 must be at least 2"),
    ({"stages": "[sft, {name: a, kind: rl, kl: reward}]"}, "rl.kl = reward takes sums of log p"),
    (
        {"stages": "[sft, {name: a, kind: rl, num_iterations: 1, fresh_masks: false}]"},
        "stage 'a': rl.fresh_masks: without effect here",
    ),
    *(
        (
            {
                f"{kind}.prompts_per_step": "1000000",
                "sampler.completion_length": "1000000",
                "sampler.block_length": "1000000",
            },
            f"{kind}.prompts_per_step x {kind}.num_generations makes arrays",
        )
        for kind in ("preference", "generate")
    ),
]


def flags(settings):
    return [f"--{key}={value}" for key, value in settings.items()]


@pytest.mark.parametrize(
    ("settings", "message"), IMPOSSIBLE, ids=lambda value: " ".join(value) if isinstance(value, dict) else ""
)
def test_an_impossible_combination_has_its_message(settings, message):
    lines = complaint(*flags(SIXTEEN | settings)).splitlines()
    assert all(line.startswith("config: ") for line in lines)
    assert any(message in line for line in lines), lines


def kind_of(message):
    """A message without its numbers and values, which tells rules apart."""
    message = re.sub(r"^stage '.*?': ", "", message)
    message = re.sub(r"^(rl|preference)\.(estimator|kl): ", "", message)
    message = re.sub(r"\[.*?\]|\{.*?\}", "[]", message)
    return re.sub(r"'[^']*'|(?<== )[^ ;:,]+|-?[0-9][0-9.e+]*|here: \w+|(?<=remasking )\w+", "_", message)


def test_no_rule_is_left_without_a_case(monkeypatch):
    monkeypatch.setattr(parsing, "check", lambda config, command="train": config)
    monkeypatch.setattr(parsing, "unread", lambda config, command: {})
    monkeypatch.setattr(parsing, "without_unread", lambda config, command: config)
    broken, every = set(), set()
    for settings_of_case, _ in IMPOSSIBLE:
        config = parse(flags(SIXTEEN | settings_of_case))
        found = list(all_rules(config))
        broken |= {kind_of(message) for is_broken, message in found if is_broken}
        every |= {kind_of(message) for _, message in found}
    assert sorted(every - broken) == []


def test_all_problems_are_reported_at_once():
    lines = complaint(
        "--rl.grad_accumulation_steps", "7", "--model.kv_heads", "3", "--lora.rank", "4", "--lora.targets", "[]"
    ).splitlines()
    assert len(lines) == 3


def test_combinations_that_look_odd_but_work_are_accepted():
    parse(["--stages", "[rl]", "--init_from", "runs/other"])
    parse(["--task.train", "rows.jsonl", "--task.train_rows", "0"])
    parse(["--task.eval_sets", "{a: rows.jsonl}", "--task.eval_rows", "0"])
    parse(["--lora.rank", "4", "--rl.kl", "loss"])
    parse(["--mesh.data", "2", "--mesh.fsdp", "-1"])


@given(st.integers(1, 40), st.integers(1, 40))
def test_the_block_length_that_is_suggested_works(length, block):
    argv = [f"--sampler.completion_length={length}", f"--sampler.steps={length}"]
    try:
        parse([*argv, f"--sampler.block_length={block}"])
        assert length % block == 0
    except UserError as error:
        assert length % block
        suggested = str(error).splitlines()[0].rpartition("try ")[2]
        parse([*argv, f"--sampler.block_length={suggested}"])


# -- settings without an effect ---------------------------------------------------------------------------------------

IDLE = [
    ({"sampler.steps": "5", "sampler.schedule": "threshold"}, "schedule = even, time or chance"),
    ({"sampler.top_k": "5", "stages": "[sft]"}, "a temperature above 0"),
    ({"sampler.top_p": "0.5", "stages": "[sft]"}, "a temperature above 0"),
    ({"sampler.remasking.confidence_of": "sampling", "stages": "[sft]"}, "a temperature above 0, top_k or top_p"),
    ({"mesh.rollout_weights": "as_trained"}, "mesh.fsdp other than 1"),
    ({"profile.start": "3"}, "profile.steps above 0"),
    ({"stages": "[rl]", "init_from": "x", "rl.optimizer.final": "0.1"}, "rl.optimizer.schedule = linear or cosine"),
    *(
        ({"stages": "[adapt]", "model.attention_mask": "causal", f"adapt.{name}": value}, "a model.attention_mask other than causal")
        for name, value in (
            ("weighting", "cart"), ("weighting", "{name: cart, p: 0.5}"), ("normalizer", "masked"), ("low", "0.1"), ("high", "0.9"),
            ("clean_prefix", "0.1"), ("truncated", "0.1"), ("anneal_steps", "4"), ("validation_samples", "3"),
            ("order_windows", "3"),
        )
    ),
    ({"lora.alpha": "3"}, "lora.rank above 0"),
    ({"lora.targets": "[q_proj]"}, "lora.rank above 0"),
    (
        {"stages": "[preference]", "init_from": "x", "preference.data": "task", "preference.writer": "policy"},
        "preference.data = ''",
    ),
    (
        {"stages": "[sft, {name: judge, kind: reward_model}]", "reward_model.replay": "0.5"},
        "reward_model.data naming more than one",
    ),
    (
        {"stages": "[sft, {name: judge, kind: reward_model}]", "reward_model.pairs_per_prompt": "4"},
        "reward_model.data naming a generate stage, and pairs",
    ),
    ({"task.seed": "1", "task.train": "a.jsonl", "task.eval_sets": "{b: b.jsonl}"}, "a source that is generated"),
    ({"rl.estimator": "{name: elbo, upper_exponent: 2}"}, "rl.estimator.upper_share above 0"),
    ({"rl.prompt_mask": "0", "rl.mask_sharing": "row"}, "rl.prompt_mask above 0"),
    ({"rl.num_iterations": "1", "rl.fresh_masks": "false"}, "rl.num_iterations above 1"),
    ({"rl.collapse.kl": "1"}, "a rl.kl"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "where"), IDLE, ids=lambda value: " ".join(value) if isinstance(value, dict) else ""
)
def test_a_setting_without_an_effect_is_refused(write, settings, where):
    message = complaint(*flags(settings))
    assert "command line: --" in message and "without effect here" in message and where in message
    assert where in complaint("--config", write(as_file(settings))), "in a file, too"


def as_file(settings):
    """Settings by full name as the text of a file."""
    tree = {}
    for key, text in settings.items():
        *above, last = key.split(".")
        node = tree
        for part in above:
            node = node.setdefault(part, {})
        node[last] = parse_yaml(text, "")
    return write_yaml(tree)


def test_what_a_later_source_takes_the_effect_from_is_back_at_its_default(write):
    file = write("sampler: {schedule: {name: threshold, threshold: 0.5}, steps: 4}\nrl: {steps: 3}\n")
    assert parse(["--config", file]).sampler.schedule == Threshold(0.5)
    assert parse(["--config", file, "--sampler.schedule.threshold", "0.6"]).sampler.schedule == Threshold(0.6)
    assert parse(["--config", file, "--sampler.schedule", "even"]).sampler.schedule == Even()
    assert parse(["--config", file, "--sampler.schedule", "klass"]).sampler.schedule.threshold == 0.9, (
        "a choice begins anew"
    )


def test_a_choice_counts_before_its_parameters_wherever_it_stands():
    one = parse(["--rl.advantage.scale", "2", "--rl.advantage", "softmax"])
    assert (
        one
        == parse(["--rl.advantage", "{name: softmax, scale: 2}"])
        == parse(["--rl.advantage.name", "softmax", "--rl.advantage.scale=2"])
    )
    assert one.rl.advantage == Softmax(2.0)


def test_in_python_the_name_of_a_choice_may_stand_for_it():
    assert SamplerConfig(schedule="threshold") == SamplerConfig(schedule=Threshold())
    assert RlConfig(kl="loss", advantage="softmax").advantage == Softmax()
    with pytest.raises(
        UserError, match=r"RlConfig: kl = 'losss' is not one of none, loss, reward \(did you mean 'loss'"
    ):
        RlConfig(kl="losss")


def test_stages_have_names_and_settings_of_their_own(write):
    file = write("""
sft: {steps: 7}
stages:
  - {name: cold_start, kind: sft, steps: 3, optimizer: {learning_rate: 1}}
  - {name: keep, kind: generate, keep_per_prompt: 2}
  - {name: again, kind: sft, data: [keep]}
  - rl
""")
    config = parse(["--config", file])
    assert config.stage_names == ("cold_start", "keep", "again", "rl")
    assert config.trained_stages == ("cold_start", "again", "rl") and config.kinds == {"sft", "generate", "rl"}
    assert [section.steps for section in config.of_kind("sft")] == [3, 7]
    cold = config.for_stage("cold_start").sft
    assert cold.optimizer == dataclasses.replace(config.sft.optimizer, learning_rate=1.0)
    assert config.for_stage("again").sft == dataclasses.replace(config.sft, data=("keep",))
    assert config.for_stage("rl") == config
    assert from_yaml(write(to_yaml(config), "resolved.yaml")) == config


def test_the_section_of_a_stage_that_does_not_run_is_named_in_the_log():
    config, origins = parse_with_origins(["--stages", "[sft]", "--rl.steps", "3"])
    assert "the settings of 'rl' have no effect: no stage is of that kind" in describe_origins(config, origins)
    config, origins = parse_with_origins(["--rl.steps", "3"])
    assert not any("no effect" in line for line in describe_origins(config, origins))


# -- where settings come from ------------------------------------------------------------------------------------------


def test_methods_and_models_have_names():
    for name in section_names("rl"):
        assert parse(["--rl", name]).rl == parse(["--rl", str(ROOT / f"configs/methods/{name}.yaml")]).rl
    assert parse(["--model", "llada_8b"]).model.width == 4096
    message = complaint("--rl", "wd_1")
    assert "did you mean 'wd1'?" in message and all(name in message for name in ("coupled_grpo", "spg"))


def test_without_the_repository_the_names_say_where_they_are_looked_up(monkeypatch, tmp_path):
    monkeypatch.setattr(parsing, "CONFIGS", tmp_path)
    assert "of the repository, which is not here" in complaint("--rl", "wd1")


def test_both_spellings_of_a_flag_are_one():
    assert parse(["--rl.mask-sharing", "row", "--run-dir=a-b"]) == parse(["--rl.mask_sharing", "row", "--run_dir=a-b"])


def test_every_setting_knows_its_source(write):
    file = write("seed: 3\nrl: {steps: 7, num_generations: 4}\n")
    config, origins = parse_with_origins(["--config", file, "--rl", "wd1", "--rl.steps", "9", "--seed", "0"])
    assert origins["rl.num_generations"] == file and origins["rl.steps"] == "command line: --rl.steps"
    assert origins["rl.policy_loss"].endswith("wd1.yaml") and "seed" not in origins, "the default again"
    lines = describe_origins(config, origins)
    assert f"settings from {file}: rl.num_generations = 4" in lines
    assert "settings from the command line: rl.steps = 9" in lines
    assert any(
        line.startswith("settings from ") and "wd1.yaml: " in line and "rl.num_iterations = 8" in line for line in lines
    )


def test_a_command_refuses_what_it_does_not_read():
    with pytest.raises(UserError, match="evaluate does not read rl.steps; it reads sampler, task"):
        parse(["--rl.steps", "3"], command="evaluate", reads=("sampler", "task"))


# -- writing -----------------------------------------------------------------------------------------------------------


def test_a_resolved_configuration_is_read_back_equal(write):
    config = parse([
        "--rl.optimizer.learning_rate", "3e-7", "--stages", "[rl]", "--rl.reward_weights", "{b: 1, a: 0.25}",
        "--lora.rank", "4", "--task.held_out_by_solution", "[held_out]", "--init_from", "runs/x: y",
        "--lora.targets", "[q_proj]",
    ])  # fmt: skip
    back = from_yaml(write(to_yaml(config), "resolved.yaml"))
    assert back == config != Config()
    assert build(Config, plain(config)) == config
    assert all(isinstance(value, (dict, list, str, int, float)) for value in plain(config).values())


def test_a_stage_has_a_task_a_sampler_and_weights_of_its_own(write):
    file = write("""
task: {name: sudoku, eval_rows: 64, seed: 5, style: instruct, held_out_by_solution: [held_out]}
sampler: {completion_length: 20, block_length: 20, steps: 4}
stages:
  - sft
  - {name: sums, kind: rl, from: start, task: {name: countdown, train_rows: 99}, sampler: {completion_length: 32, block_length: 32}}
  - {name: more, kind: sft, task: {train: rows.jsonl}}
""")
    config = parse(["--config", file])
    sums, more = config.for_stage("sums"), config.for_stage("more")
    assert (sums.task.name, sums.task.train_rows, sums.task.seed, sums.task.style) == ("countdown", 99, 5, "instruct")
    assert sums.task.eval_sets == more.task.eval_sets == {} and more.task.held_out_by_solution == ()
    assert (sums.sampler.completion_length, sums.sampler.steps) == (32, 4) and more.sampler == config.sampler
    assert (more.task.name, more.task.train, more.task.eval_rows) == ("sudoku", "rows.jsonl", 64)
    assert config.stage("sums").weights == "start" and config.for_stage("sft") == config
    assert from_yaml(write(to_yaml(config), "resolved.yaml")) == config
    assert build(Config, plain(config)) == config


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("{name: a, kind: rl, task: countdown}", "stages.1: task = 'countdown' is a section; write {key: value}"),
        ("{name: a, kind: rl, task: {nam: x}}", "stages.1: unknown key 'task.nam'"),
        ("{name: a, kind: rl, sampler: {steps: x}}", "stages.1: sampler.steps = 'x' is no int"),
        ("{name: a, kind: rl, sampler: {steps: 0}}", "stage 'a': sampler.steps = 0 must be above 0"),
        ("{name: a, kind: rl, sampler: {steps: 999}}", "stage 'a': sampler.steps = 999 is more than the"),
        ("{name: a, kind: rl, task: {name: sudoko}}", "stage 'a': task.name = 'sudoko' is not one of"),
        ("{name: a, kind: rl, task: {train_rows: 0}}", "stage 'a': task.train_rows = 0 with generated rows"),
        ("{name: a, kind: rl, from: 3}", "stages.1: from = 3 is no name of a stage"),
        ("{name: start, kind: rl}", "stages: 'start' is what d1jax calls something else"),
        ("{name: task, kind: rl}", "stages: 'task' is what d1jax calls something else"),
    ],
)
def test_mistakes_in_the_sections_of_a_stage_are_told(stage, message):
    assert message in complaint("--stages", f"[sft, {stage}]")


@pytest.mark.parametrize(
    ("section", "own", "message"),
    [
        ("rl: {reward_weights: {solved: 0}}", "kind: rl, reward_weights: {solved: 1}", "rl.reward_weights"),
        ("rl: {reward_weights: {}}", "kind: rl, reward_weights: {solved: 1}", "rl.reward_weights is empty"),
        ("generate: {reward_weights: {}}", "kind: generate, reward_weights: {cells: 1}", "generate.reward_weights"),
        ("rl: {supervision: text_steps, advantage: rloo}", "kind: rl, advantage: center", "rl.advantage = rloo"),
        ("lora: {rank: 2}\nrl: {reference: moving, kl: loss}", "kind: rl, reference: fixed", "rl.reference = moving"),
        ("rl: {prompts_per_step: 7, rollout_batch_size: 24}", "kind: rl, prompts_per_step: 6", "rl.rollout_batch_size"),
        ("rl: {kl: reward}", "kind: rl, kl: none", "rl.kl = reward takes sums"),
        ("rl: {steps: 0}", "kind: rl, steps: 3", "rl.steps = 0"),
    ],
)
def test_a_section_is_judged_as_its_stages_read_it(write, section, own, message):
    """What every stage of a kind has changed is read by nobody; what one of them reads as it is counts."""
    alone = f"{section}\nstages: [sft, {{name: a, {own}}}]\n"
    parse(["--config", write(alone)])
    kind = own.split()[1].rstrip(",")
    assert message in complaint("--config", write(alone.replace("[sft, ", f"[sft, {{name: b, kind: {kind}}}, ")))
    other = alone.replace("[sft, ", f"[sft, {{name: b, kind: {kind}, num_generations: 8}}, ")
    assert f"stage 'b': {message}"[:30] in complaint("--config", write(other))


@pytest.mark.parametrize("kind", ["rl", "preference", "generate"])
def test_the_rewards_of_a_stage_of_its_own_are_judged(kind):
    for weights in ("{}", "{solved: .nan}"):
        told = complaint("--stages", f"[sft, {{name: a, kind: {kind}, reward_weights: {weights}}}, {kind}]")
        assert f"stage 'a': {kind}.reward_weights" in told


def test_named_stages_stay_when_a_command_changes_a_setting_of_their_run():
    """`evaluate --run RUN --sampler.steps 10` lays flags over the run's configuration."""
    stages = "[{name: cold_start, kind: sft, steps: 5}, {name: keep, kind: generate}, {name: imitate, kind: sft, data: [keep]}]"
    trained = parse(["--stages", stages])
    assert build(Config, plain(trained)) == trained
    assert parse(["--seed", "1"], trained, "evaluate").stages == trained.stages


@pytest.mark.parametrize("stages", ["[sft]", "[rl]", "[sft, rl]"])
@pytest.mark.parametrize("method", section_names("rl"))
def test_what_is_accepted_is_read_back(write, stages, method):
    """A run that was trained must open, whatever settings fell back to their defaults because no stage reads them."""
    flags = ["--stages", stages, "--init_from", "runs/other", "--rl", method]
    config = parse(flags)
    assert from_yaml(write(to_yaml(config), "resolved.yaml")) == config


def test_an_evaluation_is_not_bound_by_the_rules_of_the_training():
    trained = parse(["--rl", "ppo_kl", "--init_from", "runs/other", "--stages", "[rl]"])
    assert parse(["--sampler.top_k", "5", "--evaluation.temperature", "1"], trained, "evaluate").sampler.top_k == 5
    with pytest.raises(UserError, match="rl.kl = reward"):
        parse(["--sampler.top_k", "5"], trained)


def test_a_stored_configuration_is_checked_too(write):
    path = write("rl: {num_generations: 1}")
    with pytest.raises(UserError, match=rf"{path}: config: rl\.num_generations = 1"):
        from_yaml(path)
    with pytest.raises(UserError, match="does not exist"):
        from_yaml(Path(path).parent / "gone.yaml")


def test_another_mapping_is_a_difference():
    for name in ("rl.reward_weights", "preference.reward_weights", "generate.reward_weights", "generate.accept"):
        old, new = (
            parse(["--stages", "[sft, generate, preference, rl]", f"--{name}", f"{{{one}: 1}}"]) for one in "ab"
        )
        assert differences(old, new) == [f"{name}: {{'a': 1.0}} -> {{'b': 1.0}}"]


def test_differences_are_one_line_a_field():
    new = parse(
        [
            "--rl.steps",
            "50",
            "--rl.reward_weights",
            "{solved: 2, format: 1}",
            "--stages",
            "[rl, sft]",
            "--init_from",
            "x",
        ]
    )
    assert differences(Config(), new) == [
        "stages: ['sft', 'rl'] -> ['rl', 'sft']",
        "init_from: '' -> 'x'",
        "rl.steps: 40 -> 50",
        "rl.reward_weights: {'solved': 1.0} -> {'solved': 2.0, 'format': 1.0}",
    ]
    assert differences(new, new) == []


def lines_of(lines, flag):
    return "\n".join(line for line in lines if line.split()[:1] == [flag])


def test_the_help_names_every_key_with_its_default_and_its_choices():
    lines = help_text("python -m d1jax.train").splitlines()
    assert lines[0].startswith("usage: python -m d1jax.train --config FILE.yaml")
    described = {line.split()[0]: line for line in lines if line.startswith("  --")}
    assert set(described) == {f"--{key}" for key, hint in keys_of(Config) if not dataclasses.is_dataclass(hint)}
    assert "peak  [0.0003]" in described["--rl.optimizer.learning_rate"]
    assert "peak  [0.003]" in described["--sft.optimizer.learning_rate"]
    assert described["--rl.loss_aggregation"].endswith("[bnpo] of bnpo | group_bnpo | grpo | dr_grpo | row_sum")
    assert "[one_step] of one_step | elbo" in described["--rl.estimator"]
    assert "trajectory: segments of equal length  [1]" in lines_of(lines, "--rl.estimator.samples")


def test_the_help_names_the_methods_and_docstrings_the_fields():
    assert all(name in help_text("x") for name in (*section_names("rl"), *section_names("model")))
    for key in hints_of(type(Config().sampler)):
        assert f"{key} = " in type(Config().sampler).__doc__


def test_a_key_of_every_kind_can_be_set_from_the_command_line():
    """Each key accepts its own default, written as the help shows it."""
    for key, value in leaves().items():
        assert parse([f"--{key}", str(plain(value))]) == Config(), key


def test_what_one_of_several_stages_reads_is_no_misunderstanding(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("stages: [sft, {name: a, kind: rl, prompt_mask: 0.15}]\nrl: {prompt_mask: 0, mask_sharing: row}\n")
    config = parse(["--config", str(file)])
    assert config.rl.mask_sharing == config.section_of(config.stage("a")).mask_sharing == "row"


def test_a_stage_may_change_a_parameter_of_the_choice_that_its_section_makes(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("stages: [sft, {name: a, kind: rl, kl: {coefficient: 0.1}}]\nrl: {kl: loss}\n")
    config = parse(["--config", str(file)])
    assert config.section_of(config.stage("a")).kl.coefficient == 0.1
