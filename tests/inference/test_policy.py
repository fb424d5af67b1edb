"""d1jax in a notebook: load, logits, sample, watch, save."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType

import d1jax
from d1jax.config import LoraConfig, MeshConfig, SamplerConfig, UserError
from d1jax.data.tokenizers import ByteTokenizer, CharacterTokenizer
from d1jax.diffusion.decoding import Decoding
from d1jax.diffusion.sampler import Sampler
from d1jax.inference.complete import Completions, filled_up, sample, watch
from d1jax.inference.policy import Policy, load_pretrained, save_pretrained
from d1jax.models.families import family_for
from d1jax.models.sharding import AXES, make_mesh
from d1jax.weights.hf_io import in_memory, save_weights
from d1jax.weights.peft import save_adapter
from d1jax.weights.tokenizer_files import write_new_companions

GOLDEN = Path(__file__).parents[1] / "golden"
SHARDED = MeshConfig(data=2, fsdp=2, tensor=2)
TOKENS = np.array([[0, 3, 12, 5, 12, 7], [1, 1, 12, 12, 9, 2]])
SETTINGS = SamplerConfig(completion_length=8, block_length=4, steps=4)
MASK, END = 12, 11


def one_device() -> jax.sharding.Mesh:
    return jax.make_mesh((1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def policy(tmp_path_factory, tiny) -> Policy:
    """A tiny LLaDA on one device."""
    return written(tmp_path_factory.mktemp("policy") / "llada", tiny)


@pytest.fixture(scope="module")
def dream(tmp_path_factory, tiny) -> Policy:
    changes = {"alignment": "shifted", "qkv_bias": True, "rope_full_precision": False, "heads": 4, "kv_heads": 2}
    return written(tmp_path_factory.mktemp("policy") / "dream", tiny, **changes)


def written(directory: Path, tiny, **changes) -> Policy:
    model, variables = tiny(**changes)
    tokenizer = CharacterTokenizer("abcdefghijk")
    companions = lambda beside: write_new_companions(model.config, tokenizer, beside, published=True)  # noqa: E731
    family = family_for(model.config)
    save_weights(in_memory(variables, model.config, family), model.config, family, directory, companions)
    return load_pretrained(directory, mesh=one_device())


def assert_same_weights(one: Policy, other: Policy) -> None:
    assert jax.tree.structure(one.variables) == jax.tree.structure(other.variables)
    for a, b in zip(jax.tree.leaves(one.variables), jax.tree.leaves(other.variables), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


# -- the package -------------------------------------------------------------------------------------------------------


def test_the_package_offers_what_it_says():
    for name in d1jax.__all__:
        assert getattr(d1jax, name) is not None, name
    assert d1jax.load_pretrained is load_pretrained and d1jax.SamplerConfig is SamplerConfig
    assert not hasattr(d1jax, "no_such_thing")
    with pytest.raises(AttributeError, match="no attribute 'load_pretraind'; it has .*load_pretrained"):
        d1jax.load_pretraind  # noqa: B018


# -- loading -----------------------------------------------------------------------------------------------------------


def test_the_published_and_the_native_form_are_the_same_policy(policy, tmp_path):
    save_pretrained(policy, tmp_path / "native", native=True)
    assert not list((tmp_path / "native").glob("*.safetensors"))
    native = load_pretrained(tmp_path / "native", mesh=one_device())
    assert native.model == policy.model and native.tokenizer == policy.tokenizer
    assert_same_weights(policy, native)
    np.testing.assert_array_equal(native.logits(TOKENS), policy.logits(TOKENS))


@pytest.mark.parametrize(
    ("stored", "asked", "native", "weights", "activations"),
    [
        ("float32", None, False, "float32", "float32"),
        ("float32", "bfloat16", False, "bfloat16", "bfloat16"),
        ("float32", "bfloat16", True, "bfloat16", "bfloat16"),
        ("bfloat16", None, False, "bfloat16", "bfloat16"),
        ("bfloat16", "float32", False, "float32", "float32"),
        ("float16", None, False, "float16", "float32"),
        ("float16", None, True, "float16", "float32"),
        ("float16", "bfloat16", False, "bfloat16", "bfloat16"),
    ],
)
def test_weights_and_activations_have_the_dtype_asked_for(
    write_checkpoint, tmp_path, stored, asked, native, weights, activations
):
    directory, _, variables = write_checkpoint(param_dtype=stored)
    if native:
        save_pretrained(load_pretrained(directory), tmp_path / "native", native=True)
        directory = tmp_path / "native"
    loaded = load_pretrained(directory, dtype=asked)
    assert {str(x.dtype) for x in jax.tree.leaves(loaded.variables)} == {weights}
    assert (loaded.config.param_dtype, loaded.config.dtype) == (weights, activations)
    expected = variables["params"]["blocks"]["q_proj"]["kernel"].astype(weights)
    np.testing.assert_array_equal(np.asarray(loaded.variables["params"]["blocks"]["q_proj"]["kernel"]), expected)
    logits = loaded.logits(TOKENS)
    assert logits.dtype == "float32" and np.isfinite(logits).all()


@pytest.mark.parametrize("alignment", ["same_position", "shifted"])
def test_eight_devices_give_the_logits_of_one(write_checkpoint, alignment):
    # 16 rows of the embedding, so that the vocabulary is cut too.
    directory, *_ = write_checkpoint(alignment=alignment, vocab_size=16, heads=4)
    sharded = load_pretrained(directory, mesh=SHARDED)
    kernel = sharded.variables["params"]["blocks"]["q_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    tokens = np.concatenate([TOKENS, TOKENS[:, ::-1]])
    expected = load_pretrained(directory, mesh=one_device()).logits(tokens)
    np.testing.assert_allclose(sharded.logits(tokens), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("path", "settings", "message"),
    [
        ("", {"dtype": "float16"}, "dtype = 'float16' is not one of float32, bfloat16"),
        ("", {"mesh": MeshConfig(data=3)}, "does not cover 8 devices"),
        ("", {"adapter": "nowhere"}, "adapter 'nowhere': needs adapter_config.json"),
        ("nowhere", {}, "nowhere': no such directory"),
    ],
)
def test_what_cannot_be_loaded_is_named(policy, path, settings, message):
    with pytest.raises(UserError, match=message):
        load_pretrained(policy.source / path if path else policy.source, **settings)


def test_a_directory_that_is_neither_checkpoint_nor_run_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint directory \(config.json\), no run directory \(config.yaml\)"):
        load_pretrained(tmp_path)


def with_bytes(directory):
    """Puts a byte tokenizer there, and its special tokens into config.json."""
    special = ByteTokenizer().special
    ids = {"mask_token_id": special.mask, "eos_token_id": special.end, "pad_token_id": special.end}
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | ids))
    ByteTokenizer().save(directory)


def test_a_tokenizer_of_another_model_is_refused(policy, tmp_path):
    directory = shutil.copytree(policy.source, tmp_path / "mixed")
    ByteTokenizer().save(directory)
    with pytest.raises(UserError, match="mask_token_id = 12, but the tokenizer of this model has 257"):
        load_pretrained(directory)


def test_a_tokenizer_with_more_ids_than_the_embedding_is_refused(policy, tmp_path):
    directory = shutil.copytree(policy.source, tmp_path / "mixed")
    with_bytes(directory)
    with pytest.raises(UserError, match="the tokenizer has 258 ids, the embedding only 13 rows"):
        load_pretrained(directory)


# -- logits ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llada-mha", "dream-gqa"])
def parity(request, tmp_path_factory):
    """(policy, what PyTorch computed, in the alignment of `Policy.logits`) of a golden checkpoint."""
    directory = tmp_path_factory.mktemp("golden")
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(GOLDEN / request.param / name, directory / name)
    with_bytes(directory)
    with np.load(GOLDEN / request.param / "io.npz") as arrays:
        io = {name: arrays[name] for name in arrays if name.startswith("fwd_")}
    return load_pretrained(directory, mesh=one_device()), io, request.param == "dream-gqa"


@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_logits_are_those_of_pytorch(parity, padding):
    policy, io, shifted = parity
    kind = "input" if padding == "none" else padding
    tokens, mask = io[f"fwd_{kind}_ids"], io.get(f"fwd_{kind}_mask")
    theirs = io["fwd_logits" if padding == "none" else f"fwd_{padding}_logits"]
    ours = np.asarray(policy.logits(tokens, mask))
    assert ours.shape == theirs.shape and ours.dtype == np.float32
    for row in range(len(tokens)):
        real = np.flatnonzero(mask[row]) if mask is not None else np.arange(tokens.shape[1])
        scored_by = np.concatenate([real[:1], real[:-1]]) if shifted else real
        np.testing.assert_allclose(ours[row, real], theirs[row, scored_by], atol=1e-4, rtol=0)
        np.testing.assert_array_equal(np.delete(ours[row], real, axis=0), 0.0)


@pytest.mark.parametrize("name", ["policy", "dream"])
@given(data=st.data())
def test_logits_of_real_tokens_do_not_know_of_padding(request, name, data):
    """On either side and in between, whatever the ids there."""
    policy, width = request.getfixturevalue(name), 5  # every length is a program
    mask = np.zeros(width, int)
    if data.draw(st.booleans(), label="holes"):
        mask[list(data.draw(st.sets(st.integers(0, width - 1), min_size=1)))] = 1
    else:
        length, right = data.draw(st.integers(1, width)), data.draw(st.booleans())
        mask[:length] = 1
        mask = mask if right else mask[::-1]
    tokens = np.array(data.draw(st.lists(st.integers(0, 12), min_size=width, max_size=width)))
    padded = np.asarray(policy.logits(tokens[None], mask[None]))[0]
    real = mask.astype(bool)
    np.testing.assert_allclose(padded[real], policy.logits(tokens[None, real])[0], atol=1e-5, rtol=0)
    np.testing.assert_array_equal(padded[~real], 0.0)


@pytest.mark.parametrize("name", ["policy", "dream"])
def test_a_mask_with_holes_is_the_text_without_them(request, name, tiny, oracle):
    policy = request.getfixturevalue(name)
    mask = np.array([[0, 1, 1, 0, 1, 1], [1, 0, 1, 0, 0, 1]])
    logits = np.asarray(policy.logits(TOKENS, mask))
    forward = oracle(policy.model, policy.variables)
    for row, real in enumerate(mask.astype(bool)):
        _, expected = forward(TOKENS[row, real].tolist())
        if name == "dream":
            expected = np.concatenate([expected[:1], expected[:-1]])
        np.testing.assert_allclose(logits[row, real], expected, atol=1e-4, rtol=0)


def test_a_row_of_padding_only_is_zeros(policy):
    mask = np.array([[1] * 6, [0] * 6])
    logits = np.asarray(policy.logits(TOKENS, mask))
    np.testing.assert_array_equal(logits[1], 0.0)
    np.testing.assert_allclose(logits[0], policy.logits(TOKENS)[0], atol=1e-5, rtol=0)


def test_lists_and_boolean_masks_are_arrays_too(policy):
    mask = np.array([[1, 1, 1, 0, 0, 0], [1] * 6])
    expected = policy.logits(TOKENS, mask)
    np.testing.assert_array_equal(policy.logits(TOKENS.tolist(), mask.astype(bool).tolist()), expected)


@pytest.mark.parametrize(
    ("tokens", "mask", "message"),
    [
        ([[0, 13]], None, "id 13 at row 0, column 1 is outside the vocabulary of 13"),
        ([[0, 1], [-1, 1]], None, "id -1 at row 1, column 0 is outside the vocabulary of 13"),
        ([0, 1], None, r"tokens \(2,\) and mask \(2,\) must have one shape \[B, T\]"),
        ([[0, 1]], [[1]], r"tokens \(1, 2\) and mask \(1, 1\) must have one shape"),
        ([[0, 1]], [1, 1], r"tokens \(1, 2\) and mask \(2,\) must have one shape"),
    ],
)
def test_wrong_tokens_and_masks_are_named(policy, tokens, mask, message):
    with pytest.raises(ValueError, match=message):
        policy.logits(tokens, mask)


def test_ids_that_are_no_integers_are_refused(policy):
    with pytest.raises(ValueError, match="float64"):
        policy.logits([[0.5, 1.0]])


def test_only_real_tokens_count_against_the_positions(write_checkpoint):
    policy = load_pretrained(write_checkpoint(max_positions=4)[0])
    assert policy.logits(TOKENS, [[0, 1, 1, 1, 1, 0]] * 2).shape == (2, 6, 13)
    with pytest.raises(ValueError, match="5 tokens in all are more than the model's 4 positions"):
        policy.logits(TOKENS, [[1] * 4 + [0] * 2, [1] * 5 + [0]])


# -- sampling ----------------------------------------------------------------------------------------------------------


def test_completions_hold_what_was_sampled(policy):
    done = sample(policy, ["abc", "kkk"], SETTINGS)
    assert isinstance(done, Completions)
    assert done.tokens.shape == done.unmask_step.shape == done.confidence.shape == (2, 8)
    assert not (done.tokens == MASK).any()
    for row in range(2):
        text = done.tokens[row].tolist()
        ended = END in text
        assert done.length[row] == (text.index(END) + 1 if ended else 8)
        assert done.text[row] == "".join("abcdefghijk"[t] for t in text[: text.index(END) if ended else 8])
        assert done.nfe[row] == done.unmask_step[row].max() + 1 <= SETTINGS.steps
        unmasked = done.unmask_step[row] >= 0
        assert (done.confidence[row, unmasked] > 0).all() and unmasked[: done.length[row]].all()


@pytest.mark.parametrize("name", ["policy", "dream"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_prompt_alone_or_in_a_batch_gives_the_same_text(request, name, temperature):
    policy = request.getfixturevalue(name)
    alone = sample(policy, ["abca"], SETTINGS, seed=3, temperature=temperature)
    # One prompt is longer than a bucket, so the canvas is wider too.
    batch = sample(policy, ["abca", "k", "bcd" * 12], SETTINGS, seed=3, temperature=temperature)
    for one, many in zip(vars(alone).values(), vars(batch).values(), strict=True):
        if isinstance(one, np.ndarray) and one.dtype == np.float32:
            np.testing.assert_allclose(one[0], many[0], atol=1e-5)
        else:
            np.testing.assert_array_equal(one[0], many[0])


@given(st.integers(1, 5000), st.integers(1, 8))
def test_few_numbers_of_rows_are_compiled(policy, rows, devices):
    sizes = [1] + [half * 2**power for power in range(13) for half in (2, 3)]
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    filled = filled_up(dataclasses.replace(policy, mesh=mesh), range(rows))
    size = min(size for size in sizes if size >= rows)
    assert size <= len(filled) < size + devices and len(filled) % devices == 0
    assert filled[:rows] == list(range(rows)) and set(filled[rows:]) <= {rows - 1}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_fill_a_batch_up_are_not_shown(policy, temperature):
    prompts, compiled = ["abc", "d", "ef", "a", "bb"], Sampler._compiled_run._cache_size()
    found = sample(policy, prompts, SETTINGS, seed=3, temperature=temperature)
    six = sample(policy, [*prompts, "c"], SETTINGS, seed=3, temperature=temperature)
    assert Sampler._compiled_run._cache_size() == compiled + 1
    assert found.text == six.text[:5] and found.tokens.shape == (5, 8) and found.length.shape == (5,)
    *states, last = watch(policy, prompts, SETTINGS, seed=3, temperature=temperature)
    assert all(state.tokens_BC.shape == (5, 8) and state.done_B.shape == (5,) for state in states)
    np.testing.assert_array_equal(last.tokens, found.tokens)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_eight_devices_sample_what_one_does(policy, temperature):
    prompts = ["abca", "k", "bcd", "fghij"]
    one = sample(policy, prompts, SETTINGS, temperature=temperature)
    eight = sample(load_pretrained(policy.source, mesh=SHARDED), prompts, SETTINGS, temperature=temperature)
    copies = sample(load_pretrained(policy.source), prompts[:3], SETTINGS, temperature=temperature)
    np.testing.assert_array_equal(eight.tokens, one.tokens)
    np.testing.assert_array_equal(copies.tokens, one.tokens[:3])


def test_seeds_differ_and_a_seed_repeats(policy):
    first, again, other = (sample(policy, ["abc"] * 4, SETTINGS, seed=s, temperature=2.0).tokens for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any() and (first[0] != first[1]).any()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_watching_shows_every_step_and_ends_with_the_sample(policy, temperature):
    prompts = ["abca", "k", "bcd"]
    *states, last = watch(policy, prompts, SETTINGS, seed=1, temperature=temperature)
    done = sample(policy, prompts, SETTINGS, seed=1, temperature=temperature)
    for name, value in vars(done).items():
        np.testing.assert_array_equal(getattr(last, name), value, err_msg=name)
    assert len(states) == done.nfe.max() and all(isinstance(state, Decoding) for state in states)
    before = np.full((3, 8), MASK)
    for step, state in enumerate(states):
        assert state.step == step + 1
        unmasked = before != MASK
        np.testing.assert_array_equal(state.tokens_BC[unmasked], before[unmasked])
        new = (state.tokens_BC != MASK) & ~unmasked
        np.testing.assert_array_equal(new, state.unmask_step_BC == step)
        assert new.any()
        before = state.tokens_BC


NOT_A_TEXT = "a chat needs a checkpoint with a chat template|has no chat template"


@pytest.mark.parametrize("function", [sample, lambda *args, **kw: list(watch(*args, **kw))], ids=["sample", "watch"])
@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        (["abc", ""], {}, "prompt 1 is empty"),
        ([], {}, "no prompts"),
        ("abc", {}, r"prompts is one text; write a list, \[text\]"),
        ([[{"role": "user", "content": "abc"}]], {}, NOT_A_TEXT),
        (["abc"], {"temperature": -0.5}, "temperature = -0.5 must be 0 or above"),
        (["abc"], {"temperature": float("nan")}, "temperature = nan"),
        (["abc"], {"seed": -1}, r"seed = -1 must be between 0 and 2\*\*32 - 1"),
        (["abc"], {"block_length": 3}, "block_length = 3 does not divide sampler.completion_length = 8"),
        (["abc"], {"steps": 3}, "steps = 3 is not a multiple of the 2 blocks"),
        (["abc", "a" * 33], {}, "8 new tokens: 41 tokens in all are more than the model's 40 positions"),
    ],
)
def test_impossible_requests_are_refused(write_checkpoint, function, prompts, settings, message):
    policy = load_pretrained(write_checkpoint(max_positions=40)[0])
    own = {name: settings[name] for name in ("temperature", "seed") if name in settings}
    config = dataclasses.replace(SETTINGS, **{name: settings[name] for name in settings.keys() - own.keys()})
    with pytest.raises(UserError, match=message):
        function(policy, prompts, config, **own)


@pytest.mark.parametrize("value", [np.nan, 1e30], ids=["NaN in a weight", "activations that overflow"])
@pytest.mark.parametrize("function", [sample, watch, d1jax.infill])
def test_predictions_that_are_not_finite_are_no_text(policy, function, value):
    params = jax.tree.map(lambda x: x, policy.variables["params"])
    params["ff_out"] = params["ff_out"] * value
    params["ln_f"] = {"scale": params["ln_f"]["scale"] * value}
    broken = dataclasses.replace(policy, variables={"params": params})
    with pytest.raises(UserError, match="predictions are NaN or infinite"):
        list(function(broken, ["abc{{mask:4}}" if function is d1jax.infill else "abc"], SETTINGS))


def test_a_prompt_that_just_fits_is_sampled(write_checkpoint):
    policy = load_pretrained(write_checkpoint(max_positions=40)[0])
    assert sample(policy, ["a" * 32], SETTINGS).tokens.shape == (1, 8)


def test_a_character_without_an_id_is_not_left_out_silently(policy):
    with pytest.raises(UserError, match="abz|'z'"):
        sample(policy, ["abz"], SETTINGS)


CHAT = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"


@pytest.fixture
def chatting(tmp_path, tiny) -> Policy:
    """Bytes with a chat template that never adds a header."""
    model, variables = tiny(vocab_size=264)

    def companions(beside: Path) -> None:
        write_new_companions(model.config, ByteTokenizer(), beside, published=True)
        (beside / "chat_template.jinja").write_text(CHAT)

    family = family_for(model.config)
    save_weights(in_memory(variables, model.config, family), model.config, family, tmp_path / "chatting", companions)
    return load_pretrained(tmp_path / "chatting", mesh=one_device())


def test_a_text_is_a_users_turn_where_there_is_a_chat_template(chatting):
    header = chatting.family.assistant_header
    chat = [{"role": "user", "content": "ab"}]
    assert chatting.tokenizer.prompt("ab") == chatting.tokenizer.prompt(chat) == [*f"user: ab\n{header}".encode()]
    text, turn = (sample(chatting, [prompt], SETTINGS) for prompt in ("ab", chat))
    np.testing.assert_array_equal(text.tokens, turn.tokens)


@pytest.mark.parametrize("prompt", ["", []], ids=["text", "chat"])
def test_an_empty_prompt_is_refused_also_where_a_template_would_fill_it(chatting, prompt):
    with pytest.raises(UserError, match="prompt 1 is empty|an empty conversation"):
        sample(chatting, ["ab", prompt], SETTINGS)


# -- saving ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["policy", "dream"])
@pytest.mark.parametrize("native", [False, True], ids=["published", "native"])
def test_what_is_saved_loads_as_it_was(request, name, tmp_path, native):
    policy = request.getfixturevalue(name)
    save_pretrained(policy, tmp_path / "out", native=native)
    again = load_pretrained(tmp_path / "out", mesh=one_device())
    assert again.model == policy.model and again.tokenizer == policy.tokenizer and again.family == policy.family
    np.testing.assert_array_equal(again.logits(TOKENS), policy.logits(TOKENS))


def test_a_policy_in_another_dtype_is_saved_in_it(policy, tmp_path):
    half = load_pretrained(policy.source, dtype="bfloat16", mesh=one_device())
    save_pretrained(half, tmp_path / "half")
    again = load_pretrained(tmp_path / "half", mesh=one_device())
    assert again.config.param_dtype == "bfloat16"
    assert_same_weights(half, again)
    assert '"torch_dtype": "bfloat16"' in (tmp_path / "half" / "config.json").read_text()


def test_a_sharded_policy_saves_the_same_files(policy, tmp_path):
    save_pretrained(policy, tmp_path / "one")
    save_pretrained(load_pretrained(policy.source, mesh=SHARDED), tmp_path / "eight")
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "eight").iterdir())
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "eight" / name).read_bytes(), name


@pytest.fixture
def adapted(policy, tiny, tmp_path) -> Policy:
    lora = LoraConfig(rank=2, alpha=6.0, targets=("q_proj", "ff_out"))
    _, variables = tiny(seed=1, lora=lora)
    save_adapter(variables["lora"], lora, policy.config, policy.family, tmp_path / "adapter")
    return load_pretrained(policy.source, mesh=one_device(), adapter=tmp_path / "adapter")


@pytest.mark.parametrize("native", [False, True], ids=["published", "native"])
def test_an_adapter_is_merged_when_saved(policy, adapted, tmp_path, native):
    assert adapted.model.lora.rank == 2 and "lora" in adapted.variables
    save_pretrained(adapted, tmp_path / "merged", native=native)
    merged = load_pretrained(tmp_path / "merged", mesh=one_device())
    assert "lora" not in merged.variables
    expected = np.asarray(adapted.logits(TOKENS))
    assert np.abs(expected - policy.logits(TOKENS)).max() > 0.1
    np.testing.assert_allclose(merged.logits(TOKENS), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("native", [False, True], ids=["published", "native"])
def test_an_existing_directory_is_refused_and_stays_as_it_was(policy, tmp_path, native):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="mine"):
        save_pretrained(policy, out, native=native)
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]
    assert [file.name for file in out.iterdir()] == ["notes.txt"] and (out / "notes.txt").read_text() == "mine"
