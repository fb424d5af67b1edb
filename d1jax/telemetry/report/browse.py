"""The page of an evaluation: its numbers, and every generation to search, filter and compare. One file that opens from disk."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from d1jax.files import atomic_write
from d1jax.telemetry.report.rendering import render
from d1jax.telemetry.report.viewer import trajectories

MOST_ROWS = 2000  # of a cell and model; the JSONL beside the page has all
MOST_CHARACTERS = 8000  # of a text
HEAD = 160  # characters of a question in the list
PLAYED = 24  # trajectories of the player, over all cells

Samples = Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]  # model -> cell -> samples


def browse_page(result: Mapping[str, Any], samples: Samples) -> str:
    """A whole HTML document of an evaluation's summary and samples. Texts reach the page escaped, or through `textContent`."""
    models = list(samples)
    cells = list(samples[models[0]]) if models else []
    left_out = sum(max(len(found) - MOST_ROWS, 0) for by_cell in samples.values() for found in by_cell.values())
    return render(
        "browse.html.jinja",
        title=f"{', '.join(models)}: {len(cells)} evaluations",
        result=result,
        models=models,
        columns=_columns(result),
        data={"models": models, "cells": [_cell(cell, models, samples) for cell in cells]},
        trajectories=_played(samples),
        left_out=left_out,
    )


def write_browse_page(path: Path, result: Mapping[str, Any], samples: Samples) -> None:
    """Writes `browse_page(result, samples)` to `path`: beside, then renamed."""
    atomic_write(path, browse_page(result, samples))


def _columns(result: Mapping[str, Any]) -> list[str]:
    """Which of pass@k and maj@k any line has, k above 1: avg@k and pass@1 are the accuracy."""
    several: dict[str, None] = {}
    for lines in result["results"].values():
        for line in lines:
            several |= dict.fromkeys(
                key for key in line if key.startswith(("pass@", "maj@")) and not key.endswith("@1")
            )
    return list(several)


def _cell(cell: str, models: Sequence[str], samples: Samples) -> dict[str, Any]:
    """The rows of a cell, the answers of all models beside each other."""
    rows: dict[tuple[int, int], dict[str, Any]] = {}
    for place, model in enumerate(models):
        for one in list(samples[model][cell])[:MOST_ROWS]:
            key = (one["row"], one["sample"])
            shown = rows.setdefault(
                key,
                {
                    "row": one["row"],
                    "sample": one["sample"],
                    "prompt": _cut(one["prompt"]),
                    "reference": _cut(one.get("reference")),
                    "answers": [None] * len(models),
                },
            )
            shown["answers"][place] = {
                "text": _cut(one["completion"]),
                "offer": _cut(one.get("offer")),
                "right": one["grade"].get("solved") == 1.0,
                "tokens": one["tokens"],
            }
    ordered = [rows[key] for key in sorted(rows)]
    shared = _shared_beginning([row["prompt"] for row in ordered])
    for row in ordered:
        row["head"] = " ".join(row["prompt"][shared:].split())[:HEAD] or row["prompt"][:HEAD]
    return {"name": cell, "rows": ordered}


def _shared_beginning(prompts: Sequence[str]) -> int:
    """How many characters of whole lines all prompts begin with: instructions, which tell no row from another."""
    if len(set(prompts)) < 2:
        return 0
    return os.path.commonprefix(list(prompts)).rfind("\n") + 1


def _cut(text: Any) -> str:
    text = "" if text is None else str(text)
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} … ({len(text):,} characters)"


def _played(samples: Samples) -> list[dict[str, Any]]:
    found = [
        {**one, "stage": model, "set": cell, "index": one["row"]}
        for model, by_cell in samples.items()
        for cell, rows in by_cell.items()
        for one in list(rows)[:MOST_ROWS]
        if "pieces" in one
    ]
    return trajectories(found[:: max(len(found) // PLAYED, 1)][:PLAYED])
