"""Metrics of a run: one JSON object a line in `metrics.jsonl`, mirrored to trackers where that is asked for.

The JSONL file is the record: the report, the tests and resuming read it. Trackers are views that nothing depends on.
"""

import json
import math
import numbers
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from d1jax.config import UserError
from d1jax.files import atomic_write, is_writer, to_json
from d1jax.telemetry.trackers import Trackers

FILE_NAME = "metrics.jsonl"
_RESERVED = ("stage", "step")
# JSON has no NaN or infinity, and a diverged run is exactly when the log must stay readable.
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class MetricsLog:
    """Appends to `run_dir/metrics.jsonl`; use it as a context manager.

    Lines are flushed one by one, so a killed run loses at most the line being written. Such a torn line is removed
    when the log is opened again, because appending to it would spoil the next line too.
    """

    def __init__(self, run_dir: str | os.PathLike, trackers: Trackers | None = None):
        self.path = Path(run_dir) / FILE_NAME
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if _ends_torn(self.path):
            atomic_write(self.path, "".join(map(_line, read_metrics(self.path))))
        self._file = self._open()
        self._trackers = trackers

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc) -> None:
        self.close()

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Append one line; `values` are Python, NumPy or JAX scalars. Raises ValueError for anything else."""
        scalars = {key: _scalar(key, value, stage, step) for key, value in values.items()}
        try:
            self._file.write(_line({"stage": stage, "step": int(step), **scalars}))
        except OSError as error:  # which does not say what was written to
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        if self._trackers is not None:
            self._trackers.log(stage, int(step), scalars)

    def to_disk(self) -> None:
        """Before a checkpoint is saved: else a power cut could leave the checkpoint without the rows that led to it."""
        if is_writer():  # a device cannot be synced
            os.fsync(self._file.fileno())

    def in_place(self) -> bool:
        """Whether the file that is written is still the one at `path`: not where the run directory was renamed or removed."""
        if not is_writer():
            return True
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path))
        except OSError:
            return False

    def whereabouts(self) -> str:
        """Where that file is now, as far as the system tells."""
        try:
            return os.readlink(f"/proc/self/fd/{self._file.fileno()}")
        except OSError:
            return "an unknown place"

    def rewind(self, kept: Mapping[str, int]) -> None:
        """Forget what a resumed run will write again: stages not in `kept`, and steps after `kept[stage]`.

        Trackers are left alone: they only append, and a resumed run draws over the repeated steps.
        """
        self._file.close()
        lines = read_metrics(self.path)
        left = [x for x in lines if x.get("stage") in kept and x.get("step", 0) <= kept[x["stage"]]]
        atomic_write(self.path, "".join(map(_line, left)))
        self._file = self._open()

    def close(self) -> None:
        self._file.close()
        if self._trackers is not None:
            self._trackers.close()
            self._trackers = None

    def _open(self):
        # buffering=1: every line reaches the file when it ends
        return open(self.path if is_writer() else os.devnull, "a", encoding="utf-8", buffering=1)


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """All lines of a metrics file, with "nan", "inf" and "-inf" turned back into floats; [] if there is no file.

    The last line may be torn (the run was killed while writing) and is then left out.
    Raises UserError, naming file and line, if any other line is not a JSON object.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, raw in enumerate(lines, start=1):
        if not raw.strip():
            continue
        try:
            row = json.loads(raw)
            if not isinstance(row, dict):
                raise TypeError(f"a {type(row).__name__}")
        except (ValueError, TypeError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
            if number == len(lines):
                break
            start = raw[:60].decode("utf-8", "replace")
            problem = f"{path}, line {number}: {start!r} is not a JSON object ({error}); delete the line"
            raise UserError(problem) from error
        rows.append({key: value if key == "stage" else _number(value) for key, value in row.items()})
    return rows


def format_metrics(values: Mapping[str, float]) -> str:
    """`loss 1.234  grad_norm 0.5`: a few significant digits, for people."""
    return "  ".join(f"{key} {_short(value)}" for key, value in values.items())


def _short(value: float) -> str:
    if isinstance(value, numbers.Integral):
        return str(int(value))
    value = float(value)
    return f"{value:.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:.4g}"


def _number(value: Any) -> Any:
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def _scalar(key: str, value: Any, stage: str, step: int) -> int | float:
    if key in _RESERVED:
        raise ValueError(f"metrics: {key!r} at {stage} step {step} is a reserved name; give the metric another one")
    if isinstance(value, numbers.Integral):  # includes bool and NumPy integers
        return int(value)
    try:
        if isinstance(value, str):  # float("1") works, but a string here is a mistake in the caller
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(
            f"metrics: {key} = {value!r} at {stage} step {step} is not a scalar; reduce it to one number first"
        ) from None


def _line(row: Mapping[str, Any]) -> str:
    finite = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return to_json(finite, ensure_ascii=True) + "\n"


def _ends_torn(path: Path) -> bool:
    if not path.exists() or path.stat().st_size == 0:
        return False
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"
