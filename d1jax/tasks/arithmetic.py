"""Arithmetic: sums, differences and products of several terms, worked out one operation a line before the answer is written.

A small model learns it on a CPU in minutes and really writes reasoning, so that the reward for the format, the length of a text and
the correction of a wrong line mean something.
"""

import hashlib
import re
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from d1jax.tasks import expressions
from d1jax.tasks.answers import as_answer, check_request, check_style
from d1jax.tasks.grading.numbers import final_number, show_number
from d1jax.tasks.grading.offers import two_blocks
from d1jax.tasks.grading.stored import completion_of, given_text
from d1jax.tasks.task import DataError, Row

OPERATORS = "+-*"
MOST_TERMS = 8
MOST_LINES = 32
"""Lines of reasoning that are looked at; a text with more of them has no steps."""

_CHUNK = 256  # problems drawn together; part of what (split, count, seed) means, so a change gives other rows
_IDLE_CHUNKS = 20  # so many without a new problem: there are hardly any left
_PROBLEM = re.compile(rf"[0-9]{{1,4}}(?:[-+*][0-9]{{1,4}}){{1,{MOST_TERMS - 1}}}")
_TOKEN = re.compile(r"[0-9]+|[-+*]")
_INTEGER = re.compile(r"-?[0-9]{1,12}")
_WORD = re.compile(r"\s*(?:[A-Za-z]{1,20}[:,]?\s+)?")

INSTRUCTIONS = """\
Work out the problem below, products first. Between <reasoning> and </reasoning> write one operation a line with its result, such as \
3*4=12. Then write the final number, and nothing else, between <answer> and </answer>.

{problem}="""


@dataclass(frozen=True)
class Arithmetic:
    """Problems such as `7+5*3`.

    Fields: `style` "bare" (`7+5*3=`) or "instruct" (what to write in which tags, then the problem); the completion is the same in
    both. `terms`: how many numbers a problem may have (2 to 8), which is how hard it is. `operators`: those that are drawn.
    `largest`: the numbers are 1 to this one. `limit`: no result of a line is above it; none is below 0. `words`: a line begins with
    `first` or `then`. `split_seed`: which problems are for training (90 %).
    """

    name: ClassVar[str] = "arithmetic"
    alphabet: ClassVar[str] = "".join(
        sorted(set("0123456789+-*=\nfirst then <reasoning></reasoning><answer></answer>"))
    )
    columns: ClassVar[None] = None

    style: str = "bare"
    terms: tuple[int, ...] = (3,)
    operators: str = OPERATORS
    largest: int = 20
    limit: int = 99
    words: bool = True
    split_seed: int = 0

    def __post_init__(self) -> None:
        check_style(self.name, self.style)
        if not self.terms or not set(self.terms) <= set(range(2, MOST_TERMS + 1)):
            raise ValueError(
                f"arithmetic: terms = {self.terms!r}: give one or more numbers of terms from 2 to {MOST_TERMS}, such as (3,) or (3, 4)"
            )
        if not isinstance(self.operators, str) or not self.operators or not set(self.operators) <= set(OPERATORS):
            raise ValueError(f"arithmetic: operators = {self.operators!r}: give one or more of {OPERATORS} as a text")
        for field, most in (("largest", 9999), ("limit", 10**6)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise ValueError(f"arithmetic: {field} = {value!r}: give a whole number from 1 to {most}")

    def generate(self, split: str, count: int, seed: int) -> list[Row]:
        """`count` problems of the split, no two written alike. Raises ValueError where there are not that many.

        The number of terms, the numbers and the operators are drawn uniformly; a problem with a result below 0 or above `limit` in
        one of its lines is drawn again.
        """
        check_request(self.name, split, count)
        rows: dict[str, Row] = {}
        chunk = idle = 0
        while len(rows) < count:
            before = len(rows)
            for problem in self._draw(np.random.default_rng([seed, split == "test", chunk])):
                values = [value for _, _, _, value in operations(problem)]
                if min(values) >= 0 and max(values) <= self.limit and self._split_of(problem) == split:
                    rows.setdefault(problem, {"problem": problem, "answer": str(values[-1])})
            chunk += 1
            idle = idle + 1 if len(rows) == before else 0
            if idle == _IDLE_CHUNKS:
                raise ValueError(
                    f"arithmetic: count = {count}, but after {len(rows)} distinct {split} problems with terms = {self.terms}, "
                    f"largest = {self.largest} and limit = {self.limit} no new one turned up; ask for fewer rows or raise one of them"
                )
        return list(rows.values())[:count]

    def _draw(self, rng: np.random.Generator) -> list[str]:
        sizes = rng.choice(np.array(self.terms), size=_CHUNK)
        numbers = rng.integers(1, self.largest + 1, size=(_CHUNK, MOST_TERMS))
        operators = rng.choice(np.array(list(self.operators)), size=(_CHUNK, MOST_TERMS))
        drawn = zip(sizes.tolist(), numbers.tolist(), operators.tolist(), strict=True)
        # The operator in front of the first number is left out.
        return ["".join(f"{op}{n}" for op, n in zip(ops[:size], ns[:size], strict=True))[1:] for size, ns, ops in drawn]

    def _split_of(self, problem: str) -> str:
        digest = hashlib.blake2b(f"{self.split_seed}:{_key(problem)}".encode(), digest_size=8).digest()
        return "test" if int.from_bytes(digest, "big") % 10 == 0 else "train"

    def parse(self, record: dict[str, Any], where: str) -> Row | None:
        """Reads {problem: "7+5*3", answer?: 22}; `=` may end the problem. None for a number of terms that is left out. Raises DataError."""
        cure = 'a row is {"problem": "7+5*3"} with an optional "answer"'
        problem = "".join(given_text(record, "problem", where, cure).split()).removesuffix("=")
        if not _PROBLEM.fullmatch(problem):
            raise DataError(
                f"{where}: problem = {problem!r:.60}: 2 to {MOST_TERMS} whole numbers of at most 4 digits with +, - or * between them "
                f"were expected; {cure}"
            )
        problem = re.sub(r"[0-9]+", lambda number: str(int(number[0])), problem)
        values = [value for _, _, _, value in operations(problem)]
        if min(values) < 0:
            raise DataError(
                f"{where}: problem = {problem!r}: one of its lines has the result {min(values)}, and results below 0 are not worked "
                "with; drop the row"
            )
        told = record.get("answer")
        if told is not None and str(told).strip() != str(values[-1]):
            raise DataError(f"{where}: answer = {told!r:.60}, but {problem}={values[-1]}; correct it or leave it out")
        return {"problem": problem, "answer": str(values[-1])} if len(values) + 1 in self.terms else None

    def from_stored(self, record: dict[str, Any], where: str) -> Row | None:
        """The row of a stored generation: the problem is the last one in its question or prompt. Raises DataError."""
        question, told, _ = completion_of(record, where)
        found = _PROBLEM.findall(question) or [question]
        return self.parse({"problem": found[-1], "answer": told}, where)

    def prompt(self, row: Row) -> str:
        return f"{row['problem']}=" if self.style == "bare" else INSTRUCTIONS.format(problem=row["problem"])

    def target(self, row: Row) -> str:
        """Every operation on a line of its own in reasoning tags, then the result in answer tags, in both styles."""
        words = ["first "] + ["then "] * MOST_TERMS if self.words else [""] * MOST_TERMS
        lines = [
            f"{word}{left}{op}{right}={value}"
            for word, (left, op, right, value) in zip(words, operations(row["problem"]), strict=False)
        ]
        worked = "\n".join(lines)
        return f"<reasoning>\n{worked}\n</reasoning>\n{as_answer(row['answer'], 'instruct')}"

    def offer(self, row: Row, text: str) -> str | None:
        """The number that the text states, in one spelling, for majority votes; None where it states none."""
        value = final_number(text)
        return None if value is None else show_number(value)

    def rewards(self, row: Row, text: str) -> dict[str, float]:
        """From the problem alone. `solved`: the number that the text states is the result. `answered`: it states one. `format`: one
        reasoning block and then one answer block, nothing else. `steps`: the share of the lines of reasoning that are right.

        A line is right where it is a true equation of two numbers, each of which the problem or an earlier line has, and no line
        before it says the same; a word may stand in front. A line that uses the wrong result of an earlier one rightly is right.
        Lines that are missing, of as many as the problem has operations, are wrong. Which operation comes first is not asked:
        `solved` sees that.
        """
        value = final_number(text)
        return {
            "solved": float(value is not None and value == int(row["answer"])),
            "answered": float(value is not None),
            "format": float(two_blocks(text)),
            "steps": _right_lines(row["problem"], text),
        }

    def judge_lines(self, row: Row, text: str) -> list[bool | None]:
        """Whether each line of the text is right, as `rewards` has it: a line of reasoning by itself, the line that answers by
        `solved`, tags and what stands elsewhere (of too many lines all of them) by `format`."""
        judged = _judged_lines(row["problem"], text) or {}
        before, tag, answer = text.partition("<answer>")
        answering = answer.partition("</answer>")[0].split("\n") if tag else []
        for place, line in enumerate(answering, before.count("\n")):
            if line.strip():
                judged[place] = final_number(text) == int(row["answer"])
        well_formed = two_blocks(text)
        return [judged.get(place, well_formed) for place in range(text.count("\n") + 1)]

    def grade(self, row: Row, text: str) -> dict[str, float]:
        """As `rewards`."""
        return self.rewards(row, text)

    def has_reference(self, row: Row) -> bool:
        return True  # worked out from the problem

    def problem_key(self, row: Row) -> str:
        """The terms in a fixed order: 5+7-3 and 7-3+5 pose the same problem, and so do 3*4 and 4*3."""
        return _key(row["problem"])

    def solution_key(self, row: Row) -> str | None:
        return None

    def baselines(self, row: Row) -> dict[str, str]:
        """`last_number`: the last number of the problem. `add_all`: the sum of its numbers, whatever stands between them."""
        numbers = [int(number) for number in re.findall(r"[0-9]+", row["problem"])]
        return {
            "last_number": as_answer(str(numbers[-1]), "instruct"),
            "add_all": as_answer(str(sum(numbers)), "instruct"),
        }


def operations(problem: str) -> list[tuple[int, str, int, int]]:
    """(left, operator, right, result) of every operation in the order of the worked lines: products first, then from left to right."""
    parts = _TOKEN.findall(problem)
    done = []
    while len(parts) > 1:
        place = parts.index("*") if "*" in parts else 1
        left, op, right = int(parts[place - 1]), parts[place], int(parts[place + 1])
        value = left * right if op == "*" else left + right if op == "+" else left - right
        done.append((left, op, right, value))
        parts[place - 1 : place + 2] = [str(value)]
    return done


def _key(problem: str) -> str:
    """The signed products of a problem, each with its factors in order, in order."""
    products = []
    for sign, product in re.findall(r"([-+]?)([0-9*]+)", problem):
        products.append((sign or "+") + "*".join(sorted(product.split("*"))))
    return "".join(sorted(products))


def _right_lines(problem: str, text: str) -> float:
    """The share of the lines of the reasoning block that are right, as `Arithmetic.rewards` says."""
    judged = _judged_lines(problem, text)
    operators = problem.count("+") + problem.count("-") + problem.count("*")
    return 0.0 if judged is None else sum(judged.values()) / max(len(judged), operators)


def _judged_lines(problem: str, text: str) -> dict[int, bool] | None:
    """{place among the text's lines: whether it is right} of the lines of the reasoning block that are not blank; None where there are
    more than MOST_LINES."""
    before, _, block = text.partition("<reasoning>")
    first = before.count("\n")
    block = block.partition("</reasoning>")[0]
    lines = {place: line for place, line in enumerate(block.split("\n"), first) if line.strip()}
    if len(lines) > MOST_LINES:
        return None
    known = set(map(int, re.findall(r"[0-9]+", problem)))
    said = set()
    judged = dict.fromkeys(lines, False)
    for place, line in lines.items():
        left, _, right = line[_WORD.match(line).end() :].partition("=")
        right = right.strip()
        tree = expressions.parse(left)
        if tree is None or not _INTEGER.fullmatch(right):
            continue
        used = expressions.leaves(tree)
        if len(used) == 2 and known.issuperset(used):
            if expressions.evaluate(tree) == int(right):
                equation = (expressions.show(tree), int(right))
                judged[place] = equation not in said
                said.add(equation)
            known.add(int(right))
    return judged
