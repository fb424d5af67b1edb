"""MATH: competition problems whose answer is a formula, compared by what it is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

from d1jax.tasks.answers import check_style
from d1jax.tasks.blocks import two_blocks
from d1jax.tasks.grading import d1_rules
from d1jax.tasks.grading.equivalence import equivalent_many, normal_form
from d1jax.tasks.grading.offers import last_box, offer
from d1jax.tasks.task import DataError, Row

INSTRUCTIONS = """\
Solve the problem below. Work step by step between <reasoning> and </reasoning>. Then write the final answer, as \\boxed{{...}} and \
nothing else, between <answer> and </answer>. Put each tag on a line of its own.

{problem}"""


@dataclass(frozen=True)
class Maths:
    """Competition problems with an answer in LaTeX.

    Fields: `style` "bare" (the problem alone) or "instruct" (with tags and a box for the answer); `split_seed` is there as in
    every task, and unused: nothing is generated.
    """

    name: ClassVar[str] = "math"
    alphabet: ClassVar[str] = "".join(map(chr, range(32, 127))) + "\n"
    columns: ClassVar[None] = None

    style: str = "instruct"
    split_seed: int = 0

    def __post_init__(self) -> None:
        check_style(self.name, self.style)

    def generate(self, split: str, count: int, seed: int) -> NoReturn:
        """Always raises ValueError."""
        raise ValueError(
            "math: rows cannot be generated; name a file or a hub dataset, e.g. hub:HuggingFaceH4/MATH-500:test"
        )

    def parse(self, record: dict[str, Any], where: str) -> Row:
        """Reads {problem or question, answer?, solution?}; the answer is that of the row, or else the last box of its solution.

        A row whose answer is blank (two of MATH's training rows have an empty box) has no reference. Raises DataError for a row
        without a problem, or with neither answer nor solution.
        """
        problem = record.get("problem", record.get("question"))
        if not isinstance(problem, str) or not problem.strip():
            raise DataError(
                f'{where}: problem = {problem!r:.60}: write {{"problem": "...", "solution": "... \\\\boxed{{5}}"}}'
            )
        solution, answer = record.get("solution"), record.get("answer")
        if isinstance(answer, int | float) and not isinstance(answer, bool):
            answer = repr(answer)
        if (
            not isinstance(answer, str | None)
            or not isinstance(solution, str | None)
            or (answer, solution) == (None, None)
        ):
            raise DataError(f"{where}: needs a text as answer, or a solution with a \\boxed{{...}}")
        if not (answer or "").strip():
            answer = last_box(solution or "") or ""
        return {"problem": problem.strip(), "solution": solution, "answer": answer.strip()}

    def from_stored(self, record: dict[str, Any], where: str) -> Row:
        """The row of a stored generation: {question, ground_truth} (d1) or {prompt, answer}. Raises DataError."""
        answer = record.get("ground_truth", record.get("answer"))
        return self.parse({"problem": record.get("question", record.get("prompt")), "answer": answer}, where)

    def prompt(self, row: Row) -> str:
        return row["problem"] if self.style == "bare" else INSTRUCTIONS.format(problem=row["problem"])

    def target(self, row: Row) -> str | None:
        """The solution in its tags, then the box in answer tags (bare: the solution); None where the row lacks one."""
        if row["solution"] is None or not row["answer"]:
            return None
        if self.style == "bare":
            return row["solution"]
        boxed = "\\boxed{" + row["answer"] + "}"
        return f"<reasoning>\n{row['solution'].strip()}\n</reasoning>\n<answer>\n{boxed}\n</answer>"

    def rewards(self, row: Row, text: str) -> dict[str, float]:
        """`rewards_many` of one text."""
        return self.rewards_many([row], [text])[0]

    def rewards_many(self, rows: Sequence[Row], texts: Sequence[str]) -> list[dict[str, float]]:
        """`solved`; `format` (one reasoning block, then one answer block); `boxed` (a closed box that holds something); and d1's two.

        `d1_math_correct`: 2.0 where d1's normaliser makes the last box equal to the answer. `d1_boxed_format`: 1.00 with answer
        tags and a box in them, 0.75 with tags, 0.50 with a box alone, 0.25 without either.

        Source: d1, arXiv 2504.12216, its table of MATH's rewards.
        Differs from the released code: there the box is never found (its backslash is not escaped), so that 0.75 or 0.25 come out.
        """
        return [
            {
                "solved": grade["solved"],
                "format": grade["format"],
                "boxed": float(last_box(text) is not None),
                "d1_math_correct": 2.0 * d1_rules.math_correct(text, row["answer"]),
                "d1_boxed_format": _boxed_format(text),
            }
            for row, text, grade in zip(rows, texts, self.grade_many(rows, texts), strict=True)
        ]

    def grade(self, row: Row, text: str) -> dict[str, float]:
        """`grade_many` of one text."""
        return self.grade_many([row], [text])[0]

    def grade_many(self, rows: Sequence[Row], texts: Sequence[str]) -> list[dict[str, float]]:
        """`solved`: what is offered is worth the row's answer; `answered`: something is offered; `format` as in `rewards_many`;
        `undecided`: math-verify took too long or its process died, and the text counts as wrong.

        All texts share the pool of processes, so many at once are faster. docs/graders.md says what is equal.
        """
        offered = [offer(text) for text in texts]
        asked = [place for place, found in enumerate(offered) if found is not None and rows[place]["answer"]]
        equal = dict(zip(asked, equivalent_many((rows[i]["answer"], offered[i].text) for i in asked), strict=True))
        return [
            {
                "solved": float(bool(equal.get(place))),
                "answered": float(found is not None),
                "format": float(two_blocks(texts[place])),
                "undecided": float(equal.get(place, False) is None),
            }
            for place, found in enumerate(offered)
        ]

    def offer(self, row: Row, text: str) -> str | None:
        """The answer offered, in one spelling of its layout; None where there is none."""
        found = offer(text)
        return normal_form(found.text) if found else None

    def has_reference(self, row: Row) -> bool:
        return bool(row["answer"])

    def problem_key(self, row: Row) -> str:
        """The problem, whatever its spacing."""
        return " ".join(row["problem"].split())

    def solution_key(self, row: Row) -> None:
        return None

    def baselines(self, row: Row) -> dict[str, str]:
        """`two`: 2, the most frequent answer of MATH's training rows."""
        return {"two": "<answer>\n\\boxed{2}\n</answer>"}


def _boxed_format(text: str) -> float:
    inside = text.rpartition("<answer>")[2].partition("</answer>") if "<answer>" in text else ("", "", "")
    if inside[1]:
        return 1.0 if "\\boxed" in inside[0] else 0.75
    return 0.5 if "\\boxed" in text else 0.25
