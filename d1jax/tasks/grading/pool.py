"""Worker processes that may hang or die: each row has a time limit, and a lost worker costs its row only.

Workers are ordinary programs (maths_worker.py) and not forks: a fork of a process that holds JAX's threads may hang, and a
spawned child would run the user's script again.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from d1jax.tasks.task import DataError

WORKER = Path(__file__).with_name("maths_worker.py")
SECONDS = 5.0
"""A row's time limit."""
START_SECONDS = 120.0
"""In which a worker imports its libraries, on a machine that is busy."""
START_ATTEMPTS = 3


class Worker:
    """One process, asked one row at a time."""

    def __init__(self, program: Path, alarm: int) -> None:
        # -P: the worker's own folder holds a numbers.py, which must not hide Python's.
        command = [sys.executable, "-P", str(program), str(alarm)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is the parent's to handle
        )
        self.ready = False
        self.row: int | None = None
        self.deadline = time.monotonic() + START_SECONDS
        self._read = b""

    def ask(self, row: int, pair: tuple[str, str], seconds: float) -> None:
        self.row, self.deadline = row, time.monotonic() + seconds
        line = json.dumps({"gold": pair[0], "offer": pair[1]}) + "\n"  # ASCII: lone surrogates are escaped
        with suppress(OSError):  # a worker that has died is noticed where its answer is read
            self.process.stdin.write(line.encode())
            self.process.stdin.flush()

    def answer(self) -> tuple[bool, bool | None]:
        """(whether a whole line has come, what it says). Raises EOFError where the worker has ended."""
        piece = os.read(self.process.stdout.fileno(), 4096)
        if not piece:
            raise EOFError
        self._read += piece
        if not self._read.endswith(b"\n"):
            return False, None
        line, self._read = self._read, b""
        return True, json.loads(line)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class Pool:
    """Up to `workers` processes, started when they are needed and kept until `close`.

    A row that takes more than `seconds`, or whose worker dies, is answered None, and the worker is replaced.
    """

    def __init__(self, workers: int | None = None, seconds: float = SECONDS, program: Path = WORKER) -> None:
        self.size = workers or min(_cores(), 16)
        self.seconds = seconds
        self.replaced = 0
        self._program = program
        self._workers: list[Worker] = []
        self._lock = threading.Lock()  # rewards may be computed by several threads

    def ask(self, pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
        """What the workers answer, in the order of the pairs. Raises DataError where no worker can be started."""
        with self._lock:
            try:
                return self._ask(pairs)
            except BaseException:
                self._end_all()  # an answer that is still to come would be taken for that of another row
                raise

    def _ask(self, pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
        answers: list[bool | None] = [None] * len(pairs)
        waiting = deque(range(len(pairs)))
        failed_starts = 0
        while waiting or any(worker.row is not None for worker in self._workers):
            wanted = min(self.size, len(waiting) + sum(worker.row is not None for worker in self._workers))
            while len(self._workers) < wanted:
                self._workers.append(self._start())
            for worker in self._workers:
                if worker.ready and worker.row is None and waiting:
                    row = waiting.popleft()
                    worker.ask(row, pairs[row], self.seconds)
            for worker, (lost, answer) in self._reports():
                if lost:
                    self._workers.remove(worker)
                    worker.end()
                    self.replaced += 1
                    failed_starts += not worker.ready
                    if failed_starts >= START_ATTEMPTS:
                        raise DataError(
                            f"{self._program.name}: {failed_starts} processes ended before they were ready; "
                            f"see why with: {sys.executable} -P {self._program} 5"
                        )
                elif worker.ready:
                    answers[worker.row], worker.row = answer, None
                else:
                    worker.ready = True
        return answers

    def _start(self) -> Worker:
        return Worker(self._program, int(self.seconds) + 2)

    def _reports(self) -> list[tuple[Worker, tuple[bool, bool | None]]]:
        """[(worker, (is it lost, its answer))] of those of which something is known, after waiting for it."""
        busy = [worker for worker in self._workers if worker.row is not None or not worker.ready]
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            patience = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
            events = [key.data for key, _ in selector.select(patience)]
        reports = []
        for worker in busy:
            try:
                whole, answer = worker.answer() if worker in events else (False, None)
                if whole:
                    reports.append((worker, (False, answer)))
                elif time.monotonic() >= worker.deadline:
                    reports.append((worker, (True, None)))
            except (EOFError, OSError, ValueError):
                reports.append((worker, (True, None)))
        return reports

    def close(self) -> None:
        """Ends all workers. The pool can still be asked, and starts new ones then."""
        with self._lock:
            self._end_all()

    def _end_all(self) -> None:
        for worker in self._workers:
            worker.end()
        self._workers = []


def shared_pool() -> Pool:
    """The pool of this process, with a worker for each core. It ends with the process."""
    return _pool_of(os.getpid())  # a fork has its own


@functools.cache
def _pool_of(process: int) -> Pool:
    pool = Pool()
    atexit.register(lambda: pool.close() if os.getpid() == process else None)
    return pool


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
