"""A first signal asks, a second one does not; also while the main thread is where no handler of Python runs."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from d1jax.config.errors import Stopped
from d1jax.training.stopping import StopRequest

BUSY = """
import hashlib
from d1jax.training.stopping import StopRequest
with StopRequest():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # minutes in C, like a compiler
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_process_that_is_busy_in_c(signum):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signum)
        lines = [process.stderr.readline() for _ in range(2)]
        assert lines == ["\n", "stopping after this step; once more to quit at once\n"]
        process.send_signal(signum)
        assert process.wait(timeout=60) == 128 + signum and process.stderr.read() == ""
    finally:
        process.kill()


def test_a_first_signal_is_answered_where_everything_is_saved():
    before = [signal.getsignal(number) for number in StopRequest.SIGNALS]
    with StopRequest() as stop:
        stop.check("step 1")
        signal.raise_signal(signal.SIGTERM)
        assert stop.signum == signal.SIGTERM
        with pytest.raises(Stopped, match="step 2: stopped, everything saved") as stopped:
            stop.check("step 2")
    assert stopped.value.exit_code == 143
    assert [signal.getsignal(number) for number in StopRequest.SIGNALS] == before and signal.set_wakeup_fd(-1) == -1
