"""Where an answer stands, and which number it is: documented spellings are read, others are not, hostile texts are fast."""

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.tasks.grading.numbers import MAX_DIGITS, final_number, read_number, same_number, show_number
from d1jax.tasks.grading.offers import MAX_PASSAGE, PLACES, offer, two_blocks, without_end_tokens

HOSTILE = [
    "<answer>" * 200_000, "\\boxed{" * 200_000, "}" * 2_000_000, "{" * 2_000_000, "9" * 3_000_000,
    "<answer>" + "9**" * 500_000 + "</answer>", "\\boxed{9**9**9**9}", "####" * 500_000, "answer is " * 200_000,
    "\\boxed{" + "1," * 1_000_000 + "}", "<answer>" + "\\frac{1" * 1000 + "</answer>", "\ud800\udfff\x00" * 100_000,
    "1e" * 1_000_000, "\\boxed{...}" * 100_000, "- " * 1_000_000, "\\boxed{" + " " * 2_000_000, "$" * 1_000_000,
    "<answer>" + "1 " * 1900 + "</answer>", "<answer>" + "(" * 3900 + "</answer>", "<answer>" + "." * 2_000_000 + "</answer>",
]  # fmt: skip


@pytest.mark.parametrize(
    ("passage", "value"),
    [
        *[(text, 18) for text in ("18", "18.0", "18.", " 18 ", "$18", "\\$18.00", "$18$", "\\(18\\)", "18€", "18 eggs", "018")],
        *[(text, 18) for text in ("18\\%", "18%", "18\\text{ cm}", "18 \\mathrm{kg}", "**18**", "\\textbf{18}", "{18}")],
        *[(text, 18) for text in ("x = 18", "3 \\times 6 = 18", "3 + 15 = 18 eggs", "She has 18", "18 dollars for 3 days", "１８")],
        *[(text, 18) for text in ("\\boxed{18", "US $18", "18 ml", "= 18", "Day 3: she has 18", "18\\text{ eggs} per day")],
        *[(text, 43500) for text in ("43,500", "43{,}500", "43\\,500", "43,\\!500", "$43,500.00", "43,500 dollars")],
        *[(text, -3) for text in ("-3", "−3", "–3", "$-3", "-$3", "- 3", "-3.0", "x = -3")],
        *[(text, Fraction(1, 2)) for text in ("0.5", ".5", "1/2", "\\frac{1}{2}", "\\dfrac12", "\\frac12", "\\frac{-1}{-2}", "5e-1")],
        *[(text, Fraction(-1, 2)) for text in ("-\\frac{1}{2}", "\\frac{-1}{2}", "-1/2", "-.5")],
        *[(text, Fraction(3, 2)) for text in ("1 1/2", "1\\frac{1}{2}", "1\\tfrac12", "1.50")],
        *[(text, 1500) for text in ("1.5e3", "1.5 \\times 10^{3}", "1.5 \\cdot 10^3", "1.5×10^3", "1500", "1,500")],
        *[(text, Fraction(5, 2)) for text in ("2 and 1/2", "2 \\text{ and } \\frac{1}{2}", "2 and 1/2 hours", "x = 2 and 1/2.")],
        ("-2 and 1/2", Fraction(-5, 2)), ("45/3", 15), ("2:00 pm", 2), ("1,234,567.25", Fraction(4938269, 4)),
    ],
)  # fmt: skip
def test_a_number_is_read(passage, value):
    assert read_number(passage) == value


@pytest.mark.parametrize(
    "passage",
    [
        "", "...", "eighteen", "18 or 20", "18, 20", "18 and 20", "3 + 15", "5-6", "2:30", "3,5", "1040,000", "2 \\times 9",
        "2 hours and 30 minutes", "27 \\text{ selfies and 18 portraits}", "\\sqrt{4}", "2\\pi", "4!", "1/0", "\\frac{1}{0}",
        "9" * (MAX_DIGITS + 1), "1e31", "9**9**9**9", "x2", "H2O", "nan", "inf", "1_000", "٣", "²",
        "3 and 5/2", "between 2 and 1/2", "2 and 1/2 or 3", "2 and 1/2/3", "2 and a half", "2 hours and a half", "2 and three-quarters",
         "1" * (MAX_PASSAGE + 1),
    ],
)  # fmt: skip
def test_what_states_no_number_is_none(passage):
    assert read_number(passage) is None


@pytest.mark.parametrize(
    ("text", "passage", "place"),
    [
        ("<answer>5</answer> so <answer>\\boxed{6} or \\boxed{7}</answer> \\boxed{8}", "7", 0),
        ("\\boxed{9}<answer>\n\\boxed{\\frac{1}{2}}\n</answer>", "\\frac{1}{2}", 0),
        ("\\boxed{9}<answer>8</answer>", "8", 1),
        ("\\boxed{9}<answer>...</answer><answer></answer>", "9", 2),
        ("<answer>7</answer> and <answer>8", "7", 1),
        ("\\boxed{1} \\boxed{2} \\boxed{...}", "2", 2),
        ("\\boxed{3} then \\boxed{4", "3", 2),
        ("so \\boxed\n{90}", "90", 2),
        ("so \\fbox{90} boxed{91}", "91", 2),
        ("<answer>\\boxed{12</answer>", "12", 0),
        ("it is \\boxed{280>", "280", 3),
        ("it is \\boxed{28\nmore", "28", 3),
        ("<answer>\n145</answer}", "145", 4),
        ("48 + 24 = 72\n#### 72", "72", 5),
        ("#### 5\n####   ", "5", 5),
        ("So the answer is 18.", "18", 6),
        ("**Answer:** $18", "$18", 6),
    ],
)
def test_where_an_answer_stands(text, passage, place):
    assert offer(text) == (passage, PLACES[place])


@pytest.mark.parametrize(
    "text", ["", "18", "He has 18 eggs.</answer>", "The answer is 18." + " no" * 200, "<answer></answer>"]
)
def test_what_offers_no_answer(text):
    assert offer(text) is None and final_number(text) is None


NUMBERS = st.one_of(
    st.integers(-(10**9), 10**9).map(Fraction),
    st.decimals(-(10**6), 10**6, places=2).map(Fraction),
)


def spellings(value):
    """Documented spellings of a number."""
    shown = show_number(value)
    whole, dot, rest = shown.partition(".")
    grouped = f"{int(whole):,}{dot}{rest}" if whole not in ("-0", "0") else shown
    return [
        shown, grouped, grouped.replace(",", "{,}"), f"${grouped}", f"{shown}\\%", f"{shown} eggs", f"x = {shown}", f"${shown}$",
        f"{shown}\\text{{ cm}}", shown.replace("-", "−"), f"{shown}." if not dot else f"{shown}0", f"\\textbf{{{shown}}}",
        f"{shown}e0", f"{shown} \\times 10^{{0}}", f"\\frac{{{value.numerator}}}{{{value.denominator}}}", f"She has {shown} eggs",
    ]  # fmt: skip


WRAPPERS = [
    "<answer>{}</answer>",
    "<answer>\n\\boxed{{{}}}\n</answer>",
    "so \\boxed{{{}}}.",
    "so \\boxed{{{}",
    "<answer>{}",
    "a\n#### {}",
]


@given(NUMBERS, st.data())
def test_a_right_answer_in_any_documented_format_is_accepted_and_a_wrong_one_is_not(value, data):
    spelt = data.draw(st.sampled_from(spellings(value)))
    text = data.draw(st.sampled_from(WRAPPERS)).format(spelt.replace("$", "\\$"))
    assert final_number(text) == value, text
    other = value + data.draw(st.sampled_from([1, -1, Fraction(1, 10)]))
    assert final_number(text) != other


@given(NUMBERS)
def test_a_shown_number_is_read_back(value):
    assert read_number(show_number(value)) == value


@given(st.text(max_size=60))
def test_no_text_raises(text):
    final_number(text)
    read_number(text)
    same_number(text, text)
    two_blocks(without_end_tokens(text))


@given(
    st.lists(
        st.sampled_from(
            [
                "<answer>",
                "</answer>",
                "\\boxed{",
                "{",
                "}",
                "####",
                "answer is",
                "1",
                ",",
                "-",
                "\\frac",
                "$",
                " ",
                "\n",
                "e",
                "/",
                "=",
            ]
        ),
        max_size=30,
    ).map("".join)
)
def test_no_pieces_of_answers_raise(text):
    final_number(text)
    read_number(text)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_texts_are_fast(text):
    began = time.perf_counter()
    final_number(text)
    assert time.perf_counter() - began < 3


@pytest.mark.parametrize(
    "text",
    ["x > 18", "x >= 18", "≥ 18", "x \\geq 18", "20 != 18", "x ≠ 18", "less than 5", "at least 5", "not 5", "5 < x < 6", "3k", "5 hundred",
     "3 million", "18²", "2½", "1'234", "0x12", "100 dollars plus 50", "100 -> 150", "18 divided by 2", "18|19", "18 or maybe 20"],
)  # fmt: skip
def test_what_only_contains_the_number_states_none(text):
    assert read_number(text) is None


@pytest.mark.parametrize(
    ("text", "value"), [("minus 18", -18), ("negative 18", -18), ("36>", 36), ("18 cm²", 18), ("45/3", 15)]
)
def test_signs_in_words_and_units_are_read(text, value):
    assert read_number(text) == value
