"""Samples side by side: the prompt, what each stage wrote, the reference; grids for puzzles, text for the rest."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from d1jax.telemetry.report.run_data import mapping
from d1jax.telemetry.report.wording import finite, percent, set_name, stage_name

_BLANKS = "0._"  # how a puzzle writes an empty cell


@dataclass(frozen=True)
class Grid:
    """Cells in rows of `columns`: (classes, text) each; `spoken` is the whole for those who cannot see it."""

    columns: int
    cells: list[tuple[str, str]]
    spoken: str


@dataclass(frozen=True)
class Version:
    """A prompt, a completion or a reference: as a grid, or as text. `solved` is None where nothing was graded."""

    title: str
    text: str
    grid: Grid | None = None
    typed: str = ""  # the prompt to the letter, where a grid hides its line breaks; what `generate --prompt-json` takes
    solved: bool | None = None
    grades: str = ""


@dataclass(frozen=True)
class Card:
    """All versions of one sample."""

    title: str
    versions: list[Version]


def card(samples: Sequence[Mapping[str, Any]]) -> Card:
    """The samples of one prompt, one of each stage, in the order of training."""
    first = samples[0]
    columns = columns_of(first)
    prompt, reference = str(first.get("prompt", "")), first.get("reference")
    shown = prompt.replace("\n", "")  # a grid shows by its cells where a line ends
    clues = list(shown) if columns and shown and len(shown) % columns == 0 else None
    if clues:
        typed = json.dumps(prompt) if "\n" in prompt else ""
        versions = [Version("Prompt", prompt, _grid(clues, columns, given=clues), typed)]
    else:
        versions = [Version("Prompt", prompt)]
    right = reference.replace("\n", "") if isinstance(reference, str) else None
    versions += [_completion(sample, columns, clues, right) for sample in samples]
    if right is not None:
        versions.append(Version("Reference", reference, _grid(list(right), columns, clues) if columns else None))
    return Card(f"{set_name(str(first.get('set', '')))} {first.get('index', '')}", versions)


def columns_of(sample: Mapping[str, Any]) -> int | None:
    """How many cells wide a sample is shown; None for text."""
    columns = sample.get("columns")
    return columns if isinstance(columns, int) and 1 <= columns <= 64 else None


def _completion(sample: Mapping[str, Any], columns: int | None, clues: list[str] | None, right: str | None) -> Version:
    grades = {str(name): finite(value) for name, value in mapping(sample.get("grade")).items()}
    solved = None if grades.get("solved") is None else grades.pop("solved") >= 1.0
    # A solved puzzle may differ from the reference when it has several solutions: nothing is marked wrong then.
    grid = _grid(_cells(sample), columns, clues, None if solved else right) if columns else None
    others = [f"{name.replace('_', ' ')} {percent(value, 0)}" for name, value in grades.items() if value is not None]
    return Version(
        title=stage_name(str(sample.get("stage", ""))),
        text=str(sample.get("text", "")),
        grid=grid,
        solved=solved,
        grades="" if solved or solved is None else ", ".join(others),
    )


def _cells(sample: Mapping[str, Any]) -> list[str]:
    """The completion position by position; its text when the pieces were not recorded."""
    pieces = sample.get("pieces")
    if not isinstance(pieces, list) or not pieces:
        return list(str(sample.get("text", "")))
    reveal = sample.get("reveal_step")
    ends = reveal if isinstance(reveal, list) and len(reveal) == len(pieces) else [0] * len(pieces)
    return ["" if step == -1 else str(piece) for piece, step in zip(pieces, ends, strict=True)]


def _grid(cells: Sequence[str], columns: int, given: Sequence[str] | None, right: str | None = None) -> Grid:
    side = math.isqrt(columns)
    boxed = side > 1 and side * side == columns and len(cells) == columns * columns  # a Sudoku: show its boxes
    drawn = []
    for i, text in enumerate(cells):
        css = []
        if given is not None and len(given) == len(cells):
            css.append("open" if given[i] in _BLANKS else "given")
        if right is not None and (i >= len(right) or text != right[i]):
            css.append("wrong")
        if len(text) > 2:
            css.append("small")
        if boxed and i % columns % side == side - 1 and i % columns < columns - 1:
            css.append("boxright")
        if boxed and i // columns % side == side - 1 and i // columns < columns - 1:
            css.append("boxdown")
        drawn.append((" ".join(css), "" if given is cells and text in _BLANKS else text))
    rows = [" ".join(cells[i : i + columns]) for i in range(0, len(cells), columns)]
    return Grid(columns, drawn, "; ".join(rows))
