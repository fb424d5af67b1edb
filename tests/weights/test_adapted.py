"""What a masked diffusion model begins with when it is made from an autoregressive checkpoint: weights, tokenizer, what is exported."""

import dataclasses
import json

import numpy as np
import pytest

from d1jax import load_pretrained, save_pretrained, train
from d1jax.config import Config, MeshConfig, ModelConfig, UserError
from d1jax.config.parse import parse
from d1jax.data.hf_tokenizer import load_pretrained_tokenizer, with_mask_token
from d1jax.models.families import TURNS, family_for
from d1jax.models.sharding import make_mesh
from d1jax.training.setup import set_up
from d1jax.weights.adapted import as_diffusion, bidirectional, grown
from d1jax.weights.hf_io import in_memory, save_weights

WORDS = ["a", "b", "c", "d", "ab", "cd"]


def write_tokenizer(folder, *added, mask=None):
    """A BPE of a few letters with an end token, and what else is `added`."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: place for place, word in enumerate(WORDS)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("a", "b"), ("c", "d")]))
    made.add_special_tokens(["<|end|>", *added])
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "<|end|>", "pad_token": "<|end|>", **({"mask_token": mask} if mask else {})}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))
    return len(WORDS) + 1 + len(added)


def loaded(folder):
    return load_pretrained_tokenizer(folder, mask=None, end=None, turns=TURNS, masks=False)


@pytest.mark.parametrize(
    "added, mask, expected, new",
    [
        ((), None, 7, True),
        (("<|mask|>",), None, 7, False),
        (("<|extra|>", "<|mask|>"), "<|mask|>", 8, False),
        (("<|extra|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"), None, 8, False),
        (("<unused0>", "<mask>"), None, 8, False),
        (("<extra_id_0>",), None, 7, False),
    ],
)
def test_the_mask_is_its_own_a_reserved_one_or_a_new_one(tmp_path, added, mask, expected, new):
    count = write_tokenizer(tmp_path, *added, mask=mask)
    found = with_mask_token(loaded(tmp_path))
    assert found.special.mask == expected and found.vocab_size == count + new
    assert (
        found.special.mask not in found.encode("abcd<|mask|>".replace("<|mask|>", ""))
        and found.decode([expected]) == ""
    )
    found.wrapped.save_pretrained(str(tmp_path / "saved"))
    assert loaded(tmp_path / "saved").special == found.special


def test_a_tokenizer_of_an_autoregressive_model_needs_none(tmp_path):
    write_tokenizer(tmp_path)
    assert loaded(tmp_path).special.mask == -1
    with pytest.raises(ValueError, match="no mask token"):
        load_pretrained_tokenizer(tmp_path, mask=None, end=None, turns=TURNS)


@pytest.mark.parametrize("eos", ["<|end|>", None])
def test_a_tokenizer_by_itself_ends_texts_with_its_own_end_token(tmp_path, eos):
    write_tokenizer(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pad_token": None, "eos_token": eos}))
    config = Config(tokenizer=str(tmp_path), stages=("adapt",))
    if eos:
        assert set_up(config).tokenizer.special.end == len(WORDS)
        return
    with pytest.raises(UserError, match=r"no end token; set eos_token in tokenizer_config\.json"):
        set_up(config)


CAUSAL = ModelConfig(
    width=16, layers=2, heads=2, kv_heads=1, mlp_width=24, vocab_size=7, attention_mask="causal", alignment="shifted",
    rope_full_precision=False,
)  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_are_the_mean_and_new_biases_nothing(tiny, tied):
    model, variables = tiny(**{**vars(CAUSAL), "tied_head": tied})
    config = dataclasses.replace(bidirectional(ModelConfig(alignment="shifted"), model.config), vocab_size=grown(7, 8))
    made = as_diffusion(variables, config, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), 7)["params"]
    wte, first = np.array(made["wte"]), np.array(variables["params"]["wte"])
    assert wte.shape == (64, 16) and np.array_equal(wte[:7], first)
    np.testing.assert_allclose(wte[7:], np.broadcast_to(first.mean(axis=0), (57, 16)), rtol=1e-5, atol=1e-6)
    if not tied:
        head = np.array(made["ff_out"])
        np.testing.assert_allclose(
            head[:, 7], np.array(variables["params"]["ff_out"]).mean(axis=1), rtol=1e-5, atol=1e-6
        )
    for name in ("q_proj", "k_proj", "v_proj"):
        assert not np.any(made["blocks"][name]["bias"])
        np.testing.assert_array_equal(made["blocks"][name]["kernel"], variables["params"]["blocks"][name]["kernel"])


def test_a_spare_row_of_the_embedding_becomes_the_mean(tiny):
    model, variables = tiny(**{**vars(CAUSAL), "vocab_size": 9})
    config = bidirectional(ModelConfig(alignment="shifted"), model.config)
    assert grown(9, 8) == 9
    made = np.array(as_diffusion(variables, config, make_mesh(MeshConfig()), 7)["params"]["wte"])
    np.testing.assert_allclose(made[7], np.array(variables["params"]["wte"])[:7].mean(axis=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "mine, changes",
    [
        (ModelConfig(alignment="shifted"), {"alignment": "shifted", "qkv_bias": True}),
        (ModelConfig(), {"alignment": "same_position"}),
        (ModelConfig(attention_mask="block_causal", mask_block=4), {"attention_mask": "block_causal", "mask_block": 4}),
    ],
)
def test_the_configuration_says_what_it_becomes(mine, changes):
    rest = {"alignment": mine.alignment, "attention_mask": mine.attention_mask, **changes}
    assert bidirectional(mine, CAUSAL) == dataclasses.replace(CAUSAL, **rest)


# -- whole ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path, tiny):
    """A Llama-shaped directory with a tokenizer without a mask token."""
    model, variables = tiny(**vars(CAUSAL))
    family = family_for(model.config)

    def companions(beside):
        write_tokenizer(beside)
        published = {theirs: getattr(CAUSAL, ours) for ours, theirs in family.fields.items() if ours != "head_size"}
        rest = {"model_type": "llama", "max_position_embeddings": 64, "eos_token_id": 6, "torch_dtype": "float32"}
        (beside / "config.json").write_text(json.dumps({**published, **rest}))

    save_weights(in_memory(variables, model.config, family), model.config, family, tmp_path / "llama", companions)
    return tmp_path / "llama"


def run(checkpoint, run_dir, **changes):
    text = run_dir.with_suffix(".txt")
    text.write_text("abcdabcd" * 60)
    settings = {
        "run_dir": run_dir, "init_from": checkpoint, "stages": "[adapt]", "adapt.data": f"{{{text}: 1}}", "adapt.steps": 1,
        "adapt.batch_size": 8, "adapt.length": 8, "adapt.validation_windows": 4, "adapt.validation_samples": 2,
        "adapt.order_windows": 0, **changes,
    }  # fmt: skip
    train.run(parse([f"--{key}={value}" for key, value in settings.items()]))
    return load_pretrained(run_dir)


@pytest.mark.parametrize(
    "alignment, model_type", [("shifted", "Dream"), ("same_position", "a2d-llama")], ids=["shifted", "same_position"]
)
def test_an_adapted_llama_is_a_dream_or_an_a2d_and_exports_as_one(checkpoint, tmp_path, alignment, model_type):
    policy = run(checkpoint, tmp_path / "run", **{"model.alignment": alignment})
    assert policy.tokenizer.special.mask == 7 and policy.config.vocab_size == 64
    save_pretrained(policy, tmp_path / "out")
    published = json.loads((tmp_path / "out/config.json").read_text())
    assert (published["model_type"], published["mask_token_id"], published["vocab_size"]) == (model_type, 7, 64)
    again = load_pretrained(tmp_path / "out")
    assert again.config == dataclasses.replace(policy.config, max_positions=again.config.max_positions)
    assert again.tokenizer.special == policy.tokenizer.special
    tokens = [[0, 5, 7, 2, 7, 3]]
    np.testing.assert_allclose(again.logits(tokens), policy.logits(tokens), atol=1e-5)


def test_the_same_command_finds_the_finished_run(checkpoint, tmp_path):
    run(checkpoint, tmp_path / "run")
    before = (tmp_path / "run/evaluations/adapt.text.json").read_text()
    run(checkpoint, tmp_path / "run")
    train.run(
        parse(["--config", str(tmp_path / "run/config.yaml")])
    )  # what it has written down is a configuration of it
    assert (tmp_path / "run/evaluations/adapt.text.json").read_text() == before


def test_a_stage_that_denoises_comes_after_adaptation(checkpoint):
    with pytest.raises(
        UserError, match="stage 'sft' works on masked diffusion models; put a stage of kind adapt first"
    ):
        set_up(Config(init_from=str(checkpoint), stages=("sft",)))


def test_an_embedding_with_too_few_rows_for_its_own_tokenizer_is_refused(checkpoint):
    write_tokenizer(checkpoint, "<one>", "<two>", "<three>")
    with pytest.raises(UserError, match="the tokenizer has 10 ids, the embedding only 7 rows"):
        load_pretrained(checkpoint)
    with pytest.raises(
        UserError, match="the tokenizer has 10 ids, the embedding only 7 rows; they belong to different models"
    ):
        set_up(Config(init_from=str(checkpoint), stages=("adapt",)))
