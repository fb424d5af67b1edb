"""Windows of packed text in the order in which they are learnt: from memory, or from a stream.

Both are functions of what is saved: the order in memory of (seed, position), a stream of its state.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from d1jax.config import UserError
from d1jax.data.documents import check_is_text, files_of, text_of
from d1jax.data.packing import Packer, Windows, encode
from d1jax.data.tokenizers import Tokenizer


class WindowOrder:
    """An endless order over the windows of several sources, by their shares; each source is shuffled anew every time it is through."""

    def __init__(self, sources: Sequence[Windows], shares: Sequence[float], seed: int) -> None:
        import grain  # lazily: generating and evaluating need no data library

        self._sources = sources
        orders = [
            grain.MapDataset.range(len(windows.tokens_NT)).seed(seed + place).shuffle().repeat().map(_of_source(place))
            for place, windows in enumerate(sources)
        ]
        self._order = grain.MapDataset.mix(orders, weights=list(shares))

    def take(self, start: int, count: int) -> np.ndarray:
        """The windows at the positions start .. start + count, [count, T]."""
        places = [self._order[position] for position in range(start, start + count)]
        return np.stack([self._sources[source].tokens_NT[row] for source, row in places])


def _of_source(place: int) -> Any:
    return lambda row: (place, row)


class TextStream:
    """Windows of several sources as they are read, by their shares; a source that is through begins again.

    `state` is a JSON object; a stream that is made with it goes on with the very next window.
    """

    def __init__(
        self,
        shares: Mapping[str, float],
        tokenizer: Tokenizer,
        length: int,
        setting: str,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        saved = state or {}
        self._shares = shares
        self._given = {source: saved.get(source, {}).get("given", 0) for source in shares}
        self._sources = {source: _Source(source, tokenizer, length, setting, saved.get(source)) for source in shares}

    @property
    def state(self) -> dict[str, Any]:
        """Where each source is, and how many windows it gave."""
        return {source: {**reader.state, "given": self._given[source]} for source, reader in self._sources.items()}

    def take(self, count: int) -> np.ndarray:
        """The next windows, [count, T]: always of the source that is furthest behind its share."""
        windows = []
        for _ in range(count):
            source = min(self._shares, key=lambda name: (self._given[name] + 1) / self._shares[name])
            self._given[source] += 1
            windows.append(next(self._sources[source]))
        return np.stack(windows)


class _Source(Iterator[np.ndarray]):
    """The windows of one source, without end."""

    def __init__(
        self, source: str, tokenizer: Tokenizer, length: int, setting: str, state: Mapping[str, Any] | None
    ) -> None:
        self._name, self._tokenizer, self._setting = source, tokenizer, setting
        self._packer = Packer(length, tokenizer.special.end, state["packer"] if state else None)
        self._ready = deque(state["ready"] if state else ())
        self._records = streamed(source, setting)
        if state:
            self._records.load_state_dict(state["records"])
        self._iterator = iter(self._records)
        self._read = bool(state)  # some text of the source, since it was opened; one that goes on may be at its end

    @property
    def state(self) -> dict[str, Any]:
        return {"records": self._records.state_dict(), "packer": self._packer.state, "ready": list(self._ready)}

    def __next__(self) -> np.ndarray:
        while not self._ready:
            self._read_document()
        return np.array(self._ready.popleft(), np.int32)

    def check(self) -> None:
        """Raises UserError where the first documents cannot be read, or there is no text."""
        while not self._read:
            self._read_document()

    def _read_document(self) -> None:
        try:
            record = next(self._iterator)
        except StopIteration:
            if not self._read:
                raise UserError(f"config: {self._setting}: {self._name!r} has no text") from None
            self._records = streamed(self._name, self._setting)
            self._iterator, self._read = iter(self._records), False
            return
        except Exception as error:  # of a reader, a network, a broken file: the library has no class of its own
            raise UserError(f"config: {self._setting}: {self._name!r} cannot be read ({error})") from None
        text = text_of(record, self._name, self._setting)
        if not text.strip():
            return  # as in memory
        self._read = True
        ids = encode(self._tokenizer, text, self._name, self._setting)
        self._ready += [window for window, _ in self._packer.add(ids, len(text.encode()))]


def check_stream(source: str, tokenizer: Tokenizer, length: int, setting: str) -> None:
    """Reads the first document of a source. Raises UserError where it cannot, or there is none with a text."""
    _Source(source, tokenizer, length, setting, None).check()


def streamed(source: str, setting: str) -> Any:
    """The records {"text": ...} of a source as `datasets` streams them. Raises UserError where it cannot."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"config: {setting}: streaming needs the datasets library ({error}); pip install 'd1jax[data]'"
        ) from None
    try:
        if source.startswith("hub:"):
            name, _, configuration = source.removeprefix("hub:").partition(":")
            return datasets.load_dataset(name, configuration or None, split="train", streaming=True)
        found = files_of(source, setting)
        for file in found:
            check_is_text(file, setting)
        files = [str(file) for file in found]
        lines = all(file.endswith(".jsonl") for file in files)
        if not lines and any(file.endswith(".jsonl") for file in files):
            raise UserError(f"config: {setting}: {source!r} has .jsonl and other files; name them apart")
        more = {} if lines else {"sample_by": "document"}
        counts = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
        # The library reports every load to its servers, also of one's own files, and without a network each report takes seconds.
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
        try:
            return datasets.load_dataset(
                "json" if lines else "text", data_files=files, split="train", streaming=True, **more
            )
        finally:
            datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts
    except UserError:
        raise
    except Exception as error:  # no such data set, no network
        raise UserError(f"config: {setting}: {source!r} cannot be opened ({error})") from None
