"""Texts with holes against a plain loop in natural order."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import d1jax
from d1jax.config import DualCache, SamplerConfig, UserError
from d1jax.diffusion.decoding import Decoding
from d1jax.inference.infill import Filled, has_holes, infill, merge, watch_infill
from d1jax.inference.policy import load_pretrained

MASK, END = 12, 11
SETTINGS = SamplerConfig(completion_length=8, block_length=4, steps=8)


@pytest.fixture(params=["same_position", "shifted"])
def both(request, write_checkpoint):
    """(policy, model, variables) of a tiny LLaDA or Dream."""
    directory, model, variables = write_checkpoint(request.param, alignment=request.param)
    return load_pretrained(directory), model, variables


def filled_by_hand(forward, alignment, ids, steps):
    """Greedy, the most confident first, over a row in natural order whose holes are masks."""
    tokens, when = list(ids), {}
    holes = [place for place, token in enumerate(ids) if token == MASK]
    base, extra = divmod(len(holes), steps)
    for step in range(steps):
        _, z = forward(tokens)
        if alignment == "shifted":
            z = np.concatenate([z[:1], z[:-1]])
        options = []
        for place in (place for place in holes if tokens[place] == MASK):
            logits = z[place].copy()
            logits[END] = -np.inf
            p = np.exp(logits - logits.max())
            p /= p.sum()
            logits[MASK] = -np.inf
            token = int(logits.argmax())
            options.append((-p[token], place, token))
        for _, place, token in sorted(options)[: base + (step < extra)]:
            tokens[place], when[place] = token, step
    return tokens, [when[place] for place in holes]


@pytest.mark.parametrize(
    "text", ["abc{{mask:3}}de", "{{mask:2}}ab{{mask:1}}{{mask:2}}c", "k{{mask:4}}", "{{mask:4}}fga"]
)
def test_holes_are_filled_as_a_plain_loop_fills_them(both, oracle, text):
    policy, model, variables = both
    (filled,) = infill(policy, [text], dataclasses.replace(SETTINGS, steps=4))
    ids = [
        token
        for index, part in enumerate(text.replace("}}", "{{").split("{{"))
        for token in ([MASK] * int(part[5:]) if index % 2 else policy.tokenizer.encode(part) if part else [])
    ]
    tokens, steps = filled_by_hand(
        oracle(model, variables), model.config.alignment, ids, max(round(ids.count(MASK) / 2), 1)
    )
    assert filled.tokens.tolist() == [token for token, given in zip(tokens, ids, strict=True) if given == MASK]
    assert filled.unmask_step.tolist() == steps
    assert filled.text == policy.tokenizer.decode(tokens)
    assert filled.nfe == max(steps) + 1


def test_a_batch_of_texts_with_other_holes_gives_each_its_own_text(both):
    policy, _, _ = both
    texts = ["abc{{mask:3}}de", "{{mask:2}}ab", "fg{{mask:1}}ih{{mask:2}}", "c{{mask:2}}"]
    together = infill(policy, texts, SETTINGS, temperature=1.0, seed=3)
    for row, text in enumerate(texts):
        (alone,) = infill(policy, [text], SETTINGS, temperature=1.0, seed=3, first_row=row)
        assert alone.text == together[row].text
        np.testing.assert_array_equal(alone.tokens, together[row].tokens)
    assert [len(one.tokens) for one in together] == [3, 2, 3, 2]
    for text, one in zip(texts, together, strict=True):
        rebuilt = text
        for hole in one.holes:
            before, _, rest = rebuilt.partition("{{mask:")
            rebuilt = before + hole + rest[rest.index("}}") + 2 :]
        assert one.text == rebuilt


def test_watching_ends_in_the_same_text(both):
    policy, _, _ = both
    *states, last = watch_infill(policy, "ab{{mask:3}}c", SETTINGS)
    assert isinstance(last, Filled) and all(isinstance(state, Decoding) for state in states)
    assert last.text == infill(policy, ["ab{{mask:3}}c"], SETTINGS)[0].text
    assert [int((state.tokens_BC == MASK).sum()) for state in states] == [2, 1, 0]


@given(st.lists(st.integers(0, 9), max_size=6), st.lists(st.integers(0, 6), min_size=1, max_size=5))
def test_merging_puts_each_hole_token_after_as_many_given_ones(given_ids, before):
    before = sorted(min(count, len(given_ids)) for count in before)
    merged = merge(given_ids, [("hole", index) for index in range(len(before))], before)
    assert [value for value in merged if not isinstance(value, tuple)] == given_ids
    places = [place for place, value in enumerate(merged) if isinstance(value, tuple)]
    assert [place - index for index, place in enumerate(places)] == before
    assert [merged[place][1] for place in places] == list(range(len(before)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("abc", "no hole in 'abc'"),
        ("a{{mask:}}b", "{{mask:}} needs a number of tokens above 0"),
        ("a{{mask:0}}b", "{{mask:0}} needs a number"),
        ("a{{mask:-3}}b", "{{mask:-3}} needs a number"),
        ("a{{mask:²}}b", "needs a number"),
        ("{{mask:3}}", "no text around the holes"),
        ("Z{{mask:3}}", "infill:"),
        ("a{{mask:" + "9" * 5000 + "}}", "needs a number"),
        ("a{{mask:999999999}}", "needs a number"),
    ],
)
def test_malformed_texts_are_refused(write_checkpoint, text, message):
    policy = load_pretrained(write_checkpoint()[0])
    with pytest.raises(UserError) as caught:
        infill(policy, [text], SETTINGS)
    assert message in str(caught.value)


def test_holes_that_do_not_fit_and_a_cache_that_cannot_score_them_are_refused(write_checkpoint):
    short = load_pretrained(write_checkpoint("short", max_positions=6)[0])
    with pytest.raises(UserError, match="6 positions"):
        infill(short, ["abc{{mask:4}}"], SETTINGS)
    dream = load_pretrained(write_checkpoint("dream", alignment="shifted")[0])
    with pytest.raises(UserError, match="set cache = none"):
        infill(dream, ["abc{{mask:4}}"], dataclasses.replace(SETTINGS, cache=DualCache()))


def test_nothing_around_one_text_of_a_batch_and_texts_that_are_no_list_are_refused(write_checkpoint):
    policy = load_pretrained(write_checkpoint()[0])
    with pytest.raises(UserError, match="no text around"):
        infill(policy, ["{{mask:2}}", "ab{{mask:2}}"], SETTINGS)
    with pytest.raises(UserError, match="write a list"):
        infill(policy, "a{{mask:2}}b", SETTINGS)
    with pytest.raises(UserError, match="must be above 0"):
        infill(policy, ["a{{mask:2}}b"], dataclasses.replace(SETTINGS, completion_length=0))


@pytest.mark.parametrize("text", ["a{{mask}}", "a{{ mask:4 }}", "a{{MASK:4}}b{{mask:2}}"])
def test_what_looks_like_a_hole_and_is_none_is_told(text):
    with pytest.raises(UserError, match="a hole is written"):
        has_holes(text)


def test_the_package_offers_it_and_knows_what_a_hole_is():
    assert d1jax.infill is infill and has_holes("a{{mask:2}}") and not has_holes("a{mask:2}")
