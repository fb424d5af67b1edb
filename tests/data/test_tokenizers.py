"""Character and byte tokenizers, their form on disk and in transformers, and the padding of rows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.data.tokenizers import ByteTokenizer, CharacterTokenizer, export_tokenizer, load_small_tokenizer, pad_rows

ALPHABET = "01234"
TOKENIZER = CharacterTokenizer(ALPHABET)
BYTES = ByteTokenizer()
END, MASK = TOKENIZER.special.end, TOKENIZER.special.mask
ODD = "ab 1\n\té😀e\u0301中<>'Ġ"  # Ġ is how the byte-level scheme writes a space
BOTH = pytest.mark.parametrize("tokenizer", [TOKENIZER, BYTES], ids=["characters", "bytes"])


# -- text and ids ------------------------------------------------------------------------------------------------------


@given(st.text(ALPHABET, max_size=12))
def test_decode_undoes_encode(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert len(ids) == len(text) and all(0 <= token < len(ALPHABET) for token in ids)


@given(st.text(max_size=12))
def test_bytes_write_and_read_any_text(text):
    ids = BYTES.encode(text)
    assert ids == list(text.encode()) and BYTES.decode(ids) == text


def test_half_a_surrogate_pair_has_bytes_too():
    # A model's own text comes back as a prompt.
    assert BYTES.decode(BYTES.encode("a\ud800b")) == "a?b"


@BOTH
def test_special_tokens_follow_the_symbols(tokenizer):
    special = tokenizer.special
    assert (special.end, special.mask, special.turn_end) == (tokenizer.symbols, tokenizer.symbols + 1, -1)
    assert tokenizer.vocab_size == special.vocab_size == tokenizer.symbols + 2


@BOTH
@given(data=st.data())
def test_decode_stops_at_the_first_end_and_drops_masks_and_padding_ids(tokenizer, data):
    symbols = tokenizer.symbols
    ids = data.draw(st.lists(st.sampled_from([48, 1, 2, symbols, symbols + 1, symbols + 7]), max_size=10))
    ids = [token % 5 if token == 48 and symbols == 5 else token for token in ids]
    kept = ids[: ids.index(symbols)] if symbols in ids else ids
    assert tokenizer.decode(ids) == tokenizer.decode([token for token in kept if token < symbols])
    assert len(tokenizer.decode(ids)) == sum(token < symbols for token in kept)


def test_bytes_that_are_no_text_are_shown_as_such():
    assert BYTES.decode([97, 0xC3, 98]) == "a\ufffdb"


def test_unknown_character_is_named_with_its_place():
    with pytest.raises(ValueError, match=r"character 'x' at column 2 of '01x4y' is not in the alphabet '01234'"):
        TOKENIZER.encode("01x4y")


@pytest.mark.parametrize(
    ("tokenizer", "ids", "pieces"),
    [
        # Embeddings are rounded up to a multiple of 8 rows, and an untrained model may sample one of those.
        (TOKENIZER, [0, 4, END, MASK, 7], ["0", "4", "<end>", "<mask>", "<7>"]),
        (BYTES, [97, 10, 256, 257], ["a", "\n", "<end>", "<mask>"]),
        (BYTES, [*"é".encode()], ["<c3>", "<a9>"]),
    ],
)
def test_pieces_show_every_token_even_ids_that_only_pad_the_vocabulary(tokenizer, ids, pieces):
    assert tokenizer.pieces(ids) == pieces


def test_pieces_of_ids_behind_the_bytes_are_no_bytes():
    assert BYTES.pieces([258, 263]) == ["<258>", "<263>"]


@BOTH
def test_a_prompt_is_the_text_an_answer_has_nothing_behind_it_and_a_chat_is_refused(tokenizer):
    assert not tokenizer.chats
    assert tokenizer.prompt("012") == tokenizer.answer("012") == tokenizer.encode("012")
    with pytest.raises(ValueError, match="a chat needs a checkpoint with a chat template; give a text instead"):
        tokenizer.prompt([{"role": "user", "content": "012"}])


@pytest.mark.parametrize("alphabet", ["", "abca"])
def test_alphabet_must_be_distinct_characters(alphabet):
    with pytest.raises(ValueError, match="must be distinct characters, at least one"):
        CharacterTokenizer(alphabet)


# -- files -------------------------------------------------------------------------------------------------------------


@given(st.text(min_size=1, max_size=8).filter(lambda text: len(set(text)) == len(text)))
def test_a_saved_character_tokenizer_loads_equal(tmp_path_factory, alphabet):
    directory = tmp_path_factory.mktemp("tokenizer")
    CharacterTokenizer(alphabet).save(directory)
    assert load_small_tokenizer(directory) == CharacterTokenizer(alphabet)


def test_a_saved_byte_tokenizer_loads_equal(tmp_path):
    BYTES.save(tmp_path)
    assert load_small_tokenizer(tmp_path) == BYTES != TOKENIZER


@pytest.mark.parametrize("text", [None, "{}", '{"version": "1.0", "model": {"type": "BPE"}}'])
def test_a_directory_with_another_tokenizer_or_none_has_no_small_one(tmp_path, text):
    if text is not None:
        (tmp_path / "tokenizer.json").write_text(text)
    assert load_small_tokenizer(tmp_path) is None


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """{symbols: (ours, transformers' reading of what was exported)}"""
    transformers = pytest.importorskip("transformers")
    made = {}
    for ours in (CharacterTokenizer(ODD), BYTES):
        directory = tmp_path_factory.mktemp("exported")
        export_tokenizer(ours, directory)
        made[ours.symbols] = ours, transformers.PreTrainedTokenizerFast.from_pretrained(str(directory))
    return made


def assert_same_reading(ours, theirs, text):
    ids = ours.encode(text)
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids) == ours.decode(ids) == text
    assert theirs.decode([*ids, ours.special.mask, ours.special.end], skip_special_tokens=True) == text


@given(text=st.text(ODD, max_size=12))
def test_transformers_reads_exported_characters_alike(exported, text):
    assert_same_reading(*exported[len(ODD)], text)


@given(text=st.text(max_size=12).filter(lambda text: "<end>" not in text and "<mask>" not in text))
def test_transformers_reads_exported_bytes_alike(exported, text):
    assert_same_reading(*exported[256], text)


@pytest.mark.parametrize("symbols", [len(ODD), 256])
def test_exported_special_tokens_keep_their_ids(exported, symbols):
    ours, theirs = exported[symbols]
    assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.special.end, ours.special.end)
    assert theirs.mask_token_id == ours.special.mask and len(theirs) == ours.vocab_size
    assert theirs("<end><mask>")["input_ids"] == [ours.special.end, ours.special.mask]


def test_an_exported_tokenizer_is_no_small_one(tmp_path):
    export_tokenizer(BYTES, tmp_path)
    assert load_small_tokenizer(tmp_path) is None


# -- rows --------------------------------------------------------------------------------------------------------------


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
