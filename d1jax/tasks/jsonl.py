"""Bring your own data: one JSON object per line, plain or gzipped, checked line by line by the task that will use
it.
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from d1jax.files import distinct
from d1jax.tasks.task import DataError, Row, Task


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    number = 0
    if "\0" in str(path):
        raise DataError(f"{str(path)!r}: a path cannot hold a NUL; check the path in the config")
    try:
        if path.is_fifo():
            raise DataError(f"{path}: is a pipe, which can be read once and may never end; write the rows into a file")
        # utf-8-sig reads plain UTF-8 too, and forgives the byte-order mark that Windows editors write.
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                yield number, line
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file; check the path in the config (it is relative to {Path.cwd()})"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number + 1}: not UTF-8 text ({error.reason}); save the file as UTF-8") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}:{number + 1}: cannot be unpacked ({error}); "
            "compress it again with gzip, or drop .gz from the name of a plain file"
        ) from None
    except OSError as error:
        raise DataError(
            f"{path}:{number + 1}: cannot be read ({error.strerror or error}); check that it is a readable file"
        ) from None


def records_of(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`file:line`, record) of each line that is not blank. Raises DataError."""
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line, object_pairs_hook=distinct)
        except (ValueError, RecursionError) as error:
            excerpt = line.strip()[:60]
            raise DataError(f"{where}: not valid JSON ({error}): {excerpt!r}; write one JSON object per line") from None
        if not isinstance(record, dict):
            kind = type(record).__name__
            raise DataError(
                f'{where}: a JSON object was expected, not a {kind}; write lines such as {{"key": "value"}}'
            )
        yield where, record


def parse_records(records: Iterable[tuple[str, dict[str, Any]]], task: Task, source: str, empty: str) -> list[Row]:
    """The rows that `task.parse` makes of (where, record) pairs.

    Raises DataError: the task rejects a record or leaves all of them out, two rows have one value of the task's `unique_field`,
    or there are no records (the message is `empty`).
    """
    unique = getattr(task, "unique_field", None)
    first_places: dict[str, str] = {}
    parsed = []
    for where, record in records:
        row = task.parse(record, where)
        if unique is not None and row is not None and row.get(unique) is not None:
            _check_unique(unique, row[unique], where, first_places)
        parsed.append(row)
    rows = [row for row in parsed if row is not None]
    if parsed and not rows:
        raise DataError(f"{source}: all {len(parsed)} rows are outside of what the task is configured for ({task})")
    if not rows:
        raise DataError(empty)
    return rows


def _check_unique(field: str, value: Any, where: str, first_places: dict[str, str]) -> None:
    """Adds a row's value to those that came before it: {value as JSON: where it stands}. Raises DataError where it is among them."""
    first = first_places.setdefault(json.dumps(value, sort_keys=True, default=repr), where)
    if first != where:
        raise DataError(
            f"{where}: {field} = {value!r:.60} is that of {first}, too; take one of the two rows out, or give it {field} of its own "
            "(a name that several rows share belongs under another key)"
        )


def read_rows(path: str | Path, task: Task) -> list[Row]:
    """All rows of a `.jsonl` or `.jsonl.gz` file, as `task.parse` understands them. Blank lines are skipped.

    Raises DataError with the file, the line and the cure: the file is missing, unreadable or empty, a line is not a
    JSON object, the task rejects a record, or it leaves all of them out.
    """
    path = Path(path)
    empty = f"{path}:1: the file holds no rows; write one JSON object per line"
    return parse_records(records_of(path), task, str(path), empty)
