"""Joining the other processes of a run, and leaving together: where one fails, all end with its message and its exit code.

The first process alone writes files and speaks.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, NoReturn

import jax
from jax._src.distributed import global_state  # the store of the coordinator has no public name

from d1jax import files
from d1jax.config import UserError
from d1jax.models import processes

COORDINATOR, COUNT, PLACE = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
START_SECONDS = 300  # for all processes to be there
SILENT_SECONDS = 60  # until a process that was killed is given up, and the others end
LEAVE_SECONDS = 10  # for the others to hear of a failure
LAST_SECONDS = 0.5  # between the word of the last other process and its end
FAILED = "d1jax/failed"

_takes_part = False  # whether this process has taken its part among them: one writes and speaks, and all end together
_done = threading.Event()  # nobody is to be heard of any more


def start(seconds: int = START_SECONDS) -> None:
    """Joins the other processes: those that the three variables name, or else those that JAX finds (Cloud TPU, SLURM, Open MPI,
    Kubernetes). Before anything touches a device.

    Raises UserError where there is nothing to join, or the first process cannot be reached. Where the first one waits in vain for others,
    JAX's runtime ends it.
    """
    given = {name: os.environ[name] for name in (COORDINATOR, COUNT, PLACE) if os.environ.get(name)}
    named = _named(given) if COUNT in given or PLACE in given else {}
    if named:
        told = f"process {given[PLACE]} of {given[COUNT]}, the first of which is at {given[COORDINATOR]}"
        print(f"distributed: {told}, waits for the others, {seconds} s at most", file=sys.stderr, flush=True)
        if named["process_id"] == 0:
            _check_free(given[COORDINATOR])
        else:
            _reach(given[COORDINATOR], seconds)
    try:
        jax.distributed.initialize(**named, initialization_timeout=seconds, heartbeat_timeout_seconds=SILENT_SECONDS)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"--distributed: JAX finds no cluster here ({error}); set {COORDINATOR} (host:port of the first process), {COUNT} and {PLACE}"
        ) from None
    except jax.errors.JaxRuntimeError as error:  # a port that is in use, two processes of one place
        where = f" at {given[COORDINATOR]}" if named else ""
        raise UserError(
            f"--distributed: this process cannot join the others{where} ({str(error).partition(chr(10))[0]}); is the port free, and is "
            f"{PLACE} of every process another one?"
        ) from None
    _take_part()
    if not processes.is_first():
        sys.stdout = sys.stderr = open(os.devnull, "w")  # one process speaks; failures go past this


@contextmanager
def _first_speaks() -> Iterator[None]:
    """In here the other processes say nothing; failures go past this."""
    if processes.is_first():
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def _take_part() -> threading.Thread:
    """From now on the first process alone writes, and this one ends when another one fails; the thread that hears of that."""
    global _takes_part
    _takes_part = True
    _done.clear()
    if not processes.is_first():
        files.leave_to_another()
    watch = threading.Thread(target=_watch, daemon=True)
    watch.start()
    return watch


@contextmanager
def taking_part() -> Iterator[None]:
    """In here this process ends when another one fails, and the first one alone speaks; also behind it, that one alone writes."""
    global _takes_part
    watch = _take_part()
    try:
        with _first_speaks():
            yield
    finally:
        _takes_part = False
        _done.set()
        watch.join()  # the program may end next, which a thread in the runtime would not survive


def is_joined_by_hand() -> bool:
    """Whether there are other processes that somebody else has joined: a program that calls d1jax and jax.distributed.initialize."""
    return processes.count() > 1 and not _takes_part


def _named(given: dict[str, str]) -> dict[str, Any]:
    missing = [name for name in (COORDINATOR, COUNT, PLACE) if name not in given]
    port = given.get(COORDINATOR, "").rpartition(":")[2]
    wrong = [name for name in (COUNT, PLACE) if name in given and not given[name].isdecimal()]
    if missing or wrong:
        problem = f"{missing[0]} is missing" if missing else f"{wrong[0]} = {given[wrong[0]]!r} is no number"
        raise UserError(f"--distributed: {problem}; set all of {COORDINATOR}, {COUNT} and {PLACE}")
    if int(given[PLACE]) >= int(given[COUNT]):
        raise UserError(
            f"--distributed: {PLACE} = {given[PLACE]}, but {COUNT} = {given[COUNT]}; places count from 0 to {int(given[COUNT]) - 1}"
        )
    if ":" not in given[COORDINATOR] or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"--distributed: {COORDINATOR} = {given[COORDINATOR]!r} names no port; write host:port")
    return {
        "coordinator_address": given[COORDINATOR],
        "num_processes": int(given[COUNT]),
        "process_id": int(given[PLACE]),
    }


def _check_free(address: str) -> None:
    """Raises UserError where the first process could not listen: of a port in use, by itself or by another one that calls itself the
    first, the runtime would say nothing, or crash."""
    try:
        socket.create_server(("", int(address.rpartition(":")[2]))).close()
    except OSError as error:
        raise UserError(
            f"--distributed: the first process cannot listen at {COORDINATOR} = {address} ({error.strerror}); is the port free, and is "
            f"{PLACE} = 0 in one process only?"
        ) from None


def _reach(address: str, seconds: int) -> None:
    """Returns when the first process answers. The runtime itself would end this one with a trace of its own code."""
    host, _, port = address.rpartition(":")
    until = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=1).close()
            return
        except OSError as error:
            if time.monotonic() > until or isinstance(error, socket.gaierror):
                raise UserError(
                    f"--distributed: {COORDINATOR} = {address} does not answer ({error}); is it the address of the first process, and "
                    "was that one started?"
                ) from None
            time.sleep(0.2)


# -- the end ---------------------------------------------------------------------------------------------------------------


def together(command: Callable[[Callable[[object, int], int]], int]) -> int:
    """The exit code of `command(tell)` in a process that has started; `tell(problem, code)` ends all processes with that code.

    An exception that the command does not tell of ends all of them with 1.
    """
    try:
        code = command(fail)
    except BaseException:
        fail(traceback.format_exc(), 1)
    jax.distributed.shutdown()
    return code


def fail(problem: object, code: int) -> NoReturn:
    """Ends this process and all others with `code`; each says what the problem was. The first one to fail decides."""
    with suppress(jax.errors.JaxRuntimeError):  # another one was first
        global_state.client.key_value_set(FAILED, json.dumps([processes.place(), code, str(problem)]))
    with suppress(jax.errors.JaxRuntimeError):  # the coordinator has gone
        _, code, _ = json.loads(global_state.client.blocking_key_value_get(FAILED, processes.WAIT_MS))
    _leave(problem, processes.place(), code)


def _watch() -> None:
    """Ends this process when another one has failed, also where the main thread waits for it in a collective."""
    while not _done.is_set():
        try:
            process, code, problem = json.loads(global_state.client.blocking_key_value_get(FAILED, processes.WAIT_MS))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                continue
            return
        except AttributeError:
            return  # shut down
        if process != processes.place():
            _leave(problem, process, code)
        return


def _leave(problem: object, process: int, code: int) -> NoReturn:
    """Says why, and ends. The first process, which keeps the store, is the last to go."""
    print(f"error: process {process}: {problem}", file=sys.__stderr__, flush=True)
    client = global_state.client
    with suppress(jax.errors.JaxRuntimeError):
        client.key_value_set(f"{FAILED}/{processes.place()}", "left")
    if processes.is_first():
        until = time.monotonic() + LEAVE_SECONDS
        while time.monotonic() < until and len(_dir(client)) < processes.count():
            time.sleep(0.05)
        time.sleep(LAST_SECONDS)
    # No orderly end: the main thread may be in a collective that will never come back.
    os._exit(code)


def _dir(client: Any) -> list[Any]:
    try:
        return client.key_value_dir_get(f"{FAILED}/")
    except jax.errors.JaxRuntimeError:
        return []
