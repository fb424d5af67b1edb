"""The denoising player as a page of its own: one file that opens from disk and asks the network for nothing."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from d1jax.files import write_beside
from d1jax.telemetry.markup import esc
from d1jax.telemetry.trajectory_viewer import viewer_html

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def player_page(samples: Sequence[Mapping[str, Any]], title: str) -> str:
    """A whole HTML document around `viewer_html(samples)`: of each sample it needs `pieces` and `reveal_step`, and shows `prompt`,
    `confidence`, `stage`, `set`, `index`, `columns` and `grade` where they are there. The keys work as soon as the page is open.
    """
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<link rel="icon" href="data:,"><title>{esc(title)}</title><style>{_STYLE}</style></head>\n'
        f"<body><main><h1>{esc(title)}</h1>\n{viewer_html(samples)}\n</main><script>{_SCRIPT}</script></body></html>\n"
    )


def write_player(path: Path, samples: Sequence[Mapping[str, Any]], title: str) -> None:
    """Writes the page beside, then renames."""
    write_beside(path, player_page(samples, title))


_STYLE = """
html{color-scheme:light dark;-webkit-text-size-adjust:100%}
body{margin:0;background:#faf9f6;color:#1d2126;
  font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1040px;margin:0 auto;padding:36px 24px}
h1{font-size:19px;font-weight:600;margin:0 0 16px;overflow-wrap:anywhere}
@media screen and (prefers-color-scheme:dark){body{background:#16181c;color:#e6e6e3}}
@media (max-width:560px){main{padding:20px 12px}}
"""

_SCRIPT = "document.querySelector('.d1v-stage')?.focus({preventScroll: true, focusVisible: false});"
