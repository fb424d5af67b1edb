"""Anybody's own rows: a JSONL file with prompts and answers, in the forms that TRL's datasets have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn

from d1jax.tasks.answers import check_style
from d1jax.tasks.grading.offers import offer, two_blocks
from d1jax.tasks.reward_functions import NAMED, call, resolve
from d1jax.tasks.task import DataError, Row

Prompt = str | list[dict[str, str]]
KNOWN = ("prompt", "messages", "completion", "answer", "text", "chosen", "rejected", "completions", "label", "labels")
FORM = '{"prompt": "...", "answer": "..."}, {"prompt": "...", "completion": "..."}, {"messages": [...]} or another of TRL\'s types'


@dataclass(frozen=True)
class Rows:
    """Rows of the user's own.

    Fields: `fields`, which of the file's names stand for prompt, answer, ... ({question: prompt, gold: answer}); `judge`, the reward
    that decides what is right (exact, number, math, boxed, regex:PATTERN, my_rewards.py:function; "none" judges nothing); `style` and
    `split_seed` are there as in every task: prompts are taken as they are.
    """

    name: ClassVar[str] = "jsonl"
    alphabet: ClassVar[str] = "".join(map(chr, range(32, 127))) + "\n\t"
    columns: ClassVar[None] = None
    unique_field: ClassVar[str] = "id"

    style: str = "bare"
    split_seed: int = 0
    fields: Mapping[str, str] = field(default_factory=dict)
    judge: str = "exact"

    def __post_init__(self) -> None:
        check_style(self.name, self.style)
        if not isinstance(self.fields, Mapping) or not all(
            isinstance(x, str) for pair in self.fields.items() for x in pair
        ):
            raise ValueError(f"jsonl: fields = {self.fields!r:.60}: write {{question: prompt, gold: answer}}")
        unknown = sorted(set(self.fields.values()) - set(KNOWN))
        if unknown:
            raise ValueError(f"jsonl: fields maps to {unknown[0]!r}; choices: {', '.join(KNOWN)}")
        if not isinstance(self.judge, str):
            raise ValueError(f"jsonl: judge = {self.judge!r:.60}: write a name, e.g. exact")
        if self.judge != "none" and resolve(self.judge) is None:
            raise ValueError(
                f"jsonl: judge = {self.judge!r} is not one of {', '.join(NAMED)}, none, regex:PATTERN, my_rewards.py:function"
            )

    def generate(self, split: str, count: int, seed: int) -> NoReturn:
        """Always raises ValueError."""
        raise ValueError("jsonl: rows cannot be generated; name a file, e.g. task.train: rows.jsonl")

    def parse(self, record: dict[str, Any], where: str) -> Row:
        """Reads one of TRL's types, standard or conversational, or {prompt, answer}; other fields stay, for reward functions.

        prompt: a text or messages; completion, chosen, rejected: a text or messages; messages: a conversation, whose last turn of the
        assistant is the completion; text: a completion without a prompt; completions + labels: steps, of which the right ones are
        the completion. Raises DataError.
        """
        record = {self.fields.get(key, key): value for key, value in record.items()}
        record = _ranked(record, where)
        prompt, completion = self._asked(record, where)
        answer = record.get("answer")
        if answer is not None and (
            isinstance(answer, bool) or not isinstance(answer, str | int | float) or answer != answer
        ):
            raise DataError(f"{where}: answer = {answer!r:.60}: write a text or a number")
        if isinstance(answer, str) and not answer.strip():
            raise DataError(
                f"{where}: answer is blank, so that an empty text would be right; write one, or leave the field out"
            )
        row = {key: value for key, value in record.items() if key not in ("messages", "text", "completions", "prompt")}
        row |= {"prompt": prompt, "completion": completion}
        row |= {
            key: _said(record[key], f"{where}: {key}") for key in ("chosen", "rejected") if record.get(key) is not None
        }
        if isinstance(record.get("completions"), list):
            row["steps"] = _steps(record, where)
        if isinstance(record.get("label"), bool) and "completion" in record:
            row["labelled"] = _said(record["completion"], f"{where}: completion")
        if answer is not None:
            row["answer"] = str(answer)
        return row

    def _asked(self, record: dict[str, Any], where: str) -> tuple[Prompt, str | None]:
        """(prompt, completion or None) of a record of any type."""
        if "messages" in record:
            turns = _turns(record["messages"], f"{where}: messages")
            if turns[-1]["role"] != "assistant":
                return turns, None
            if len(turns) == 1:
                raise DataError(f"{where}: messages: has one turn of the assistant and nothing that asks for it")
            return turns[:-1], turns[-1]["content"]
        if "text" in record and "prompt" not in record:
            return "", _text(record["text"], f"{where}: text")
        name = "completion" if "completion" in record else "chosen"
        chosen = record.get(name)
        if "prompt" not in record:
            if isinstance(chosen, list):  # TRL's implicit prompt: what both have in front
                turns = _turns(chosen, f"{where}: chosen")
                return turns[:-1], turns[-1]["content"]
            raise DataError(f"{where}: has no prompt among {', '.join(record)[:80] or '(nothing)'}; a row is {FORM}")
        prompt = record["prompt"]
        prompt = _turns(prompt, f"{where}: prompt") if isinstance(prompt, list) else _text(prompt, f"{where}: prompt")
        if not prompt:
            raise DataError(f"{where}: prompt is empty; write what the model is asked")
        if isinstance(record.get("completions"), list) and isinstance(record.get("labels"), list):
            return prompt, "\n".join(step for step, right in _steps(record, where) if right) or None
        if "label" in record and not isinstance(record["label"], bool):
            raise DataError(f"{where}: label = {record['label']!r:.40}: write true or false")
        if record.get("label") is False:  # unpaired preference: what was not wanted is not taught
            return prompt, None
        if isinstance(chosen, list):
            chosen = _turns(chosen, f"{where}: {name}")[-1]["content"]
        return prompt, None if chosen is None else _text(chosen, f"{where}: {name}")

    def prompt(self, row: Row) -> Prompt:
        return row["prompt"]

    def target(self, row: Row) -> str | None:
        """The completion; None where the row has none."""
        return row["completion"]

    def pair(self, row: Row) -> tuple[str | None, str | None]:
        """(the better text, the worse one) of a row of preferences: chosen and rejected, or a completion and its label; None: not there."""
        if "labelled" in row:
            return (row["labelled"], None) if row["label"] else (None, row["labelled"])
        return row.get("chosen"), row.get("rejected")

    def steps(self, row: Row) -> list[tuple[str, bool]]:
        """The steps of a row of TRL's stepwise type, and whether each is right; [] for another row."""
        return row.get("steps", [])

    def rewards(self, row: Row, text: str) -> dict[str, float | None]:
        return self.rewards_many([row], [text])[0]

    def rewards_many(self, rows: Sequence[Row], texts: Sequence[str]) -> list[dict[str, float | None]]:
        """`solved`, as the judge says (None: it does not apply), and `format`: one reasoning block, then one answer block."""
        return [
            {"solved": value, "format": float(two_blocks(text))}
            for value, text in zip(self._judged(rows, texts), texts, strict=True)
        ]

    def grade(self, row: Row, text: str) -> dict[str, float]:
        return self.grade_many([row], [text])[0]

    def grade_many(self, rows: Sequence[Row], texts: Sequence[str]) -> list[dict[str, float]]:
        """`solved`: the judge's value is 1 or more; `score`: its value; `format` as in rewards. What does not apply is 0."""
        return [
            {"solved": float((value or 0.0) >= 1.0), "score": float(value or 0.0), "format": float(two_blocks(text))}
            for value, text in zip(self._judged(rows, texts), texts, strict=True)
        ]

    def _judged(self, rows: Sequence[Row], texts: Sequence[str]) -> list[float | None]:
        function = None if self.judge == "none" else resolve(self.judge)
        if function is None or not rows:
            return [None] * len(rows)
        places = [place for place, row in enumerate(rows) if self.has_reference(row)]
        found: list[float | None] = [None] * len(rows)
        if places:
            asked = [_asked_text(rows[place]["prompt"]) for place in places]
            try:
                values = call(self.judge, function, asked, [texts[i] for i in places], [rows[i] for i in places])
            except DataError:
                raise
            except Exception as error:  # a user's own function
                raise DataError(
                    f"judge {self.judge!r}, {len(places)} texts: {type(error).__name__}: {error}; mend the function, or let it return None "
                    "for a text that it cannot judge"
                ) from error
            for place, value in zip(places, values, strict=True):
                found[place] = value
        return found

    def offer(self, row: Row, text: str) -> str | None:
        found = offer(text)
        return (found.text if found else text).strip() or None

    def has_reference(self, row: Row) -> bool:
        """Whether the judge can say anything: exact, number and math need an answer, the others none."""
        return self.judge not in ("exact", "number", "math") or "answer" in row

    def problem_key(self, row: Row) -> str:
        return " ".join(_asked_text(row["prompt"]).split()).casefold() or (row["completion"] or "")

    def solution_key(self, row: Row) -> None:
        return None

    def baselines(self, row: Row) -> dict[str, str]:
        return {"empty": ""}


def _ranked(record: dict[str, Any], where: str) -> dict[str, Any]:
    """NeMo's ranked completions, {context, completions: [{rank, completion}]}, as prompt, chosen and rejected: best and worst rank."""
    ranked = record.get("completions")
    if not (isinstance(ranked, list) and ranked and all(isinstance(one, Mapping) and "rank" in one for one in ranked)):
        return record
    if len(ranked) < 2 or not all(isinstance(one["rank"], int) and "completion" in one for one in ranked):
        raise DataError(
            f"{where}: completions: write two or more of {{rank: 0, completion: ...}}, ranks being whole numbers"
        )
    best, worst = min(ranked, key=lambda one: one["rank"]), max(ranked, key=lambda one: one["rank"])
    if best["rank"] == worst["rank"]:
        raise DataError(f"{where}: completions: all have rank {best['rank']}, so none is better")
    rest = {key: value for key, value in record.items() if key not in ("context", "completions")}
    prompt = record.get("prompt", record.get("context"))
    return {**rest, "prompt": prompt, "chosen": best["completion"], "rejected": worst["completion"]}


def _steps(record: Mapping[str, Any], where: str) -> list[tuple[str, bool]]:
    """TRL's stepwise type, {completions: [text, ...], labels: [true, ...]}, as (text, right) pairs. Raises DataError."""
    texts, labels = record["completions"], record.get("labels")
    if not texts or not isinstance(labels, list) or len(labels) != len(texts):
        count = len(labels) if isinstance(labels, list) else "no"
        raise DataError(
            f"{where}: completions has {len(texts)} steps and labels {count} labels; write one true or false a step"
        )
    if not all(isinstance(label, bool) or label in (0, 1) for label in labels):
        raise DataError(f"{where}: labels = {labels!r:.60}: write true or false for each step")
    steps = [_text(text, f"{where}: completions") for text in texts]
    blank = next((place for place, text in enumerate(steps) if not text.strip()), None)
    if blank is not None:
        raise DataError(f"{where}: completions: step {blank} is blank; take it out, and its label")
    return list(zip(steps, map(bool, labels), strict=True))


def _said(value: Any, where: str) -> str:
    """A text, or the last turn of a conversation."""
    return _turns(value, where)[-1]["content"] if isinstance(value, list) else _text(value, where)


def _asked_text(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(turn["content"] for turn in prompt)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(
            f"{where} = {value!r:.60}: a text was expected; write it as a JSON string, or give the field another name where it means "
            "something else"
        )
    return value


def _turns(value: Any, where: str) -> list[dict[str, str]]:
    """A conversation: [{"role": ..., "content": ...}, ...]. Raises DataError."""
    whole = isinstance(value, list) and value and all(isinstance(turn, Mapping) for turn in value)
    if not whole or not all(isinstance(turn.get(key), str) for turn in value for key in ("role", "content")):
        raise DataError(f'{where} = {value!r:.60}: write messages, [{{"role": "user", "content": "..."}}, ...]')
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]
