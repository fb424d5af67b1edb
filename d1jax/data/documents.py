"""Documents of plain text: from JSONL, text files, folders and patterns; from the hub as they come.

A source is named as in `adapt.data`. Nothing in a file is executed.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from d1jax.config import UserError
from d1jax.files import distinct

KEY = "text"  # where a JSON object has its document
HEAD = 2**16  # bytes that tell a binary file
GZIP = b"\x1f\x8b"


def files_of(source: str, setting: str) -> list[Path]:
    """The files of a source, in the order of their names. Raises UserError where there are none."""
    path = Path(source)
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.is_file() and not _hidden(file.relative_to(path))]
    elif path.is_file():
        found = [path]
    else:
        found = [Path(name) for name in glob.glob(source, recursive=True) if Path(name).is_file()]
    if not found:
        raise UserError(
            f"config: {setting}: {source!r} is no file, no folder with files and no pattern that matches any"
        )
    return sorted(found)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def documents(source: str, setting: str) -> Iterator[tuple[str, str]]:
    """(where it stands, its text) of every document that is not empty: a text file is one, a line of a .jsonl is one.

    Raises UserError for a file that is not text in UTF-8, and for a line that is no JSON object with a text under "text".
    """
    for file in files_of(source, setting):
        text = _text_of(file, setting)
        if file.suffix != ".jsonl":
            if text.strip():
                yield str(file), text
            continue
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                found = _record(line, f"{file}:{number}", setting)
                if found.strip():
                    yield f"{file}:{number}", found


def _text_of(file: Path, setting: str) -> str:
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise UserError(f"config: {setting}: {file} cannot be read ({error.strerror})") from None
    if b"\0" in raw:
        raise UserError(f"config: {setting}: {file} is a binary file; name text files, e.g. by a pattern")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"config: {setting}: {file} is not UTF-8 (byte {error.start}); convert it, or leave it out by a pattern"
        ) from None


def check_is_text(file: Path, setting: str) -> None:
    """Raises UserError for a file that begins as none of text does: a compressed one, an image."""
    try:
        with open(file, "rb") as stream:
            head = stream.read(HEAD)
    except OSError as error:
        raise UserError(f"config: {setting}: {file} cannot be read ({error.strerror})") from None
    if b"\0" in head or head.startswith(GZIP):
        raise UserError(f"config: {setting}: {file} is a binary file; name text files, e.g. by a pattern")


def _record(line: str, where: str, setting: str) -> str:
    try:
        value = json.loads(line, object_pairs_hook=distinct)
    except (ValueError, RecursionError) as error:
        raise UserError(f"config: {setting}: {where}: not readable as JSON ({error})") from None
    return text_of(value, where, setting)


def text_of(record: Any, where: str, setting: str) -> str:
    """The document of a record. Raises UserError where it has none."""
    text = record.get(KEY) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise UserError(f'config: {setting}: {where}: no text under "{KEY}"; write {{"{KEY}": "..."}}')
    return text


def digests(source: str, setting: str) -> dict[Path, bytes]:
    """{file: SHA-256 of its contents} of a source."""
    found = {}
    for file in files_of(source, setting):
        try:
            with open(file, "rb") as stream:
                found[file] = hashlib.file_digest(stream, "sha256").digest()
        except OSError as error:
            raise UserError(f"config: {setting}: {file} cannot be read ({error.strerror})") from None
    return found


def fingerprint(source: str, files: Mapping[Path, bytes]) -> dict[str, Any]:
    """{"source", "rows": number of files, "sha256" of names and contents}: tells a corpus from another one under its name.

    files: its `digests`.
    """
    digest = hashlib.sha256()
    for file, contents in files.items():
        digest.update(file.name.encode())
        digest.update(contents)
    return {"source": source, "rows": len(files), "sha256": digest.hexdigest()}
