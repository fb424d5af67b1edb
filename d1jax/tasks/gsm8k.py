"""GSM8K: grade-school word problems whose answer is a number."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, NoReturn

from d1jax.tasks.answers import as_answer, check_style
from d1jax.tasks.blocks import two_blocks
from d1jax.tasks.grading import d1_rules
from d1jax.tasks.grading.numbers import final_number, read_number
from d1jax.tasks.grading.offers import offer
from d1jax.tasks.task import DataError, Row

INSTRUCTIONS = """\
Solve the word problem below. Work step by step between <reasoning> and </reasoning>. Then write the final number, and nothing \
else, between <answer> and </answer>. Put each tag on a line of its own.

{question}"""
_CALCULATOR = re.compile(r"<<[^<>\n]*>>")  # GSM8K's marks for a calculator, as in 3*4=<<3*4=12>>12


@dataclass(frozen=True)
class Gsm8k:
    """Word problems, answered by a number.

    Fields: `style` "bare" (the question alone) or "instruct" (with tags for reasoning and answer); `split_seed` is there as in
    every task, and unused: nothing is generated.
    """

    name: ClassVar[str] = "gsm8k"
    alphabet: ClassVar[str] = "".join(map(chr, range(32, 127))) + "\n"
    columns: ClassVar[None] = None

    style: str = "instruct"
    split_seed: int = 0

    def __post_init__(self) -> None:
        check_style(self.name, self.style)

    def generate(self, split: str, count: int, seed: int) -> NoReturn:
        """Always raises ValueError."""
        raise ValueError("gsm8k: rows cannot be generated; name a file or a hub dataset, e.g. hub:openai/gsm8k/main")

    def parse(self, record: dict[str, Any], where: str) -> Row:
        """Reads {question, answer}, the answer being a worked solution that ends with "#### number", or the number alone.

        Raises DataError for a row without a question, or whose answer states no number.
        """
        question = record.get("question")
        if not isinstance(question, str) or not question.strip():
            raise DataError(
                f'{where}: question = {question!r:.60}: write {{"question": "...", "answer": "... #### 18"}}'
            )
        answer = record.get("answer")
        if isinstance(answer, int | float) and not isinstance(answer, bool):
            answer = repr(answer)
        if not isinstance(answer, str):
            raise DataError(
                f"{where}: answer = {answer!r:.60}: write the solution as a text that ends with #### 18, or the number"
            )
        worked, marked, final = answer.rpartition("####")
        if read_number(final) is None:
            raise DataError(
                f"{where}: answer ends with {final.strip()[-60:]!r}, which is no number; end it with #### 18"
            )
        solution = _CALCULATOR.sub("", worked).strip() if marked else None
        return {"question": question.strip(), "solution": solution, "answer": final.strip()}

    def from_stored(self, record: dict[str, Any], where: str) -> Row:
        """The row of a stored generation: {question, ground_truth} (d1) or {prompt, answer}. Raises DataError.

        A ground_truth that is null, as d1 writes it for negative numbers, has no reference: no text is right.
        """
        question = record.get("question", record.get("prompt"))
        if record.get("ground_truth", 0) is None and isinstance(question, str):
            return {"question": question.strip(), "solution": None, "answer": ""}
        answer = record.get("ground_truth", record.get("answer"))
        return self.parse({"question": question, "answer": answer}, where)

    def prompt(self, row: Row) -> str:
        return row["question"] if self.style == "bare" else INSTRUCTIONS.format(question=row["question"])

    def target(self, row: Row) -> str | None:
        """The worked solution in its tags, then the number in answer tags (bare: the solution and "#### number"); None where the
        row has no solution.
        """
        if row["solution"] is None:
            return None
        if self.style == "bare":
            return f"{row['solution']}\n#### {row['answer']}"
        return f"<reasoning>\n{row['solution']}\n</reasoning>\n{as_answer(row['answer'], 'instruct')}"

    def rewards(self, row: Row, text: str) -> dict[str, float]:
        """`solved` and `format` (one reasoning block, then one answer block), and d1's five, faults included, under names that
        begin with d1: they add up to d1's reward of GSM8K.

        `d1_correct` 2.0 where the answer equals the row's letter by letter (18.0 is not 18); `d1_integer` 0.5 where it is all
        digits; `d1_strict_format`, `d1_soft_format` 0.5 each; `d1_xml_count` up to 0.5, and below 0 for what follows the tags.

        Source: d1, arXiv 2504.12216, its released reward functions (`grading/d1_rules.py`).
        """
        answer = d1_rules.reward_answer(text)
        return {
            "solved": self.grade(row, text)["solved"],
            "format": float(two_blocks(text)),
            "d1_correct": 2.0 * (answer == row["answer"]),
            "d1_integer": 0.5 * answer.isdigit(),
            "d1_strict_format": d1_rules.strict_format(text),
            "d1_soft_format": d1_rules.soft_format(text),
            "d1_xml_count": d1_rules.xml_count(text),
        }

    def grade(self, row: Row, text: str) -> dict[str, float]:
        """`solved`: the number offered is the row's, exactly; `answered`: a number is offered; `format` as in `rewards`.

        docs/graders.md says where an answer may stand and which spellings are one number.
        """
        value = final_number(text)
        solved = value is not None and value == _value(row["answer"])
        return {"solved": float(solved), "answered": float(value is not None), "format": float(two_blocks(text))}

    def offer(self, row: Row, text: str) -> str | None:
        """The number offered, in one spelling; None where there is none."""
        value = final_number(text)
        if value is None:
            return offer(text).text[:100] if offer(text) else None
        return str(value)

    def has_reference(self, row: Row) -> bool:
        return row["answer"] != ""

    def problem_key(self, row: Row) -> str:
        """The question, whatever its spacing and capitals."""
        return " ".join(row["question"].split()).casefold()

    def solution_key(self, row: Row) -> None:
        return None

    def baselines(self, row: Row) -> dict[str, str]:
        """`last_number`: the last number of the question, or 1."""
        numbers = re.findall(r"\d+", row["question"])
        return {"last_number": as_answer(numbers[-1] if numbers else "1", "instruct")}


def _value(answer: str) -> Fraction | None:
    return read_number(answer)
