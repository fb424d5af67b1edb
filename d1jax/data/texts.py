"""What a stage on plain text learns from, and what it is measured on: windows in memory, or a stream.

N windows, T tokens of a window, B windows of an update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from d1jax.config import AdaptConfig, UserError
from d1jax.config.adapt import HUB
from d1jax.data.documents import digests, documents, fingerprint
from d1jax.data.packing import Windows, pack
from d1jax.data.text import TextStream, WindowOrder, check_stream
from d1jax.data.tokenizers import Tokenizer

HELD_OUT = "held_out"  # the validation set that is cut from what is learnt


@dataclass(frozen=True)
class Texts:
    """The text of one stage. `learnt` holds the windows of every source; it is empty where they are streamed."""

    config: AdaptConfig
    setting: str  # what messages call it by
    tokenizer: Tokenizer
    seed: int
    learnt: tuple[Windows, ...]
    validation: Mapping[str, Windows]
    data: Mapping[str, dict[str, Any]]  # setting -> what tells the files from others under the same name

    def batches(self, state: Mapping[str, Any] | None = None) -> Batches:
        """The batches of the stage; `state` is where a stream had come to."""
        config = self.config
        if config.streaming:
            stream = TextStream(config.data, self.tokenizer, config.length, self.setting, state)
            return Batches(config.batch_size, None, stream)
        return Batches(config.batch_size, WindowOrder(self.learnt, list(config.data.values()), self.seed), None)


@dataclass(frozen=True)
class Batches:
    """The batches of a stage, in turn: of an order a function of the step, of a stream the next ones."""

    size: int
    order: WindowOrder | None
    stream: TextStream | None

    def take(self, step: int) -> np.ndarray:
        """The windows of an update, [B, T]."""
        if self.stream is not None:
            return self.stream.take(self.size)
        return self.order.take(step * self.size, self.size)

    @property
    def state(self) -> dict[str, Any] | None:
        """What a stream needs to go on; None where the step says it all."""
        return None if self.stream is None else self.stream.state


def read_texts(
    config: AdaptConfig, stage: str, tokenizer: Tokenizer, seed: int, longest: int, log: Callable[[str], None]
) -> Texts:
    """Reads, writes as tokens and packs the text of a stage.

    Raises UserError, before anything is compiled, for what is no text, too little, or longer than the `longest` positions of the model
    (0: no limit).
    """
    setting = f"{stage}.data"
    if not config.data:
        raise UserError(f"config: {setting} is empty; write e.g. {{text.jsonl: 1}}")
    if longest and config.length > longest:
        raise UserError(
            f"config: {stage}.length = {config.length} is more than the {longest} positions of the model; lower it"
        )
    sets = {name: f"{stage}.validation.{name}" for name in config.validation}
    apart = {sets[name]: source for name, source in config.validation.items()}
    files = {setting + f".{source}": source for source in config.data if not source.startswith(HUB)}
    contents = {name: digests(source, name) for name, source in {**files, **apart}.items()}
    data = {name: fingerprint(source, contents[name]) for name, source in {**files, **apart}.items()}
    for name in apart:
        for other in files:
            _check_apart(name, contents[name], other, contents[other])

    end = tokenizer.special.end
    log(f"data: {setting}: token {end} ({tokenizer.pieces([end])[0]!r}) stands between documents")

    def packed(source: str, name: str) -> Windows:
        return pack(documents(source, name), tokenizer, config.length, name, log)

    validation = {
        name: _first(packed(source, sets[name]), config.validation_windows)
        for name, source in config.validation.items()
    }
    if config.streaming:
        for source in config.data:
            check_stream(source, tokenizer, config.length, setting)
        return Texts(config, setting, tokenizer, seed, (), validation, data)
    learnt = [packed(source, setting) for source in config.data]
    if not validation:
        learnt, held = _held_out(learnt, list(config.data), config, setting)
        validation = {HELD_OUT: held}
    return Texts(config, setting, tokenizer, seed, tuple(learnt), validation, data)


def _check_apart(name: str, held: Mapping[Path, bytes], other: str, learnt: Mapping[Path, bytes]) -> None:
    """Raises UserError where a validation set has a file of a source, or no text but the source's. Files that are alike by chance, as
    licences are, may stand in both.
    """
    same = {file.resolve() for file in held} & {file.resolve() for file in learnt}
    if same or set(held.values()) <= set(learnt.values()):
        what = str(min(same)) if same else "all of its text"
        raise UserError(f"config: {name}: {what} is in {other}, too, which is learnt from; give text that is not seen")


def _first(windows: Windows, count: int) -> Windows:
    return Windows(*(array[:count] for array in windows))


def _held_out(
    learnt: list[Windows], names: list[str], config: AdaptConfig, setting: str
) -> tuple[list[Windows], Windows]:
    """(what is left to learn from, the first windows of every source together). Raises UserError where a source has too few."""
    each = -(-config.validation_windows // len(learnt))
    for name, windows in zip(names, learnt, strict=True):
        if len(windows.tokens_NT) <= each:
            raise UserError(
                f"config: {setting}: {name!r} has {len(windows.tokens_NT)} windows of {config.length} tokens, of which {each} are held out "
                "for validation; give more text, lower adapt.length or adapt.validation_windows, or name files in adapt.validation"
            )
    held = Windows(*(np.concatenate([windows[part][:each] for windows in learnt]) for part in (0, 1)))
    return [Windows(*(array[each:] for array in windows)) for windows in learnt], held
