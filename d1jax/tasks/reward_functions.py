"""Rewards that belong to no task: by name, by pattern, or a function that somebody already has, with TRL's signature.

A name in `reward_weights` is first one of the task's own; else one of these:

    exact  number  boxed  math            the answer offered against the row's `answer`
    regex:PATTERN                         1 where the pattern is found in the text
    language  repetition_penalty          share of words in Latin letters; minus the share of repeated 3-grams
    length_penalty:N                      0 up to N words, falling to -1 at 2 N
    my_rewards.py:function, package.module:function     def f(completions, **columns) -> list[float | None]
"""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib
import importlib.util
import inspect
import itertools
import math
import re
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from d1jax.tasks.grading.equivalence import equivalent_many
from d1jax.tasks.grading.numbers import final_number, read_number
from d1jax.tasks.grading.offers import last_box, offer
from d1jax.tasks.task import DataError, Row

BatchReward = Callable[..., Sequence[float | None]]
SECONDS = 300.0  # that a function of the user's own may take for a batch
PATTERN_SECONDS = 1.0  # for a text; one that takes longer is not found
PATTERN_BATCH_SECONDS = 20.0  # for all texts of a batch
PATTERN_LEAST_SECONDS = 0.01  # for each text of a batch that has used up its seconds: enough for an ordinary one
LONGEST = 200_000  # characters of a text that patterns look at


class TooSlow(Exception):
    """Some texts of a batch took too long. `values` has a number for every text, 0 for those."""

    def __init__(self, message: str, values: list[float | None]) -> None:
        super().__init__(message)
        self.values = values


# -- by name -------------------------------------------------------------------------------------------------------------


def exact(completions: Sequence[str], answer: Sequence[str | None], **_: Any) -> list[float | None]:
    """1 where the passage offered is the answer letter by letter, but for the space around it; None for a row without one."""
    return [
        None if gold is None else float(_offered(text) == str(gold).strip())
        for text, gold in zip(completions, answer, strict=True)
    ]


def number(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float | None]:
    """1 where the number offered is the answer's; None for a row whose answer is no number."""
    golds = [None if gold is None else read_number(str(gold).rpartition("####")[2]) for gold in answer]
    values = [final_number(text) for text in completions]
    return [None if gold is None else float(value == gold) for value, gold in zip(values, golds, strict=True)]


def boxed(completions: Sequence[str], **_: Any) -> list[float]:
    r"""1 where the text has a closed \boxed{} that holds something."""
    return [float(last_box(text) is not None) for text in completions]


def maths(completions: Sequence[str], answer: Sequence[str | None], **_: Any) -> list[float | None]:
    """1 where the formula offered is worth the answer (`grading/equivalence.py`); None for a row without one."""
    offered = [offer(text) for text in completions]
    asked = [place for place, found in enumerate(offered) if found is not None and answer[place] is not None]
    equal = equivalent_many((str(answer[place]), offered[place].text) for place in asked)
    right = dict(zip(asked, equal, strict=True))
    return [None if answer[place] is None else float(bool(right.get(place))) for place in range(len(completions))]


def language(completions: Sequence[str], **_: Any) -> list[float]:
    """Share of the words that are written in Latin letters only; 1 for a text without words (DeepSeek-R1's language consistency)."""
    values = []
    for text in completions:
        words = [word for word in re.findall(r"\w+", text[:LONGEST]) if any(map(str.isalpha, word))]
        latin = sum(all(ord(letter) < 0x250 for letter in word) for word in words)
        values.append(latin / len(words) if words else 1.0)
    return values


def repetition_penalty(completions: Sequence[str], **_: Any) -> list[float]:
    """Minus the share of 3-grams of words that occur before in the text: 0 to -1; 0 for fewer than three words."""
    values = []
    for text in completions:
        words = text[:LONGEST].casefold().split()
        grams = list(zip(words, words[1:], words[2:], strict=False))
        values.append(len(set(grams)) / len(grams) - 1.0 if grams else 0.0)
    return values


NAMED: dict[str, BatchReward] = {
    "exact": exact,
    "number": number,
    "boxed": boxed,
    "math": maths,
    "language": language,
    "repetition_penalty": repetition_penalty,
}


def _offered(text: str) -> str:
    found = offer(text)
    return (found.text if found else text).strip()


def _pattern(name: str) -> BatchReward:
    import regex  # Python's own has no time limit, and holds the interpreter while it searches

    try:
        pattern = regex.compile(name.partition(":")[2])
    except (regex.error, RecursionError) as error:
        raise ValueError(f"reward {name!r}: the pattern cannot be read ({error}); write regex:PATTERN") from None

    def search(completions: Sequence[str], **_: Any) -> list[float]:
        values, slow, began = [], 0, monotonic()
        for text in completions:
            left = PATTERN_BATCH_SECONDS - (monotonic() - began)
            try:
                seconds = max(min(PATTERN_SECONDS, left), PATTERN_LEAST_SECONDS)
                values.append(float(bool(pattern.search(text[:LONGEST], timeout=seconds))))
            except TimeoutError:
                values.append(0.0)
                slow += 1
        if slow:
            raise TooSlow(f"in {slow} of them the search took too long", values)
        return values

    return search


def _length_penalty(name: str) -> BatchReward:
    limit = name.partition(":")[2]
    if not (limit.isascii() and limit.isdecimal() and int(limit) > 0):
        raise ValueError(
            f"reward {name!r}: write length_penalty:N with a number of words above 0, e.g. length_penalty:400"
        )
    words = int(limit)
    return lambda completions, **_: [-min(max(len(t.split()) / words - 1.0, 0.0), 1.0) for t in completions]


# -- functions of the user's own --------------------------------------------------------------------------------------------


def resolve(name: str) -> BatchReward | None:
    """The reward of a name that no task has; None where there is none of that form. Raises ValueError for one that cannot be made."""
    if name in NAMED:
        return NAMED[name]
    if name.startswith("regex:"):
        return _pattern(name)
    if name.startswith("length_penalty:"):
        return _length_penalty(name)
    module, colon, function = name.rpartition(":")
    if not colon or not function.isidentifier():
        return None
    try:
        found = getattr(_module(module, name), function, None)
    except (Exception, SystemExit) as error:  # a user's own code
        raise ValueError(f"reward {name!r}: {module} raised {type(error).__name__}: {error}") from error
    if not callable(found):
        raise ValueError(f"reward {name!r}: {module} has no function {function!r}")
    return _bounded(name, found)


def _module(module: str, name: str) -> Any:
    if not module.endswith(".py"):
        return importlib.import_module(module)
    path = Path(module)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {module!r}")
    return _executed(str(path.resolve()), path.stat().st_mtime_ns)


@functools.cache
def _executed(path: str, changed: int) -> Any:
    """The module of a file, executed once: functions of one file share what it holds, a model that it loads, say."""
    called = f"d1jax_own_reward_{hashlib.sha256(path.encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(called, path)
    made = importlib.util.module_from_spec(spec)
    sys.modules[called] = made  # dataclasses looks its module up by name
    try:
        spec.loader.exec_module(made)
    except BaseException:
        del sys.modules[called]
        raise
    return made


def _bounded(name: str, function: BatchReward) -> BatchReward:
    """The function in a thread of its own with a time limit: one that sleeps is left behind. (What it prints is printed: standard output
    belongs to the process, and a thread that is left behind would keep it.)"""

    def call(**given: Any) -> Sequence[float | None]:
        told: dict[str, Any] = {}

        def work() -> None:
            try:
                values = function(**_taken(function, given))
                # A generator works here, too, and one that never ends gives one value too many.
                listed = hasattr(values, "__iter__") and not isinstance(values, str | dict)
                told["values"] = list(itertools.islice(values, len(given["completions"]) + 1)) if listed else values
            except Exception as error:
                told["error"] = error
            except BaseException as error:  # sys.exit() must not look like a command that has finished
                told["error"] = RuntimeError(f"called for an end: {type(error).__name__}({error})")

        thread = threading.Thread(target=work, name=f"reward {name}", daemon=True)
        thread.start()
        thread.join(SECONDS)
        if thread.is_alive():
            raise TimeoutError(f"took more than {SECONDS:g} seconds for {len(given['completions'])} texts")
        if "error" in told:
            raise told["error"]
        return told["values"]

    return call


def _taken(function: BatchReward, given: Mapping[str, Any]) -> dict[str, Any]:
    """What of the keyword arguments the function takes: all where it has **columns."""
    parameters = inspect.signature(function).parameters.values()
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters):
        return dict(given)
    return {one.name: given[one.name] for one in parameters if one.name in given}


# -- a batch -------------------------------------------------------------------------------------------------------------


def call(
    name: str,
    function: BatchReward,
    prompts: Sequence[str],
    completions: Sequence[str],
    rows: Sequence[Row],
    failures: list[str] | None = None,
) -> list[float | None]:
    """One number a text, None where the reward does not apply to its row.

    The function gets prompts, completions and every field that a row has, as lists, None where a row lacks it; they are copies, so that a
    function may change them. `failures` gets a line where some texts took too long and count as 0. Raises ValueError for another
    number of values, or one that is no finite number; what the function itself raises passes.
    """
    keys = sorted({key for row in rows for key in row} - {"prompts", "completions"})
    columns = {key: [copy.deepcopy(row.get(key)) for row in rows] for key in keys}
    if name in NAMED and "answer" in inspect.signature(function).parameters and "answer" not in columns:
        raise DataError(f"reward {name!r} compares with the field `answer`, and no row has it; map one to it")
    try:
        values = function(prompts=list(prompts), completions=list(completions), **columns)
    except TooSlow as error:
        values = error.values
        if failures is not None:
            failures.append(f"reward {name!r}, {len(completions)} texts: {error}")
    try:
        made = list(values)
    except TypeError:
        raise ValueError(f"returned a {type(values).__name__}; return a list with a number for each text") from None
    if len(made) != len(completions):
        raise ValueError(f"returned {len(made)} values for {len(completions)} texts")
    for value in made:
        if value is not None and not _is_finite(value):
            raise ValueError(f"returned {value!r:.60}, which is no finite number (None: does not apply)")
    return [None if value is None else float(value) for value in made]


def _is_finite(value: Any) -> bool:
    try:
        return not isinstance(value, str) and math.isfinite(value)
    except TypeError:
        return False
