"""Countdown: reach a target with + - * /, using each given number exactly once.

Rows come from a generator (the procedure behind the public training file) or from a file; answers are judged by parsing
them, with exact fractions.
"""

import hashlib
import re
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from d1jax.tasks import expressions
from d1jax.tasks.answers import (
    answer_text,
    as_answer,
    check_request,
    check_style,
    last_boxed,
)
from d1jax.tasks.expressions import Tree, reaches, solve
from d1jax.tasks.grading.offers import offer
from d1jax.tasks.grading.stored import completion_of
from d1jax.tasks.task import DataError, Row

_CHUNK = 256  # problems drawn together; part of what (split, count, seed) means, so a change gives other rows
_WIDTH = 1024  # candidates tried at once for the problems of a chunk that are still open
_STEP = re.compile(r"\s*([0-9]{1,12})\s*([-+*/])\s*([0-9]{1,12})\s*=\s*([0-9]{1,12})\s*")
_STORED = re.compile(r"Numbers:\s*\[?([0-9,\s]{1,80}?)\]?\s*Target:\s*([0-9]{1,12})", re.IGNORECASE)
_STORED_BARE = re.compile(r"\A\s*([0-9]+(?:,[0-9]+)+)=([0-9]+):?\s*\Z")

INSTRUCTIONS = """\
Numbers: {numbers}
Target: {target}

Find an expression whose value is exactly the target. Use every number above once, no other \
number, and only +, -, *, / and parentheses.

Think it through between <reasoning> and </reasoning>. Then write the expression alone, without an equals sign, \
between <answer> and </answer>."""


@dataclass(frozen=True)
class Countdown:
    """Countdown.

    Fields: `style` "bare" (`44,19,35=98:`) or "instruct" (rules in words, answer in tags); `numbers`, how many numbers
    a problem may have (2 to 6 in files; the generator makes 3 and 4); `split_seed`, which problems are for training (90
    %).
    """

    name: ClassVar[str] = "countdown"
    alphabet: ClassVar[str] = "0123456789+-*/()=,:"
    columns: ClassVar[None] = None

    style: str = "bare"
    numbers: tuple[int, ...] = (3,)
    split_seed: int = 0

    def __post_init__(self) -> None:
        check_style(self.name, self.style)
        if not self.numbers or not set(self.numbers) <= set(range(2, 7)):
            raise ValueError(
                f"countdown: numbers = {self.numbers!r}: give one or more sizes from 2 to 6, such as (3,) or (3, 4)"
            )

    def generate(self, split: str, count: int, seed: int) -> list[Row]:
        """`count` distinct solvable problems of the split, with a solution. Raises ValueError for sizes other than 3
        and 4.

        The size is drawn from `numbers`, the target from 10..100, the numbers from 1..99 with repetition; the target is
        kept and the numbers are redrawn until all of them reach it with exact divisions and no negative intermediate
        value.

        Source: the procedure of stream-of-search (kanishkg/stream-of-search, `src/countdown.py`), whose histograms the
        public training file shows.
        """
        check_request(self.name, split, count)
        if not set(self.numbers) <= {3, 4}:
            raise ValueError(
                f"countdown: numbers = {self.numbers!r}: problems of 3 and 4 numbers can be generated; "
                "read others from a file"
            )
        rows: dict[str, Row] = {}
        chunk = 0
        while len(rows) < count:
            for numbers, target in self._draw(np.random.default_rng([seed, split == "test", chunk]), split):
                rows.setdefault(_key(numbers, target), {"numbers": numbers, "target": target})
            chunk += 1
        kept = list(rows.values())[:count]
        return [{**row, "solution": expressions.show(solve(row["numbers"], row["target"]))} for row in kept]

    def _draw(self, rng: np.random.Generator, split: str) -> list[tuple[list[int], int]]:
        sizes = rng.choice(np.array(self.numbers), size=_CHUNK)
        targets = rng.integers(10, 101, size=_CHUNK)
        problems: list[list[int]] = [[]] * _CHUNK
        for size in sorted(set(self.numbers)):
            todo = np.flatnonzero(sizes == size)
            while len(todo):
                # Few open problems share the width among them: several draws each, of which the first that fits counts.
                owner = np.tile(todo, -(-_WIDTH // len(todo)))
                numbers = rng.integers(1, 100, size=(len(owner), size))
                for index in np.flatnonzero(reaches(numbers, targets[owner])).tolist():
                    place, drawn = owner[index], numbers[index].tolist()
                    if not problems[place] and self._split_of(_key(drawn, targets[place])) == split:
                        problems[place] = drawn
                todo = np.array([place for place in todo if not problems[place]], dtype=int)
        return list(zip(problems, targets.tolist(), strict=True))

    def _split_of(self, key: str) -> str:
        digest = hashlib.blake2b(f"{self.split_seed}:{key}".encode(), digest_size=8).digest()
        return "test" if int.from_bytes(digest, "big") % 10 == 0 else "train"

    def parse(self, record: dict[str, Any], where: str) -> Row | None:
        """Reads {nums, target, solution?} (TinyZero), {numbers, target, solution?}, {input: "30,100,93", output: "23"}
        (d1), and {input: "15,44,79,50", output: "44-15=29,79-29=50"} (Dream: the last input is the target, the output
        is a solution in steps).
        """
        if "input" in record:
            values = _integers(record, "input", where)
            steps = str(record.get("output", ""))
            if "=" in steps:
                numbers, target, solution = values[:-1], values[-1], steps
                tree = _from_steps(steps, numbers)
            else:
                numbers, (target, *more) = values, _integers(record, "output", where)
                if more:
                    raise DataError(
                        f"{where}: output = {steps!r}: give one integer (the target), "
                        "or steps such as '44-15=29,79-29=50'"
                    )
                solution = tree = None
        else:
            key = "nums" if "nums" in record else "numbers"
            numbers, (target, *more) = _integers(record, key, where), _integers(record, "target", where)
            if more:
                raise DataError(f"{where}: target = {record['target']!r}: give one integer")
            solution = record.get("solution")
            tree = expressions.parse(solution) if isinstance(solution, str) else None
        if len(numbers) not in self.numbers:
            return None
        if solution is None:
            return {"numbers": numbers, "target": target}
        if tree is None or sorted(expressions.leaves(tree)) != sorted(numbers) or expressions.evaluate(tree) != target:
            raise DataError(
                f"{where}: the solution {solution!r} does not make {target} from {numbers}, each used once; "
                "correct it or leave it out"
            )
        return {"numbers": numbers, "target": target, "solution": expressions.show(tree)}

    def from_stored(self, record: dict[str, Any], where: str) -> Row | None:
        """The row of a stored generation: the reference is [[numbers], target] (d1), or the question or prompt says `Numbers: ...`
        and `Target: ...` or is a bare one (`44,19,35=98:`). None for a number of numbers that is left out. Raises DataError.
        """
        question, told, _ = completion_of(record, where)
        if isinstance(told, list) and len(told) == 2 and isinstance(told[0], list):
            return self.parse({"numbers": told[0], "target": told[1]}, where)
        found = _STORED.search(question) or _STORED_BARE.search(question)
        if found is None:
            raise DataError(
                f"{where}: neither the reference {told!r:.60} is [[numbers], target], nor does the question say Numbers: and Target:"
            )
        numbers = ",".join(re.findall(r"[0-9]+", found[1]))
        return self.parse({"numbers": numbers, "target": found[2]}, where)

    def prompt(self, row: Row) -> str:
        numbers, target = row["numbers"], row["target"]
        if self.style == "bare":
            return f"{','.join(map(str, numbers))}={target}:"
        return INSTRUCTIONS.format(numbers=", ".join(map(str, numbers)), target=target)

    def target(self, row: Row) -> str | None:
        solution = row.get("solution")
        return None if solution is None else as_answer(solution, self.style)

    def _judge(self, row: Row, text: str) -> tuple[bool, bool, bool]:
        """(is an expression with a value, uses exactly the given numbers, and equals the target)"""
        answer = answer_text(text, self.style)
        boxed = last_boxed(text if answer is None else answer)
        answer = answer if boxed is None else boxed
        if answer is None and (found := offer(text)) and found.place == "open box":  # that the length limit leaves open
            answer = found.text
        tree = None if answer is None else expressions.parse(answer)
        value = None if tree is None else expressions.evaluate(tree)
        if value is None:
            return False, False, False
        used = sorted(expressions.leaves(tree)) == sorted(row["numbers"])
        return True, used, used and value == row["target"]

    def rewards(self, row: Row, text: str) -> dict[str, float]:
        """`solved`: each given number is used exactly once and the value is the target, exactly. `numbers`: each is
        used exactly once, but the value is wrong. Weights 1.0 and 0.1 give the reward of the d1 paper.

        Differs from the released code of d1: there everything inside answer tags earns 0.1, a word or nothing at all
        included, and powers and // count as arithmetic.
        """
        _, used, solved = self._judge(row, text)
        return {"solved": float(solved), "numbers": float(used and not solved)}

    def grade(self, row: Row, text: str) -> dict[str, float]:
        """`solved` as in `rewards`; `parsed`: the answer is an expression with a value; `numbers_used`: with exactly
        the given numbers.
        """
        parsed, used, solved = self._judge(row, text)
        return {"solved": float(solved), "parsed": float(parsed), "numbers_used": float(used)}

    def has_reference(self, row: Row) -> bool:
        return True  # judged by the rules

    def problem_key(self, row: Row) -> str:
        """The numbers in ascending order and the target: their order in the row poses no new problem."""
        return _key(row["numbers"], row["target"])

    def solution_key(self, row: Row) -> str | None:
        return None

    def baselines(self, row: Row) -> dict[str, str]:
        """`add_all`: the sum of the numbers."""
        return {"add_all": as_answer("+".join(map(str, row["numbers"])), self.style)}


def _key(numbers: list[int], target: int) -> str:
    return f"{','.join(map(str, sorted(numbers)))}={target}"


def _from_steps(steps: str, numbers: list[int]) -> Tree | None:
    """Joins "44-15=29,79-29=50" into one tree; None when a step uses a number that is not there."""
    pool: list[tuple[int, Tree]] = [(number, number) for number in numbers]
    for step in steps.split(","):
        match = _STEP.fullmatch(step)
        if match is None:
            return None
        operands = []
        for text in (match[1], match[3]):
            place = next((index for index, (value, _) in enumerate(pool) if value == int(text)), None)
            if place is None:
                return None
            operands.append(pool.pop(place)[1])
        pool.append((int(match[4]), (match[2], operands[0], operands[1])))
    return pool[0][1] if len(pool) == 1 else None


def _integers(record: dict[str, Any], key: str, where: str) -> list[int]:
    """One or more non-negative integers: a JSON number, a list of them, or a string with commas."""
    value = record.get(key)
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    texts = [str(part).strip() for part in parts if not isinstance(part, bool)]
    if (
        not texts
        or len(texts) != len(parts)
        or not all(re.fullmatch(f"[0-9]{{1,{expressions.MAX_DIGITS}}}", text) for text in texts)
    ):
        raise DataError(
            f"{where}: {key} = {value!r}: whole numbers of at most {expressions.MAX_DIGITS} digits were expected; "
            'a row is {"numbers": [44, 19, 35], "target": 98} with an optional "solution"'
        )
    return [int(text) for text in texts]
