"""Data sets in the Hugging Face layout: an id on the hub, or a local folder of data files.

Both are read with the `datasets` library, which is optional and imported on first use.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from d1jax.tasks.jsonl import parse_records
from d1jax.tasks.task import DataError, Row, Task

HUB = "hub:"
_FORM = (
    "write hub:NAME or hub:NAME:SPLIT, where NAME is owner/name or owner/name/configuration on the hub, or a folder, as in "
    "hub:simplescaling/s1K"
)
_INSTALL = "pip install 'd1jax[data]'"


def read_hub(source: str, task: Task) -> list[Row]:
    """All rows of `hub:NAME` or `hub:NAME:SPLIT` (default split: train), as `task.parse` understands them.

    NAME is a Hugging Face dataset id with its owner, or a local folder of data files; SPLIT may be a slice, such as
    train[:100]. Nulls count as absent.

    Raises DataError with the source, the cause and the cure: the library is missing, the data set or its split cannot
    be loaded, the task rejects a record, or it leaves all of them out.
    """
    name, _, split = source.removeprefix(HUB).partition(":")
    folder = Path(name)
    local = name != "" and folder.is_dir()
    # A name without an owner could mean one of the library's file readers (json, pandas), which search the working
    # directory; the one for pandas unpickles what it finds.
    if not source.startswith(HUB) or source.endswith(":") or not (local or name.count("/") in (1, 2)):
        raise DataError(f"{source}: no such folder, and not the id of a data set; {_FORM}")
    records = _records(source, str(folder.resolve()) if local else name, split or "train")
    return parse_records(records, task, source, empty=f"{source}: the split holds no rows; name another split")


def read_parquet(source: str, task: Task) -> list[Row]:
    """All rows of a local `.parquet` file, as `task.parse` understands them. Raises DataError as `read_hub` does."""
    if not Path(source).is_file():
        raise DataError(f"{source}: no such file; check the path in the config (it is relative to {Path.cwd()})")
    records = _records(source, "parquet", "train", data_files=source)
    return parse_records(records, task, source, empty=f"{source}: the file holds no rows")


def _records(source: str, name: str, split: str, **files: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{source}: reading it needs the datasets library ({_first_line(error)}); {_INSTALL}") from None
    if int(datasets.__version__.split(".")[0]) < 4:  # older versions can run a data set's own Python script
        raise DataError(f"{source}: datasets {datasets.__version__} is older than version 4; {_INSTALL}")
    try:
        for index, record in enumerate(datasets.load_dataset(*_with_configuration(name), split=split, **files)):
            # A table has every column in every row: null is how it says that a record lacks a key.
            yield f"{source} row {index}", {key: value for key, value in record.items() if value is not None}
    except Exception as error:  # files, network, formats: the library documents no common base class
        cause = ": ".join(_first_line(e) for e in (error, error.__cause__) if e is not None)
        raise DataError(
            f"{source}: cannot be loaded ({cause}); check the name, the split and the connection: {_FORM}. Without a connection give a "
            "JSONL file of the rows instead"
        ) from None


def _with_configuration(name: str) -> tuple[str, ...]:
    """(dataset,) or (dataset, configuration) of owner/name/configuration; a local folder is one name."""
    owner, _, rest = name.partition("/")
    dataset, _, configuration = rest.partition("/")
    return (f"{owner}/{dataset}", configuration) if configuration and not Path(name).is_dir() else (name,)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
