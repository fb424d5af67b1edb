"""How numbers and names are written on a page."""

import math
from typing import Any

_STAGES = {"base": "Base model", "init": "Initial model"}
_WORDS = {"sft": "SFT", "rl": "RL"}


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
        return f"{value:,.{digits}f}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def stage_name(name: str) -> str:
    """`sft` -> `SFT`, `rl_1` -> `RL 1`, `cold_start` -> `cold start`."""
    return _STAGES.get(name) or " ".join(_WORDS.get(word, word) for word in name.split("_"))


def set_name(name: str) -> str:
    """What an evaluation set is called: `held_out` -> `held-out`, `my_set` -> `my set`."""
    return "held-out" if name == "held_out" else name.replace("_", " ")
