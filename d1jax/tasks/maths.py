r"""MATH: competition problems whose answer is a formula in a box, in the layout of the published files (MATH, MATH-500).

Whether two formulas are worth the same is asked of math-verify, in processes that may hang or die (grading/equivalence.py);
judging many texts in one call is what they are for. docs/graders.md says which passage of a text is its answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

from d1jax.tasks.answers import as_answer, check_style
from d1jax.tasks.grading import d1_rules
from d1jax.tasks.grading.equivalence import check_installed, equivalent_many, normal_form
from d1jax.tasks.grading.offers import last_box, offer, two_blocks
from d1jax.tasks.grading.stored import completion_of, given_text
from d1jax.tasks.task import DataError, Row

INSTRUCTIONS = """\
Solve the problem below. Work it out step by step between <reasoning> and </reasoning>. Then write the final answer in a \
\\boxed{{}} between <answer> and </answer>.

{problem}"""


@dataclass(frozen=True)
class Maths:
    """MATH, and other problems whose answer is a formula or a short text.

    Fields: `style` "bare" (the problem alone) or "instruct" (what to write in which tags, then the problem); texts are judged
    alike in both. `split_seed` is there as in every task, and unused: nothing is generated.
    """

    name: ClassVar[str] = "math"
    alphabet: ClassVar[str] = "".join(map(chr, range(32, 127))) + "\n"  # see Traces
    columns: ClassVar[None] = None

    style: str = "instruct"
    split_seed: int = 0

    def __post_init__(self) -> None:
        """Raises DataError where math-verify is not installed: now, and not after hours."""
        check_style(self.name, self.style)
        check_installed()

    def generate(self, split: str, count: int, seed: int) -> NoReturn:
        """Always raises ValueError."""
        raise ValueError(
            "math: rows cannot be generated; name a file or a hub dataset, e.g. task.train: hub:DigitalLearningGmbH/MATH-lighteval"
        )

    def parse(self, record: dict[str, Any], where: str) -> Row | None:
        r"""Reads {problem, solution?, answer?} as a row of the three, of which the last two may be None. Without `answer`, the last
        box of the solution is it.

        Left out is a row whose `answer` is blank or whose solution has only empty boxes (lines 5342 and 5344 of MATH's training file):
        no text can be compared with that.
        """
        problem = given_text(record, "problem", where, 'a row is {"problem": "...", "solution": "... \\\\boxed{18}"}')
        solution, answer = record.get("solution"), record.get("answer")
        if isinstance(answer, int | float) and not isinstance(answer, bool):
            answer = str(answer)
        for key, value in (("solution", solution), ("answer", answer)):
            if not isinstance(value, str | None):
                raise DataError(f"{where}: {key} = {value!r:.60}: a text was expected; write it as a JSON string")
        told = answer if answer is not None else last_box(solution or "")
        if (told is not None and not told.strip()) or (told is None and "\\boxed" in (solution or "")):
            return None
        return {"problem": problem, "solution": solution, "answer": None if told is None else told.strip()}

    def from_stored(self, record: dict[str, Any], where: str) -> Row:
        """The row of a stored generation: {question, ground_truth, generations} or {prompt, answer, completion}. Raises DataError."""
        problem, told, _ = completion_of(record, where)
        if isinstance(told, int | float) and not isinstance(told, bool):
            told = str(told)
        if not isinstance(told, str | None):
            raise DataError(
                f"{where}: the stored answer = {told!r:.60}: a text was expected; write it as a JSON string"
            )
        return {"problem": problem, "solution": None, "answer": (told or "").strip() or None}

    def prompt(self, row: Row) -> str:
        return row["problem"] if self.style == "bare" else INSTRUCTIONS.format(problem=row["problem"])

    def target(self, row: Row) -> str | None:
        """instruct: the worked solution in reasoning tags, then the box in answer tags. bare: the solution, whose box is the answer;
        it gets one where it has none. None where the row lacks a solution or an answer.
        """
        if not row["solution"] or row["answer"] is None:
            return None
        boxed = f"\\boxed{{{row['answer']}}}"
        if self.style == "bare":
            return row["solution"] if last_box(row["solution"]) else f"{row['solution']}\n{boxed}"
        return f"<reasoning>\n{row['solution']}\n</reasoning>\n{as_answer(boxed, self.style)}"

    def offer(self, row: Row, text: str) -> str | None:
        """The answer that the text states, in one spelling, for majority votes; None where it states none."""
        return normal_form(_offered(text)) or None

    def rewards(self, row: Row, text: str) -> dict[str, float]:
        """One row of `rewards_many`."""
        return self.rewards_many([row], [text])[0]

    def rewards_many(self, rows: Sequence[Row], texts: Sequence[str]) -> list[dict[str, float]]:
        r"""`solved` as in `grade`. `format`: one reasoning block and then one answer block, nothing else. `boxed`: the last answer
        tags hold a closed box.

        `d1_math_correct`: 2 where d1's normaliser makes the last box and the reference one text; without any box the whole text
        is compared. `d1_boxed_format`: 1.00 for a box in the answer tags, 0.75 for the tags alone, 0.50 for a box alone, 0.25 for
        neither.
        Differs from the released code: that table is the paper's; a fault in the code (`\b` is read as a backspace) never sees a box
        and gives 0.75 or 0.25 only, and half a point more or less is not what either says.
        """
        return [
            {
                "solved": grade["solved"],
                "format": float(two_blocks(text)),
                "boxed": float(d1_rules.boxed_format(text) == 1.0),
                "d1_math_correct": 2.0 * (row["answer"] is not None and d1_rules.math_reward(text, row["answer"])),
                "d1_boxed_format": d1_rules.boxed_format(text),
            }
            for row, text, grade in zip(rows, texts, self.grade_many(rows, texts), strict=True)
        ]

    def grade(self, row: Row, text: str) -> dict[str, float]:
        """One row of `grade_many`."""
        return self.grade_many([row], [text])[0]

    def grade_many(self, rows: Sequence[Row], texts: Sequence[str]) -> list[dict[str, float]]:
        """`solved`: the answer that the text states is worth the row's; 0.0 where the row has none. `answered`: it states one.
        `undecided`: math-verify did not say in its time limit, and the answer counts as wrong.
        """
        offered = [_offered(text) for text in texts]
        told = equivalent_many(
            [(row["answer"] or "", offer if row["answer"] else "") for row, offer in zip(rows, offered, strict=True)]
        )
        return [
            {"solved": float(equal is True), "answered": float(offer != ""), "undecided": float(equal is None)}
            for equal, offer in zip(told, offered, strict=True)
        ]

    def has_reference(self, row: Row) -> bool:
        return row["answer"] is not None

    def problem_key(self, row: Row) -> str:
        """The problem, whatever its spacing. Capitals matter: $n$ and $N$ may be two things."""
        return " ".join(row["problem"].split())

    def solution_key(self, row: Row) -> str | None:
        return None

    def baselines(self, row: Row) -> dict[str, str]:
        """`empty`: nothing. `two`: 2, the answer that MATH gives most often."""
        return {"empty": "", "two": as_answer("\\boxed{2}", "instruct")}


def _offered(text: str) -> str:
    found = offer(text)
    return "" if found is None else found.text
