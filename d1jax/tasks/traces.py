"""Worked reasoning: questions with a trace of thinking and a written answer, in the layout of s1K.

Made for SFT. The answer is judged too, by comparing it to a short reference answer where the row has one.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, NoReturn

from d1jax.tasks.answers import answer_text, as_answer, check_style, last_boxed, question_key
from d1jax.tasks.grading.offers import two_blocks
from d1jax.tasks.task import DataError, Row

_SHORT = 40  # characters up to which a line of its own counts as an answer; longer ones are explanations
_LONGEST_NUMBER = 64  # characters; a longer number is compared as text, so that its digits cost no arithmetic
_WRAPPERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), (r"\text{", "}"))
_NUMBER = re.compile(r"[-+]?(?:(?:[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)(?:\.[0-9]+|/0*[1-9][0-9]*)?|\.[0-9]+)")
_FRAC = re.compile(r"\A([-+]?)\\frac\{([0-9]+)\}\{([0-9]+)\}\Z")  # whole texts only: 1\frac{1}{2} is not 11/2
# LaTeX that changes how an answer is set, not what it says: spaces, sizes of brackets, dollars and degrees of a bare number.
_LAYOUT = re.compile(
    r"\\[!,;:]|\\(?:left|right|displaystyle)(?![A-Za-z])|\\\$|\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\})"
)
_FRACTION_NAME = re.compile(r"\\[dt]frac(?![A-Za-z])")
_BARE_NUMERATOR = re.compile(r"\\frac\s*([0-9A-Za-z])")
_BARE_DENOMINATOR = re.compile(r"(\\frac\{[^{}]*\})\s*([0-9A-Za-z])")
_BARE_ROOT = re.compile(r"\\sqrt\s*([0-9A-Za-z])")

INSTRUCTIONS = """\
Work out the question below. Think it through between <reasoning> and </reasoning>. Then give the final answer \
between <answer> and </answer>.

{question}"""


@dataclass(frozen=True)
class Traces:
    """Questions with worked reasoning, such as simplescaling/s1K.

    Fields: `style` "bare" (the question alone) or "instruct" (what to write in which tags, then the question); the
    completion is the same in both, since it is two texts and not one. `split_seed` is there as in every task, and
    unused: nothing is generated.
    """

    name: ClassVar[str] = "traces"
    # What the character tokenizer needs for plain English. Text is free: rows with other characters need a tokenizer
    # with a vocabulary of its own.
    alphabet: ClassVar[str] = "".join(map(chr, range(32, 127))) + "\n"
    columns: ClassVar[None] = None

    style: str = "instruct"
    split_seed: int = 0

    def __post_init__(self) -> None:
        check_style(self.name, self.style)

    def generate(self, split: str, count: int, seed: int) -> NoReturn:
        """Always raises ValueError."""
        raise ValueError(
            "traces: rows cannot be generated; name a file or a hub dataset, e.g. task.train: hub:simplescaling/s1K"
        )

    def parse(self, record: dict[str, Any], where: str) -> Row | None:
        """Reads {question, thinking_trajectories: [text, ...] or thinking: text, attempt?, solution?, answer?} as a row of
        `question` and `reasoning`, `attempt` and `answer`, of which the last three may be None.

        `reasoning` is the first trajectory. `answer` is read from the first of solution, answer and attempt that has one:
        its last box, what stands behind #### in its last line (GSM8K), or all of it where it is one short line or a number.
        Null and blank count as absent.
        """
        question = _text(record, "question", where)
        if question is None:
            raise DataError(
                f"{where}: question = {record.get('question')!r}: a question was expected among the keys "
                f'{", ".join(record)[:80] or "(none)"}; a row is {{"question": "...", "thinking": "...", "attempt": "..."}}'
            )
        attempt = _text(record, "attempt", where)
        told = (_text(record, "solution", where), _number_or_text(record.get("answer")), attempt)
        return {
            "question": question,
            "reasoning": _first_trajectory(record, where) or _text(record, "thinking", where),
            "attempt": attempt,
            "answer": next(filter(None, map(_short_answer, told)), None),
        }

    def prompt(self, row: Row) -> str:
        return row["question"] if self.style == "bare" else INSTRUCTIONS.format(question=row["question"])

    def target(self, row: Row) -> str | None:
        """The reasoning in its tags, then the attempt in answer tags; None where the row lacks one of them.

        Source: d1, arXiv 2504.12216, SFT on s1K.
        Differs from the released code: the texts stand on lines of their own, without surrounding space.
        """
        if row["reasoning"] is None or row["attempt"] is None:
            return None
        return f"<reasoning>\n{row['reasoning']}\n</reasoning>\n{as_answer(row['attempt'], 'instruct')}"

    def _offer(self, text: str) -> str:
        """The answer that the text offers, or ""."""
        answer = answer_text(text, self.style) or ""
        return (last_boxed(answer) or answer).strip()

    def rewards(self, row: Row, text: str) -> dict[str, float]:
        """`solved` as in `grade`; `format`: the text is one reasoning block and then one answer block, nothing else."""
        return {"solved": self.grade(row, text)["solved"], "format": float(two_blocks(text))}

    def grade(self, row: Row, text: str) -> dict[str, float]:
        """`solved`: the answer offered equals the row's, as numbers where both are numbers, else as texts; 0.0 where
        the row has none. `answered`: an answer that is not blank was offered, in answer tags (bare: in any way).

        The answer offered is the last box inside the last answer tags, or all that they hold. Only spelling is
        forgiven (see `_canonical`): `2x` is not `x + x`, and `N = 21` is not `21`.
        """
        offer = self._offer(text)
        solved = row["answer"] is not None and _canonical(offer) == _canonical(row["answer"]) != ""
        return {"solved": float(solved), "answered": float(offer != "")}

    def has_reference(self, row: Row) -> bool:
        return row["answer"] is not None

    def problem_key(self, row: Row) -> str:
        """The question, whatever its spacing and capitals."""
        return question_key(row["question"])

    def solution_key(self, row: Row) -> str | None:
        return None

    def baselines(self, row: Row) -> dict[str, str]:
        """`empty`: nothing. No answer fits many questions."""
        return {"empty": ""}


def _text(record: dict[str, Any], key: str, where: str) -> str | None:
    """The text under `key` without surrounding space; None where it is absent, null or blank."""
    value = record.get(key)
    if not isinstance(value, str | None):
        raise DataError(f"{where}: {key} = {value!r:.60}: a text was expected; write it as a JSON string")
    return (value or "").strip() or None


def _number_or_text(value: Any) -> str | None:
    """A short answer is often stored as a number. Anything else is no answer that could be compared."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    return value.strip() or None if isinstance(value, str) else None


def _first_trajectory(record: dict[str, Any], where: str) -> str | None:
    value = record.get("thinking_trajectories")
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
        raise DataError(
            f"{where}: thinking_trajectories = {value!r:.60}: a list of texts was expected; "
            'write ["..."], or put a single text under "thinking"'
        )
    return value[0].strip() or None if value else None


def _short_answer(text: str | None) -> str | None:
    """The last box of a worked solution, or what its last line says behind ####, or all of it where it is one short line."""
    if text is None:
        return None
    last = text.rsplit("\n", 1)[-1].strip()
    if last.startswith("####"):
        text = last.removeprefix("####").strip()
    short = len(text) <= _SHORT and "\n" not in text
    return last_boxed(text) or (text if short else None) or None


def _canonical(answer: str) -> Fraction | str:
    r"""One spelling for answers that differ in spelling only.

    Forgiven: spaces that separate no words, a final period, surrounding $ $, \( \), \[ \] or \text{ }. Integers,
    decimals, a/b and \frac{a}{b} become numbers, with or without commas for thousands. LaTeX of the layout is forgiven, too:
    \left and \right, thin spaces, \$ and degrees, and braces that are left out, as in \frac43 and \sqrt3. Whether two formulas
    are worth the same is not asked.
    """
    answer = _LAYOUT.sub("", answer.replace("\\ ", " "))
    answer = _BARE_NUMERATOR.sub(r"\\frac{\1}", _FRACTION_NAME.sub(r"\\frac", answer))
    answer = _BARE_ROOT.sub(r"\\sqrt{\1}", _BARE_DENOMINATOR.sub(r"\1{\2}", answer))
    text = re.sub(r"(?<!\w) | (?!\w)", "", " ".join(answer.split())).removesuffix(".")
    for left, right in _WRAPPERS:
        inside = text.removeprefix(left).removesuffix(right)
        # `$x$ or $y$` begins and ends with a mark too, but is not one thing in a wrapper.
        if len(inside) == len(text) - len(left) - len(right) and right not in inside:
            text = inside.strip().removesuffix(".")
    if len(text) > _LONGEST_NUMBER:
        return text
    number = _FRAC.sub(r"\1\2/\3", text)
    return Fraction(number.replace(",", "")) if _NUMBER.fullmatch(number) else text
