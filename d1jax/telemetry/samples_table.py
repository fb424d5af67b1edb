"""Samples side by side: the prompt, what each stage wrote, the reference; grids for puzzles, text for the rest."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from d1jax.telemetry.markup import esc, finite, percent
from d1jax.telemetry.run_data import set_name, stage_name

_BLANKS = "0._"  # how a puzzle writes an empty cell


def sample_card(samples: Sequence[Mapping[str, Any]]) -> str:
    """One card: the samples of one prompt, one of each stage, in the order of training."""
    first = samples[0]
    columns = first.get("columns")
    columns = columns if isinstance(columns, int) and 1 <= columns <= 64 else None
    prompt, reference = str(first.get("prompt", "")), first.get("reference")
    shown = prompt.replace("\n", "")  # a grid shows by its cells where a line ends
    clues = list(shown) if columns and shown and len(shown) % columns == 0 else None
    blocks = [_block("Prompt", _grid(clues, columns, given=clues) + _typed(prompt) if clues else _text(prompt))]
    for sample in samples:
        cells = _cells(sample)
        if columns:
            # A solved puzzle may differ from the reference when it has several solutions: nothing is marked wrong then.
            right = None if _solved(sample) or not isinstance(reference, str) else reference.replace("\n", "")
            body = _grid(cells, columns, given=clues, right=right)
        else:
            body = _text(str(sample.get("text", "")))
        blocks.append(_block(esc(stage_name(str(sample.get("stage", "")))) + _mark(sample), body))
    if isinstance(reference, str):
        body = _grid(list(reference.replace("\n", "")), columns, given=clues) if columns else _text(reference)
        blocks.append(_block("Reference", body))
    title = f"{esc(set_name(str(first.get('set', ''))))} {esc(first.get('index', ''))}"
    return f'<article class="sample"><h3>{title}</h3><div class="versions">{"".join(blocks)}</div></article>'


def _cells(sample: Mapping[str, Any]) -> list[str]:
    """The completion position by position; its text when the pieces were not recorded."""
    pieces = sample.get("pieces")
    if not isinstance(pieces, list) or not pieces:
        return list(str(sample.get("text", "")))
    reveal = sample.get("reveal_step")
    ends = reveal if isinstance(reveal, list) and len(reveal) == len(pieces) else [0] * len(pieces)
    return ["" if step == -1 else str(piece) for piece, step in zip(pieces, ends, strict=True)]


def _solved(sample: Mapping[str, Any]) -> bool:
    grade = sample.get("grade")
    return isinstance(grade, Mapping) and (finite(grade.get("solved")) or 0.0) >= 1.0


def _mark(sample: Mapping[str, Any]) -> str:
    grade = sample.get("grade")
    if not isinstance(grade, Mapping) or finite(grade.get("solved")) is None:
        return ""
    if _solved(sample):
        return '<br><span class="ok">✓ solved</span>'
    cells = finite(grade.get("cell_accuracy"))
    known = "not solved" if cells is None else f"{percent(cells)} right"
    return f'<br><span class="no">✗ {known}</span>'


def _block(title: str, body: str) -> str:
    return f"<div><h4>{title}</h4>{body}</div>"


def _typed(prompt: str) -> str:
    """The prompt itself, which a grid does not show to the letter; what `generate --prompt-json` takes."""
    return f'<code class="typed">{esc(json.dumps(prompt))}</code>' if "\n" in prompt else ""


def _text(text: str) -> str:
    return f'<pre tabindex="0">{esc(text)}</pre>'


def _grid(cells: Sequence[str], columns: int, given: Sequence[str] | None, right: str | None = None) -> str:
    side = math.isqrt(columns)
    boxed = side > 1 and side * side == columns and len(cells) == columns * columns  # a Sudoku: show its boxes
    spans = []
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
        shown = "" if given is cells and text in _BLANKS else text
        spans.append(f'<span class="{" ".join(css)}">{esc(shown)}</span>')
    rows = [" ".join(cells[i : i + columns]) for i in range(0, len(cells), columns)]
    return (
        f'<div class="grid" role="img" aria-label="{esc("; ".join(rows))}" '
        f'style="grid-template-columns:repeat({columns},auto)">{"".join(spans)}</div>'
    )
