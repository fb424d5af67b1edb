"""Data sets in the Hugging Face layout, read from local folders: nothing here needs a network."""

import json
import sys

import pytest

from d1jax.tasks import Countdown, Traces, make, read_source
from d1jax.tasks.hub import read_hub
from d1jax.tasks.task import DataError

RECORDS = [
    {"question": "1 + 1?", "solution": "2"},
    {"question": "2 + 2?", "thinking_trajectories": ["hm"], "attempt": "4"},
]
EXPECTED = [
    {"question": "1 + 1?", "reasoning": None, "attempt": None, "answer": "2"},
    {"question": "2 + 2?", "reasoning": "hm", "attempt": "4", "answer": "4"},
]


@pytest.fixture
def library(tmp_path, monkeypatch):
    """The datasets library, cut off from the network and with a cache of its own."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return datasets


@pytest.fixture
def folder(tmp_path):
    """`folder(train=[...], test=[...])` -> the path of a folder with a JSONL file per split."""

    def make(**splits):
        path = tmp_path / "data"
        path.mkdir()
        for split, records in splits.items():
            text = records if isinstance(records, str) else "".join(json.dumps(record) + "\n" for record in records)
            (path / f"{split}.jsonl").write_text(text)
        return path

    return make


def complaint(source, task=None):
    with pytest.raises(DataError) as caught:
        read_hub(source, task or Traces())
    message = str(caught.value)
    assert message.startswith(source)
    assert "\n" not in message
    return message


def test_a_folder_is_read_and_nulls_are_absent(library, folder):
    assert read_hub(f"hub:{folder(train=RECORDS)}", Traces()) == EXPECTED


def test_relative_folders_and_splits(library, folder, monkeypatch):
    path = folder(train=RECORDS, test=RECORDS[:1])
    monkeypatch.chdir(path.parent)
    assert read_source("hub:data", Traces()) == read_source("hub:data:train", Traces()) == EXPECTED
    assert read_source("hub:data:test", Traces()) == EXPECTED[:1]
    assert read_source("hub:data:train[1:]", Traces()) == EXPECTED[1:]


def test_other_sources_are_files(folder):
    assert read_source(str(folder(train=RECORDS) / "train.jsonl"), Traces()) == EXPECTED


def test_the_task_names_the_row(library, folder):
    source = f"hub:{folder(train=[RECORDS[0], {'question': ' ', 'solution': '3'}])}"
    assert complaint(source).startswith(f"{source} row 1: question = ' ': a question was expected")


def test_rows_that_the_task_leaves_out_are_not_rows(library, folder):
    source = f"hub:{folder(train=[{'nums': [44, 19, 35], 'target': 98}], test=[{'nums': [1, 2], 'target': 3}])}"
    assert [row["target"] for row in read_hub(source, Countdown())] == [98]
    assert "all 1 rows are outside" in complaint(f"{source}:test", Countdown())


def test_no_rows(library, monkeypatch):
    monkeypatch.setattr(library, "load_dataset", lambda name, split: [])
    assert complaint("hub:a/b:test") == "hub:a/b:test: the split holds no rows; name another split"


def test_unknown_split(library, folder):
    message = complaint(f"hub:{folder(train=RECORDS)}:tset")
    assert 'cannot be loaded (Unknown split "tset". Should be one of' in message
    assert "check the name, the split and the connection: write hub:NAME or hub:NAME:SPLIT" in message


def test_unreadable_data(library, folder):
    assert "JSON parse error" in complaint(f"hub:{folder(train='{')}")


def test_folder_without_data(library, folder):
    assert "cannot be loaded (The directory at" in complaint(f"hub:{folder()}")


def test_a_data_set_that_cannot_be_reached(library, monkeypatch):
    def load_dataset(name, split):
        assert (name, split) == ("nobody/nothing", "train")
        raise ConnectionError("Couldn't reach it\nand much more")

    monkeypatch.setattr(library, "load_dataset", load_dataset)
    assert "hub:nobody/nothing: cannot be loaded (Couldn't reach it); check" in complaint("hub:nobody/nothing")


def test_scripts_are_never_run(library, folder, tmp_path):
    path = folder(train=RECORDS)
    (path / "data.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert "scripts are no longer supported" in complaint(f"hub:{path}")
    assert not (tmp_path / "ran").exists()


def test_versions_that_could_run_scripts_are_refused(library, monkeypatch):
    monkeypatch.setattr(library, "__version__", "3.6.0")
    assert "datasets 3.6.0 is older than version 4; pip install 'd1jax[data]'" in complaint("hub:nobody/nothing")


@pytest.mark.parametrize(
    "source", ["hub:", "hub::train", "hub:json", "hub:pandas:train", "hub:a/b:", "hub:no/such/x/y"]
)
def test_names_that_can_be_no_data_set(source):
    assert "no such folder, and not the id of a data set; write hub:NAME or hub:NAME:SPLIT" in complaint(source)


def test_missing_library(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert complaint(f"hub:{folder(train=RECORDS)}").endswith("; pip install 'd1jax[data]'")


def test_a_parquet_file_is_read_like_its_rows(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"question": "q", "answer": "so #### 18"}, {"question": "r", "answer": "#### 7"}]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    found = read_source(str(tmp_path / "rows.parquet"), make("gsm8k"))
    assert [row["question"] for row in found] == ["q", "r"]
    with pytest.raises(DataError, match="no.parquet: no such file"):
        read_source(str(tmp_path / "no.parquet"), make("gsm8k"))
