"""Several processes that train together, on JAX's own runtime: all of them run one program, on the same rows.

What is on the devices is one array over all of them (models/sharding.py). What is on the host every process computes for itself, from
equal inputs, so that all of them decide alike; texts, which take long to grade, are divided among them. How they come together and end is
in joining.py.

What is told among the hosts goes through the store of JAX's coordinator and not over the devices: these may be decoding the next texts.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from jax._src.distributed import global_state  # the store of the coordinator has no public name

from d1jax.config import UserError

SEEN_SECONDS = 90  # NFS may tell a machine of a file that another one has written half a minute late
WAIT_MS = 1000

_turn = itertools.count()
_asks = True  # whether the others are there to be asked


def count() -> int:
    """How many processes there are."""
    return global_state.num_processes if global_state.client is not None else 1


def place() -> int:
    """The place of this process among them, from 0 on."""
    return global_state.process_id if global_state.client is not None else 0


def is_first() -> bool:
    """Whether this process writes and speaks; the only one does."""
    return place() == 0


def gathered(value: Any) -> list[Any]:
    """This value of every process, by their places. All of them must ask; values are what JSON can hold, numbers to their last bit."""
    if count() == 1:
        return [value]
    if not _asks:
        raise RuntimeError("only the first process is here; the others would never answer")
    client, turn = global_state.client, next(_turn)
    asked = _who_asks()
    client.key_value_set_bytes(_key(turn, place()), json.dumps([asked, value], default=float).encode())  # of numpy, too
    told = [json.loads(_waited_for(_key(turn, one))) for one in range(count())]
    for process, (other, _) in enumerate(told):
        if other != asked:
            raise RuntimeError(
                f"process {place()} is at {asked}, and process {process} at {other}: they no longer decide alike"
            )
    found = [one for _, one in told]
    # That all have written this turn says that all have read the one before.
    if turn:
        client.key_value_delete(_key(turn - 1, place()))
    return found


def _who_asks() -> str:
    """The place in the code that asks, which is one in all processes."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def _key(turn: int, process: int) -> str:
    return f"d1jax/{turn}/{process}"


def _waited_for(key: str) -> bytes:
    """What is stored under a key, however long that takes: a process that has died is noticed elsewhere."""
    while True:
        try:
            return global_state.client.blocking_key_value_get_bytes(key, WAIT_MS)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def meet() -> None:
    """Returns when all processes have come here: what the first one has written before is there for all."""
    gathered(None)


def first_only(function: Callable[[], Any]) -> Any:
    """`function()` of the first process; None in the others, which wait for it."""
    found = None
    if is_first():
        with _alone():
            found = function()
    meet()
    return found


def agreed(function: Callable[[], Any]) -> Any:
    """`function()` of the first process, in all of them; what JSON can hold. For what depends on files: a machine may hear of a file that
    another one has written late, and all must decide alike. The others do not look."""
    if count() == 1 or not _asks:
        return function()
    found = None
    if is_first():
        with _alone():
            found = function()
    return gathered(found)[0]


def wait_until(sees: Callable[[], bool], what: Callable[[], str]) -> None:
    """Returns when this process sees what the first one has written. Raises UserError that begins with `what()` where it never does."""
    until = time.monotonic() + SEEN_SECONDS
    while not sees():
        if time.monotonic() > until:
            raise UserError(
                f"--distributed: {what()}, which the first process has written, is not there or another file in process {place()}; put "
                "run_dir on storage that all processes see, and start them in the same folder"
            )
        time.sleep(min(1.0, SEEN_SECONDS / 10))


@contextmanager
def _alone() -> Iterator[None]:
    """In here this process must not ask the others, which wait for it already."""
    global _asks
    _asks = False
    try:
        yield
    finally:
        _asks = True


def bounds(rows: int) -> list[int]:
    """Where the parts of the processes begin, of work on so many rows, and where the last one ends."""
    return [rows * process // count() for process in range(count() + 1)]


def own_part(rows: int) -> slice:
    """The rows that this process works on."""
    return slice(*bounds(rows)[place() : place() + 2])


def divided(function: Callable[[slice], list[Any]], rows: int) -> list[Any]:
    """The list `function(slice of all rows)`, one entry a row, of which every process makes its own part; entries as in `gathered`."""
    return list(itertools.chain.from_iterable(gathered(function(own_part(rows)))))


def check_equal(named: dict[str, Any]) -> None:
    """Raises UserError, in all processes, where something that all must have alike is not: {what it is called: its value}."""
    for process, other in enumerate(gathered(named)):
        different = [name for name in named if other.get(name) != named[name]]
        if different:
            name = different[0]
            raise UserError(
                f"--distributed: {name} is {other.get(name)!r} in process {process} and {named[name]!r} in process {place()}; start all "
                "processes with the same configuration, data and versions"
            )
