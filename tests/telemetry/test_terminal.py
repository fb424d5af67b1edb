"""The denoising drawn in a terminal: layout, colours, and no escape sequence of the model's own."""

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.telemetry.terminal import FRESH, MASK, DenoisingView, frame, printable

ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def plain(lines):
    return [ESCAPES.sub("", line) for line in lines]


def test_masks_are_drawn_and_new_text_stands_out():
    (line,) = frame(["a", None, "b"], [False, False, True], 80, 24)
    assert plain([line]) == [f"a{MASK}b"]
    assert line.startswith("a\x1b") and f"{FRESH}b" in line


def test_lines_break_at_the_width_and_at_line_breaks():
    assert plain(frame(["abc", "d\n", "e"], [False] * 3, 3, 9)) == ["abc", "d↵", "e"]


def test_wide_characters_take_two_columns():
    assert plain(frame(["日本"], [False], 3, 9)) == ["日", "本"]


def test_only_the_last_lines_are_shown():
    assert plain(frame(["a\nb\nc"], [False], 9, 2)) == ["b↵", "c"]


@pytest.mark.parametrize("text", ["\x1b[2J", "\x07", "\x9b31m", "\x00", "\u202e"])
def test_control_characters_never_reach_the_terminal(text):
    assert text[0] not in printable(text) and text[0] not in "".join(plain(frame([text], [False], 80, 24)))


@given(st.lists(st.one_of(st.none(), st.text(max_size=6)), max_size=30), st.integers(2, 12), st.integers(1, 5))
def test_no_line_is_too_wide_and_no_frame_too_high(pieces, width, height):
    lines = plain(frame(pieces, [False] * len(pieces), width, height))
    assert 1 <= len(lines) <= height
    assert all(len(line) <= width + sum(map(_combining, line)) for line in lines)


def _combining(character):
    import unicodedata

    return bool(unicodedata.combining(character))


def test_a_view_draws_over_its_last_frame_and_clears_it():
    stream = io.StringIO()
    view = DenoisingView(stream)
    view.draw([None, None], [False, False], "step 1")
    first = stream.getvalue()
    view.draw(["a", "b"], [True, True], "step 2")
    view.clear()
    later = stream.getvalue()[len(first) :]
    assert MASK * 2 in ESCAPES.sub("", first) and "step 1" in first
    assert later.startswith("\x1b[2A\x1b[J") and "step 2" in later and later.endswith("\x1b[2A\x1b[J")
    view.clear()
    assert stream.getvalue()[len(first) :] == later
