"""Everything a stage works with, built once from the configuration: the setup, the task, and its rows as arrays."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from d1jax.config import Config, TaskConfig, UserError
from d1jax.data.tokenizers import Tokenizer, pad_rows
from d1jax.models import sharding
from d1jax.tasks import read_source
from d1jax.tasks.task import Row, Task
from d1jax.training.setup import Setup, make_task, set_up

SHARE = "share:"
MAX_GENERATED = 5_000_000  # rows: some gigabytes of Python objects


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
class Context(Setup):
    task: Task
    train: Problems
    eval_sets: dict[str, Problems]
    data: dict[str, dict[str, Any]]  # setting -> which rows it gave: source, rows, sha256


def build(
    config: Config, log: Callable[[str], None] = print, training: bool = True, saved: Path | None = None
) -> Context:
    """Reads or generates the rows and describes the model; no weights yet. Without `training` the training rows are left out.

    `saved` is the source directory of the existing run that the weights will come from.
    Raises UserError and DataError before anything is compiled.
    """
    _check_own_task(config.task, saved)
    setup = set_up(config, saved)
    check_rows_divide(setup.config, setup.mesh, training)
    task = make_task(setup.config.task)
    train_rows, eval_rows, data = read_rows(task, setup.config, log, training)
    return assemble(setup, task, train_rows, eval_rows, data, log, training)


def _check_own_task(config: TaskConfig, saved: Path | None) -> None:
    """Raises UserError for a task whose file came with a run: what a run directory holds is data, and is not executed."""
    file = Path(config.name.rpartition(":")[0])
    if saved is not None and file.suffix == ".py" and file.resolve().is_relative_to(saved.resolve().parent):
        raise UserError(
            f"config: task.name = {config.name!r} is a file of the run itself, which is not executed; if you trust it, copy it "
            "elsewhere and give --task.name"
        )


def read_rows(
    task: Task, config: Config, log: Callable[[str], None], training: bool
) -> tuple[list[Row], dict[str, list[Row]], dict[str, dict[str, Any]]]:
    """(training rows, rows of every evaluation set, which rows each source gave) that the section `task` names.

    Training rows that pose a problem of an evaluation set are left out; without `training` all of them are.
    """
    shared = any(source.startswith(SHARE) for source in config.task.eval_sets.values())
    train_rows = _rows(task, config, config.task.train, "train", config.task.train_rows) if training or shared else []
    eval_rows = {
        name: _share(task, train_rows, source, config.task)
        if source.startswith(SHARE)
        else _rows(task, config, source, "test", config.task.eval_rows)
        for name, source in config.task.eval_sets.items()
    }
    sources = {f"task.eval_sets.{name}": (source, eval_rows[name]) for name, source in config.task.eval_sets.items()}
    if training:
        sources |= {"task.train": (config.task.train, train_rows)}
    data = {setting: _identity(*found) for setting, found in sources.items()}
    if not training:
        return [], eval_rows, data
    if config.kinds & {"rl", "preference", "rejection"}:
        _check_reward_names(task, eval_rows[next(iter(eval_rows))][0], config)
    return _without_overlap(task, config.task, train_rows, eval_rows, log), eval_rows, data


def assemble(
    setup: Setup,
    task: Task,
    train_rows: list[Row],
    eval_rows: dict[str, list[Row]],
    data: dict[str, dict[str, Any]],
    log: Callable[[str], None],
    training: bool = True,
) -> Context:
    """The rows as arrays, beside the setup. Raises UserError for rows that no stage can work with: without answers, too long."""
    config, tokenizer = setup.config, setup.tokenizer
    if training and not config.kinds <= {"sft"}:
        wanted = any("solved" in names for _, names in _reward_names(config))
        _check_references(task, "task.train", train_rows, wanted, log)
    for name, rows in eval_rows.items():
        _check_references(task, f"task.eval_sets.{name}", rows, True, log)
    completion, taught = _completion_columns(config), target_columns(config)
    if config.task.too_long == "drop":
        train_rows = _that_fit(task, tokenizer, train_rows, (completion, taught), config, log)
    columns = longest_prompt(task, tokenizer, train_rows)
    _check_positions(config, columns, completion, "training")
    train = problems_of(task, tokenizer, train_rows, (columns, taught), "the training rows")
    columns = longest_prompt(task, tokenizer, [row for rows in eval_rows.values() for row in rows])
    if eval_rows:
        _check_positions(config, columns, config.sampler.completion_length, "evaluation")
    # What an evaluation row stores as its target is shown, not scored: it may be longer than what is sampled.
    eval_sets = {name: problems_of(task, tokenizer, rows, (columns, 0), name) for name, rows in eval_rows.items()}
    return Context(**vars(setup), task=task, train=train, eval_sets=eval_sets, data=data)


def _check_reward_names(task: Task, row: Row, config: Config) -> None:
    offered = task.rewards(row, "")
    for setting, names in _reward_names(config):
        unknown = sorted(set(names) - set(offered))
        if unknown:
            raise UserError(
                f"config: {setting} names {unknown}, which {task.name} does not have; choices: {', '.join(offered)}"
            )


def _reward_names(config: Config) -> list[tuple[str, list[str]]]:
    """(setting, the task's rewards that it names) of every stage that looks at rewards."""
    found = []
    for stage in config.stages:
        section = config.section_of(stage)
        if stage.kind in ("rl", "preference"):
            found.append((f"{stage.name}.reward_weights", list(section.reward_weights)))
        if stage.kind == "rejection":
            found.append((f"{stage.name}.accept", [section.accept]))
    return found


def _identity(source: str, rows: list[Row]) -> dict[str, Any]:
    """What tells these rows from others of the same name; of rows and not of bytes, so that a file may be packed or moved."""
    text = "\n".join(json.dumps(row, sort_keys=True, default=repr) for row in rows)
    return {"source": source, "rows": len(rows), "sha256": hashlib.sha256(text.encode()).hexdigest()}


def target_columns(config: Config) -> int:
    """Columns of the targets that the SFT stages learn from; 0 where there is none: RL reads no target, however long."""
    default = config.sampler.completion_length
    return max((section.completion_length or default for section in config.of_kind("sft")), default=0)


def _completion_columns(config: Config) -> int:
    """The longest completion that a stage puts behind a training prompt."""
    sampled = 0 if config.kinds <= {"sft"} else config.sampler.completion_length
    return max(sampled, target_columns(config))


def longest_prompt(task: Task, tokenizer: Tokenizer, rows: list[Row]) -> int:
    return max((len(_prompt_ids(task, tokenizer, row)) for row in rows), default=0)


def _check_positions(config: Config, prompt_columns: int, completion: int, rows: str) -> None:
    limit = config.model.max_positions
    if limit and prompt_columns + completion > limit:
        raise UserError(
            f"config: the longest prompt of the {rows} rows has {prompt_columns} tokens; with {completion} new ones that is more than the "
            f"{limit} positions of the model; lower sampler.completion_length or sft.completion_length, or shorten the prompts"
        )


def check_rows_divide(config: Config, mesh: Mesh, training: bool) -> None:
    """Raises UserError where a batch, or a part of it, does not divide over the devices that rows are cut over."""
    shards = sharding.row_shards(mesh)
    sizes = {"evaluation.batch_size": config.evaluation.batch_size}
    for stage in config.stages if training else ():
        section = config.section_of(stage)
        if stage.kind == "sft":
            sizes[f"{stage.name}.batch_size"] = section.batch_size // section.grad_accumulation_steps
            continue
        sizes[f"{stage.name}.prompts_per_step x {stage.name}.num_generations"] = section.rollout_rows
        if stage.kind == "rl":
            sizes[f"the rows of an update of {stage.name}"] = section.rollout_rows // section.grad_accumulation_steps
        if stage.kind == "preference":
            pairs = section.prompts_per_step // section.grad_accumulation_steps
            sizes[f"the pairs of an update of {stage.name}"] = pairs
    for name, size in sizes.items():
        if size % shards:
            raise UserError(
                f"config: {name} (a micro-batch: {size} rows) does not divide over {shards} devices of data x fsdp"
            )


def _rows(task: Task, config: Config, source: str, split: str, count: int) -> list[Row]:
    if source == "generated":
        if count > MAX_GENERATED:
            raise UserError(
                f"config: {count} rows to generate (task.train_rows or task.eval_rows) are more than {MAX_GENERATED}, which is "
                "what fits into memory; generate fewer, or write them into a file"
            )
        try:
            return task.generate(split, count, config.task.seed)
        except ValueError as error:
            raise UserError(f"config: task: {error}") from None
    rows = read_source(source, task)
    return rows[:count] if count else rows


def _share(task: Task, rows: list[Row], source: str, config: TaskConfig) -> list[Row]:
    """A part of the training rows, always the same one; the overlap rule then takes them out of training."""
    try:
        fraction = float(source.removeprefix(SHARE))
    except ValueError:
        fraction = -1.0
    if not 0 < fraction < 1:
        raise UserError(f"config: task.eval_sets: {source!r} is not of the form share:0.01, between 0 and 1")
    order = np.random.default_rng(config.seed).permutation(len(rows))
    picked = [rows[index] for index in order[: max(round(len(rows) * fraction), 1)]]
    return picked[: config.eval_rows] if config.eval_rows else picked


def _that_fit(
    task: Task,
    tokenizer: Tokenizer,
    rows: list[Row],
    lengths: tuple[int, int],
    config: Config,
    log: Callable[[str], None],
) -> list[Row]:
    """The training rows whose prompt leaves room for `lengths` = (columns of a completion, columns of a target), and whose target
    fits, where targets are learnt from (not 0 columns). The others are counted, never cut.
    """
    completion, taught = lengths
    limit = config.model.max_positions or 2**31 - 1

    def fits(row: Row) -> bool:
        target = (_target_ids(task, tokenizer, row) or []) if taught else []
        return len(target) <= taught and len(_prompt_ids(task, tokenizer, row)) + completion <= limit

    kept = [row for row in rows if fits(row)]
    if len(kept) < len(rows):
        log(
            f"data: left out {len(rows) - len(kept)} of {len(rows)} training rows that are too long (task.too_long: drop)"
        )
    if rows and not kept:
        cure = "raise sft.completion_length" if taught else "lower sampler.completion_length, or shorten the prompts"
        raise UserError(f"config: every training row is too long; {cure}")
    return kept


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
        raise UserError(
            "config: every training row occurs in an evaluation set; use other files or fewer of task.held_out_by_solution"
        )
    return train


def _check_references(task: Task, setting: str, rows: list[Row], wanted: bool, log: Callable[[str], None]) -> None:
    """Names the rows that no answer can solve. Raises UserError where that is all of them and the answer is `wanted`."""
    without = [index for index, row in enumerate(rows) if not task.has_reference(row)]
    if not without:
        return
    first = f"row {without[0]}, {task.problem_key(rows[without[0]])[:60]!r}"
    if wanted and len(without) == len(rows):
        raise UserError(
            f"config: {setting}: none of its {len(rows)} rows has a reference answer that can be read, so every text would count as "
            f"wrong (the first: {first}); the task's docstring says where an answer may stand"
        )
    log(
        f"data: {len(without)} of {len(rows)} rows of {setting} have no reference answer that can be read; no text solves them "
        f"(the first: {first})"
    )


def problems_of(task: Task, tokenizer: Tokenizer, rows: list[Row], columns: tuple[int, int], name: str) -> Problems:
    """The rows as arrays of `columns` = (prompt, target) columns; without target columns targets are left out."""
    end = tokenizer.special.end
    prompt_RP, prompt_length_R = pad_rows([_prompt_ids(task, tokenizer, row) for row in rows], columns[0], end)
    targets = [_target_ids(task, tokenizer, row) if columns[1] else None for row in rows]
    longest = max((len(ids) for ids in targets if ids), default=0)
    if longest > columns[1]:
        raise UserError(
            f"config: a target of {name} has {longest} tokens, more than the {columns[1]} of sampler.completion_length "
            "(or sft.completion_length); raise it, or leave such rows out (task.too_long: drop)"
        )
    target_RC, _ = pad_rows([ids or [] for ids in targets], columns[1], end)
    return Problems(rows, prompt_RP, prompt_length_R, target_RC, np.array([ids is not None for ids in targets]))


def _prompt_ids(task: Task, tokenizer: Tokenizer, row: Row) -> list[int]:
    try:
        return tokenizer.prompt(task.prompt(row))
    except ValueError as error:
        raise UserError(f"config: a prompt of task {task.name!r} cannot be written: {error}") from None


def _target_ids(task: Task, tokenizer: Tokenizer, row: Row) -> list[int] | None:
    """The SFT completion; None where the row has none."""
    target = task.target(row)
    try:
        return None if target is None else tokenizer.answer(target)
    except ValueError as error:
        raise UserError(f"config: a target of task {task.name!r} cannot be written: {error}") from None
