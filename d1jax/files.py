"""Write beside, then rename: a crash leaves the old file or directory or the new one, never half of one."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

UMASK = os.umask(0)  # it can only be read by setting it, so once, before there are threads
os.umask(UMASK)

_writes = True  # of several processes that train together one does


def leave_to_another() -> None:
    """From now on another process writes what all of them would: nothing of what is below leaves a file here."""
    global _writes
    _writes = False


def is_writer() -> bool:
    """Whether files are written by this process."""
    return _writes


def atomic_write(path: Path, text: str) -> None:
    """Writes a text file as UTF-8, and makes its folder. Raises OSError that names the file; the old one is whole then."""
    if not _writes:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    try:
        # "replace": model output may hold lone surrogates, which UTF-8 cannot write
        with open(beside, "w", encoding="utf-8", errors="replace") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink()  # half a file on a full disk helps nobody
        raise OSError(error.errno, f"{error.strerror}, while it was written", str(path)) from None


def to_json(value: Any, **how: Any) -> str:
    """JSON that every reader takes: a number that is not finite, for which JSON has no word, becomes null."""
    return json.dumps(_finite(value), allow_nan=False, **{"ensure_ascii": False, **how})


def _finite(value: Any) -> Any:
    if isinstance(value, float):  # also NumPy's float64
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def write_json(path: Path, value: Any) -> None:
    """Indented, but a list of numbers stays on one line. Line breaks within strings are escaped, so none is a list's."""
    text = to_json(value, indent=2)
    atomic_write(path, re.sub(r"\[\n([-+.\deE,\s]+)\]", lambda found: f"[{' '.join(found[1].split())}]", text) + "\n")


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    atomic_write(path, "".join(to_json(row) + "\n" for row in rows))


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs, for `json.loads(text, object_pairs_hook=distinct)`. Raises ValueError for a key given twice:
    readers disagree on which one counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} stands there twice")
    return found


def check_new(path: Path) -> None:
    """Raises FileExistsError where `path` exists and is not an empty directory, PermissionError where it cannot be made."""
    empty = path.is_dir() and not any(path.iterdir())
    if path.is_symlink() or (path.exists() and not empty):
        raise FileExistsError(f"{path} exists already; choose another directory, or move that one away")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise PermissionError(f"{path} cannot be made: {above} is not a directory that may be written to")


@contextmanager
def new_directory(path: Path, everywhere: bool = False) -> Iterator[Path]:
    """`with new_directory(out) as beside:` fill `beside`; it becomes `out` at the end, and is gone if anything went wrong.

    Raises FileExistsError, before anything is written, where `path` exists and is not an empty directory. Where another process writes,
    what is filled here goes; `everywhere`: it stays, because each process needs it where it runs (a cache).
    """
    if not _writes and not everywhere:
        with tempfile.TemporaryDirectory() as beside:
            yield Path(beside)
        return
    check_new(path)
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.unfinished-", dir=path.parent))
    try:
        yield beside
        for written in (*beside.rglob("*"), beside):
            # Temporary directories and safetensors files are private; the result has the usual permissions.
            written.chmod((0o777 if written.is_dir() else 0o666) & ~UMASK)
            _to_disk(written)
        os.replace(beside, path)
        _to_disk(path.parent)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _to_disk(path: Path) -> None:
    """Before the rename: else a power cut could leave a final name with empty files."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
