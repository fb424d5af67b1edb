"""python tools/leak_check.py --task sudoku --train FILE --test FILE: what a training source and a test source have in common.

--task NAME      sudoku (puzzle; solution grid), countdown (numbers in any order, and target), arithmetic (terms in any order),
                 my/file.py:Mine (its problem_key and solution_key); gsm8k, math, code, traces, s1k, jsonl (text: equal but for its
                 layout; a run of words that both hold)
--train SOURCE   FILE.jsonl, FILE.jsonl.gz, hub:NAME:SPLIT, or generated (sudoku, countdown, arithmetic)
--test SOURCE
--ngram 13       words in a row that count as shared text; 0 looks for equal texts only
--field NAME     of a text's rows: where the text stands [question, problem, prompt, messages or text]
--rows 10000     of a source that is generated, of each split
--lines 10       line numbers that are printed, the first ones of both files

Prints one JSON line. The exit code is 1 where there is an overlap, 0 where there is none, 2 for a mistake in the arguments or rows.
"""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from d1jax.config import UserError
from d1jax.config.flags import split_flags
from d1jax.tasks import make, read_source
from d1jax.tasks.benchmarks import GENERATED
from d1jax.tasks.task import DataError
from d1jax.telemetry.command_line import exit_code

NAMES = ("task", "train", "test", "ngram", "field", "rows", "lines")
TEXTS = ("gsm8k", "math", "code", "traces", "s1k", "jsonl")
FIELDS = ("question", "problem", "prompt", "messages", "text")
OPTIONS: dict[str, dict[str, Any]] = {
    "sudoku": {},
    "countdown": {"numbers": (2, 3, 4, 5, 6)},
    "arithmetic": {"terms": (2, 3, 4, 5, 6, 7, 8)},
}
GENERATED_OPTIONS: dict[str, dict[str, Any]] = {
    "sudoku": {},
    "countdown": {"numbers": (3, 4)},
    "arithmetic": {"terms": (3, 4)},
}
# What says nothing: LaTeX's spaces and sizes, dollars and braces, and punctuation that is not inside a number.
_LAYOUT = re.compile(r"\\[,;:! ]|\\(?:left|right|displaystyle)(?![a-z])|[\s${}?\"“”]|(?<![0-9])[.,]|[.,](?![0-9])")

Numbered = tuple[int, Any]  # (number of the line, what was read from it)
Keys = Callable[[Any], Sequence[str]]


def main(argv: Sequence[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    return exit_code(lambda: _check(argv))


def _check(argv: Sequence[str]) -> int:
    own, rest = split_flags(argv, NAMES)
    if rest:
        raise UserError(f"command line: {rest[0]} is not one of --{', --'.join(NAMES)}")
    for name in ("task", "train", "test"):
        if not own.get(name):
            raise UserError(f"--{name} is missing; e.g. --task gsm8k --train train.jsonl --test test.jsonl")
    if "rows" in own and GENERATED not in (own["train"], own["test"]):
        raise UserError("--rows is for sources that are generated, and neither of these is; leave it out")
    lines = _number(own, "lines", 10)
    train, test, kinds = _sources(own)
    overlaps = {name: overlap(train, test, keys, lines) for name, keys in kinds.items()}
    rows = {"train": len(train), "test": len(test)}
    print(
        json.dumps(
            {"task": own["task"], "train": own["train"], "test": own["test"], "rows": rows, "overlaps": overlaps}
        )
    )
    return int(any(one["keys"] for one in overlaps.values()))


def _number(own: Mapping[str, str], name: str, default: int) -> int:
    text = own.get(name, str(default))
    if not re.fullmatch("[0-9]{1,9}", text):
        raise UserError(f"--{name} {text!r} is not a whole number from 0 on")
    return int(text)


# -- what is compared ------------------------------------------------------------------------------------------------------


def overlap(train: Sequence[Numbered], test: Sequence[Numbered], keys: Keys, lines: int = 10) -> dict[str, Any]:
    """{"keys": how many are in both, "train", "test": rows of each that have one, "train_lines", "test_lines": the first of them}."""
    posed: dict[str, list[int]] = {}
    for number, row in test:
        for key in set(keys(row)):
            posed.setdefault(key, []).append(number)
    shared: set[str] = set()
    train_lines = []
    for number, row in train:
        found = {key for key in keys(row) if key in posed}
        if found:
            train_lines.append(number)
            shared |= found
    test_lines = sorted({number for key in shared for number in posed[key]})
    return {
        "keys": len(shared),
        "train": len(train_lines),
        "test": len(test_lines),
        "train_lines": train_lines[:lines],
        "test_lines": test_lines[:lines],
    }


def words(text: str) -> list[str]:
    """The words and numbers of a text, whatever its capitals, spacing and punctuation."""
    return re.findall(r"\w+", _plain(text))


def equal_text(text: str) -> list[str]:
    """Equal for texts that differ in capitals, spacing and punctuation only; the signs of a formula count, x + 1 is not x - 1."""
    return [_LAYOUT.sub("", _plain(text))]


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def ngrams(text: str, n: int) -> Iterator[str]:
    """Every run of n words; none of a text that is shorter."""
    found = words(text)
    return (" ".join(found[place : place + n]) for place in range(len(found) - n + 1))


# -- reading -----------------------------------------------------------------------------------------------------------------


def _sources(own: Mapping[str, str]) -> tuple[list[Numbered], list[Numbered], dict[str, Keys]]:
    """(training rows, test rows, {kind of overlap: its keys}). Raises UserError and DataError."""
    name, size = own["task"], _number(own, "ngram", 13)
    if name in TEXTS:
        reader = _Reader(_TextOf(own.get("field")))
        kinds: dict[str, Keys] = {"text": equal_text}
        if size:
            kinds[f"{size}-gram"] = lambda text: list(ngrams(text, size))
        return _read(own["train"], reader), _read(own["test"], reader), kinds
    for flag in ("ngram", "field"):
        if flag in own:
            raise UserError(f"--{flag} is for texts ({', '.join(TEXTS)}), not for {name}")
    return _of_task(name, own)


def _of_task(name: str, own: Mapping[str, str]) -> tuple[list[Numbered], list[Numbered], dict[str, Keys]]:
    if name not in OPTIONS and not name.rpartition(":")[0].endswith(".py"):
        raise UserError(
            f"--task {name!r} is not one of {', '.join([*OPTIONS, *TEXTS])}, nor of the form my/file.py:Mine"
        )
    try:
        task = make(name, **OPTIONS.get(name, {}))
        made = {
            split: _generated(name, split, _number(own, "rows", 10_000))
            if own[split] == GENERATED
            else _read(own[split], _Reader(task.parse))
            for split in ("train", "test")
        }
    except DataError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from None
    kinds: dict[str, Keys] = {"problem": lambda row: [task.problem_key(row)]}
    if any(task.solution_key(row) is not None for _, row in made["test"]):
        kinds["solution"] = lambda row: [key for key in [task.solution_key(row)] if key is not None]
    return made["train"], made["test"], kinds


def _generated(name: str, split: str, count: int) -> list[Numbered]:
    task = make(name, **GENERATED_OPTIONS.get(name, {}))
    return list(enumerate(task.generate(split, count, 0), start=1))


@dataclass(frozen=True)
class _Reader:
    """As a task to `read_source`: keeps with each row the number of its line (of a hub's row: its place, from 0)."""

    of: Callable[[dict[str, Any], str], Any]

    def parse(self, record: dict[str, Any], where: str) -> Numbered | None:
        found = self.of(record, where)
        return None if found is None else (int(re.search(r"\d+$", where)[0]), found)


@dataclass(frozen=True)
class _TextOf:
    """The text of a record: a field, or the first of FIELDS that is there; of a chat, what its user says."""

    field: str | None

    def __call__(self, record: dict[str, Any], where: str) -> str:
        name = self.field or next((key for key in FIELDS if record.get(key) is not None), None)
        value = record.get(name) if name else None
        if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
            value = "\n".join(str(turn.get("content")) for turn in value if turn.get("role") == "user")
        if not isinstance(value, str) or not value.strip():
            asked = f"{self.field} = {value!r:.60}" if self.field else f"none of {', '.join(FIELDS)}"
            raise DataError(
                f"{where}: {asked}: no text among the keys ({', '.join(record)[:80]}); name it with --field NAME"
            )
        return value


def _read(source: str, reader: _Reader) -> list[Numbered]:
    if source == GENERATED:
        raise UserError("texts cannot be generated; name a file or hub:NAME:SPLIT")
    rows: Any = read_source(source, reader)
    return rows


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
