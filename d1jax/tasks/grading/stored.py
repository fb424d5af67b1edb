"""Stored generations, to be graded again without a model: the fields that a record has, whoever wrote it."""

from typing import Any

from d1jax.tasks.task import DataError

LAYOUTS = (("question", "ground_truth", "generations"), ("prompt", "answer", "completion"))
"""(problem, reference, text) as d1 stores them, and plain."""


def completion_of(record: dict[str, Any], where: str) -> tuple[Any, Any, str]:
    """(problem, reference answer, text) of a record in one of LAYOUTS. The reference may be null. Raises DataError."""
    problem, reference, text = LAYOUTS[0] if "generations" in record else LAYOUTS[1]
    for key in (problem, reference, text):
        if key not in record:
            raise DataError(
                f"{where}: no {key!r} among the keys ({', '.join(map(repr, record)) or 'none'}); a row is "
                + " or ".join("{" + ", ".join(layout) + "}" for layout in LAYOUTS)
            )
    if not isinstance(record[text], str):
        raise DataError(f"{where}: {text} = {record[text]!r:.60}: a text was expected; write one row for each text")
    if not isinstance(record[problem], str):
        raise DataError(f"{where}: {problem} = {record[problem]!r:.60}: a text was expected; write it as a JSON string")
    return record[problem], record[reference], record[text]


def given_text(record: dict[str, Any], key: str, where: str, cure: str) -> str:
    """The text under a key without surrounding space. Raises DataError where it is absent, blank or none."""
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"{where}: {key} = {value!r:.60}: a text was expected among the keys {', '.join(record)[:80] or '(none)'}; {cure}"
        )
    return value.strip()
