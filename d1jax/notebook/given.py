"""A policy in memory and rows that were given, as what the training loops work with: a checked configuration, a task, token arrays."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from d1jax.config import (
    Config,
    LoraConfig,
    SamplerConfig,
    TaskConfig,
    UserError,
)
from d1jax.config.check import check
from d1jax.config.no_effect import Command, no_effect, unread, without_unread
from d1jax.config.setting import value_at
from d1jax.config.stored import section_from
from d1jax.config.values import plain
from d1jax.data.rows import read_rows
from d1jax.inference.policy import Policy, default_sampler
from d1jax.models.transformer import Transformer
from d1jax.tasks.task import Row
from d1jax.training.context import Context, assemble, check_reward_names
from d1jax.training.setup import Setup, make_task

Pairs = Sequence[tuple[str, str]]  # (prompt, answer)
Data = TaskConfig | Pairs | Sequence[str] | Sequence[Mapping[str, Any]]
Judged = Callable[[Row, str], float | Mapping[str, float]]
NO_ADAPTER = LoraConfig()
TO_LEARN = "to learn from; give (prompt, answer) pairs"


@dataclass(frozen=True)
class GivenTask:
    """Rows and a judge as a task."""

    judged: Judged
    name: str = "given"
    columns: None = None

    def prompt(self, row: Row) -> str:
        return row["prompt"]

    def target(self, row: Row) -> str | None:
        return row.get("answer")

    def has_reference(self, row: Row) -> bool:
        return True  # a judge of the user's needs none; where there is no judge, `context_of` looks

    def problem_key(self, row: Row) -> str:
        return self.prompt(row)

    def rewards(self, row: Row, text: str) -> dict[str, float]:
        value = self.judged(row, text)
        named = value if isinstance(value, Mapping) else {"solved": value}
        return {name: float(one) for name, one in named.items()}  # numpy's and jax's numbers too

    def grade(self, row: Row, text: str) -> dict[str, float]:
        """The judge's grades. Raises UserError for what is none: a mean over texts would hide it."""
        place = f"grade of row {row['prompt'][:60]!r}"
        try:
            grades = self.rewards(row, text)
        except (TypeError, ValueError) as error:
            raise UserError(f"{place}: {error}; return a number in [0, 1], or {{name: number}}") from error
        wrong = [f"{name} = {value}" for name, value in grades.items() if not 0 <= value <= 1]
        if wrong:
            raise UserError(f"{place}: {', '.join(wrong)} is not in [0, 1]")
        if "solved" not in grades:
            raise UserError(
                f"{place} has no 'solved', only {sorted(grades)}; return it beside them, 1 for a right text"
            )
        return grades


def is_the_answer(row: Row, text: str) -> float:
    return float(text.strip() == row["answer"].strip())


def with_answers(rows: list[Row], cure: str) -> list[Row]:
    for index, row in enumerate(rows):
        if "answer" not in row:
            raise UserError(f"data: row {index}, {row['prompt'][:60]!r}, has no answer {cure}")
    return rows


def rows_of(data: Any) -> list[Row]:
    if hasattr(data, "columns") and hasattr(data, "to_dict"):  # iterating over a table gives the names of its columns
        raise UserError('data: a table is no list of rows; give table.to_dict("records")')
    data = list(data) if isinstance(data, Iterable) and not isinstance(data, str | Mapping) else []
    if not data:
        raise UserError("data: give a list of prompts, (prompt, answer) pairs or rows, at least one")
    rows = []
    for index, one in enumerate(data):
        row = {"prompt": one} if isinstance(one, str) else one
        if isinstance(row, tuple | list) and len(row) == 2:
            row = {"prompt": row[0], "answer": row[1]}
        texts = isinstance(row, Mapping) and [row.get("prompt"), row.get("answer", "")]
        if not texts or not all(isinstance(text, str) for text in texts) or not texts[0]:
            raise UserError(f'data: row {index} is no prompt, (prompt, answer) or mapping with a text as "prompt"')
        rows.append(dict(row))
    return rows


def setup_of(
    policy: Policy, stages: tuple[str, ...], data: Any = None, *, sampler: SamplerConfig | None = None, **sections: Any
) -> Setup:
    """A policy in memory as what a run stands on, with a configuration that is checked like one of a file. No stages: it is evaluated.

    Raises UserError for a setting of another type or choice, for impossible combinations, and for one that has no effect.
    """
    given = {"sampler": sampler, "task": data if isinstance(data, TaskConfig) else None, **sections}
    given = {name: section for name, section in given.items() if dataclasses.is_dataclass(section)}
    # Built anew from plain values, so that types are checked, and the name of a choice may stand for it.
    given = {name: section_from(type(section), plain(section), name) for name, section in given.items()}
    adapted = given.get("lora", NO_ADAPTER).rank > 0
    # All weights are trained in fp32, whatever they are stored in: bf16 would round small updates away.
    stored = dataclasses.replace(policy.config, param_dtype="float32") if stages and not adapted else policy.config
    default = {"sampler": policy.sampler or default_sampler(policy.config)}
    config = Config(init_from="a policy in memory", stages=stages or ("sft",), model=stored, **{**default, **given})
    command: Command = "train" if stages else "evaluate"
    check(config, command)
    for name, reader in unread(config, command).items():
        if name.partition(".")[0] in given:
            raise UserError(no_effect(f"{name} = {value_at(config, name)}", reader))
    config = check(without_unread(config, command), command)
    model = Transformer(stored, config.lora) if stages else policy.model
    return Setup(config, policy.mesh, model, policy.tokenizer)


def context_of(
    setup: Setup,
    data: TaskConfig | list[Row],
    judged: Judged | None,
    log: Callable[[str], None] | None = None,
    training: bool = True,
) -> Context:
    """The setup with rows: those of a task, read as a run would read them, or those that were given.

    No evaluation runs during training here, so it gets no evaluation sets.
    """
    log = log or to_stderr
    if isinstance(data, TaskConfig):
        if judged is not None:
            raise UserError(
                f"reward= or grade= beside task {data.name!r}, which judges its rows itself; leave it out, or give the rows"
            )
        task = make_task(data)
        train_rows, eval_rows, identity = read_rows(task, setup.config, log, training)
        if training:
            check_reward_names(task, train_rows, setup.config)
        eval_rows = {} if training else dict(list(eval_rows.items())[:1])
        return assemble(setup, task, train_rows, eval_rows, identity, log, training)
    if judged is None and (not training or "rl" in setup.config.kinds):
        with_answers(data, "to compare with; give reward= or grade=")
    given = GivenTask(judged or is_the_answer)
    train_rows, eval_rows = (data, {}) if training else ([], {"given": data})
    return assemble(setup, given, train_rows, eval_rows, {}, log, training)


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr)
