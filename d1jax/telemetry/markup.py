"""Text into HTML, safely: model output, prompts and run names are untrusted and pass through here."""

import html
import math
from typing import Any

from d1jax.files import to_json


def esc(value: Any) -> str:
    """Text for an element or a double-quoted attribute."""
    return html.escape(str(value), quote=True)


def script_json(value: Any) -> str:
    """JSON that is safe inside a <script> element.

    `ensure_ascii` writes U+2028, U+2029 and lone surrogates as \\u escapes; `<`, `>` and `&` are escaped here, so that
    no text can close the element or open a comment.
    """
    text = to_json(value, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def finite(value: Any) -> float | None:
    """The value as a finite float, or None: summaries of interrupted runs hold nulls, strings and NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def percent(rate: float | None, digits: int = 1) -> str:
    """0.273 -> `27.3 %`, with a narrow no-break space."""
    return "–" if rate is None else f"{100 * rate:.{digits}f}\u202f%"


def compact(value: float | None) -> str:
    """A number in about three significant digits, for tables and axis labels."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        digits = max(0, 2 - math.floor(math.log10(abs(value))))
        text = f"{value:,.{digits}f}"
        return text
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
