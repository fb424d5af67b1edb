"""What a run starts from: a checkpoint's architecture, weights and tokenizer, and rows that fit them."""

import contextlib
import dataclasses
import io
import json
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from d1jax import convert, train
from d1jax.config import (
    Config,
    EvaluationConfig,
    LoraConfig,
    ModelConfig,
    RlConfig,
    SamplerConfig,
    SftConfig,
    TaskConfig,
    UserError,
)
from d1jax.config.parse import parse
from d1jax.data.hf_tokenizer import PretrainedTokenizer
from d1jax.data.tokenizers import ByteTokenizer, CharacterTokenizer
from d1jax.inference.policy import load_pretrained, save_pretrained
from d1jax.models import lora
from d1jax.models.families import family_for
from d1jax.telemetry.metrics import read_metrics
from d1jax.training.context import build
from d1jax.training.setup import save_source, set_up
from d1jax.training.stage_log import StageLog
from d1jax.weights.hf_directory import fingerprint, open_checkpoint
from d1jax.weights.hf_io import in_memory, save_native, save_weights
from d1jax.weights.run import RunDirectory, open_run
from d1jax.weights.tokenizer_files import load_tokenizer, write_new_companions
from d1jax.weights.variables import mark_one_adapter, start_variables, variables_at

DIGITS = "01234\n"  # what 4x4 Sudoku needs
TASK = TaskConfig(train_rows=8, eval_rows=4)


@pytest.fixture
def write(tmp_path, tiny):
    """`write("name", native=True, alphabet=..., ...)` -> (directory, model, variables) of a model for an alphabet."""

    def write(name: str = "base", native: bool = False, alphabet: str = DIGITS, **changes):
        model, variables = tiny(**{"vocab_size": 16, **changes})
        tokenizer, out = CharacterTokenizer(alphabet), tmp_path / name
        companions = lambda beside: write_new_companions(model.config, tokenizer, beside, published=not native)  # noqa: E731
        family = family_for(model.config)
        if native:
            save_native(in_memory(variables, model.config, family), model.config, family, out, companions)
        else:
            save_weights(in_memory(variables, model.config, family), model.config, family, out, companions)
        return out, model, variables

    return write


def config(init_from: Path | str = "", task: TaskConfig = TASK, **settings) -> Config:
    return Config(**{"init_from": str(init_from), "task": task, **settings})


# -- architecture and tokenizer ----------------------------------------------------------------------------------------


def test_the_architecture_of_a_checkpoint_is_adopted(write_checkpoint):
    directory, model, _ = write_checkpoint(qkv_bias=True, alignment="shifted", heads=4, kv_heads=2, max_positions=77)
    mine = ModelConfig(remat="full", dtype="bfloat16")
    setup = set_up(config(directory, model=mine, lora=LoraConfig(rank=3)))
    adopted = {**vars(model.config), "remat": "full", "dtype": "bfloat16"}
    assert vars(setup.config.model) == vars(setup.model.config) == adopted
    assert setup.model.lora.rank == 3


def test_attention_is_checked_in_the_shapes_of_the_checkpoint(write_checkpoint, monkeypatch):
    directory, model, _ = write_checkpoint(heads=4, kv_heads=2)
    seen = []
    monkeypatch.setattr("d1jax.models.attention.check", lambda model, mesh: seen.append(model))
    set_up(config(directory))
    assert [(one.width, one.heads, one.kv_heads) for one in seen] == [(model.config.width, 4, 2)]


def test_saying_what_the_checkpoint_says_is_no_contradiction(write_checkpoint):
    directory, model, _ = write_checkpoint()
    assert set_up(config(directory, model=ModelConfig(width=16, heads=2))).model.config.width == 16


@pytest.mark.parametrize(
    ("name", "value", "theirs"),
    [
        ("width", 32, 16),
        ("layers", 7, 2),
        ("rope_theta", 100.0, 5e5),
        ("tied_head", True, False),
        ("vocab_size", 5, 13),
    ],
)
def test_a_contradicting_setting_is_refused_by_name(write_checkpoint, name, value, theirs):
    directory, *_ = write_checkpoint()
    with pytest.raises(UserError, match=rf"model\.{name} = {theirs} \(here: {value}\).*leave them out"):
        set_up(config(directory, model=ModelConfig(**{name: value})))


def test_an_exported_character_tokenizer_is_a_pretrained_one(write):
    setup = set_up(config(write()[0]))
    assert isinstance(setup.tokenizer, PretrainedTokenizer) and not setup.tokenizer.chats
    ours = CharacterTokenizer(DIGITS)
    assert setup.tokenizer.encode("0123\n4") == ours.encode("0123\n4")
    assert setup.tokenizer.special == ours.special


def test_a_native_checkpoint_with_the_tasks_characters_is_taken(write):
    assert set_up(config(write(native=True)[0])).tokenizer == CharacterTokenizer(DIGITS)


@pytest.mark.parametrize("tokenizer", ["characters", "bytes"])
def test_weights_are_never_given_ids_of_another_tokenizer(write, tokenizer):
    directory, *_ = write(native=True, alphabet="43210abcd\n", vocab_size=264)
    with pytest.raises(UserError, match="another tokenizer|tokenizer"):
        set_up(config(directory, tokenizer=tokenizer))


def test_random_weights_may_read_bytes():
    setup = set_up(config(tokenizer="bytes"))
    assert setup.tokenizer == ByteTokenizer()
    assert setup.model.config.vocab_size == 264  # 258, rounded up to a multiple of 8


def test_a_vocabulary_that_is_too_small_is_refused():
    with pytest.raises(UserError, match="model.vocab_size = 100 is smaller than the tokenizer's 258; use 0"):
        set_up(config(tokenizer="bytes", model=ModelConfig(vocab_size=100)))


def test_the_head_has_no_adapter_and_wrong_targets_are_named(write):
    with pytest.raises(UserError, match="lm_head"):
        set_up(config(write()[0], lora=LoraConfig(rank=2, targets=("lm_head",))))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no/such/place", "no such directory; name a checkpoint"),
        (".", r"no run directory \(config.yaml\) and no RUN/checkpoints"),
    ],
)
def test_init_from_that_names_nothing_is_refused(tmp_path, path, message):
    with pytest.raises(UserError, match=message):
        set_up(config(tmp_path / path))


# -- weights -----------------------------------------------------------------------------------------------------------


def begin(base: Path, run: Path):
    setup = set_up(config(base))
    directory = RunDirectory(run)
    save_source(setup, directory)
    with jax.set_mesh(setup.mesh):
        return start_variables(setup, directory)


@pytest.mark.parametrize("native", [False, True], ids=["published", "native"])
def test_a_run_starts_with_the_weights_of_the_checkpoint(write, tmp_path, native):
    directory, _, variables = write(native=native)
    started = begin(directory, tmp_path / "run")
    assert jax.tree.structure(started) == jax.tree.structure(variables)
    for ours, theirs in zip(jax.tree.leaves(started), jax.tree.leaves(variables), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def test_a_run_keeps_what_is_not_weights(write, tmp_path):
    directory, *_ = write()
    (directory / "modeling_llada.py").write_text("raise SystemExit\n")
    begin(directory, tmp_path / "run")
    source = RunDirectory(tmp_path / "run").source
    assert (source / "config.json").read_bytes() == (directory / "config.json").read_bytes()
    assert (source / "modeling_llada.py").is_file() and not list(source.glob("*.safetensors"))
    assert load_tokenizer(source) == load_tokenizer(directory)


def rewritten(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt", "note": "trained further"})


def in_shards(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "model-00001-of-00001.safetensors")
    names = load_file(directory / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_source_that_cannot_be_written_whole_is_not_there(write, tmp_path, monkeypatch):
    run = RunDirectory(tmp_path / "run")
    setup = set_up(config(write()[0]))

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr("d1jax.training.setup.copy_companions", fail)
    with pytest.raises(OSError, match="no space left"):
        save_source(setup, run)
    assert not run.source.exists()
    monkeypatch.undo()
    save_source(setup, run)
    assert load_tokenizer(run.source) == setup.tokenizer


def test_a_model_that_no_family_can_express_may_still_be_trained(tmp_path):
    run = RunDirectory(tmp_path / "run")
    setup = set_up(config(model=ModelConfig(alignment="shifted")))
    save_source(setup, run)
    assert load_tokenizer(run.source) == setup.tokenizer


def test_init_from_is_kept_as_an_absolute_path(write, monkeypatch):
    directory, *_ = write()
    monkeypatch.chdir(directory.parent)
    assert set_up(config(directory.name)).config.init_from == str(directory)


def test_the_shorter_limit_of_positions_counts(write):
    directory, *_ = write(max_positions=100)
    limits = [
        set_up(config(directory, model=ModelConfig(max_positions=n))).model.config.max_positions for n in (0, 60, 500)
    ]
    assert limits == [100, 60, 100]


def test_any_changed_matrix_changes_the_fingerprint(write):
    """Also of a large file, of which only a part of every megabyte is read."""
    directory, *_ = write(width=256, mlp_width=4096, vocab_size=4096, layers=8)
    before, path = fingerprint(open_checkpoint(directory)), directory / "model.safetensors"
    assert path.stat().st_size > 2**26
    tensors = load_file(path)
    name = "model.transformer.blocks.5.up_proj.weight"
    save_file({**tensors, name: tensors[name] * 1.01}, path, metadata={"format": "pt"})
    assert fingerprint(open_checkpoint(directory)) != before
    save_file(tensors, path, metadata={"format": "pt"})
    assert fingerprint(open_checkpoint(directory)) == before


@pytest.mark.parametrize("change", [rewritten, in_shards])
def test_a_checkpoint_that_changed_is_refused_on_resume(write, tmp_path, change):
    directory, *_ = write()
    begin(directory, tmp_path / "run")
    begin(directory, tmp_path / "run")  # the same again
    change(directory)
    with pytest.raises(UserError, match="has other files than when this run began"):
        begin(directory, tmp_path / "run")
    begin(directory, tmp_path / "new")


# -- rows --------------------------------------------------------------------------------------------------------------

SHORT = SamplerConfig(completion_length=8, block_length=8, steps=4)


def traces(path: Path, lengths: list[int], question: str = "what is {}?") -> str:
    """A file with one row a length: the characters of its trace."""
    rows = [
        {"question": question.format(index), "thinking": "t" * length, "attempt": str(index)}
        for index, length in enumerate(lengths)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def reading(tmp_path):
    """`reading([lengths], eval_sets=..., sft_length=...)` -> (context, the lines that were logged), read as bytes."""

    def read(lengths, eval_sets=None, sft_length=0, max_positions=0, training=True, stages=("sft", "rl"), **task):
        logged: list[str] = []
        train = traces(tmp_path / "train.jsonl", lengths)
        other = traces(tmp_path / "other.jsonl", [5], "and {}?")
        made = TaskConfig(
            name="traces", train=train, train_rows=0, eval_rows=0, eval_sets=eval_sets or {"other": other}, **task
        )
        context = build(
            config(
                task=made,
                tokenizer="bytes",
                sampler=SHORT,
                sft=SftConfig(completion_length=sft_length),
                model=ModelConfig(max_positions=max_positions),
                stages=stages,
            ),
            logged.append,
            training,
        )
        return context, logged

    return read


EMPTY = len("<reasoning>\n\n</reasoning>\n<answer>\n0\n</answer>")  # around a trace


def questions(problems) -> list[str]:
    return [row["question"] for row in problems.rows]


def rows_of(path: Path, answers: list[str | None]) -> str:
    rows = [
        {"question": f"{path.stem} {i}?", "thinking": "t", "attempt": a or "long " * 20} for i, a in enumerate(answers)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def of_answers(tmp_path, train, evaluated, stages=("sft", "rl"), training=True, **rl):
    logged: list[str] = []
    files = {name: rows_of(tmp_path / f"{name}.jsonl", rows) for name, rows in (("train", train), ("test", evaluated))}
    task = TaskConfig(name="traces", train=files["train"], train_rows=0, eval_rows=0, eval_sets={"test": files["test"]})
    sizes = {"sft": SftConfig(completion_length=256), "rl": RlConfig(prompts_per_step=8, num_generations=8, **rl)}
    build(config(task=task, tokenizer="bytes", sampler=SHORT, stages=stages, **sizes), logged.append, training)
    return logged


def test_rows_that_nothing_can_solve_are_counted_and_named_before_training(tmp_path):
    assert not [line for line in of_answers(tmp_path, ["1", "2"], ["3"]) if "reference" in line]
    said = " ".join(of_answers(tmp_path, ["1", None, None], [None, "3"]))
    assert "1 of 2 rows of task.eval_sets.test have no reference answer" in said and "row 0, 'test 0?'" in said
    assert "2 of 3 rows of task.train have no reference answer" in said and "row 1, 'train 1?'" in said


def test_rl_or_evaluation_on_rows_that_nothing_can_solve_is_refused(tmp_path):
    for training in (True, False):
        with pytest.raises(UserError, match="task.eval_sets.test: none of its 2 rows has a reference answer"):
            of_answers(tmp_path, ["1"], [None, None], training=training)
    with pytest.raises(UserError, match="task.train: none of its 1 rows has a reference answer"):
        of_answers(tmp_path, [None], ["1"])
    of_answers(tmp_path, [None], ["1"], stages=("sft",))  # taught, not judged
    of_answers(tmp_path, [None], ["1"], reward_weights={"format": 1.0})  # judged by its form only


def test_what_tells_rows_apart_is_what_they_say(reading):
    seen = [reading(lengths, sft_length=64)[0].data["task.train"] for lengths in ([3, 5], [3, 5], [3, 6], [5, 3])]
    assert seen[0] == seen[1] and len({row["sha256"] for row in seen}) == 3 and seen[0]["rows"] == 2
    assert set(reading([3], sft_length=64)[0].data) == {"task.train", "task.eval_sets.other"}


def test_more_generated_rows_than_fit_into_memory_are_refused():
    with pytest.raises(UserError, match="1000000000000 rows to generate"):
        build(config(task=TaskConfig(train_rows=10**12)), lambda line: None)


@pytest.mark.parametrize("path", ["x" * 300, "a\0b"])
def test_a_name_that_no_file_can_have_is_named(path):
    with pytest.raises(UserError, match="init_from .*: no such directory"):
        set_up(config(path))
    with pytest.raises(UserError, match="no such directory"):
        load_pretrained(path)


def test_targets_may_be_longer_than_what_is_sampled(reading):
    context, _ = reading([3, 30], sft_length=128)
    assert context.train.target_RC.shape == (2, 128) and context.train.has_target_R.all()
    assert context.config.sampler.completion_length == 8
    assert context.eval_sets["other"].target_RC.shape == (1, 0)
    row = context.train.target_RC[1].tolist()
    text = context.task.target(context.train.rows[1])
    assert context.tokenizer.decode(row) == text and row[len(text) :] == [256] * (128 - len(text))


def test_a_target_that_is_too_long_is_an_error_that_names_both_cures(reading):
    with pytest.raises(
        UserError, match=r"a target of the training rows has \d+ tokens, more than the 64 .*raise it"
    ) as told:
        reading([3, 100], sft_length=64)
    told.match("task.too_long: drop")


def test_rows_that_are_too_long_are_dropped_and_counted_never_cut(reading):
    context, logged = reading([3, 20, 21, 100, 5], sft_length=EMPTY + 20, too_long="drop")
    assert questions(context.train) == ["what is 0?", "what is 1?", "what is 4?"]
    assert [line for line in logged if "left out 2 of 5 training rows that are too long" in line]


def test_rl_alone_reads_no_target_and_leaves_no_row_out_for_its_length(reading):
    for too_long in ("drop", "fail"):
        context, logged = reading([3, 20, 21, 1000], too_long=too_long, stages=("rl",))
        assert len(context.train) == 4 and not any("left out" in line for line in logged)
    with pytest.raises(UserError, match="longest prompt of the training rows"):
        reading([3], max_positions=15, stages=("rl",))


def test_sft_alone_is_bounded_by_its_targets_and_not_by_what_is_sampled(reading):
    context, _ = reading([3], sft_length=EMPTY + 20, max_positions=EMPTY + 40, stages=("sft",))
    assert len(context.train) == 1


def test_prompts_that_are_too_long_for_the_model_are_dropped_too(reading, tmp_path):
    assert kept_prompts(tmp_path, (36, 37), SHORT) == [36]


def kept_prompts(tmp_path: Path, sizes: tuple[int, ...], sampler: SamplerConfig) -> list[int]:
    """The prompt lengths that are left of `sizes` with 100 positions, of which 64 are for the target."""
    path = tmp_path / "rows.jsonl"
    rows = [{"question": "q" * size, "thinking": "t", "attempt": "1"} for size in sizes]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluation = {"x": traces(tmp_path / "x.jsonl", [1])}
    task = TaskConfig(name="traces", train=str(path), train_rows=0, eval_sets=evaluation, too_long="drop")
    room = {"sft": SftConfig(completion_length=64), "model": ModelConfig(max_positions=100)}
    context = build(config(task=task, tokenizer="bytes", sampler=sampler, **room), lambda line: None)
    return [len(question) for question in questions(context.train)]


def test_a_row_fits_only_if_its_prompt_leaves_room_to_sample(tmp_path):
    """RL samples sampler.completion_length tokens behind the same prompts, also where targets are shorter."""
    sampler = SamplerConfig(completion_length=80, block_length=80, steps=4)
    assert kept_prompts(tmp_path, (10, 30), sampler) == [10]


def test_evaluation_rows_that_leave_no_room_to_answer_are_dropped_and_counted(reading, tmp_path):
    """As in training, and their number stands where the rows are recorded; by default they are an error."""
    other = tmp_path / "mixed.jsonl"
    rows = [{"question": "q" * size, "thinking": "t", "attempt": "1"} for size in (5, 12, 13, 90)]
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    short = {"sft_length": 0, "max_positions": 20, "stages": ("rl",), "eval_sets": {"mixed": str(other)}}
    context, logged = reading([3], too_long="drop", **short)
    assert [len(question) for question in questions(context.eval_sets["mixed"])] == [5, 12]
    assert context.data["task.eval_sets.mixed"]["rows"] == 4 and context.data["task.eval_sets.mixed"]["left_out"] == 2
    assert [line for line in logged if "left out 2 of 4 rows of task.eval_sets.mixed" in line]
    with pytest.raises(UserError, match="longest prompt of the evaluation rows has 90 tokens"):
        reading([3], **short)
    with pytest.raises(UserError, match="every row of task.eval_sets.mixed is too long"):
        reading([3], too_long="drop", **(short | {"eval_sets": {"mixed": traces(other, [5] * 2, "q" * 30 + "{}")}}))


def test_nothing_left_is_an_error(reading):
    with pytest.raises(UserError, match="every training row is too long; raise sft.completion_length"):
        reading([100, 200], sft_length=64, too_long="drop")


@pytest.mark.parametrize("too_long", ["fail", "drop"])
def test_a_model_that_is_too_short_for_its_prompts_is_refused(reading, too_long):
    with pytest.raises(UserError, match="lower sampler.completion_length or sft.completion_length|too long"):
        reading([3], sft_length=64, max_positions=70, too_long=too_long)


def test_a_share_is_taken_out_of_training_and_always_the_same(reading):
    share = {"dev": "share:0.25"}
    context, logged = reading([3] * 20, eval_sets=share, sft_length=128)
    dev, train = questions(context.eval_sets["dev"]), questions(context.train)
    assert len(dev) == 5 and len(train) == 15 and not set(dev) & set(train)
    assert dev != [f"what is {index}?" for index in range(5)]  # drawn, not the first ones
    assert any("dropped 5 of 20 training rows" in line for line in logged)
    again, _ = reading([3] * 20, eval_sets=share, sft_length=128)
    assert questions(again.eval_sets["dev"]) == dev
    evaluation, _ = reading([3] * 20, eval_sets=share, sft_length=128, training=False)
    assert questions(evaluation.eval_sets["dev"]) == dev and len(evaluation.train) == 0
    other, _ = reading([3] * 20, eval_sets=share, sft_length=128, seed=1)
    assert questions(other.eval_sets["dev"]) != dev


def test_a_small_share_is_one_row_at_least(reading):
    context, _ = reading([3] * 5, eval_sets={"dev": "share:0.01"}, sft_length=128)
    assert len(context.eval_sets["dev"]) == 1 and len(context.train) == 4


def test_the_set_that_selects_has_no_problem_of_the_others(tmp_path):
    sets = {"test": traces(tmp_path / "test.jsonl", [3] * 4), "validation": "share:0.5"}
    logged: list[str] = []

    def built(rows):
        task = TaskConfig(
            name="traces", train=traces(tmp_path / "train.jsonl", [3] * rows), train_rows=0, eval_rows=0, eval_sets=sets
        )
        evaluation = EvaluationConfig(every=1, select="validation")
        sft = SftConfig(completion_length=128)
        return build(config(task=task, tokenizer="bytes", sampler=SHORT, sft=sft, evaluation=evaluation), logged.append)

    context = built(40)
    test, validation = questions(context.eval_sets["test"]), questions(context.eval_sets["validation"])
    assert not set(test) & set(validation) and not set(validation) & set(questions(context.train))
    dropped = 20 - len(validation)
    assert dropped and any(f"dropped {dropped} of 20 problems of validation" in line for line in logged)
    with pytest.raises(UserError, match="evaluation.select = 'validation': all of its 2 problems are in another set"):
        built(4)


@pytest.mark.parametrize("share", ["share:0", "share:1", "share:-0.5", "share:25%", "share:", "share:nan", "share:2"])
def test_bad_shares_are_refused(reading, share):
    with pytest.raises(UserError, match=f"'{share}' is not of the form share:0.01, between 0 and 1"):
        reading([3] * 4, eval_sets={"dev": share}, sft_length=128)


def test_a_task_with_characters_that_the_checkpoint_lacks_is_refused(write):
    directory, *_ = write(alphabet="01\n")
    with pytest.raises(UserError):
        build(config(directory, sampler=SamplerConfig(completion_length=20, block_length=20)), lambda line: None)


# -- a whole run from a checkpoint ---------------------------------------------------------------------------------------

SETTINGS = {
    "task.train_rows": 32, "task.eval_rows": 4, "sampler.completion_length": 20, "sampler.block_length": 20,
    "sampler.steps": 2, "sft.steps": 2, "sft.batch_size": 8, "rl.steps": 2, "rl.prompts_per_step": 4, "rl.num_generations": 2,
    "rl.num_iterations": 2, "rl.reward_weights": "{units: 1}", "checkpoint_every": 1, "evaluation.batch_size": 8,
    "lora.rank": 2,
}  # fmt: skip


def train_on(base: Path, run: Path) -> tuple[int, str]:
    """(exit code, what was printed)"""
    flags = [f"--{key}={value}" for key, value in {**SETTINGS, "run_dir": run, "init_from": base}.items()]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = train.main(flags)
    return code, printed.getvalue()


def learnt(run: Path) -> list[dict]:
    """The metrics without the clock."""
    lines = read_metrics(run / "metrics.jsonl")
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in lines]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny):
    """(base checkpoint, finished run, what it printed)"""
    root = tmp_path_factory.mktemp("runs")
    model, variables = tiny(vocab_size=16)
    companions = lambda beside: write_new_companions(  # noqa: E731
        model.config, CharacterTokenizer(DIGITS), beside, published=True
    )
    family = family_for(model.config)
    save_weights(in_memory(variables, model.config, family), model.config, family, root / "base", companions)
    code, printed = train_on(root / "base", root / "whole")
    assert code == 0, printed
    return root / "base", root / "whole", printed


def test_a_run_logs_what_it_trains_and_that_is_no_head_and_no_embedding(trained):
    _, run, printed = trained
    table = [line.split("trained:")[1].split() for line in printed.splitlines() if "trained:" in line]
    paths = {row[0] for row in table if row[0].startswith(("lora/", "params/"))}
    modules = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")
    assert paths == {f"lora/blocks/{module}/{part}" for module in modules for part in "ab"}
    assert "lora/ff_out" not in printed and "wte" not in printed
    # Of all parameters: rank 2 on 2 layers of width 16, MLP 24; 5 matrices of width 16, gains, embedding and head.
    adapters = 2 * 2 * (4 * (16 + 16) + 3 * (16 + 24))
    whole = 2 * (4 * 16 * 16 + 3 * 16 * 24 + 2 * 16) + 2 * 16 * 16 + 16
    assert f"{adapters:,} of {adapters + whole:,} parameters" in printed
    assert [(line["stage"], line["step"]) for line in learnt(run)] == [("sft", 1), ("sft", 2), ("rl", 1), ("rl", 2)]


def test_a_stopped_run_resumes_to_the_same_metrics(trained, tmp_path, monkeypatch):
    base, whole, _ = trained
    run = tmp_path / "stopped"
    record = StageLog.log_metrics

    def stopping(self, step, values, watch):
        record(self, step, values, watch)
        self._stop.signum = signal.SIGTERM

    with monkeypatch.context() as patch:
        patch.setattr(StageLog, "log_metrics", stopping)
        assert train_on(base, run)[0] == 128 + signal.SIGTERM
    assert len(learnt(run)) == 1
    assert train_on(base, run)[0] == 0
    assert learnt(run) == learnt(whole)


def test_the_weights_of_a_run_load_and_export(trained, tmp_path):
    base, run, _ = trained
    policy = load_pretrained(run)
    save_pretrained(policy, tmp_path / "out")
    again = load_pretrained(tmp_path / "out")
    assert "lora" in policy.variables and "lora" not in again.variables
    assert again.tokenizer == policy.tokenizer == load_pretrained(base).tokenizer
    tokens = np.array([policy.tokenizer.prompt("0123002140120000")])
    np.testing.assert_allclose(again.logits(tokens), policy.logits(tokens), atol=1e-5, rtol=0)
    np.testing.assert_array_equal(
        load_pretrained(run / "checkpoints" / "rl" / "2").logits(tokens), policy.logits(tokens)
    )
    first, before = load_pretrained(run / "checkpoints" / "sft" / "1"), load_pretrained(base)
    assert (np.asarray(first.logits(tokens)) != policy.logits(tokens)).any()
    assert (np.asarray(before.logits(tokens)) != policy.logits(tokens)).any()
    for name in ("wte", "ff_out"):
        np.testing.assert_array_equal(policy.variables["params"][name], before.variables["params"][name])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("checkpoints/rl/7", r"stage 'rl' has checkpoints of steps \[1, 2\], not of 7"),
        ("checkpoints/dpo/1", "no stage 'dpo'"),
    ],
)
def test_a_checkpoint_that_a_run_lacks_is_named(trained, path, message):
    with pytest.raises(UserError, match=message):
        load_pretrained(trained[1] / path)


def test_a_lora_run_has_one_adapter_over_its_unchanged_base(trained):
    """The second stage goes on with the adapter of the first: nothing is merged, so nothing is rounded away, between stages."""
    base, run, _ = trained
    directory, config = open_run(run)
    setup = set_up(config, directory.source)
    with jax.set_mesh(setup.mesh):
        found = {stage: variables_at(setup, directory, stage)[0] for stage in ("sft", "rl")}
    published = load_pretrained(base).variables["params"]
    for variables in found.values():
        jax.tree.map(np.testing.assert_array_equal, variables["params"], published)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), found["sft"]["lora"], found["rl"]["lora"])
    assert 0 < max(jax.tree.leaves(moved)) < 0.1, "a fresh adapter would lie further away"


def test_a_lora_run_of_an_older_version_is_refused(trained, tmp_path):
    """Its stages had an adapter each, on a base that was merged between them: read as one they would be another model."""
    shutil.copytree(trained[1], tmp_path / "old")
    directory, config = open_run(tmp_path / "old")
    directory.adapter.unlink()
    setup = set_up(config, directory.source)
    with jax.set_mesh(setup.mesh), pytest.raises(UserError, match="written by an older d1jax, whose stages sft, rl"):
        variables_at(setup, directory, "rl")
    with pytest.raises(UserError, match="written by an older d1jax"):
        mark_one_adapter(config, directory)


def test_the_adapter_of_two_stages_exports_as_one_of_the_checkpoint(trained, tmp_path):
    base, run, _ = trained
    assert convert.main(["to-hf", str(run), str(tmp_path / "adapter"), "--adapter-only"]) == 0
    policy, adapted = load_pretrained(run), load_pretrained(base, adapter=tmp_path / "adapter")
    assert adapted.model.lora.rank == 2 and "lora" in adapted.variables
    tokens = np.array([policy.tokenizer.prompt("0123002140120000")])
    np.testing.assert_allclose(adapted.logits(tokens), policy.logits(tokens), atol=1e-4)


def test_the_adapter_of_a_step_exports_too(trained, tmp_path, capsys):
    _, run, _ = trained
    step = next((run / "checkpoints" / "sft").iterdir())
    assert convert.main(["to-hf", str(step), str(tmp_path / "adapter"), "--adapter-only"]) == 0
    base = trained[0]
    tokens = [[1, 2, 3]]
    adapted = load_pretrained(base, adapter=tmp_path / "adapter").logits(tokens)
    np.testing.assert_allclose(adapted, load_pretrained(step).logits(tokens), atol=1e-4)
    assert np.abs(adapted - load_pretrained(run).logits(tokens)).max() > 1e-4
    for missing, message in (("sft/77", "has checkpoints of steps"), ("other/1", "has no checkpoint of stage 'other'")):
        assert convert.main(["to-hf", str(run / "checkpoints" / missing), str(tmp_path / "no"), "--adapter-only"]) == 2
        assert message in capsys.readouterr().err


def test_a_run_whose_base_is_no_checkpoint_says_what_to_do(small_run, tmp_path, capsys):
    assert convert.main(["to-hf", str(small_run), str(tmp_path / "out"), "--adapter_only"]) == 2
    assert (
        "export its merged weights, without --adapter-only. For an adapter, export the weights first"
        in capsys.readouterr().err
    )


def test_a_lora_run_goes_on_with_the_adapter_of_another(trained, tmp_path):
    """With other settings of LoRA it is merged in fp32 and rounded once, to the dtype of the new base."""
    _, run, _ = trained
    theirs = open_run(run)[1]
    found = {}
    for name, settings in (("same", theirs.lora), ("other", LoraConfig(rank=1))):
        config = dataclasses.replace(theirs, init_from=str(run), stages=("rl",), lora=settings)
        setup = set_up(dataclasses.replace(config, model=dataclasses.replace(config.model, param_dtype="bfloat16")))
        (tmp_path / name).mkdir()
        with jax.set_mesh(setup.mesh):
            found[name] = start_variables(setup, RunDirectory(tmp_path / name))
    policy = load_pretrained(run)
    jax.tree.map(np.testing.assert_array_equal, found["same"]["lora"], policy.variables["lora"])
    assert {leaf.dtype for leaf in jax.tree.leaves(found["same"]["params"])} == {np.dtype("bfloat16")}
    expected = lora.merge(policy.variables, theirs.lora, "bfloat16")
    jax.tree.map(np.testing.assert_array_equal, found["other"], expected)


def test_the_base_of_a_lora_run_is_that_of_its_own_seed(tmp_path, monkeypatch):
    """Whatever seed the texts are drawn with when it is evaluated."""
    flags = {"stages": "[sft]", "lora.rank": "2", "task.train_rows": "8", "task.eval_rows": "4", "sft.steps": "1", "sft.batch_size": "8",
             "model.width": "16", "model.layers": "1", "model.heads": "2", "model.kv_heads": "2", "model.mlp_width": "24",
             "evaluation.batch_size": "8", "run_dir": str(tmp_path / "run")}  # fmt: skip
    train.run(parse([piece for key, value in flags.items() for piece in (f"--{key}", value)]))
    run, config = open_run(tmp_path / "run")
    found = []
    for seed in (0, 7):
        setup = set_up(dataclasses.replace(config, seed=seed), run.source)
        with jax.set_mesh(setup.mesh):
            found.append(variables_at(setup, run, "sft")[0])
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_a_run_starts_from_any_step_of_another(trained, tmp_path):
    _, run, _ = trained
    step = run / "checkpoints" / "sft" / "1"
    settings = dataclasses.replace(open_run(run)[1], init_from=str(step), stages=("rl",), lora=LoraConfig())
    setup = set_up(settings)
    found = RunDirectory(tmp_path / "new")
    found.path.mkdir()
    with jax.set_mesh(setup.mesh):
        variables = start_variables(setup, found)
    assert json.loads(found.origin.read_text()) == {"stage": "sft", "step": 1}
    merged = lora.merge(load_pretrained(step).variables, open_run(run)[1].lora)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), variables, merged)
    assert setup.tokenizer == load_pretrained(run).tokenizer


@pytest.mark.parametrize(("rank", "dtype"), [(0, "float32"), (2, "bfloat16")])
def test_a_seed_draws_the_same_weights_in_every_dtype(tmp_path, rank, dtype):
    """What will be trained is not rounded either; the base of an adapter is stored as the configuration says."""
    found = {}
    for stored in ("float32", "bfloat16"):
        settings = Config(
            task=TASK, model=ModelConfig(width=16, layers=1, heads=2, kv_heads=2, mlp_width=24, param_dtype=stored)
        )
        setup = set_up(dataclasses.replace(settings, lora=LoraConfig(rank=rank)))
        with jax.set_mesh(setup.mesh):
            found[stored] = start_variables(setup, RunDirectory(tmp_path))["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(found["bfloat16"])} == {np.dtype(dtype)}
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(b.dtype), b), found["float32"], found["bfloat16"])
