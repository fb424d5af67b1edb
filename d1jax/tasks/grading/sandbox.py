"""Runs untrusted Python programs against tests, and says of every test how it went.

    [outcome] = run_all([Program("def f(x): return x + 1", tests=("assert f(1) == 2",))])
    outcome.passed      # (True,)

Programs run in processes of their own, which `fork_server.py` forks and `confine.py` confines: by Linux namespaces, where
the machine allows them, through bubblewrap where that is installed and they are not, else by limits and an audit hook.
docs/graders.md says what that protects from, and what not.
"""

import atexit
import importlib.util
import json
import os
import queue
import select
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFINEMENTS = ("namespaces", "bwrap", "limits")
STATUSES = ("passed", "failed", "timeout", "error")
_SERVER = Path(__file__).with_name("fork_server.py")
_START_SECONDS = 60.0  # for a server to start, on a machine that is busy
_GRACE_SECONDS = 10.0  # a test, for forking, killing and cleaning up around its limit
_MOST_REPLY = 1 << 24  # bytes


@dataclass(frozen=True)
class Program:
    """`source` is run, then `setup`, then one of `tests`: every test in a process and a directory of its own.

    `seconds` is the limit of one test, the program before it included; `megabytes` that of a process's address space,
    `file_megabytes` that of what it may write, `processes` how many it may have at a time, threads included.
    """

    source: str
    tests: tuple[str, ...]
    setup: str = ""
    seconds: float = 5.0
    megabytes: int = 4096
    file_megabytes: int = 16
    processes: int = 32


@dataclass(frozen=True)
class TestResult:
    """`status`: passed; failed (the test's assertion did not hold); timeout; error (anything else). `message` says why."""

    __test__ = False  # nothing that pytest collects

    status: str
    message: str = ""


@dataclass(frozen=True)
class Outcome:
    """How the tests of a program went, in their order."""

    tests: tuple[TestResult, ...]

    @property
    def passed(self) -> tuple[bool, ...]:
        return tuple(test.status == "passed" for test in self.tests)

    @property
    def pass_rate(self) -> float:
        """The share of tests that passed; 0 where there are none."""
        return sum(self.passed) / len(self.tests) if self.tests else 0.0


class SandboxError(RuntimeError):
    """No program can be run here at all. The message says why, and the cure."""


class ServerLost(Exception):
    """A fork server has died or does not answer."""


class Server:
    """One fork server and its pipes. Raises ServerLost where it does not start."""

    def __init__(self, confinement: str) -> None:
        site, readable = _python_folders()
        inner = "limits" if confinement == "bwrap" else confinement
        settings = {"site": site, "readable": readable, "confinement": inner}
        command = [sys.executable, "-P", "-S", "-s", "-B", str(_SERVER), json.dumps(settings)]
        if confinement == "bwrap":
            command = _bubblewrap([*readable, str(_SERVER.parent)]) + command
        environment = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1",
                       "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # fmt: skip
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, cwd="/",
            start_new_session=True,
        )  # fmt: skip
        try:
            self._receive(time.monotonic() + _START_SECONDS)
        except ServerLost as error:
            raise ServerLost(f"{error} {self.close()}".strip()) from None

    def ask(self, program: Program) -> Outcome:
        """Raises ServerLost."""
        until = time.monotonic() + len(program.tests) * (program.seconds + _GRACE_SECONDS) + _START_SECONDS
        self._send(json.dumps(vars(program)).encode(), until)
        reply = self._receive(until)
        try:
            results = tuple(TestResult(str(status), str(message)) for status, message in reply["tests"])
        except (TypeError, KeyError, ValueError):
            raise ServerLost("it gave an answer of another form") from None
        if len(results) != len(program.tests) or any(result.status not in STATUSES for result in results):
            raise ServerLost("it gave an answer of another form")
        return Outcome(results)

    def _send(self, data: bytes, until: float) -> None:
        fd = self._process.stdin.fileno()
        os.set_blocking(fd, False)
        rest = memoryview(len(data).to_bytes(4, "big") + data)
        while rest:
            self._ready(fd, select.POLLOUT, until)
            try:
                rest = rest[os.write(fd, rest[: 1 << 16]) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise ServerLost(f"it takes no requests ({error.strerror})") from None

    def _receive(self, until: float) -> Any:
        size = int.from_bytes(self._read(4, until), "big")
        if size > _MOST_REPLY:
            raise ServerLost("it gave an answer of another form")
        try:
            return json.loads(self._read(size, until))
        except ValueError:
            raise ServerLost("it gave an answer of another form") from None

    def _read(self, size: int, until: float) -> bytes:
        fd, data = self._process.stdout.fileno(), b""
        while len(data) < size:
            self._ready(fd, select.POLLIN, until)
            part = os.read(fd, size - len(data))
            if not part:
                raise ServerLost("it has ended")
            data += part
        return data

    def _ready(self, fd: int, event: int, until: float) -> None:
        poll = select.poll()
        poll.register(fd, event)
        if not poll.poll(max(0.0, 1000 * (until - time.monotonic()))):
            raise ServerLost("it does not answer")

    def close(self) -> str:
        """Ends the server and all that it runs; returns the last line that it wrote to its standard error."""
        process = self._process
        process.stdin.close()  # it ends, and kills what runs, when nobody can ask any more
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        os.set_blocking(process.stderr.fileno(), False)
        said = process.stderr.read() or b""
        process.stderr.close()
        return said.decode(errors="replace").strip().rpartition("\n")[2][:300]


class Sandbox:
    """Fork servers that are kept between calls. Used by one thread at a time or by several; `close` ends them."""

    def __init__(self, workers: int, confinement: str) -> None:
        self._workers, self._confinement = workers, confinement
        self._idle: queue.SimpleQueue[Server | None] = queue.SimpleQueue()
        for _ in range(workers):
            self._idle.put(None)  # started by the first program that needs it

    def run_all(self, programs: Sequence[Program]) -> list[Outcome]:
        """One outcome a program, in their order. A server that dies costs the program that it ran, and is replaced."""
        if len(programs) < 2:
            return [self._run(program) for program in programs]
        with ThreadPoolExecutor(min(self._workers, len(programs)), "sandbox") as pool:
            return list(pool.map(self._run, programs))

    def _run(self, program: Program) -> Outcome:
        if not program.tests:
            return Outcome(())
        with self._server() as kept:
            try:
                if kept[0] is None:
                    kept[0] = Server(self._confinement)
            except ServerLost as error:
                return _all_tests(program, f"the sandbox does not start: {error}")
            try:
                return kept[0].ask(program)
            except ServerLost as error:
                kept.pop().close()
                kept.append(None)
                return _all_tests(program, f"the sandbox was lost: {error}")
            except (
                BaseException
            ):  # KeyboardInterrupt in the middle of an answer: the next one must not be read as this one's
                kept.pop().close()
                kept.append(None)
                raise

    @contextmanager
    def _server(self) -> Iterator[list[Server | None]]:
        kept = [self._idle.get()]
        try:
            yield kept
        finally:
            self._idle.put(kept[0])

    def close(self) -> None:
        for _ in range(self._workers):
            server = self._idle.get()
            if server is not None:
                server.close()
            self._idle.put(None)


_lock = threading.Lock()
_sandboxes: dict[tuple[int, str], Sandbox] = {}
_found: list[str] = []


def run_all(programs: Sequence[Program], workers: int | None = None, confinement: str | None = None) -> list[Outcome]:
    """One outcome a program, in their order; never raises because of what a program does, and never waits for one forever.

    `workers` programs at a time (default: one a core that this process may use); their servers are kept until `close_all`
    or the end of the process. `confinement`: one of CONFINEMENTS; default: the first that works. Raises SandboxError where
    none does.
    """
    if not programs:
        return []
    key = (workers or len(os.sched_getaffinity(0)), confinement or confinement_here())
    with _lock:
        sandbox = _sandboxes.setdefault(key, Sandbox(*key))
    return sandbox.run_all(programs)


def confinement_here() -> str:
    """The strongest of CONFINEMENTS that works on this machine; tried once. Raises SandboxError where none does."""
    with _lock:
        if _found:
            return _found[0]
        if not hasattr(os, "pidfd_open") or not sys.platform.startswith("linux"):
            raise SandboxError("code: programs can be run on Linux only (5.3 or newer); evaluate code there")
        refused = []
        for name in CONFINEMENTS:
            if name == "bwrap" and shutil.which("bwrap") is None:
                continue
            try:
                Server(name).close()
            except ServerLost as error:
                refused.append(f"{name}: {error}")
            else:
                _found.append(name)
                return name
    raise SandboxError(f"code: no sandbox starts on this machine ({'; '.join(refused)}); see docs/graders.md")


def close_all() -> None:
    """Ends all servers; the next `run_all` starts new ones."""
    with _lock:
        for sandbox in _sandboxes.values():
            sandbox.close()
        _sandboxes.clear()


atexit.register(close_all)


def _all_tests(program: Program, message: str) -> Outcome:
    return Outcome((TestResult("error", message),) * len(program.tests))


def _python_folders() -> tuple[str, list[str]]:
    """(where numpy is installed, or ""; the folders that Python needs)."""
    numpy = importlib.util.find_spec("numpy")
    site = str(Path(numpy.origin).parents[1]) if numpy is not None and numpy.origin else ""
    return site, sorted({path for path in (sys.base_prefix, sys.prefix, site) if path}, key=len)


def _bubblewrap(readable: Sequence[str]) -> list[str]:
    """The command before Python's own: no network, nothing to be seen but Python and the system's libraries, read-only."""
    # Not --die-with-parent: the parent would be the thread that started it. The server ends when its input does.
    command = ["bwrap", "--unshare-all", "--new-session", "--proc", "/proc", "--dev", "/dev"]
    command += ["--tmpfs", "/tmp"]
    for path in ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache", *readable):
        command += ["--ro-bind-try", path, path]
    return command
