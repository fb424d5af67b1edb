"""Documents as windows: nothing is lost or told twice, and the bytes of the text are those of its windows."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.config import UserError
from d1jax.data.packing import Packer, pack
from d1jax.data.tokenizers import ByteTokenizer

BYTES = ByteTokenizer()
TEXTS = st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12), min_size=1, max_size=8)


def packed(texts, length):
    return pack([("here", text) for text in texts], BYTES, length, "adapt.data")


@given(TEXTS, st.integers(2, 9))
def test_windows_are_the_documents_one_behind_the_other(texts, length):
    stream = [token for text in texts for token in [*BYTES.encode(text), BYTES.special.end]]
    whole = len(stream) // length
    if not whole:
        with pytest.raises(UserError, match="fill no window"):
            packed(texts, length)
        return
    windows = packed(texts, length)
    np.testing.assert_array_equal(windows.tokens_NT.reshape(-1), stream[: whole * length])
    # A token of this tokenizer is a byte, and an end token is none.
    np.testing.assert_allclose(windows.bytes_NT, windows.tokens_NT != BYTES.special.end, atol=1e-5)


@given(TEXTS, st.integers(2, 9), st.integers(0, 8))
def test_a_packer_that_is_made_again_from_its_state_goes_on(texts, length, at):
    def windows(cut):
        packer, found = Packer(length, 7), []
        for number, text in enumerate(texts):
            if number == cut:
                packer = Packer(length, 7, packer.state)
            found += list(packer.add(BYTES.encode(text), len(text.encode())))
        return found

    assert windows(at) == windows(-1)


def test_what_is_split_and_left_over_is_counted():
    said = []
    pack([("a", "x" * 10), ("b", "y" * 3)], BYTES, 4, "adapt.data", said.append)
    assert said == [
        "data: adapt.data: 2 documents, 3 windows of 4 tokens; 1 documents are longer than a window and split, 3 tokens behind the last "
        "window left out"
    ]


def test_bytes_of_a_text_of_many_bytes_a_token_are_spread_over_it(tmp_path):
    class Words(ByteTokenizer):
        def encode(self, text):
            return [1] * len(text.split())

    windows = pack([("a", "größer und älter")], Words(), 2, "adapt.data")
    np.testing.assert_allclose(windows.bytes_NT.sum(), len("größer und älter".encode()), rtol=1e-6)


def test_text_that_cannot_be_written_is_named():
    class Digits(ByteTokenizer):
        def encode(self, text):
            raise ValueError(f"tokenizer: cannot write {text!r}")

    with pytest.raises(UserError, match="config: adapt.data: file.txt: tokenizer: cannot write 'a'"):
        pack([("file.txt", "a")], Digits(), 2, "adapt.data")


def test_a_book_is_cut_in_time_that_grows_with_its_length():
    """Two million tokens took minutes when each window moved all that was behind it."""
    begun = time.monotonic()
    windows = packed(["x" * 2_000_000], 16)
    assert len(windows.tokens_NT) == 125_000 and time.monotonic() - begun < 60
