"""The order of windows from memory and from streams: shares are kept, and both go on exactly where they were."""

import gzip
import json
from collections import Counter

import numpy as np
import pytest

from d1jax.config import AdaptConfig, UserError
from d1jax.data.packing import Windows
from d1jax.data.text import TextStream, WindowOrder
from d1jax.data.texts import read_texts
from d1jax.data.tokenizers import ByteTokenizer

BYTES = ByteTokenizer()


def windows_of(start, count):
    tokens = np.arange(start, start + count, dtype=np.int32)[:, None] + np.zeros((1, 4), np.int32)
    return Windows(tokens, np.ones((count, 4), np.float32))


def test_every_source_is_seen_by_its_share_and_whole_before_it_comes_again():
    order = WindowOrder([windows_of(0, 6), windows_of(100, 50)], [1.0, 3.0], seed=3)
    seen = order.take(0, 48)[:, 0]
    assert sum(seen < 100) == 12 and sum(seen >= 100) == 36
    small = [number for number in seen if number < 100]
    assert sorted(small[:6]) == list(range(6)) == sorted(small[6:])
    assert len({number for number in seen if number >= 100}) == 36


def test_an_order_is_a_function_of_seed_and_position():
    make = lambda seed: WindowOrder([windows_of(0, 20), windows_of(50, 9)], [2.0, 1.0], seed)  # noqa: E731
    np.testing.assert_array_equal(make(0).take(7, 30), make(0).take(0, 37)[7:])
    assert not np.array_equal(make(0).take(0, 30), make(1).take(0, 30))


@pytest.fixture
def sources(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"a{i}" * 5}) + "\n" for i in range(7)))
    (tmp_path / "b.txt").write_text("b is a text file\nof two lines")
    return {str(tmp_path / "a.jsonl"): 2.0, str(tmp_path / "b.txt"): 1.0}


def test_a_stream_gives_the_shares_and_begins_again(sources):
    stream = TextStream(sources, BYTES, 6, "adapt.data")
    windows = stream.take(60)
    counted = Counter(
        bytes(row[row < 256].astype(np.uint8).tolist()).decode().strip("0123456789")[:1] for row in windows
    )
    assert counted["a"] == 40
    assert len({tuple(row) for row in windows}) < 60  # both were through and began again


@pytest.mark.parametrize("at", [0, 1, 5, 17, 33])
def test_a_stream_goes_on_with_the_very_next_window(sources, at):
    whole = TextStream(sources, BYTES, 6, "adapt.data").take(50)
    first = TextStream(sources, BYTES, 6, "adapt.data")
    np.testing.assert_array_equal(first.take(at) if at else whole[:0], whole[:at])
    state = json.loads(json.dumps(first.state))
    again = TextStream(sources, BYTES, 6, "adapt.data", state)
    np.testing.assert_array_equal(again.take(50 - at), whole[at:])


def test_nothing_is_told_of_files_of_ones_own(sources, monkeypatch):
    load = pytest.importorskip("datasets.load")
    monkeypatch.setattr(load, "get_session", lambda: pytest.fail("the network is asked"))
    assert len(TextStream(sources, BYTES, 6, "adapt.data").take(2)) == 2


def test_a_stream_without_text_ends(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(UserError, match="a.jsonl"):
        TextStream({str(tmp_path / "a.jsonl"): 1.0}, BYTES, 6, "adapt.data").take(1)


# -- what a stage is given ------------------------------------------------------------------------------------------------


def read(tmp_path, longest=0, **changes):
    (tmp_path / "a.txt").write_text("abcdefgh" * 40)
    (tmp_path / "b.txt").write_text("ABCDEFGH" * 20)
    settings = {"data": {str(tmp_path / "a.txt"): 1.0}, "length": 8, "validation_windows": 4, **changes}
    return read_texts(AdaptConfig(**settings), "adapt", BYTES, 0, longest, lambda line: None)


def test_the_first_windows_are_held_out_and_not_learnt(tmp_path):
    both = {str(tmp_path / "a.txt"): 1.0, str(tmp_path / "b.txt"): 1.0}
    texts = read(tmp_path, data=both)
    assert len(texts.validation["held_out"].tokens_NT) == 4
    assert [len(windows.tokens_NT) for windows in texts.learnt] == [40 - 2, 20 - 2]


def test_files_of_their_own_are_the_validation(tmp_path):
    texts = read(tmp_path, validation={"capitals": str(tmp_path / "b.txt")})
    assert len(texts.validation["capitals"].tokens_NT) == 4 and len(texts.learnt[0].tokens_NT) == 40


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data": {}}, "adapt.data is empty"),
        ({"longest": 7}, "adapt.length = 8 is more than the 7 positions of the model"),
        ({"validation_windows": 40}, "has 40 windows of 8 tokens, of which 40 are held out"),
        ({"length": 400}, "fill no window of 400"),
    ],
)
def test_what_cannot_be_learnt_from_is_named(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, **changes)


def test_text_that_is_learnt_cannot_be_the_validation(tmp_path):
    with pytest.raises(UserError, match=r"adapt.validation.same: .*a\.txt is in adapt.data.*which is learnt from"):
        read(tmp_path, validation={"same": str(tmp_path / "a.txt")})
    (tmp_path / "copy.txt").write_text("abcdefgh" * 40)
    with pytest.raises(UserError, match="adapt.validation.copy: all of its text is in adapt.data"):
        read(tmp_path, validation={"copy": str(tmp_path / "copy.txt")})
    with pytest.raises(UserError, match=r"adapt.validation.one: .*b\.txt is in adapt.data"):
        read(tmp_path, data={f"{tmp_path}/*.txt": 1.0}, validation={"one": str(tmp_path / "b.txt")})


def test_files_that_are_alike_by_chance_may_stand_in_both(tmp_path):
    for name, text in (("learnt", "abcdefgh" * 40), ("held", "ABCDEFGH" * 40)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
        (tmp_path / name / "text.py").write_text(text)
    texts = read(tmp_path, data={str(tmp_path / "learnt"): 1.0}, validation={"other": str(tmp_path / "held")})
    assert len(texts.validation["other"].tokens_NT) == 4


def test_names_with_a_dot_stay_apart(tmp_path):
    (tmp_path / "c.txt").write_text("01234567" * 20)
    files = {"v1.code": str(tmp_path / "b.txt"), "v2.code": str(tmp_path / "c.txt")}
    assert list(read(tmp_path, validation=files).validation) == ["v1.code", "v2.code"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("c.jsonl.gz", gzip.compress(b'{"text": "a"}\n', mtime=1), "is a binary file"),
        ("c.jsonl", b'{"content": "a"}\n', 'no text under "text"'),
        ("c.jsonl", b'{"text": ""}\n{"text": " "}\n', "has no text"),
        ("c.txt", b"", "has no text"),
        ("c.txt", "\xe9".encode("latin-1"), "cannot be read"),
    ],
)
def test_a_stream_is_looked_at_before_anything_is_compiled(tmp_path, name, content, message):
    pytest.importorskip("datasets")
    (tmp_path / name).write_bytes(content)
    held = {"held": str(tmp_path / "b.txt")}
    with pytest.raises(UserError, match=f"adapt.data.*{message}"):
        read(tmp_path, data={str(tmp_path / name): 1.0}, validation=held, streaming=True)


def test_a_stream_leaves_out_documents_without_text_as_memory_does(tmp_path):
    pytest.importorskip("datasets")
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["", "abc", " \n", "de"]))
    end = BYTES.special.end
    found = TextStream({str(file): 1.0}, BYTES, 7, "adapt.data").take(2)
    assert found.tolist() == [[*b"abc", end, *b"de", end]] * 2
