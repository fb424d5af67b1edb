"""The denoising player as a page of its own: one file that opens from disk and asks the network for nothing."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from d1jax.files import atomic_write
from d1jax.telemetry.report.rendering import render
from d1jax.telemetry.report.viewer import trajectories


def player_page(samples: Sequence[Mapping[str, Any]], title: str) -> str:
    """A whole HTML document: of each sample it needs `pieces` and `reveal_step`, and shows `prompt`, `confidence`, `stage`, `set`,
    `index`, `columns` and `grade` where they are there. The keys work as soon as the page is open.
    """
    return render("player.html.jinja", title=title, trajectories=trajectories(samples))


def write_player(path: Path, samples: Sequence[Mapping[str, Any]], title: str) -> None:
    """Writes `player_page(samples, title)` to `path`: beside, then renamed."""
    atomic_write(path, player_page(samples, title))
