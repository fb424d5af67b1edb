"""Documents from files, folders and patterns, and what is refused."""

import json

import pytest

from d1jax.config import UserError
from d1jax.data.documents import digests, documents, files_of, fingerprint


def texts(source):
    return [text for _, text in documents(str(source), "adapt.data")]


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.txt").write_text("beta\n")
    (folder / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "zwei ü", "id": 3}\n{"text": "  "}\n')
    (folder / "deep" / "c.py").write_text("x = 1\n")
    (folder / "empty.txt").write_text(" \n")
    (folder / ".hidden").write_bytes(b"\0")
    return folder


def test_a_folder_gives_its_files_in_order_of_their_names(corpus):
    assert texts(corpus) == ["one", "zwei ü", "beta\n", "x = 1\n"]


def test_a_pattern_gives_what_it_matches(corpus):
    assert texts(f"{corpus}/**/*.py") == ["x = 1\n"]
    assert texts(f"{corpus}/*.txt") == ["beta\n"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert texts(tmp_path / "a.txt") == ["hello"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"PK\x03\x04\0\0", r"a\.txt is a binary file"),
        ("a.txt", "grüße".encode("latin-1"), r"a\.txt is not UTF-8 \(byte 2\)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 1}\n', r'a\.jsonl:2: no text under "text"'),
        ("a.jsonl", b'{"text": "a"\n', r"a\.jsonl:1: not readable as JSON"),
        ("a.jsonl", b'["a"]\n', r'a\.jsonl:1: no text under "text"'),
        (
            "a.jsonl",
            b'{"text": "a", "text": "b"}\n',
            r"a\.jsonl:1: not readable as JSON \(key 'text' stands there twice\)",
        ),
    ],
)
def test_what_is_no_text_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"config: adapt.data: .*{message}"):
        texts(tmp_path / name)


@pytest.mark.parametrize("name", ["missing.txt", "no/such/*.txt", ""])
def test_a_source_without_files_is_named(tmp_path, name):
    with pytest.raises(UserError, match="is no file, no folder with files and no pattern that matches any"):
        files_of(str(tmp_path / name) if name else str(tmp_path / "empty*"), "adapt.data")


def test_other_contents_under_the_same_name_have_another_fingerprint(tmp_path):
    file = tmp_path / "a.jsonl"
    made = lambda: fingerprint(str(file), digests(str(file), "adapt.data"))  # noqa: E731
    file.write_text(json.dumps({"text": "a"}))
    first = made()
    assert first == made() and first["rows"] == 1
    file.write_text(json.dumps({"text": "b"}))
    assert made()["sha256"] != first["sha256"]
