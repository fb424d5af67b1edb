"""Protects: metrics are mirrored only where that is asked for, under their names, and a tracker that fails ends nothing."""

import sys
from types import ModuleType

import pytest

from d1jax.config import UserError
from d1jax.config.parse import parse
from d1jax.telemetry.metrics import MetricsLog, read_metrics
from d1jax.telemetry.trackers import LIBRARIES, Trackers, check_trackers


def test_nothing_is_tracked_unless_asked():
    assert parse([]).track == ()
    with pytest.raises(UserError, match="track.0 = 'wandbb' is not one of tensorboard, wandb, trackio"):
        parse(["--track", "[wandbb]"])


@pytest.fixture
def fake(monkeypatch):
    """{library: calls} of libraries that write down how they are called."""
    seen = {"wandb": [], "trackio": [], "tensorboardX": []}
    for library in ("wandb", "trackio"):
        made = ModuleType(library)
        made.__spec__ = object()
        made.init = lambda library=library, **given: seen[library].append(("init", given))
        made.log = lambda values, library=library: seen[library].append(("log", values))
        made.finish = lambda library=library: seen[library].append(("finish",))
        monkeypatch.setitem(sys.modules, library, made)

    class Writer:
        def __init__(self, path):
            seen["tensorboardX"].append(path)

        def add_scalar(self, *call):
            seen["tensorboardX"].append(call)

        def close(self):
            seen["tensorboardX"].append("closed")

    board = ModuleType("tensorboardX")
    board.__spec__, board.SummaryWriter = object(), Writer
    monkeypatch.setitem(sys.modules, "tensorboardX", board)
    return seen


def test_every_tracker_gets_stage_step_and_names(tmp_path, fake):
    with MetricsLog(tmp_path / "run", Trackers(tuple(LIBRARIES), tmp_path / "run", {"seed": 3})) as log:
        log.write("rl", 2, {"reward": 0.5})
    for library in ("wandb", "trackio"):
        (_, settings), logged, finished = fake[library]
        assert settings["project"] == "d1jax" and settings["name"] == "run" and settings["config"] == {"seed": 3}
        assert logged == ("log", {"rl/step": 2, "rl/reward": 0.5}) and finished == ("finish",)
    assert fake["tensorboardX"] == [str(tmp_path / "run" / "tensorboard"), ("rl/reward", 0.5, 2), "closed"]


def test_one_that_fails_is_named_once_and_the_record_is_whole(tmp_path, fake, capsys):
    def broken(values):
        raise ConnectionError("no network")

    sys.modules["wandb"].log = broken
    with MetricsLog(tmp_path, Trackers(("wandb", "trackio"), tmp_path, {})) as log:
        log.write("rl", 1, {"reward": 0.5})
        log.write("rl", 2, {"reward": 0.6})
    assert capsys.readouterr().err.count("wandb could not log (ConnectionError: no network)") == 1
    assert [row["step"] for row in read_metrics(log.path)] == [1, 2] and len(fake["trackio"]) == 4


def test_a_library_that_is_missing_is_told_before_anything_is_built(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"track names trackio, and trackio is not installed; pip install 'd1jax\[trackio\]'"
    ):
        check_trackers(["trackio"])
