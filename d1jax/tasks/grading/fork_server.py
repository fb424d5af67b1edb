"""The process that runs programs: it is started once, imports numpy once, and forks one confined process for every test.

    python -P -S -s fork_server.py '{"site": "/path/of/site-packages", "readable": [...], "confinement": "namespaces"}'

Speaks over its standard input and output: frames of four bytes (the length, big-endian) and JSON. The first frame that it
writes says how programs are confined; then every request {"source", "tests", "seconds", ...} is answered by
{"tests": [[status, message], ...]}. It ends when its standard input does. `sandbox.py` is the other end.
"""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
import confine  # noqa: E402

sys.path.remove(HERE)

_MESSAGE = 300  # characters
_TEST_BEGUN = b"test"
_MOST_REPORT = 1 << 16  # bytes; what a pipe holds
# What a test relies on: it finds these as they were before the program ran.
_KEPT = (
    "builtins", "math", "cmath", "copy", "collections", "itertools", "functools", "operator", "re", "string", "random",
    "numpy", "numpy._core.numeric", "numpy._core.fromnumeric", "numpy.testing", "inspect", "unittest", "json",
)  # fmt: skip
_COMMON = (
    "abc, array, ast, base64, bisect, calendar, cmath, collections, contextlib, copy, dataclasses, datetime, decimal, enum, "
    "fractions, functools, hashlib, heapq, inspect, io, itertools, json, math, operator, queue, random, re, statistics, string, "
    "struct, sys, textwrap, threading, time, traceback, types, typing, unicodedata, unittest, zlib"
).split(", ")


# -- inside of the process of one test ---------------------------------------------------------------------------------


def run_test(source: str, setup: str, test: str, report: int, token: bytes) -> None:
    """Executes the program, then the set-up and the test, and reports how it went. Never returns.

    The program is the module `solution`, so that `if __name__ == "__main__"` does not run. The test has a copy of its names.
    """
    end, write, dumps, kept = os._exit, os.write, json.dumps, snapshot()
    phase = "program"
    try:
        module = type(sys)("solution")
        sys.modules["solution"] = module
        # To run what a model wrote is what this process is for: it is confined (confine.py) and ends with the test.
        exec(compile(source, "<program>", "exec"), module.__dict__)
        restore(kept)
        phase = "test"
        write(report, _TEST_BEGUN)
        names = dict(module.__dict__)
        for part in (setup, test):
            if part:
                exec(compile(part, "<test>", "exec"), names)  # confined like the program
        status, message = "passed", ""
    except BaseException as error:  # SystemExit and KeyboardInterrupt too
        status = "failed" if phase == "test" and isinstance(error, AssertionError) else "error"
        try:
            message = f"{type(error).__name__}: {error}"[:_MESSAGE]
        except BaseException:
            message = type(error).__name__
    try:
        write(report, token + dumps([phase, status, message]).encode())
    finally:
        end(0)


def snapshot() -> list:
    """The modules that tests rely on, and what they hold."""
    return [(name, module, dict(vars(module))) for name in _KEPT if (module := sys.modules.get(name)) is not None]


def restore(kept: list) -> None:
    """Undoes what a program changed in these modules; what it added stays."""
    for name, module, names in kept:
        sys.modules[name] = module
        vars(module).update(names)


# -- the server --------------------------------------------------------------------------------------------------------


class Ended(Exception):
    """The other end is gone."""


class Server:
    """Runs the tests of requests one after another. `namespaces`: whether the kernel confines them."""

    def __init__(self, namespaces: bool, own_processes: int, processes_fd: int | None) -> None:
        self._namespaces, self._own_processes, self._processes_fd = namespaces, own_processes, processes_fd
        self._requests, self._replies = os.dup(0), os.dup(1)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)

    def answer(self, request: dict) -> dict:
        results: list = []
        for test in request["tests"]:
            phase, status, message = self._one(request, test)
            results.append([status, message])
            if phase == "program" and status != "passed":  # it never came to the test: no other test would fare better
                results += [[status, message]] * (len(request["tests"]) - len(results))
                break
        return {"tests": results}

    def _one(self, request: dict, test: str) -> list:
        token, seconds = os.urandom(16), request["seconds"]
        if self._namespaces:
            confine.fresh_scratch(request["file_megabytes"])
            scratch = confine.SCRATCH
        else:
            scratch = tempfile.mkdtemp(prefix="d1jax-program-")
            os.chmod(scratch, 0o777)
        report, theirs = os.pipe()
        try:
            if self._namespaces:
                confine.new_process_namespace()
            child = os.fork()
            if child == 0:
                self._become_program(request, test, scratch, theirs, token)
            if self._namespaces:
                confine.set_namespace(self._processes_fd)
            os.close(theirs)
            timeout = self._wait(child, seconds)
            status = self._kill(child)
            return self._told(report, token, timeout, status, seconds)
        finally:
            os.close(report)
            if self._namespaces:
                confine.drop_scratch()
            else:
                remove(scratch)

    def _become_program(self, request: dict, test: str, scratch: str, report: int, token: bytes) -> None:
        try:
            os.setsid()
            os.dup2(report, 3)
            os.closerange(4, 4096)
            os.chdir(scratch)
            os.environ["HOME"] = os.environ["TMPDIR"] = scratch
            # Where there is no namespace of users, the limit counts all that the user runs.
            processes = request["processes"] + (0 if self._namespaces else self._own_processes)
            confine.limit(request["seconds"], request["megabytes"], request["file_megabytes"], processes)
            # The private root shows Python to every user; elsewhere it may lie in a home directory of root's.
            confine.give_up_rights(other_user=self._namespaces or seen_by_others(os.__file__))
            confine.die_with_parent()
            if not self._namespaces:
                confine.forbid_by_audit_hook(scratch)
            run_test(request["source"], request["setup"], test, 3, token)
        except BaseException:
            os._exit(71)

    def _wait(self, child: int, seconds: float) -> bool:
        """Until the process ends (False) or the time is over (True). Raises Ended when nobody waits for the answer."""
        ended = os.pidfd_open(child)
        try:
            poll = select.poll()
            poll.register(ended, select.POLLIN)
            poll.register(self._requests, 0)  # hang-ups are told without being asked for
            until = time.monotonic() + seconds
            while (left := until - time.monotonic()) > 0:
                happened = dict(poll.poll(max(1, int(1000 * left))))
                if self._requests in happened:
                    self._kill(child)
                    raise Ended
                if ended in happened:
                    return False
            return True
        finally:
            os.close(ended)

    def _kill(self, child: int) -> int:
        """Kills the process and all that it started, waits for them, and returns its exit status."""
        os.kill(child, signal.SIGKILL)  # not reaped yet, so the number is still its own
        if not self._namespaces:
            kill_group(child)
        _, status = os.waitpid(child, 0)  # of the first of a process namespace: returns when all in it are gone
        if not self._namespaces:
            kill_descendants()
        return os.waitstatus_to_exitcode(status)

    def _told(self, report: int, token: bytes, timeout: bool, status: int, seconds: float) -> list:
        os.set_blocking(report, False)
        try:
            data = os.read(report, _MOST_REPORT)
        except BlockingIOError:
            data = b""
        phase = "test" if data.startswith(_TEST_BEGUN) else "program"  # what forges this mark costs itself time only
        _, found, told = data.partition(token)
        if found:
            try:
                phase, result, message = json.loads(told)
                return [str(phase), str(result), str(message)]
            except (ValueError, TypeError):
                pass
        if timeout:
            return [phase, "timeout", f"not done within {seconds:g} s"]
        if status == 71:
            return ["program", "error", "the sandbox could not be set up for this program"]
        how = f"was killed by signal {-status}" if status < 0 else f"ended with code {status}"
        return [phase, "error", f"the process {how} before the test was done"]

    def serve(self) -> None:
        while True:
            request = json.loads(self._read(int.from_bytes(self._read(4), "big")))
            self.send(self.answer(request))

    def _read(self, size: int) -> bytes:
        parts = []
        while size:
            part = os.read(self._requests, min(size, 1 << 20))
            if not part:
                raise Ended
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def send(self, reply: dict) -> None:
        data = json.dumps(reply).encode()
        data = len(data).to_bytes(4, "big") + data
        while data:
            data = data[os.write(self._replies, data) :]


def kill_group(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # it has no group yet, or left it
        pass


def kill_descendants() -> None:
    """Kills the processes that are left, which are children of this one since their parents died (`adopt_orphans`)."""
    until = time.monotonic() + 5
    while time.monotonic() < until:
        for child in children():
            try:
                os.kill(child, signal.SIGKILL)
            except ProcessLookupError:
                pass
        try:
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        except ChildProcessError:
            return
        time.sleep(0.001)


def children() -> list[int]:
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(number) for number in file.read().split()]


def remove(folder: str) -> None:
    """Removes a scratch directory, whatever a program has built in it."""
    try:
        os.rmdir(folder)
    except FileNotFoundError:
        pass
    except OSError:  # not empty; rm needs no recursion for deep trees
        subprocess.run(["/bin/chmod", "-R", "u+rwx", folder], stderr=subprocess.DEVNULL)
        subprocess.run(["/bin/rm", "-rf", folder], stderr=subprocess.DEVNULL)


def count_processes() -> int:
    """Threads that the user runs already, which count against a limit of processes."""
    total, user = 0, os.getuid()
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == user:
                total += len(os.listdir(f"/proc/{name}/task"))
        except OSError:
            continue
    return total


def seen_by_others(path: str) -> bool:
    """Whether every user may read this file."""
    if not os.stat(path).st_mode & 0o004:
        return False
    while path != "/":
        path = os.path.dirname(path)
        if not os.stat(path).st_mode & 0o001:
            return False
    return True


def into_namespaces(readable: list[str]) -> int:
    """Continues in a forked process that namespaces confine; returns the descriptor of its namespace of processes.

    The process that was started waits for it, and neither outlives the other.
    """
    confine.enter_namespaces()
    inner = os.fork()
    if inner:
        os.closerange(0, 3)
        os._exit(abs(os.waitstatus_to_exitcode(os.waitpid(inner, 0)[1])))
    confine.die_with_parent()
    processes = os.open("/proc/self/ns/pid", os.O_RDONLY)
    confine.private_root(readable)
    return processes


def main() -> None:
    settings = json.loads(sys.argv[1])
    os.umask(0o022)
    for name in _COMMON:
        __import__(name)
    if settings["site"]:
        sys.path.append(settings["site"])
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # where memory runs out, these processes go first
    except OSError:
        pass
    namespaces = settings["confinement"] == "namespaces"
    processes = into_namespaces(settings["readable"]) if namespaces else None
    try:
        import numpy.testing  # noqa: F401
    except ImportError:
        pass
    own = 0
    if not namespaces:
        confine.adopt_orphans()
        own = count_processes()
    server = Server(namespaces, own, processes)
    try:
        server.send({"numpy": "numpy" in sys.modules})
        server.serve()
    except (Ended, BrokenPipeError):
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
