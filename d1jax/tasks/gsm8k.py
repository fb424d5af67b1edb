"""GSM8K: school problems in words whose answer is one number, in the layout of the published files.

Judging is exact and linear in the text; docs/graders.md says which passage of a text is its answer.
"""

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, NoReturn

from d1jax.tasks.answers import as_answer, check_style, question_key
from d1jax.tasks.grading import d1_rules
from d1jax.tasks.grading.numbers import final_number, read_number, show_number
from d1jax.tasks.grading.offers import two_blocks
from d1jax.tasks.grading.stored import completion_of, given_text
from d1jax.tasks.task import DataError, Row

_MARKS = re.compile(r"<<[^<>\n]*>>")  # of the calculator: 48/2 = <<48/2=24>>24

PLACE = "{question}"
INSTRUCTIONS = """\
Solve the problem below. Work it out step by step between <reasoning> and </reasoning>. Then write the final number, and \
nothing else, between <answer> and </answer>.

{question}"""


@dataclass(frozen=True)
class Gsm8k:
    """GSM8K, and other questions whose answer is a number.

    Fields: `style` "bare" (the question alone) or "instruct" (what to write in which tags, then the question); texts are judged
    alike in both. `template`: the prompt of "instruct" in words of your own, with {question} where the question stands.
    `split_seed` is there as in every task, and unused: nothing is generated.
    """

    name: ClassVar[str] = "gsm8k"
    alphabet: ClassVar[str] = "".join(map(chr, range(32, 127))) + "\n"  # see Traces
    columns: ClassVar[None] = None

    style: str = "instruct"
    split_seed: int = 0
    template: str = INSTRUCTIONS

    def __post_init__(self) -> None:
        check_style(self.name, self.style)
        if not isinstance(self.template, str) or PLACE not in self.template:
            raise ValueError(
                f"{self.name}: template = {self.template!r:.60} has no {PLACE}; write it where the question stands"
            )
        if self.style == "bare" and self.template != INSTRUCTIONS:
            raise ValueError(
                f'{self.name}: style "bare" asks the question alone; leave template out, or set style to instruct'
            )

    def generate(self, split: str, count: int, seed: int) -> NoReturn:
        """Always raises ValueError."""
        raise ValueError(
            "gsm8k: rows cannot be generated; name a file or a hub dataset, e.g. task.train: hub:openai/gsm8k/main:train"
        )

    def parse(self, record: dict[str, Any], where: str) -> Row:
        """Reads {question, answer?} as a row of `question`, `solution` and `number` (as it is written), of which the last two may
        be None.

        `answer` is a worked solution that ends with `#### 18`, or the number alone, as text or as a JSON number. Raises
        DataError where it states no number.
        """
        question = given_text(record, "question", where, 'a row is {"question": "...", "answer": "... #### 18"}')
        answer = record.get("answer")
        if answer is None:
            return {"question": question, "solution": None, "number": None}
        number = _reference(answer, f"{where}: answer")
        solution, marked, _ = answer.rpartition("####") if isinstance(answer, str) else ("", "", "")
        worked = _MARKS.sub("", solution).strip() if marked else ""
        return {"question": question, "solution": worked or None, "number": number}

    def from_stored(self, record: dict[str, Any], where: str) -> Row:
        """The row of a stored generation: {question, ground_truth, generations} or {prompt, answer, completion}. A number that
        is null, as d1 stores negative ones, leaves the row without a reference. Raises DataError.
        """
        question, told, _ = completion_of(record, where)
        number = None if told is None else _reference(told, f"{where}: the stored answer")
        return {"question": question, "solution": None, "number": number}

    def prompt(self, row: Row) -> str:
        return row["question"] if self.style == "bare" else self.template.replace(PLACE, row["question"])

    def target(self, row: Row) -> str | None:
        """instruct: the worked solution in reasoning tags, then the number in answer tags. bare: the solution, then `#### 18`.
        None where the row lacks one of them.
        """
        if row["solution"] is None or row["number"] is None:
            return None
        number = show_number(read_number(row["number"]))
        if self.style == "bare":
            return f"{row['solution']}\n#### {number}"
        return f"<reasoning>\n{row['solution']}\n</reasoning>\n{as_answer(number, self.style)}"

    def offer(self, row: Row, text: str) -> str | None:
        """The number that the text states, in one spelling, for majority votes; None where it states none."""
        value = final_number(text)
        return None if value is None else show_number(value)

    def rewards(self, row: Row, text: str) -> dict[str, float]:
        """`solved` as in `grade`. `format`: one reasoning block and then one answer block, nothing else.

        The rewards whose names begin with d1_ are those of d1's released code, in its points; with weights of 1 their sum is
        its reward. `d1_correct`: 2 where what stands in the last answer tags is the row's number letter by letter.
        `d1_integer`: 0.5 where it is all digits. `d1_xml_count`: see `d1_rules.xml_count`; may be negative.
        `d1_soft_format`, `d1_strict_format`: 0.5 each.
        Differs from the paper: no text earns both formats, since the strict one asks for line breaks inside the tags and the
        soft one forbids them, so the most is 3.5 and not 4; a usual solution of several lines earns neither. A number with a
        comma or a sign is no integer; `18.0`, `$18`, and `1080` where the row writes 1,080, are not correct.
        """
        answer = d1_rules.reward_answer(text)
        return {
            "solved": self.grade(row, text)["solved"],
            "format": float(two_blocks(text)),
            "d1_correct": 2.0 * (answer == row["number"]),
            "d1_integer": 0.5 * answer.isdigit(),
            "d1_xml_count": d1_rules.xml_count(text),
            "d1_soft_format": d1_rules.soft_format(text),
            "d1_strict_format": d1_rules.strict_format(text),
        }

    def grade(self, row: Row, text: str) -> dict[str, float]:
        """`solved`: the number that the text states is the row's, exactly; 0.0 where the row has none. `answered`: it states one."""
        value = final_number(text)
        solved = value is not None and row["number"] is not None and value == read_number(row["number"])
        return {"solved": float(solved), "answered": float(value is not None)}

    def columns_of(self, row: Row) -> Row:
        """The row with its number as `answer`, for reward functions."""
        return {**row, "answer": row["number"]}

    def has_reference(self, row: Row) -> bool:
        return row["number"] is not None

    def problem_key(self, row: Row) -> str:
        """The question, whatever its spacing and capitals."""
        return question_key(row["question"])

    def solution_key(self, row: Row) -> str | None:
        return None

    def baselines(self, row: Row) -> dict[str, str]:
        """`empty`: nothing. `last_number`: the last number of the question."""
        found = re.findall(r"[0-9][0-9,]*(?:\.[0-9]+)?", row["question"])
        return {"empty": "", "last_number": as_answer(found[-1].rstrip(",") if found else "", "instruct")}


def _reference(told: object, what: str) -> str:
    """The number of a reference answer as it is written. Raises DataError where it states none."""
    written = ""
    if isinstance(told, str):
        written = told.rpartition("####")[2].strip()
    elif isinstance(told, int | float) and not isinstance(told, bool) and math.isfinite(told):
        written = show_number(Fraction(told) if isinstance(told, int) else Fraction(repr(told)))
    if read_number(written) is None:
        raise DataError(
            f"{what} = {told!r:.60} states no number; write e.g. 18, or a worked solution that ends with #### 18"
        )
    return written
