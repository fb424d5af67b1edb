"""Progress on a terminal and in a log file; time is a fake clock, so nothing here depends on the machine."""

import io

import pytest

from d1jax.telemetry.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_plain_lines_first_last_and_at_most_one_every_few_seconds():
    stream, clock = io.StringIO(), Clock()
    with Progress("sft", 90, every=5.0, stream=stream, clock=clock) as progress:
        for step in range(90):
            clock.now += 0.25
            progress.update({"loss": 2.0 - step / 100})
    lines = stream.getvalue().splitlines()
    assert lines[0] == "sft   1/90  loss 2"
    assert lines[1] == "sft  21/90  4.0 it/s  eta 00:17  loss 1.8"
    assert lines[-1] == "sft  90/90  4.0 it/s  eta 00:00  loss 1.11"
    assert len(lines) == 6


def test_the_last_state_is_printed_once_when_a_run_breaks_off():
    stream, clock = io.StringIO(), Clock()
    with pytest.raises(KeyboardInterrupt), Progress("rl", 40, stream=stream, clock=clock) as progress:
        for _ in range(3):
            progress.update({"reward": 1.0})
        raise KeyboardInterrupt
    assert [line.split("  ")[1].strip() for line in stream.getvalue().splitlines()] == ["1/40", "3/40"]


def test_a_resumed_run_counts_on_and_its_rate_counts_new_steps_only():
    stream, clock = io.StringIO(), Clock()
    with Progress("sft", 12, initial=9, stream=stream, clock=clock) as progress:
        for _ in range(3):
            clock.now += 10
            progress.update({})
    assert stream.getvalue().splitlines() == [
        "sft  10/12",
        "sft  11/12  10.0 s/it  eta 00:10",
        "sft  12/12  10.0 s/it  eta 00:00",
    ]


def test_nothing_is_printed_without_a_step_and_notes_are_lines():
    stream = io.StringIO()
    with Progress("sft", 3, stream=stream) as progress:
        progress.note("saved step 0")
    assert stream.getvalue() == "saved step 0\n"


def test_a_terminal_gets_a_bar_with_metrics_and_notes_on_their_own_line():
    stream = Terminal()
    with Progress("rl", 4, initial=1, stream=stream) as progress:
        progress.update({"reward": 0.123456})
        progress.note("evaluated")
        progress.update({"reward": 0.5})
        progress.update({"reward": 0.75})
    text = stream.getvalue()
    assert "rl:" in text and "4/4" in text and "reward 0.75" in text
    assert "evaluated" in [part.strip() for part in text.replace("\r", "\n").split("\n")]
    assert "eta" not in text, "plain lines do not mix with the bar"


def test_standard_error_is_looked_up_when_the_stage_starts(capsys):
    with Progress("sft", 1) as progress:
        progress.update({"loss": 1.0})
    captured = capsys.readouterr()
    assert captured.err == "sft  1/1  loss 1\n" and captured.out == ""
