"""The sandbox against programs that want out, on, or more: no process, no file and no hang is left, and no false pass."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.tasks.grading import sandbox
from d1jax.tasks.grading.pool import shared_pool
from d1jax.tasks.grading.sandbox import CONFINEMENTS, Outcome, Program, Server, ServerLost, close_all, run_all

FORK = "import os\nif os.fork():\n    os._exit(0)\nos.setsid()\n"
# name -> (program, the statuses that its one test may have). The test itself always holds.
HOSTILE = {
    "endless loop": ("while True: pass", {"timeout"}),
    "loop that catches everything": ("while True:\n  try:\n    while True: pass\n  except BaseException: pass", {"timeout"}),
    "sleep": ("import time; time.sleep(1000)", {"timeout"}),
    "fork bomb": ("import os\nwhile True: os.fork()", {"timeout", "error"}),
    "fork bomb that catches": (
        "import os\nwhile True:\n  try: os.fork()\n  except BaseException: pass",
        {"timeout", "error"},
    ),
    "thread bomb": (
        "import threading, time\nwhile True:\n  try: threading.Thread(target=time.sleep, args=(999,)).start()\n  except RuntimeError: pass",
        {"timeout", "error"},
    ),
    "giant allocation": ("x = bytearray(1 << 40)", {"error"}),
    "growing allocation": ("x = []\nwhile True: x.append(bytearray(1 << 26))", {"error", "timeout"}),
    "power tower": ("x = 9**9**9**9", {"timeout", "error"}),
    "write outside": ("open('/tmp/d1jax-escaped', 'w').write('x')", {"error"}),
    "write at home": ("import os; open(os.path.expanduser('~root/d1jax-escaped'), 'w').write('x')", {"error"}),
    "remove outside": ("import os; os.remove('/usr/bin/env')", {"error"}),
    "huge file": ("with open('x', 'wb') as f:\n  while True: f.write(b'x' * (1 << 20))", {"error"}),
    "many files": ("import os\nfor i in range(10**6):\n  open(str(i), 'w').close()", {"error", "timeout", "passed"}),
    "deep directories": (
        "import os\nfor i in range(3000):\n  os.mkdir('d'); os.chdir('d')\nos.chmod('.', 0)",
        {"error", "passed", "timeout"},
    ),
    "network": ("import socket; socket.create_connection(('1.1.1.1', 53), timeout=3)", {"error"}),
    "name look-up": ("import socket; socket.getaddrinfo('example.com', 80)", {"error"}),
    "huge output": ("while True: print('x' * 100000)", {"timeout"}),
    "huge standard error": ("import os\nwhile True: os.write(2, b'x' * 100000)", {"timeout"}),
    "reads its input": ("x = input()", {"error"}),
    "leaves by os._exit": ("import os; os._exit(0)", {"error"}),
    "leaves by sys.exit": ("import sys; sys.exit(0)", {"error"}),
    "leaves by signal": ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", {"error", "passed"}),
    "crashes": ("def f(*a): return f(*a)\nimport sys; sys.setrecursionlimit(10**9); f()", {"error"}),
    "prints a pass": ("print('passed'); print('[\"test\", \"passed\", \"\"]'); import os; os._exit(0)", {"error"}),
    "writes a pass to every descriptor": (
        'import os\nfor fd in range(64):\n  try: os.write(fd, b\'test["test", "passed", ""]\')\n  except OSError: pass\nos._exit(0)',
        {"error"},
    ),
    "closes every descriptor": ("import os; os.closerange(0, 1000)", {"error"}),
    "daemon": (FORK + "import time; time.sleep(1000)", {"error", "timeout"}),
    "daemon of a daemon": (
        "import os, time, signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "for _ in range(3):\n  if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(1000)",
        {"error", "passed"},
    ),
    "other programs": ("import subprocess; subprocess.Popen(['/bin/sleep', '1000'])", {"error", "passed"}),
    "ignores signals": (
        "import signal\nfor s in range(1, 32):\n  if s not in (9, 19): signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
        {"timeout"},
    ),
    "removes its directory": ("import os, shutil; shutil.rmtree(os.getcwd(), ignore_errors=True)", {"passed", "error"}),
    "patches builtins": ("import builtins; builtins.all = lambda x: 1 / 0; builtins.AssertionError = KeyError", {"passed"}),
    "empties sys.modules": ("import sys; sys.modules.clear()", {"passed", "error"}),
    "broken Unicode": ("x = '\ud800'", {"error"}),
    "a NUL": ("x = 1\0", {"error"}),
    "megabyte source": ("x = 1\n" + "#" * 2**20, {"passed"}),
    "nested parentheses": ("(" * 10**5 + ")" * 10**5, {"error"}),
    "nested expression": ("x = " + "-" * 10**5 + "1", {"error"}),
    "an error whose text is hostile": ("class E(Exception):\n  def __str__(self): raise E()\nraise E()", {"error"}),
    "an error without end": ("class E(Exception):\n  def __str__(self):\n    while True: pass\nraise E()", {"timeout"}),
    "traces": ("import sys; sys.settrace(lambda *a: 1 / 0); sys.setprofile(lambda *a: 1 / 0)", {"error"}),
    "at exit": ("import atexit, time; atexit.register(time.sleep, 1000)", {"passed"}),
    "thread that stays": ("import threading, time; threading.Thread(target=time.sleep, args=(1000,)).start()", {"passed"}),
}  # fmt: skip


def available(name: str) -> bool:
    try:
        Server(name).close()
    except (ServerLost, FileNotFoundError):
        return False
    return True


@pytest.fixture(scope="module", params=CONFINEMENTS)
def confinement(request):
    if not available(request.param):
        pytest.skip(f"{request.param} cannot be had on this machine")
    yield request.param
    close_all()


def one(source: str, test: str = "assert True", confinement: str | None = None, **options) -> sandbox.TestResult:
    [outcome] = run_all([Program(source, (test,), **options)], workers=1, confinement=confinement)
    return outcome.tests[0]


def descendants() -> set[int]:
    """The processes below this one: servers, and whatever programs have left."""
    parents, found = {}, {os.getpid()}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            parents[int(name)] = int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    for _ in range(10):
        found |= {child for child, parent in parents.items() if parent in found}
    return found - {os.getpid()}


@pytest.fixture(autouse=True)
def without_other_processes():
    """Tests of formulas in this process have left their workers, which are meant to stay."""
    shared_pool().close()


def scratch_folders() -> list[Path]:
    return list(Path("/tmp").glob("d1jax-program-*"))


def test_each_test_has_its_own_result_and_sees_nothing_of_the_other():
    program = Program(
        "seen = []\ndef f(x):\n  seen.append(x)\n  return len(seen)",
        ("assert f(1) == 1", "assert f(1) == 1", "assert f(1) == 2, 'two'", "f(", "raise KeyError('k')"),
    )
    [outcome] = run_all([program])
    assert [test.status for test in outcome.tests] == ["passed", "passed", "failed", "error", "error"]
    assert outcome.tests[2].message == "AssertionError: two"
    assert outcome.tests[4].message == "KeyError: 'k'"
    assert outcome.passed == (True, True, False, False, False)
    assert outcome.pass_rate == 0.4


def test_every_test_has_a_limit_of_its_own_and_one_that_is_too_slow_costs_itself_only():
    program = Program(
        "import time", ("assert True", "time.sleep(9)", "time.sleep(0.3)", "time.sleep(0.3)"), seconds=0.5
    )
    [outcome] = run_all([program])
    assert [test.status for test in outcome.tests] == ["passed", "timeout", "passed", "passed"]
    assert "0.5 s" in outcome.tests[1].message


def test_a_program_that_never_comes_to_its_tests_is_run_once():
    began = time.monotonic()
    [outcome] = run_all([Program("while True: pass", ("assert True",) * 50, seconds=0.5)])
    assert {test.status for test in outcome.tests} == {"timeout"} and len(outcome.tests) == 50
    assert time.monotonic() - began < 5


def test_outcomes_are_in_the_order_of_the_programs_for_any_number_of_workers():
    programs = [Program(f"x = {i}", (f"assert x % 3 == {i} % 2",)) for i in range(20)]
    expected = [(i % 3 == i % 2,) for i in range(20)]
    for workers in (1, 3):
        assert [outcome.passed for outcome in run_all(programs, workers=workers)] == expected
    assert run_all([]) == []
    assert run_all([Program("1", ())]) == [Outcome(())]


def test_main_does_not_run_and_tests_may_import_the_program():
    source = "def f(): return 7\nif __name__ == '__main__':\n  raise SystemExit"
    assert one(source, "from solution import f\nassert f() == 7").status == "passed"
    assert (
        one("import dataclasses\n@dataclasses.dataclass\nclass A:\n  x: 'int' = 3", "assert A().x == 3").status
        == "passed"
    )


def test_a_test_finds_its_helpers_as_they_were():
    source = (
        "import builtins, sys, math\nimport numpy as np\nnp.allclose = lambda *a, **k: True\nbuiltins.all = lambda x: True\n"
        "math.isclose = lambda *a, **k: True\nsys.modules['math'] = sys\ndel builtins.any"
    )
    assert one(source, "import numpy as np\nassert np.allclose([1.0], [2.0])").status == "failed"
    assert one(source, "assert all([0])").status == "failed"
    assert one(source, "assert any([0])").status == "failed"
    assert one(source, "import math\nassert math.isclose(1, 2)").status == "failed"


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(name, confinement):
    source, statuses = HOSTILE[name]
    assert one("x = 1", confinement=confinement).status == "passed"
    before, servers = scratch_folders(), descendants()
    began = time.monotonic()
    result = one(source, confinement=confinement, seconds=0.4, megabytes=512)
    assert result.status in statuses, result
    assert time.monotonic() - began < 20
    assert scratch_folders() == before
    assert not Path("/tmp/d1jax-escaped").exists() and not Path("/root/d1jax-escaped").exists()
    # The server is there for the next program, and nothing that this one has started is.
    assert one("x = 1", "assert x == 1", confinement=confinement).status == "passed"
    assert descendants() == servers


def test_nothing_of_this_machine_is_seen_but_python_and_its_libraries():
    if not available("namespaces"):
        pytest.skip("namespaces cannot be had on this machine")
    source = (
        "import os\nseen = set(os.listdir('/'))\n"
        f"there = os.path.exists({str(Path(__file__))!r}) or os.path.exists('/etc/passwd') or os.path.exists('/proc/1')"
    )
    assert one(source, "assert not there and 'home' not in seen", "namespaces").status == "passed"
    assert one("import os", "assert os.getpid() == 1 and os.listdir('.') == []", "namespaces").status == "passed"
    rights = "import ctypes\nresult = ctypes.CDLL(None).unshare(0x00020000)"  # a namespace of mounts needs a capability
    assert one(rights, "assert result == -1", "namespaces").status == "passed"


def test_a_server_that_dies_costs_its_program_and_is_replaced(monkeypatch):
    close_all()
    assert one("x = 1").status == "passed"
    asked = Server.ask

    def killed(self, program):
        os.kill(self._process.pid, signal.SIGKILL)
        return asked(self, program)

    monkeypatch.setattr(Server, "ask", killed)
    result = one("x = 1")
    assert result.status == "error" and "sandbox was lost" in result.message
    monkeypatch.undo()
    assert one("x = 1").status == "passed"
    close_all()
    assert descendants() == set()


def test_servers_and_programs_end_with_the_process_that_asked(tmp_path):
    script = tmp_path / "asks.py"
    script.write_text(
        "from d1jax.tasks.grading.sandbox import Program, run_all\nprint('asks', flush=True)\n"
        "run_all([Program('while True: pass', ('pass',), seconds=60)])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(sandbox.__file__).parents[3])}
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, env=environment)
    assert process.stdout.readline() == b"asks\n"
    time.sleep(1.5)
    below = _below(process.pid)
    assert len(below) >= 2
    process.kill()
    process.wait()
    process.stdout.close()
    until = time.monotonic() + 10
    while time.monotonic() < until and any(_alive(pid) for pid in below):
        time.sleep(0.05)
    assert [pid for pid in below if _alive(pid)] == []


def _below(pid: int) -> list[int]:
    children = [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*children, *(below for child in children for below in _below(child))]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@given(st.lists(st.text(max_size=200), min_size=1, max_size=5))
def test_any_text_as_a_program_has_a_result(sources):
    outcomes = run_all([Program(source, ("assert False",), seconds=1) for source in sources])
    assert all(outcome.tests[0].status in {"failed", "error", "timeout"} for outcome in outcomes)


def test_servers_outlive_the_threads_that_started_them(confinement):
    programs = [Program("x = 1", ("assert x == 1",))] * 8
    for _ in range(4):
        assert all(outcome.pass_rate == 1 for outcome in run_all(programs, workers=2, confinement=confinement))


HOSTILE_ROUNDS = 310  # of the quick ones, a quarter of that of the slow ones: 10,145 programs


def test_ten_thousand_hostile_programs_leave_nothing():
    quick = [source for source, statuses in HOSTILE.values() if "timeout" not in statuses]
    slow = [source for source, statuses in HOSTILE.values() if "timeout" in statuses]
    programs = [Program(source, ("assert True",), seconds=0.5, megabytes=512) for source in quick] * HOSTILE_ROUNDS
    programs += [Program(source, ("assert True",), seconds=0.1, megabytes=512) for source in slow] * (
        HOSTILE_ROUNDS // 4
    )
    programs += [Program("x = 1", ("assert x == 1",))] * 1000
    outcomes = run_all(programs)
    assert len(outcomes) == len(programs)
    assert sum(outcome.pass_rate for outcome in outcomes[-1000:]) == 1000
    assert not any(
        "sandbox" in test.message and "lost" in test.message for outcome in outcomes for test in outcome.tests
    )
    close_all()
    assert descendants() == set() and scratch_folders() == []
