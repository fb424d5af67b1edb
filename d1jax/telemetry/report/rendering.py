"""The one door between Python and the templates: everything that is printed is escaped, whatever it is.

Model output, prompts and run names are untrusted. Only two things are printed as they stand: files of this package, through
`packaged`, and JSON for scripts, through Jinja's `tojson`, which escapes `<`, `>`, `&` and `'`.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d1jax.files import to_json
from d1jax.telemetry.report.wording import compact, percent, set_name, stage_name

if TYPE_CHECKING:
    import jinja2

FOLDER = Path(__file__).parent / "templates"
# HTML has no way to write these: browsers drop some and misread others. A lone surrogate has no UTF-8.
UNWRITABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def render(template: str, **values: Any) -> str:
    """The text of a template of this package with these values."""
    return environment().get_template(template).render(values)


@functools.cache
def environment(*folders: Path) -> jinja2.Environment:
    """Jinja with escaping always on, and an error for a value that is not there. Templates of `folders` come before the package's."""
    import jinja2  # here: commands import the report without ever writing one

    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, FOLDER]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_writable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.policies["json.dumps_function"] = to_json
    made.policies["json.dumps_kwargs"] = {"ensure_ascii": True, "separators": (",", ":")}
    made.filters |= {"compact": compact, "percent": percent, "set_name": set_name, "stage_name": stage_name}
    made.globals |= {"packaged": functools.partial(_packaged, (*folders, FOLDER)), "script_hash": _script_hash}
    return made


def _packaged(folders: tuple[Path, ...], name: str) -> Any:
    """A style sheet or script that stands beside the templates, not escaped."""
    from markupsafe import Markup

    path = next(folder / name for folder in folders if (folder / name).exists())
    return Markup(path.read_text(encoding="utf-8"))


def _script_hash(name: str) -> str:
    """How a Content-Security-Policy names a packaged script: the browser then runs no other one."""
    text = _packaged((FOLDER,), name).encode("utf-8")
    return f"sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}"


def _writable(value: Any) -> Any:
    return UNWRITABLE.sub("\ufffd", value) if type(value) is str else value
