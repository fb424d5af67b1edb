"""How to sample travels with the weights, from a run into an export and back, and is what every path does by default."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

import d1jax
from d1jax.config import SamplerConfig, UserError
from d1jax.data.tokenizers import CharacterTokenizer
from d1jax.inference.policy import PUBLISHED_SAMPLER, load_pretrained, sampler_of, save_pretrained
from d1jax.weights.generation_config import FILE, read_sampler, write_sampler

SETTINGS = SamplerConfig(completion_length=6, block_length=3, steps=2, remasking="entropy", end_token="last", top_k=3)
PROMPT = "4130\n0300\n1004\n0000\n"


@pytest.mark.parametrize("native", [False, True], ids=["published", "native"])
def test_a_runs_settings_go_into_its_export_and_are_the_default_of_both(small_run, tmp_path, native):
    policy = load_pretrained(small_run)
    assert policy.sampler == sampler_of(small_run) and policy.sampler.steps == 2
    save_pretrained(policy, tmp_path / "out", native=native)
    exported = load_pretrained(tmp_path / "out")
    assert exported.sampler == sampler_of(tmp_path / "out") == policy.sampler
    explicit = d1jax.sample(policy, [PROMPT], policy.sampler)
    for one in (policy, exported):
        by_default = d1jax.sample(one, [PROMPT])
        assert by_default.tokens.shape == (1, 20)
        np.testing.assert_array_equal(by_default.tokens, explicit.tokens)
        *_, watched = d1jax.watch(one, [PROMPT])
        np.testing.assert_array_equal(watched.tokens, explicit.tokens)
    save_pretrained(exported, tmp_path / "again", native=native)
    assert (tmp_path / "again" / FILE).read_bytes() == (tmp_path / "out" / FILE).read_bytes()


def test_a_step_of_a_run_samples_as_the_run(small_run):
    step = small_run / "checkpoints" / "sft" / "1"
    assert load_pretrained(step).sampler == sampler_of(step) == sampler_of(small_run)


def test_a_checkpoint_that_says_nothing_samples_as_documented(write_checkpoint):
    directory, *_ = write_checkpoint()
    policy = load_pretrained(directory)
    assert policy.sampler is None and sampler_of(directory) == PUBLISHED_SAMPLER
    assert d1jax.sample(policy, ["abc"]).tokens.shape == (1, 128)
    save_pretrained(policy, directory.parent / "copy")
    assert not (directory.parent / "copy" / FILE).exists()


def test_what_else_the_file_holds_stays(tmp_path):
    (tmp_path / FILE).write_text(json.dumps({"eos_token_id": 7, "alg": "origin"}))
    write_sampler(tmp_path, SETTINGS)
    assert read_sampler(tmp_path) == SETTINGS
    stored = json.loads((tmp_path / FILE).read_text())
    assert stored["eos_token_id"] == 7 and stored["alg"] == "origin" and stored["max_new_tokens"] == 6


def test_settings_that_have_no_effect_at_a_temperature_come_along_all_the_same(small_run):
    policy = dataclasses.replace(load_pretrained(small_run), sampler=SETTINGS)
    assert d1jax.sample(policy, [PROMPT]).tokens.shape == (1, 6), "top_k is not read when nothing is drawn"
    with pytest.raises(UserError, match="sampler.top_k = 3: without effect here"):
        d1jax.sample(policy, [PROMPT], SETTINGS)
    with pytest.raises(UserError, match=r"sampler.steps = 2: without effect here.*schedule = even, time or chance"):
        d1jax.sample(policy, [PROMPT], SamplerConfig(steps=2, schedule="threshold"))


def test_holes_are_filled_with_a_policys_own_settings(small_run):
    policy = load_pretrained(small_run)
    (one,), (two,) = d1jax.infill(policy, ["41{{mask:4}}"]), d1jax.infill(policy, ["41{{mask:4}}"], policy.sampler)
    assert one.text == two.text


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ([], "expected keys and values"),
        ({"stepz": 3}, "unknown key 'stepz'"),
        ({"steps": True}, "steps = True is no int"),
        ({"steps": 0}, "sampler.steps = 0 must be above 0"),
        ({"remasking": "lowest"}, "remasking = 'lowest' is not one of"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused_naming_the_file(small_run, tmp_path, stored, message):
    save_pretrained(load_pretrained(small_run), tmp_path / "out")
    (tmp_path / "out" / FILE).write_text(json.dumps({"d1jax_sampler": stored}))
    with pytest.raises(UserError, match=message) as told:
        load_pretrained(tmp_path / "out")
    assert str(tmp_path / "out" / FILE) in str(told.value)


# -- without a tokenizer, and with one that is kept apart ----------------------------------------------------------------


@pytest.fixture
def bare(write_checkpoint):
    """(a checkpoint without tokenizer files, a directory with them alone, the whole one)."""
    whole, *_ = write_checkpoint()
    alone, apart = whole.parent / "alone", whole.parent / "apart"
    shutil.copytree(whole, alone)
    apart.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.move(alone / name, apart / name)
    return alone, apart, whole


def test_logits_and_sampling_on_ids_need_no_tokenizer(bare):
    alone, _, whole = bare
    policy, usual = load_pretrained(alone), load_pretrained(whole)
    tokens = [[1, 2, 3]]
    np.testing.assert_array_equal(policy.logits(tokens), usual.logits(tokens))
    settings = SamplerConfig(completion_length=4, block_length=4, steps=2)
    found = d1jax.sample(policy, tokens, settings)
    np.testing.assert_array_equal(found.tokens, d1jax.sample(usual, tokens, settings).tokens)
    assert found.text[0].split() == [
        str(token) for token in found.tokens[0, : found.length[0]] if token != policy.tokenizer.end
    ]
    assert "alone" in repr(policy)


def test_every_id_that_a_file_names_ends_a_text_of_ids(bare):
    """eos_token_id of config.json and of generation_config.json, one or a list; padding is another one."""
    alone, *_ = bare
    published = json.loads((alone / "config.json").read_text())
    (alone / "config.json").write_text(json.dumps({**published, "eos_token_id": [3, 4]}))
    (alone / "generation_config.json").write_text(json.dumps({"eos_token_id": 5}))
    tokenizer = load_pretrained(alone).tokenizer
    assert tokenizer.special.end_ids == (3, 4, 5, published["pad_token_id"])
    assert [tokenizer.decode([1, end, 2]) for end in tokenizer.special.end_ids] == ["1"] * 4
    (alone / "config.json").write_text(json.dumps({**published, "eos_token_id": published["mask_token_id"]}))
    with pytest.raises(UserError, match="the mask token 12 is also a token that ends a text"):
        load_pretrained(alone)


def test_what_ends_a_text_is_read_beside_the_weights_too(bare):
    alone, apart, _ = bare
    for folder, token in ((alone, 3), (apart, 4)):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": token}))
    policy = load_pretrained(alone, tokenizer=apart)
    assert {3, 4} <= set(policy.tokenizer.special.end_ids)
    save_pretrained(policy, alone.parent / "out")
    assert load_pretrained(alone.parent / "out").tokenizer.special == policy.tokenizer.special


def test_a_small_tokenizer_apart_must_fit_the_weights(bare):
    alone, *_ = bare
    other = alone.parent / "other"
    other.mkdir()
    CharacterTokenizer("abcd").save(other)
    with pytest.raises(UserError, match="mask_token_id = 12, but the tokenizer .* has 5"):
        load_pretrained(alone, tokenizer=other)


@pytest.mark.parametrize("native", [False, True])
def test_a_small_tokenizer_that_was_apart_is_exported_too(bare, native):
    alone, *_ = bare
    small = CharacterTokenizer("abcdefghijk")
    (alone.parent / "small").mkdir()
    small.save(alone.parent / "small")
    policy = load_pretrained(alone, tokenizer=alone.parent / "small")
    save_pretrained(policy, alone.parent / "out", native=native)
    assert load_pretrained(alone.parent / "out").tokenizer.prompt("abk") == small.prompt("abk")


def test_a_text_needs_a_tokenizer_and_the_message_says_how_to_name_one(bare):
    alone, apart, whole = bare
    with pytest.raises(
        UserError, match="no tokenizer files, so a text cannot be written; give token ids, or .*--tokenizer DIR"
    ):
        d1jax.sample(load_pretrained(alone), ["abc"])
    policy = load_pretrained(alone, tokenizer=apart)
    assert policy.tokenizer == load_pretrained(whole).tokenizer
    save_pretrained(policy, alone.parent / "out")
    assert load_pretrained(alone.parent / "out").tokenizer == policy.tokenizer


def test_special_ids_that_nothing_names_are_asked_for(bare):
    alone, *_ = bare
    published = json.loads((alone / "config.json").read_text())
    del published["mask_token_id"]
    (alone / "config.json").write_text(json.dumps(published))
    policy = load_pretrained(alone)
    assert policy.logits([[1, 2]]).shape[:2] == (1, 2)
    with pytest.raises(UserError, match="mask_token_id = None in config.json is no id"):
        d1jax.sample(policy, [[1, 2]])


def test_a_run_has_its_tokenizer(small_run, tmp_path):
    with pytest.raises(UserError, match="is a run, which has its tokenizer; leave tokenizer out"):
        load_pretrained(small_run, tokenizer=tmp_path)


def test_a_policy_is_shown_in_a_line(small_run, write_checkpoint):
    shown = repr(load_pretrained(small_run))
    assert "\n" not in shown and len(shown) < 300
    count = sum(x.size for x in d1jax.load_pretrained(small_run).variables["params"]["blocks"]["attn_norm"].values())
    assert count and "Policy(llada, " in shown and "1 layers of 8" in shown and "float32, on 8 x cpu" in shown
    assert "bfloat16" in repr(load_pretrained(write_checkpoint()[0], dtype="bfloat16"))
