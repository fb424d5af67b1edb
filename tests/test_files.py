"""A file or directory is the old one or the new one, never half of one, and nobody's data is deleted."""

import json
import os
import stat

import numpy as np
import pytest

from d1jax.files import atomic_write, new_directory, to_json, write_json, write_jsonl


class Crash(BaseException):
    """As abrupt as Ctrl-C."""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# -- directories ----------------------------------------------------------------------------------------------------------


def test_directory_appears_under_its_name_at_the_end_only(tmp_path):
    out = tmp_path / "new" / "out"
    with new_directory(out) as beside:
        (beside / "weights").write_text("half")
        assert not out.exists()
        assert beside.parent == out.parent, "another file system could not be renamed from"
    assert names(tmp_path / "new") == ["out"] and (out / "weights").read_text() == "half"


def test_directory_gets_the_permissions_of_an_ordinary_one(tmp_path):
    (tmp_path / "ordinary").mkdir()
    with new_directory(tmp_path / "out"):
        pass
    mode = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("out", "ordinary")]
    assert mode[0] == mode[1]


@pytest.mark.parametrize("was_there", [False, True], ids=["new", "empty directory"])
@pytest.mark.parametrize("error", [OSError, Crash])
def test_failing_halfway_leaves_neither_the_directory_nor_a_hidden_one(tmp_path, error, was_there):
    out = tmp_path / "out"
    if was_there:
        out.mkdir()
    with pytest.raises(error), new_directory(out) as beside:
        (beside / "folder").mkdir()
        (beside / "folder" / "weights").write_text("half")
        raise error("no space left on device")
    assert names(tmp_path) == ["out"] * was_there
    assert not was_there or names(out) == []


def test_an_empty_directory_may_be_filled(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with new_directory(out) as beside:
        (beside / "weights").write_text("whole")
    assert names(tmp_path) == ["out"] and names(out) == ["weights"]


@pytest.mark.parametrize("there", ["file", "directory", "hidden file"])
def test_what_exists_is_refused_before_anything_is_written_and_stays(tmp_path, there):
    out = tmp_path / "out"
    precious = {"file": out, "directory": out / "thesis.txt", "hidden file": out / ".thesis"}[there]
    precious.parent.mkdir(exist_ok=True)
    precious.write_text("precious")
    with pytest.raises(FileExistsError, match="out exists already; choose another"), new_directory(out):
        pytest.fail("the body ran")
    assert names(tmp_path) == ["out"] and precious.read_text() == "precious"


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(OSError), new_directory(out):
        out.mkdir()
        (out / "thesis.txt").write_text("precious")
    assert names(tmp_path) == ["out"] and (out / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize("target_exists", [True, False])
def test_a_link_is_followed_or_refused_before_hours_of_writing(tmp_path, target_exists):
    target, out = tmp_path / "scratch", tmp_path / "out"
    if target_exists:
        target.mkdir()
    out.symlink_to(target, target_is_directory=True)
    written = False
    try:
        with new_directory(out) as beside:
            written = True
            (beside / "weights").write_text("whole")
    except OSError:
        assert not written
    else:
        assert names(out) == ["weights"]


# -- files ----------------------------------------------------------------------------------------------------------------


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    atomic_write(path, "old")

    def crash(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError):
        atomic_write(path, "new")
    assert path.read_text() == "old"


def test_a_file_is_replaced_and_its_folder_made(tmp_path):
    path = tmp_path / "new" / "text"
    for text in ("old, and longer", "new"):
        atomic_write(path, text)
        assert path.read_text() == text
    assert names(path.parent) == ["text"]


def test_text_is_utf8_and_a_lone_surrogate_does_not_stop_it(tmp_path):
    write_jsonl(tmp_path / "rows", [{"text": "Äß你"}, {"text": "\ud800"}])
    assert (tmp_path / "rows").read_bytes() == '{"text": "Äß你"}\n{"text": "?"}\n'.encode()
    write_json(tmp_path / "value", {"ä": [1]})
    assert (tmp_path / "value").read_text(encoding="utf-8") == '{\n  "ä": [1]\n}\n'


def test_json_keeps_numbers_on_a_line_and_strings_as_they_are(tmp_path):
    value = {"rows": [[1, -2.5e-07], [3]], "text": ["[ 1", "[\n1,\n2]", "a  b"], "none": [], "mixed": [1, None, "2"]}
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == value and "    [1, -2.5e-07],\n    [3]\n" in text


def test_json_is_valid_whatever_was_measured(tmp_path):
    value = {"a": [1.5, float("nan"), (float("inf"), {"b": np.float64("-inf")})], "c": "NaN", "d": 2}
    plain = {"a": [1.5, None, [None, {"b": None}]], "c": "NaN", "d": 2}

    def refuse(word):
        raise AssertionError(word)

    write_json(tmp_path / "one.json", value)
    write_jsonl(tmp_path / "many.jsonl", [value])
    for text in (to_json(value), (tmp_path / "one.json").read_text(), (tmp_path / "many.jsonl").read_text()):
        assert json.loads(text, parse_constant=refuse) == plain


def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    atomic_write(tmp_path / "one.txt", "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device.*one.txt"):
        atomic_write(tmp_path / "one.txt", "new")
    assert names(tmp_path) == ["one.txt"] and (tmp_path / "one.txt").read_text() == "old"
