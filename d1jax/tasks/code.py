"""Code: a question in words or the beginning of a function, answered by a program that has to pass tests.

Programs run in the sandbox of `grading/sandbox.py`. Judging many texts in one call is what its processes are for:
`rewards_many` and `grade_many` run all programs together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

from d1jax.tasks.answers import check_style, question_key
from d1jax.tasks.code_answers import code_format, completed, offered_code, uses_forbidden, xml_format
from d1jax.tasks.code_rows import read_row
from d1jax.tasks.grading.sandbox import Outcome, Program, run_all
from d1jax.tasks.grading.stored import LAYOUTS
from d1jax.tasks.task import DataError, Row

INSTRUCTIONS = """\
Solve the task below in Python. Answer with one block that begins with ```python and ends with ```, and that contains \
the complete program: imports, helpers and the function that is asked for.

{question}"""
TAGGED_INSTRUCTIONS = """\
Solve the task below in Python. Think it through between <reasoning> and </reasoning>. Then write, between <answer> and \
</answer>, one block that begins with ```python and ends with ```, and that contains the complete program: imports, \
helpers and the function that is asked for. Put each tag on a line of its own.

{question}"""


@dataclass(frozen=True)
class Code:
    """Programming tasks with tests.

    Fields: `style` "bare" (the question alone; a text without a fence is a program) or "instruct" (what to write, then the
    question); `tags`, whether instruct asks for reasoning and answer tags, as d1 does; `shown_tests`, how many assertions
    the prompt quotes where the row has a list of them: they say what the function is called; `seconds`, the limit of one
    test; `suite_seconds`, that of a test that is a whole file of inputs (EvalPlus); `megabytes`, the memory of a program.
    `split_seed` is there as in every task, and unused: nothing is generated.
    """

    name: ClassVar[str] = "code"
    # What the character tokenizer needs for plain English and programs; see Traces.
    alphabet: ClassVar[str] = "".join(map(chr, range(32, 127))) + "\n\t"
    columns: ClassVar[None] = None

    style: str = "instruct"
    split_seed: int = 0
    tags: bool = False
    shown_tests: int = 1
    seconds: float = 5.0
    suite_seconds: float = 60.0
    megabytes: int = 4096

    def __post_init__(self) -> None:
        check_style(self.name, self.style)
        if self.shown_tests < 0:
            raise ValueError(f"code: shown_tests = {self.shown_tests} is negative; 0 quotes none")
        for field in ("seconds", "suite_seconds"):
            if not 0.1 <= getattr(self, field) <= 3600:
                raise ValueError(f"code: {field} = {getattr(self, field)!r}: give a limit from 0.1 to 3600 seconds")
        if not 128 <= self.megabytes <= 1 << 20:
            raise ValueError(f"code: megabytes = {self.megabytes!r}: give 128 or more; Python itself needs some")

    def generate(self, split: str, count: int, seed: int) -> NoReturn:
        """Always raises ValueError."""
        raise ValueError(
            "code: rows cannot be generated; name a file or a hub dataset, e.g. task.train: hub:KodCode/KodCode-Light-RL-10K"
        )

    def parse(self, record: dict[str, Any], where: str) -> Row | None:
        """Reads rows of HumanEval, MBPP (also sanitized), both in EvalPlus's OriginFmt, KodCode, AceCode, and
        {prompt or question, test_list or tests or test_cases, solution?}, where the prompt may be a list of messages.
        """
        return read_row(record, where)

    def from_stored(self, record: dict[str, Any], where: str) -> Row:
        """The row of a stored generation: what `parse` reads, and the text under `completion` or `generations`. Raises DataError
        where it has no tests: nothing else says whether a program is right.
        """
        generated = {layout[2] for layout in LAYOUTS}
        row = read_row({key: value for key, value in record.items() if key not in generated}, where)
        if not row["tests"]:
            raise DataError(
                f"{where}: no tests among the keys ({', '.join(map(repr, record))}); copy the test fields of the data set into "
                'the row, or write "test_list": ["assert f(1) == 2"]'
            )
        return row

    def prompt(self, row: Row) -> str:
        question = row["question"]
        if row["stub"] is not None and self.style == "instruct":
            question = f"Complete this function:\n```python\n{question.strip()}\n```"
        elif row["shown"] and self.shown_tests:
            tests = "\n".join(row["shown"][: self.shown_tests])
            question = f"{question}\n\nThe program has to pass:\n{tests}"
        if self.style == "bare":
            return question
        return (TAGGED_INSTRUCTIONS if self.tags else INSTRUCTIONS).format(question=question)

    def target(self, row: Row) -> str | None:
        """The solution, in a python block (bare: alone; HumanEval in style bare: what follows the prompt)."""
        solution = row["solution"]
        if solution is None:
            return None
        if self.style == "bare":
            return solution.removeprefix(row["stub"] or "")
        block = f"```python\n{solution.strip()}\n```"
        return f"<answer>\n{block}\n</answer>" if self.tags else block

    def program(self, row: Row, code: str) -> Program:
        """The program that is run for an answer: the code, then the row's set-up, then each of its tests.

        Source: the order is MBPP's (code, test_setup_code, test_list).
        """
        if row["stub"] is not None:
            code = completed(row["stub"], row["entry_point"], code)
        seconds = self.suite_seconds if row["suite"] else self.seconds
        return Program(code, tuple(row["tests"]), row["setup"], seconds=seconds, megabytes=self.megabytes)

    def outcomes(self, rows: Sequence[Row], texts: Sequence[str]) -> list[Outcome | None]:
        """How the program of each text did in the tests of its row; None where the text has none, or the row no tests.

        Raises SandboxError where programs cannot be run on this machine.
        """
        offers = [offered_code(text, self.style) for text in texts]
        places = [
            i for i, (row, code) in enumerate(zip(rows, offers, strict=True)) if code is not None and row["tests"]
        ]
        ran = run_all([self.program(rows[place], offers[place] or "") for place in places])
        found: list[Outcome | None] = [None] * len(offers)
        for place, outcome in zip(places, ran, strict=True):
            found[place] = outcome
        return found

    def rewards_many(self, rows: Sequence[Row], texts: Sequence[str]) -> list[dict[str, float]]:
        """`rewards` of every text; all programs run together."""
        outcomes = self.outcomes(rows, texts)
        return [self._rewards(text, outcome) for text, outcome in zip(texts, outcomes, strict=True)]

    def grade_many(self, rows: Sequence[Row], texts: Sequence[str]) -> list[dict[str, float]]:
        """`grade` of every text; all programs run together."""
        outcomes = self.outcomes(rows, texts)
        return [_grades(text, outcome) for text, outcome in zip(texts, outcomes, strict=True)]

    def _rewards(self, text: str, outcome: Outcome | None) -> dict[str, float]:
        grades = _grades(text, outcome)
        rate, layout = grades["pass_rate"], grades["code_format"]
        forbidden = uses_forbidden(offered_code(text, self.style) or "")
        return {
            **grades,
            "diffucoder": 2.0 * rate * (layout == 1.0) + 0.5 * layout,
            "xml_format": xml_format(text),
            "allowed_pass_rate": 0.0 if forbidden else rate,
        }

    def rewards(self, row: Row, text: str) -> dict[str, float]:
        """`solved`: all tests pass. `pass_rate`: the share that passes. `code_format`: see code_answers.py.

        `diffucoder`: 2.0 x pass_rate + 0.5 x code_format, from 0 to 2.5; the first term only where the format is 1.
        `xml_format` and `allowed_pass_rate` (0 where the program uses a forbidden module): the two parts of d1's reward.

        Source: DiffuCoder, arXiv 2506.20639; d1, arXiv 2504.12216 v2, as restated in SPG, App. G.1.
        Differs from the released code of DiffuCoder: a test that takes too long fails alone, not all of them; see code_format.
        """
        return self.rewards_many([row], [text])[0]

    def grade(self, row: Row, text: str) -> dict[str, float]:
        """`solved`, `pass_rate` and `code_format`, as in `rewards`."""
        return self.grade_many([row], [text])[0]

    def has_reference(self, row: Row) -> bool:
        return bool(row["tests"])

    def problem_key(self, row: Row) -> str:
        """The question, whatever its spacing and capitals."""
        return question_key(row["question"])

    def solution_key(self, row: Row) -> str | None:
        return None

    def baselines(self, row: Row) -> dict[str, str]:
        """`empty`: nothing. No program passes many tests."""
        return {"empty": ""}

    def self_test(self, rows: Sequence[Row]) -> list[tuple[int, str]]:
        """(place, what went wrong) of the rows whose own solution does not pass their tests: broken, or too slow here."""
        places = [place for place, row in enumerate(rows) if row["solution"] is not None and row["tests"]]
        outcomes = run_all([self.program(rows[place], rows[place]["solution"]) for place in places])
        wrong = []
        for place, outcome in zip(places, outcomes, strict=True):
            first = next((test for test in outcome.tests if test.status != "passed"), None)
            if first is not None:
                wrong.append((place, f"{first.status}: {first.message}"))
        return wrong


def _grades(text: str, outcome: Outcome | None) -> dict[str, float]:
    rate = 0.0 if outcome is None else outcome.pass_rate
    return {"solved": float(rate == 1.0), "pass_rate": rate, "code_format": code_format(text)}
