"""Everything a stage works with, built once from the configuration: mesh, task, rows as arrays, tokenizer, model, weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from d1jax.config import Config, ConfigError, ModelConfig, TaskConfig
from d1jax.data.tokenizers import CharacterTokenizer, load_tokenizer, pad_rows
from d1jax.models import lora
from d1jax.models.transformer import Transformer, Variables, initialize
from d1jax.runtime import mesh as mesh_rules
from d1jax.runtime.checkpoint import Checkpoints
from d1jax.runtime.run_directory import RunDirectory, open_run, write_json
from d1jax.tasks import TASKS
from d1jax.tasks.jsonl import read_rows
from d1jax.tasks.task import Row, Task

PRINTABLE = "".join(map(chr, range(32, 127))) + "\n"
KEYS = {"weights": 0, "sft": 1, "rl": 2, "evaluation": 3, "sft adapter": 4, "rl adapter": 5}


@dataclass(frozen=True)
class Problems:
    """Rows of a task, and their prompts and targets as token arrays. R rows, P prompt columns, C completion columns."""

    rows: list[Row]
    prompt_RP: np.ndarray
    prompt_length_R: np.ndarray
    target_RC: np.ndarray  # padded with end tokens; a row without a target is all end tokens
    has_target_R: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Experiment:
    config: Config
    mesh: Mesh
    task: Task
    tokenizer: CharacterTokenizer
    model: Transformer
    train: Problems
    eval_sets: dict[str, Problems]

    def key(self, purpose: str) -> Array:
        """The root key of a purpose: a function of the seed and the purpose's name only."""
        return jax.random.fold_in(jax.random.key(self.config.seed), KEYS[purpose])


def make_task(config: TaskConfig) -> Task:
    options = {"numbers": config.numbers} if config.name == "countdown" else {}
    try:
        return TASKS[config.name](style=config.style, split_seed=config.seed, **options)
    except ValueError as error:
        raise ConfigError(f"config: task: {error}") from None


def build(config: Config, log: Callable[[str], None] = print, training: bool = True) -> Experiment:
    """Reads or generates the rows and describes the model; no weights yet. Without `training` the training rows are left out.

    Raises ConfigError and DataError before anything is compiled.
    """
    mesh = mesh_rules.make_mesh(config.mesh)
    _check_rows_divide(config, mesh, training)
    task = make_task(config.task)
    tokenizer = CharacterTokenizer(task.alphabet if config.task.style == "bare" else PRINTABLE)
    eval_rows = {
        name: _rows(task, config, source, "test", config.task.eval_rows)
        for name, source in config.task.eval_sets.items()
    }
    train_rows: list[Row] = []
    if training:
        unknown = sorted(set(config.rl.reward_weights) - set(task.rewards(eval_rows[next(iter(eval_rows))][0], "")))
        if unknown:
            choices = ", ".join(task.rewards(eval_rows[next(iter(eval_rows))][0], ""))
            raise ConfigError(
                f"config: rl.reward_weights names {unknown}, which {task.name} does not have; choices: {choices}"
            )
        train_rows = _rows(task, config, config.task.train, "train", config.task.train_rows)
        train_rows = _without_overlap(task, config.task, train_rows, eval_rows, log)
    prompt_columns = max(
        len(tokenizer.encode(task.prompt(row))) for rows in (train_rows, *eval_rows.values()) for row in rows
    )
    columns = (prompt_columns, config.sampler.completion_length)
    train = _problems(task, tokenizer, train_rows, columns, "the training rows")
    eval_sets = {name: _problems(task, tokenizer, rows, columns, name) for name, rows in eval_rows.items()}
    # A multiple of 8 divides over any small mesh.
    vocab_size = config.model.vocab_size or -(-tokenizer.vocab_size // 8) * 8
    if vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"config: model.vocab_size = {vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size}; use 0"
        )
    model = Transformer(dataclasses.replace(config.model, vocab_size=vocab_size), config.lora)
    return Experiment(config, mesh, task, tokenizer, model, train, eval_sets)


def _check_rows_divide(config: Config, mesh: Mesh, training: bool) -> None:
    shards = mesh_rules.row_shards(mesh)
    rollout_rows = config.rl.prompts_per_step * config.rl.group_size
    sizes = {"evaluation.batch_size": config.evaluation.batch_size}
    if training and "sft" in config.stages:
        sizes["sft.batch_size"] = config.sft.batch_size // config.sft.micro_batches
    if training and "rl" in config.stages:
        sizes["rl.prompts_per_step x rl.group_size"] = rollout_rows // config.rl.micro_batches
    for name, size in sizes.items():
        if size % shards:
            raise ConfigError(
                f"config: {name} (a micro-batch: {size} rows) does not divide over {shards} devices of data x fsdp"
            )


def _rows(task: Task, config: Config, source: str, split: str, count: int) -> list[Row]:
    if source == "generated":
        try:
            return task.generate(split, count, config.task.seed)
        except ValueError as error:
            raise ConfigError(f"config: task: {error}") from None
    rows = read_rows(source, task)
    return rows[:count] if count else rows


def _without_overlap(
    task: Task, config: TaskConfig, train: list[Row], eval_sets: dict[str, list[Row]], log: Callable[[str], None]
) -> list[Row]:
    """Training rows that pose no problem of an evaluation set (and, where asked, share no solution with it)."""
    for name, rows in eval_sets.items():
        problems = {task.problem_key(row) for row in rows}
        solutions = {task.solution_key(row) for row in rows} - {None} if name in config.held_out_by_solution else set()
        kept = [
            row for row in train if task.problem_key(row) not in problems and task.solution_key(row) not in solutions
        ]
        if len(kept) < len(train):
            why = "problem or solution" if solutions else "problem"
            log(f"data: dropped {len(train) - len(kept)} of {len(train)} training rows whose {why} occurs in {name}")
        train = kept
    if not train:
        raise ConfigError(
            "config: every training row occurs in an evaluation set; use other files or fewer of task.held_out_by_solution"
        )
    return train


def _problems(
    task: Task, tokenizer: CharacterTokenizer, rows: list[Row], columns: tuple[int, int], name: str
) -> Problems:
    end = tokenizer.special.end
    prompt_RP, prompt_length_R = pad_rows([tokenizer.encode(task.prompt(row)) for row in rows], columns[0], end)
    targets = [task.target(row) for row in rows]
    encoded = [tokenizer.encode(text or "") for text in targets]
    longest = max(map(len, encoded), default=0)
    if longest > columns[1]:
        raise ConfigError(
            f"config: a target of {name} has {longest} tokens, more than sampler.completion_length = {columns[1]}; raise it"
        )
    target_RC, _ = pad_rows(encoded, columns[1], end)
    return Problems(rows, prompt_RP, prompt_length_R, target_RC, np.array([text is not None for text in targets]))


# -- weights ------------------------------------------------------------------------------------------------------------


def start_variables(experiment: Experiment, run: RunDirectory) -> Variables:
    """The weights before the first stage: random, or the last ones of the run that `init_from` names.

    Which step those were is written down the first time, so that a source that goes on training moves nothing here.
    """
    config = experiment.config
    if config.lora.rank:
        initial = jax.eval_shape(lambda: initialize(experiment.model, experiment.key("weights"), experiment.mesh))
        lora.check_targets(initial["params"], config.lora)
    if not config.init_from:
        return initialize(experiment.model, experiment.key("weights"), experiment.mesh)
    source_run, source = open_run(config.init_from)
    check_same_model(experiment, source_run, source)
    if run.origin.exists():
        origin = json.loads(run.origin.read_text(encoding="utf-8"))
    else:
        saved = [(stage, step) for stage, step in source_run.saved_steps(source.stages).items() if step]
        if not saved:
            raise ConfigError(f"init_from {config.init_from!r} has no checkpoint yet")
        origin = dict(zip(("stage", "step"), saved[-1], strict=True))
        write_json(run.origin, origin)
    theirs = dataclasses.replace(experiment, config=source, model=Transformer(experiment.model.config, source.lora))
    return variables_at(theirs, source_run, origin["stage"], origin["step"])[0]


def check_same_model(experiment: Experiment, run: RunDirectory, source: Config) -> None:
    """Raises ConfigError where the weights of a run do not fit the model and tokenizer of this experiment."""
    here, there = (dataclasses.asdict(_architecture(config)) for config in (experiment.config, source))
    other = [f"model.{name} = {there[name]} (here: {here[name]})" for name in here if here[name] != there[name]]
    if other:
        raise ConfigError(f"run {str(run.path)!r} has another model: {', '.join(other)}")
    if run.tokenizer.is_file() and load_tokenizer(run.tokenizer) != experiment.tokenizer:
        raise ConfigError(
            f"run {str(run.path)!r} has another tokenizer than task {experiment.config.task.name!r} needs in this style"
        )


def _architecture(config: Config) -> ModelConfig:
    """The model's configuration without what may change between runs on the same weights."""
    return dataclasses.replace(config.model, remat=False, dtype="float32", param_dtype="float32")


def with_adapter(experiment: Experiment, variables: Variables, stage: str) -> Variables:
    """The variables of a stage: under LoRA with a fresh adapter, which changes nothing until it is trained."""
    if experiment.config.lora.rank == 0:
        return variables
    return {**variables, **initialize(experiment.model, experiment.key(f"{stage} adapter"), experiment.mesh, ("lora",))}


def split(variables: Variables) -> tuple[Variables, Variables]:
    """(trainable, frozen): the adapter and the rest, or everything and nothing."""
    name = "lora" if "lora" in variables else "params"
    return {name: variables[name]}, {other: value for other, value in variables.items() if other != name}


def variables_at(
    experiment: Experiment, run: RunDirectory, stage: str, step: int | None = None
) -> tuple[Variables, int]:
    """(weights, step) of a stage of a run at `step` (None: its last checkpoint), adapters merged. ConfigError if there are none."""
    stages = experiment.config.stages
    if stage not in stages:
        raise ConfigError(f"run {str(run.path)!r} has no stage {stage!r}; choices: {', '.join(stages)}")
    if not run.checkpoints(stage).is_dir():
        raise ConfigError(f"run {str(run.path)!r} has no checkpoint of stage {stage!r} yet")
    checkpoints = Checkpoints(run.checkpoints(stage))
    try:
        saved = checkpoints.steps()
        if not saved:
            raise ConfigError(f"run {str(run.path)!r} has no checkpoint of stage {stage!r} yet")
        if step is not None and step not in saved:
            raise ConfigError(f"run {str(run.path)!r}: stage {stage!r} has checkpoints of steps {saved}, not of {step}")
        index = stages.index(stage)
        if experiment.config.lora.rank and index:
            before, _ = variables_at(experiment, run, stages[index - 1])
        elif experiment.config.lora.rank:
            before = start_variables(experiment, run)
        else:
            before = initialize(
                experiment.model, experiment.key("weights"), experiment.mesh
            )  # an example of shapes and placement
        trainable, frozen = split(with_adapter(experiment, before, stage))
        step = saved[-1] if step is None else step
        loaded = checkpoints.load(step, {"trainable": trainable})
    finally:
        checkpoints.close()
    return lora.merge({**frozen, **loaded["trainable"]}, experiment.config.lora), step
