"""Everything a stage works with, built once from the configuration: the setup, the task, and its rows as arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from d1jax.config import Config, Stage, TaskConfig, UserError
from d1jax.config.reward_model import MODEL
from d1jax.config.setting import MOST
from d1jax.config.stage import SAMPLED
from d1jax.data.examples import Examples, Problems, tokenise
from d1jax.data.pairs import StoredPairs, pairs_of_rows
from d1jax.data.rows import check_references, identity_of_file, read_rows, read_training_rows
from d1jax.data.steps import StoredSteps, steps_of_rows
from d1jax.data.texts import Texts, read_texts
from d1jax.diffusion.reward_model import RewardModel
from d1jax.models import sharding
from d1jax.tasks.reward_functions import NAMED, resolve
from d1jax.tasks.task import Row, Task
from d1jax.training.setup import Setup, make_task, set_up

ROWS_LOOKED_AT = 32  # for the names of rewards: a mixture of tasks has others in other rows


Judged = StoredPairs | StoredSteps  # texts of which it is known what is better


@dataclass(frozen=True)
class Context(Setup):
    task: Task
    train: Problems
    eval_sets: dict[str, Problems]
    data: dict[str, dict[str, Any]]  # setting -> which rows it gave: source, rows, sha256
    # What a stage with stored pairs or steps learns from, in the order of its `data`.
    judged_sources: tuple[Judged, ...] = ()
    # Those that a stage names as rewards of texts, and the one that it names for the rewards of steps.
    reward_models: Mapping[str, RewardModel] = field(default_factory=dict)
    step_model: RewardModel | None = None
    # Of a stage on plain text: what it learns from, and what it is measured on.
    texts: Texts | None = None
    # Of a stage with a task or sampler of its own: the context of the run, by which it is evaluated.
    run: Context | None = None

    @property
    def evaluated(self) -> Context:
        """The context that evaluations during training work with: all stages of a run are put to the same rows in the same way."""
        return self.run or self


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
    # The rows of the run's task are what those stages work with that have no task of their own.
    sharing = tuple(stage for stage in setup.config.stages if "task" not in stage.shared)
    shared = dataclasses.replace(setup, config=dataclasses.replace(setup.config, stages=sharing))
    training = training and bool(sharing)
    task = make_task(shared.config.task)
    train_rows, eval_rows, data = read_rows(task, shared.config, log, training)
    data |= _identity_of_own_task(shared.config.task, "task.name")
    if training:
        check_reward_names(task, train_rows, shared.config)
    task.grade(next(iter(eval_rows.values()))[0], "")  # a task of the user's own that cannot grade is found out now
    built = assemble(shared, task, train_rows, eval_rows, data, log, training)
    return dataclasses.replace(built, config=setup.config)


def of_stages(context: Context, log: Callable[[str], None] = print) -> dict[str, Context]:
    """The context of every stage of a run: its own settings, and its own rows where it has a task of its own.

    Raises UserError and DataError before anything is compiled.
    """
    found = {stage.name: _of_stage(context, stage, log) for stage in context.config.stages}
    for stage in context.config.stages:
        if is_stepwise(found[stage.name].config, stage):
            _check_judges(stage, found)
    return found


def _check_judges(stage: Stage, contexts: Mapping[str, Context]) -> None:
    """Raises UserError where kept texts are to be judged line by line, and their task cannot."""
    for name in judged_by_name(contexts[stage.name].config, stage):
        task = contexts[name].task if name in contexts else None
        if task is not None and not hasattr(task, "judge_lines"):
            raise UserError(
                f"config: {stage.name}.data names {name!r} with loss = stepwise, but task {task.name!r} judges no single lines; bring "
                "labelled steps as rows (data: [task]), or take loss = pairwise"
            )


def _of_stage(context: Context, stage: Stage, log: Callable[[str], None]) -> Context:
    built = _with_own_sections(context, stage, log)
    if stage.kind == "adapt":
        texts = read_texts(
            built.config.adapt, stage.name, built.tokenizer, built.config.seed, built.config.model.max_positions, log
        )
        return dataclasses.replace(built, texts=texts, data={**built.data, **texts.data})
    if "task" not in judged_by_name(built.config, stage):
        return built
    config = built.config
    columns, setting = config.sampler.completion_length, f"{stage.name}.data"
    read = steps_of_rows if is_stepwise(config, stage) else pairs_of_rows
    stored, left_out = read(built.task, built.tokenizer, built.train, columns, config.task.too_long, setting)
    if left_out:
        log(
            f"data: left out {left_out} of {len(built.train)} rows of {setting} that are too long (task.too_long: drop)"
        )
    return dataclasses.replace(built, judged_sources=(stored,))


def is_stepwise(config: Config, stage: Stage) -> bool:
    """Whether a stage learns from texts whose steps are labelled, and not from pairs."""
    return stage.kind == "reward_model" and config.reward_model.loss == "stepwise"


def judged_by_name(config: Config, stage: Stage) -> tuple[str, ...]:
    """Where the pairs or labelled steps of a stage come from: task, or the names of generate stages."""
    if stage.kind == "preference":
        return tuple(filter(None, (config.preference.data,)))
    return config.reward_model.data if stage.kind == "reward_model" else ()


def _with_own_sections(context: Context, stage: Stage, log: Callable[[str], None]) -> Context:
    """The context under what a stage changes, with its own rows where it has a task of its own."""
    config = context.config.for_stage(stage.name)
    if not stage.shared:
        return dataclasses.replace(context, config=config)
    # What the rows must do for this stage alone.
    alone = dataclasses.replace(config, stages=(Stage(stage.name, stage.kind),))
    if "task" not in stage.shared:
        columns = context.train.prompt_RP.shape[1]
        _check_positions(alone, columns, _completion_columns(alone), f"training rows of stage {stage.name!r}")
        return dataclasses.replace(context, config=config, run=context)
    _check_own_task(alone.task, None)
    task = make_task(alone.task)
    rows, data = read_training_rows(
        task,
        alone,
        {name: problems.rows for name, problems in context.eval_sets.items()},
        context.task,
        context.config.task,
        log,
    )
    check_reward_names(task, rows, alone)
    setup = Setup(**{field.name: getattr(context, field.name) for field in dataclasses.fields(Setup)})
    built = assemble(dataclasses.replace(setup, config=alone), task, rows, {}, {}, log)
    data |= _identity_of_own_task(alone.task, "task.name")
    named = {f"{stage.name}.{setting}": found for setting, found in data.items()}
    return dataclasses.replace(built, config=config, run=context, data=named)


def _identity_of_own_task(config: TaskConfig, setting: str) -> dict[str, dict[str, Any]]:
    """Of a task of the user's own: its file grades every row."""
    file = config.name.rpartition(":")[0]
    return {setting: identity_of_file(Path(file))} if file.endswith(".py") else {}


def _check_own_task(config: TaskConfig, saved: Path | None) -> None:
    """Raises UserError for a task whose file came with a run: what a run directory holds is data, and is not executed."""
    file = Path(config.name.rpartition(":")[0])
    if saved is not None and file.suffix == ".py" and file.resolve().is_relative_to(saved.resolve().parent):
        raise UserError(
            f"config: task.name = {config.name!r} is a file of the run itself, which is not executed; if you trust it, copy it "
            "elsewhere and give --task.name"
        )


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
    if training and config.kinds & SAMPLED:
        wanted = any("solved" in names for _, names in _reward_names(config))
        check_references(task, "task.train", train_rows, wanted, log)
    for name, rows in eval_rows.items():
        check_references(task, f"task.eval_sets.{name}", rows, True, log)
    columns = target_columns(config)
    learnt = tokenise(task, tokenizer, train_rows, targets=columns > 0)
    if config.task.too_long == "drop":
        learnt = _that_fit(learnt, config, log)
    _check_positions(config, learnt.longest_prompt, _completion_columns(config), "training")
    train = learnt.padded((learnt.longest_prompt, columns), tokenizer.special.end, "the training rows")
    # What an evaluation row stores as its target is shown, not scored: it may be longer than what is sampled.
    posed = {name: tokenise(task, tokenizer, rows, targets=False) for name, rows in eval_rows.items()}
    if config.task.too_long == "drop":
        posed = {name: _posed_that_fit(name, examples, config, data, log) for name, examples in posed.items()}
    longest = max((examples.longest_prompt for examples in posed.values()), default=0)
    if posed:
        _check_positions(config, longest, config.sampler.completion_length, "evaluation")
    eval_sets = {name: examples.padded((longest, 0), tokenizer.special.end, name) for name, examples in posed.items()}
    return Context(**vars(setup), task=task, train=train, eval_sets=eval_sets, data=data)


def _that_fit(examples: Examples, config: Config, log: Callable[[str], None]) -> Examples:
    """The training rows that the model has positions and the targets have columns for. The others are counted, never cut."""
    limit = config.model.max_positions or MOST
    columns = target_columns(config)
    kept = examples.that_fit(limit - _completion_columns(config), columns)
    left_out, count = len(examples.rows) - len(kept.rows), len(examples.rows)
    if left_out:
        log(f"data: left out {left_out} of {count} training rows that are too long (task.too_long: drop)")
    if count and left_out == count:
        cure = "raise sft.completion_length" if columns else "lower sampler.completion_length, or shorten the prompts"
        raise UserError(f"config: every training row is too long; {cure}")
    return kept


def _posed_that_fit(
    name: str, examples: Examples, config: Config, data: dict[str, dict[str, Any]], log: Callable[[str], None]
) -> Examples:
    """The rows of an evaluation set whose prompts leave the model room to answer; `data` is told how many of them do not."""
    setting = f"task.eval_sets.{name}"
    kept = examples.that_fit((config.model.max_positions or MOST) - config.sampler.completion_length, MOST)
    left_out, count = len(examples.rows) - len(kept.rows), len(examples.rows)
    if left_out:
        log(
            f"data: left out {left_out} of {count} rows of {setting} whose prompts are too long (task.too_long: drop); its numbers are "
            f"of the other {count - left_out} only"
        )
        data.get(setting, {})["left_out"] = left_out
    if count and left_out == count:
        raise UserError(
            f"config: every row of {setting} is too long; lower sampler.completion_length, or shorten the prompts"
        )
    return kept


def check_reward_names(task: Task, rows: Sequence[Row], config: Config) -> None:
    """Raises UserError where a stage names a reward that no row has; of several tasks each has its own."""
    named = _reward_names(config)
    if not named:
        return
    offered = sorted({name for row in rows[:ROWS_LOOKED_AT] for name in task.rewards(row, "")})
    for setting, names in named:
        try:
            unknown = sorted(name for name in set(names) - set(offered) if resolve(name) is None)
        except ValueError as error:
            raise UserError(f"config: {setting}: {error}") from None
        if unknown:
            raise UserError(
                f"config: {setting} names {unknown}, which {task.name} does not have; choices: {', '.join(offered)}; of any task: "
                f"{', '.join(NAMED)}, regex:PATTERN, length_penalty:N, my_rewards.py:function, module:function"
            )


def _reward_names(config: Config) -> list[tuple[str, list[str]]]:
    """(setting, the task's rewards that it names) of every stage that looks at rewards."""
    found = []
    for stage in config.stages:
        section = config.section_of(stage)
        if stage.kind in ("rl", "generate") or (stage.kind == "preference" and not section.data):
            names = [name for name in section.reward_weights if not name.startswith(MODEL)]
            found.append((f"{stage.name}.reward_weights", names))
        if stage.kind == "generate":
            found.append((f"{stage.name}.accept", [name for name in section.accept if not name.startswith(MODEL)]))
    return found


def target_columns(config: Config, anything: bool = False) -> int:
    """Columns of the targets of SFT stages that learn from the task's own rows, or (`anything`) also from others.

    0 where there is no such stage: RL reads no target, however long.
    """
    sections = [section for section in config.of_kind("sft") if anything or "task" in section.data]
    return max((section.completion_length or config.sampler.completion_length for section in sections), default=0)


def _completion_columns(config: Config) -> int:
    """The longest completion that a stage puts behind a training prompt."""
    sampled = config.sampler.completion_length if config.kinds & SAMPLED else 0
    return max(sampled, target_columns(config, anything=True))


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
        if stage.kind in ("adapt", "sft"):
            sizes[f"{stage.name}.batch_size"] = section.batch_size // section.grad_accumulation_steps
        if stage.kind == "reward_model":
            sizes[f"the pairs of an update of {stage.name}"] = section.batch_size // section.grad_accumulation_steps
        if stage.kind not in SAMPLED:
            continue
        if not getattr(section, "data", ""):  # stored pairs are not sampled
            sizes[f"{stage.name}.prompts_per_step x {stage.name}.num_generations"] = section.rollout_rows
            sizes[f"{stage.name}.rollout_batch_size"] = section.rows_at_a_time
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
