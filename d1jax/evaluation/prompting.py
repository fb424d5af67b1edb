"""What a benchmark's row looks like to the model: system message, worked examples, question, and how the answer begins."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from d1jax.config import UserError
from d1jax.config.benchmark import BenchmarkConfig
from d1jax.data.tokenizers import Chat, Tokenizer
from d1jax.tasks.task import Row, Task

_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Prompter:
    """Writes the prompts of one benchmark."""

    task: Task
    config: BenchmarkConfig
    shots: tuple[tuple[str, str], ...]  # (question, worked answer)

    def asked(self, row: Row) -> str:
        """The question as this benchmark puts it. Raises UserError for a field of the template that the row lacks."""
        prompt = self.task.prompt(row)
        if not self.config.template:
            return prompt
        fields = {key: value for key, value in row.items() if isinstance(value, str)} | {"prompt": prompt}

        def value(found: re.Match[str]) -> str:
            if found[1] not in fields:
                raise UserError(
                    f"template: {{{found[1]}}} is no field of this task's rows; choices: {', '.join(sorted(fields))}"
                )
            return fields[found[1]]

        return _FIELD.sub(value, self.config.template)

    def chat(self, row: Row) -> Chat:
        """The prompt as turns."""
        turns = [{"role": "system", "content": self.config.system}] if self.config.system else []
        for question, answer in self.shots:
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return [*turns, {"role": "user", "content": self.asked(row)}]

    def text(self, row: Row) -> str:
        """The prompt as one text that the model continues."""
        shown = [f"{question}\n{answer}\n\n" for question, answer in self.shots]
        return "".join(shown) + self.asked(row) + ("\n" if self.shots else "")

    def ids(self, row: Row, tokenizer: Tokenizer) -> list[int]:
        """The prompt as token ids, what the answer begins with included. Raises UserError for what cannot be written, and for a system
        message where there is no chat that it could stand in.
        """
        if self.config.system and not tokenizer.chats:
            raise UserError(
                f"system = {self.config.system!r:.60}: the checkpoint has no chat template, so the message would not reach it; leave it "
                "out (--system ''), or put it into template"
            )
        try:
            if self.config.chat and tokenizer.chats:
                ids = tokenizer.prompt(self.chat(row))
            elif tokenizer.chats:  # its prompt() would make a chat of it
                ids = tokenizer.encode(self.text(row))
            else:
                ids = tokenizer.prompt(self.text(row))
            return ids + (tokenizer.encode(self.config.prefill) if self.config.prefill else [])
        except ValueError as error:
            raise UserError(f"a prompt of task {self.task.name!r} cannot be written: {error}") from None


def choose_shots(task: Task, config: BenchmarkConfig, rows: Sequence[Row], test: Sequence[Row]) -> Prompter:
    """The `Prompter` with config.few_shot worked examples: rows with a target, chosen by the seed, none of them a test problem or posed
    twice.

    Raises UserError where there are not so many.
    """
    if not config.few_shot:
        return Prompter(task, config, ())
    posed = {task.problem_key(row) for row in test}
    plain = Prompter(task, config, ())
    order = np.random.default_rng(config.seed).permutation(len(rows))
    shots: list[tuple[str, str]] = []
    for place in order:
        row = rows[place]
        target, problem = task.target(row), task.problem_key(row)
        if target is not None and problem not in posed:
            shots.append((plain.asked(row), target))
            posed.add(problem)
        if len(shots) == config.few_shot:
            return Prompter(task, config, tuple(shots))
    raise UserError(
        f"few_shot = {config.few_shot}: of {len(rows)} rows for worked examples only {len(shots)} have a worked answer and are no test "
        "problem; lower it, or name other rows with --shots"
    )
