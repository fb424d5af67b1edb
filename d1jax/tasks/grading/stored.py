"""Stored generations, to be graded again without a model: the fields that a record has, whoever wrote it."""

from typing import Any

from d1jax.tasks.task import DataError

LAYOUTS = (("question", "ground_truth", "generations"), ("prompt", "answer", "completion"))
"""(problem, reference, text) as d1 stores them, and plain."""


def completion_of(record: dict[str, Any], where: str) -> tuple[Any, Any, str]:
    """(problem, reference answer, text) of a record in one of LAYOUTS. The reference may be null. Raises DataError."""
    problem, reference, text = _nearest_layouts(record)[0]
    for key in (problem, reference, text):
        if key not in record:
            raise DataError(
                f"{where}: no {key!r} among the keys ({', '.join(map(repr, record)) or 'none'}); a row is "
                + " or ".join("{" + ", ".join(layout) + "}" for layout in LAYOUTS)
            )
    if not isinstance(record[problem], str):
        raise DataError(f"{where}: {problem} = {record[problem]!r:.60}: a text was expected; write it as a JSON string")
    return record[problem], record[reference], text_of(record, where)


def text_of(record: dict[str, Any], where: str) -> str:
    """The generated text of a record. Raises DataError where it has none."""
    key = next((layout[2] for layout in _nearest_layouts(record) if layout[2] in record), None)
    if key is None:
        raise DataError(
            f"{where}: no generated text among the keys ({', '.join(map(repr, record)) or 'none'}); write it under "
            + " or ".join(layout[2] for layout in LAYOUTS)
        )
    if not isinstance(record[key], str):
        raise DataError(f"{where}: {key} = {record[key]!r:.60}: a text was expected; write one row for each text")
    return record[key]


def _nearest_layouts(record: dict[str, Any]) -> list[tuple[str, str, str]]:
    """LAYOUTS, that first of which a record has the most fields: the one that is missing is then named."""
    return sorted(LAYOUTS, key=lambda layout: -sum(key in record for key in layout))


def given_text(record: dict[str, Any], key: str, where: str, cure: str) -> str:
    """The text under a key without surrounding space. Raises DataError where it is absent, blank or none."""
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"{where}: {key} = {value!r:.60}: a text was expected among the keys {', '.join(record)[:80] or '(none)'}; {cure}"
        )
    return value.strip()
