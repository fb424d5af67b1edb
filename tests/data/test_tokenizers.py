"""The character tokenizer and the padding of rows."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.data.tokenizers import CharacterTokenizer, load_tokenizer, pad_rows

ALPHABET = "01234"
TOKENIZER = CharacterTokenizer(ALPHABET)
END, MASK = TOKENIZER.special.end, TOKENIZER.special.mask


@given(st.text(ALPHABET, max_size=12))
def test_decode_undoes_encode(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert len(ids) == len(text) and all(0 <= token < len(ALPHABET) for token in ids)


def test_special_tokens_follow_the_alphabet():
    assert (END, MASK, TOKENIZER.special.turn_end) == (5, 6, -1)
    assert TOKENIZER.vocab_size == 7


@given(st.lists(st.integers(0, 9), max_size=10))
def test_decode_stops_at_the_first_end_and_drops_what_is_no_character(ids):
    expected = ""
    for token in ids:
        if token == END:
            break
        expected += ALPHABET[token] if token < 5 else ""
    assert TOKENIZER.decode(ids) == expected


def test_unknown_character_is_named_with_its_place():
    with pytest.raises(ValueError, match=r"character 'x' at column 2 of '01x4y' is not in the alphabet '01234'"):
        TOKENIZER.encode("01x4y")


def test_pieces_show_every_token_even_ids_that_only_pad_the_vocabulary():
    # Embeddings are rounded up to a multiple of 8 rows, and an untrained model may sample one of those.
    assert TOKENIZER.pieces([0, 4, END, MASK, 7]) == ["0", "4", "<end>", "<mask>", "<7>"]


@pytest.mark.parametrize("alphabet", ["", "abca"])
def test_alphabet_must_be_distinct_characters(alphabet):
    with pytest.raises(ValueError, match="must be distinct characters, at least one"):
        CharacterTokenizer(alphabet)


@given(st.text(min_size=1, max_size=8).filter(lambda text: len(set(text)) == len(text)))
def test_a_saved_tokenizer_loads_equal(tmp_path_factory, alphabet):
    if any("\ud800" <= character <= "\udfff" for character in alphabet):
        return  # half a surrogate pair is not text
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(json.dumps(CharacterTokenizer(alphabet).to_dict()))
    assert load_tokenizer(path) == CharacterTokenizer(alphabet)


def test_unknown_kind_of_tokenizer_is_named(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text('{"kind": "bpe", "alphabet": "ab"}')
    with pytest.raises(ValueError, match=r"tokenizer.json: tokenizer kind 'bpe' is not one of characters"):
        load_tokenizer(path)


def test_rows_are_padded_on_the_right():
    padded, lengths = pad_rows([[1, 2, 3], [], [4]], width=4, fill=9)
    np.testing.assert_array_equal(padded, [[1, 2, 3, 9], [9, 9, 9, 9], [4, 9, 9, 9]])
    np.testing.assert_array_equal(lengths, [3, 0, 1])
    assert padded.dtype == lengths.dtype == np.int32


def test_no_rows_are_an_empty_array():
    padded, lengths = pad_rows([], width=3, fill=0)
    assert padded.shape == (0, 3) and lengths.shape == (0,)


def test_a_row_that_is_too_long_is_named():
    with pytest.raises(ValueError, match="row 1 has 3 tokens, more than the 2 columns there are for it"):
        pad_rows([[1], [1, 2, 3], [4, 5, 6]], width=2, fill=0)
