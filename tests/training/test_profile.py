"""The window of steps that the profiler records."""

import jax
import jax.numpy as jnp
import pytest

from d1jax.config.profile import ProfileConfig
from d1jax.training.profile import Profile


@pytest.fixture
def traces(monkeypatch):
    """What the profiler is told."""
    told = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda directory, **_: told.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: told.append("stop"))
    return told


@pytest.mark.parametrize(
    ("start", "steps", "first", "last", "traced"),
    [
        (2, 2, 0, 9, [2, 4]),
        (0, 1, 0, 9, [0, 1]),
        (8, 5, 0, 9, [8, None]),  # the stage ends before the window does
        (2, 2, 3, 9, [3, 4]),  # a run that goes on within the window
        (2, 2, 4, 9, []),  # and behind it
        (5, 2, 5, 9, [5, 7]),
        (2, 0, 0, 9, []),
    ],
)
def test_the_window(traces, tmp_path, start, steps, first, last, traced):
    found = []
    profile = Profile(ProfileConfig(start, steps), tmp_path, first)
    found += [first] * len(traces)
    for step in range(first + 1, last + 1):
        before = len(traces)
        profile.done(step)
        found += [step] * (len(traces) - before)
    told = profile.stop()
    assert [*found, *([None] if told else [])] == traced
    assert traces == ["start", "stop"][: len(traced)]


def test_a_trace_is_written(tmp_path):
    profile = Profile(ProfileConfig(1, 1), tmp_path / "profiles", 0)
    assert profile.done(1) == ""
    jax.block_until_ready(jax.jit(lambda x: x + 1)(jnp.ones(3)))
    assert "steps 2 on are in" in profile.done(2)
    assert list((tmp_path / "profiles").rglob("*.xplane.pb"))


def test_the_devices_are_done_with_the_steps_before_and_in_the_window(tmp_path):
    profile = Profile(ProfileConfig(2, 3), tmp_path, 0)
    assert [step for step in range(9) if profile.is_edge(step)] == [2, 5]
    assert not any(Profile(ProfileConfig(2, 0), tmp_path, 0).is_edge(step) for step in range(9))
