"""Adapters in PEFT's format: exact there and back, the vocabulary head left alone, and the same weights as PEFT merges."""

import json
import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from safetensors.numpy import load_file, save_file

from d1jax.config import LoraConfig, MeshConfig, UserError
from d1jax.models.families import FAMILIES, family_for
from d1jax.models.lora import merge
from d1jax.models.sharding import AXES, make_mesh
from d1jax.models.transformer import Transformer, abstract_variables
from d1jax.weights.names import to_published
from d1jax.weights.peft import is_adapter, read_adapter, save_adapter

LORA = LoraConfig(rank=3, alpha=5.0)
SHAPE = {
    "llada": {"heads": 4, "kv_heads": 2, "vocab_size": 14},
    "dream": {"heads": 4, "kv_heads": 2, "vocab_size": 14, "alignment": "shifted", "qkv_bias": True, "rope_full_precision": False},
}  # fmt: skip
BLOCK = {"llada": "base_model.model.model.transformer.blocks", "dream": "base_model.model.model.layers"}
HEAD = {"llada": "base_model.model.model.transformer.ff_out", "dream": "base_model.model.lm_head"}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def one_device():
    return jax.make_mesh((1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1])


def eight_devices():
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


@pytest.fixture
def saved(tiny, tmp_path):
    """`saved("dream", lora=...)` -> (directory, model, its variables)."""

    def save(family="llada", lora=LORA, **changes):
        model, variables = tiny(lora=lora, **{**SHAPE[family], **changes})
        save_adapter(variables["lora"], lora, model.config, FAMILIES[family], tmp_path / "adapter", "org/base")
        return tmp_path / "adapter", model, variables

    return save


def read(folder, model, mesh=one_device):
    return read_adapter(folder, model.config, family_for(model.config), mesh())


def rewrite(folder, **changes):
    settings = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**settings, **changes}))


def edit_tensors(folder, edit):
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def refusal(folder, model):
    with pytest.raises(UserError) as caught:
        read(folder, model)
    assert str(folder) in str(caught.value)
    return str(caught.value)


# -- there and back -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", [one_device, eight_devices])
@pytest.mark.parametrize("targets", [LORA.targets, ("q_proj", "ff_out"), ("ff_out",)], ids="+".join)
@pytest.mark.parametrize("family", SHAPE)
def test_an_adapter_survives_the_round_trip_exactly(saved, family, targets, mesh):
    folder, model, variables = saved(family, LoraConfig(rank=3, alpha=5.5, targets=targets))
    lora, read_back = read(folder, model, mesh)
    assert lora == model.lora
    assert jax.tree.structure(read_back) == jax.tree.structure({"lora": variables["lora"]})
    jax.tree.map(np.testing.assert_array_equal, read_back["lora"], variables["lora"])
    like = abstract_variables(model, mesh(), ("lora",))
    assert jax.tree.map(lambda x: (x.dtype, x.sharding), read_back) == jax.tree.map(
        lambda x: (x.dtype, x.sharding), like
    )


@pytest.mark.parametrize("family", SHAPE)
def test_an_adapter_on_eight_devices_is_saved_as_from_one(saved, tmp_path, family):
    folder, model, _ = saved(family)
    lora, adapters = read(folder, model, eight_devices)
    save_adapter(adapters["lora"], lora, model.config, FAMILIES[family], tmp_path / "again", "org/base")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("family, ff_out", [("llada", "ff_out"), ("dream", "mlp.down_proj")])
def test_tensors_have_pefts_names_and_layout(saved, family, ff_out):
    folder, _, variables = saved(family)
    tensors = load_file(folder / WEIGHTS)
    assert len(tensors) == 2 * 2 * 7
    pair = variables["lora"]["blocks"]["ff_out"]
    np.testing.assert_array_equal(tensors[f"{BLOCK[family]}.1.{ff_out}.lora_A.weight"], pair["a"][1].T)
    np.testing.assert_array_equal(tensors[f"{BLOCK[family]}.1.{ff_out}.lora_B.weight"], pair["b"][1].T)
    assert tensors[f"{BLOCK[family]}.1.{ff_out}.lora_A.weight"].shape == (3, 24)


def test_settings_say_what_was_trained_and_on_what(saved, tiny, tmp_path):
    folder, model, variables = saved()
    settings = json.loads((folder / CONFIG).read_text())
    assert settings["base_model_name_or_path"] == "org/base"
    assert (settings["peft_type"], settings["r"], settings["lora_alpha"], settings["bias"]) == ("LORA", 3, 5, "none")
    assert is_adapter(folder) and not is_adapter(tmp_path)


def test_an_alpha_that_is_an_int_is_fine(saved):
    folder, model, _ = saved(lora=LoraConfig(rank=3, alpha=6))
    assert read(folder, model)[0].alpha == 6.0


def test_rslora_scales_by_the_root_of_the_rank(saved):
    folder, model, _ = saved()
    rewrite(folder, use_rslora=True)
    lora, _ = read(folder, model)
    assert lora.alpha / lora.rank == pytest.approx(5.0 / 3**0.5)


def test_an_existing_directory_is_not_overwritten(saved):
    folder, model, variables = saved()
    before = (folder / WEIGHTS).read_bytes()
    with pytest.raises(FileExistsError, match="exists already"):
        save_adapter(variables["lora"], LORA, model.config, FAMILIES["llada"], folder)
    assert (folder / WEIGHTS).read_bytes() == before


# -- what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", [CONFIG, WEIGHTS])
def test_missing_files_are_named(saved, gone):
    folder, model, _ = saved()
    (folder / gone).unlink()
    assert f"needs {CONFIG} and {WEIGHTS}" in refusal(folder, model)


@pytest.mark.parametrize("family", SHAPE)
def test_an_adapter_of_the_vocabulary_head_is_refused_with_the_name_of_its_tensor(saved, family):
    folder, model, _ = saved(family)
    name = f"{HEAD[family]}.lora_A.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: np.zeros((3, 16), np.float32)}))
    message = refusal(folder, model)
    assert f"tensor {name} adapts the vocabulary head" in message and "train again with target_modules" in message


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.transformer.wte.lora_embedding_A",
        f"{BLOCK['llada']}.0.q_proj.lora_A.bias",
        f"{BLOCK['llada']}.0.q_proj.lora_magnitude_vector.weight",
        f"{BLOCK['llada']}.0.q_proj.base_layer.weight",
        f"{BLOCK['llada']}.0.attn_norm.lora_A.weight",
        f"{BLOCK['llada']}.x.q_proj.lora_A.weight",
        f"{BLOCK['dream']}.0.self_attn.q_proj.lora_A.weight",
        "model.transformer.blocks.0.q_proj.lora_A.weight",
    ],
)
def test_a_tensor_that_belongs_to_no_linear_layer_of_a_block_is_named(saved, name):
    folder, model, _ = saved()
    edit_tensors(folder, lambda tensors: tensors.update({name: np.zeros((3, 16), np.float32)}))
    assert f"tensor {name} belongs to no linear layer of a llada model" in refusal(folder, model)


@pytest.mark.parametrize(
    "setting, value",
    [
        ("use_dora", True),
        ("rank_pattern", {"q_proj": 8}),
        ("alpha_pattern", {"q_proj": 8}),
        ("modules_to_save", ["lm_head"]),
        ("bias", "lora_only"),
        ("bias", "all"),
        ("fan_in_fan_out", True),
        ("layers_to_transform", [0]),
        ("target_parameters", ["mlp.experts"]),
        ("peft_type", "LOHA"),
        # These change what PEFT computes, and leave no trace in the names and shapes of the tensors.
        ("alora_invocation_tokens", [1, 2]),
        ("layer_replication", [[1, 2], [0, 1]]),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("lora_bias", True),
        ("trainable_token_indices", [3]),
    ],
    ids=str,
)
def test_a_variant_that_computes_something_else_is_refused_by_name(saved, setting, value):
    folder, model, _ = saved()
    rewrite(folder, **{setting: value})
    assert f"{folder / CONFIG}: {setting} = {value!r} is not supported" in refusal(folder, model)


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal"])
def test_an_initialisation_that_leaves_the_base_weights_alone_is_fine(saved, init):
    folder, model, _ = saved()
    rewrite(folder, init_lora_weights=init)
    assert read(folder, model)[0] == LORA


@pytest.mark.parametrize(
    "changes",
    [
        *({"r": value} for value in (0, None, "3", 3.0, True, 10**9)),
        *({"lora_alpha": value} for value in (None, "5", True, 0, -5.0, float("nan"), float("inf"), 10**400)),
    ],
    ids=lambda changes: f"{changes!r:.30}",
)
def test_rank_and_alpha_must_be_numbers(saved, changes):
    folder, model, _ = saved()
    rewrite(folder, **changes)
    assert f"{folder / CONFIG}: r = " in refusal(folder, model)


def test_a_setting_that_nobody_knows_is_refused(saved):
    folder, model, _ = saved()
    rewrite(folder, use_something_new=True)
    assert "d1jax does not know 'use_something_new'" in refusal(folder, model)
    rewrite(folder, use_something_new=None)  # what a newer PEFT writes of what it did not use
    assert read(folder, model)[0].rank > 0


@pytest.mark.parametrize("value", ["yes", 1, []], ids=str)
def test_rslora_is_a_switch(saved, value):
    folder, model, _ = saved()
    rewrite(folder, use_rslora=value)
    assert f"use_rslora = {value!r}" in refusal(folder, model)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_tensor_that_is_not_finite_is_refused_by_name(saved, bad):
    folder, model, _ = saved()
    name = f"{BLOCK['llada']}.1.q_proj.lora_B.weight"
    edit_tensors(folder, lambda tensors: tensors[name].__setitem__((0, 0), bad))
    assert f"tensor {name} holds NaN or infinite values" in refusal(folder, model)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"layers": 3}, "blocks.2.attn_out.lora_A.weight has shape None, this model needs (3, 16)"),
        ({"layers": 1}, "blocks.1.attn_out.lora_A.weight has shape (3, 16), this model needs None"),
        ({"mlp_width": 40}, "ff_out.lora_A.weight has shape (3, 24), this model needs (3, 40)"),
        ({"kv_heads": 4}, "k_proj.lora_B.weight has shape (8, 3), this model needs (16, 3)"),
    ],
    ids=str,
)
def test_an_adapter_of_another_model_is_refused_by_tensor_and_shape(saved, tiny, changes, message):
    folder, _, _ = saved()
    other, _ = tiny(**{**SHAPE["llada"], **changes})
    assert "is for another model: tensor " in refusal(folder, other) and message in refusal(folder, other)


def test_a_rank_that_the_tensors_do_not_have_is_refused(saved):
    folder, model, _ = saved()
    rewrite(folder, r=4)
    assert "has shape (3, 16), this model needs (4, 16)" in refusal(folder, model)


@pytest.mark.parametrize("kind", ["lora_A", "lora_B"])
def test_half_a_pair_is_refused(saved, kind):
    folder, model, _ = saved()
    name = f"{BLOCK['llada']}.1.up_proj.{kind}.weight"
    edit_tensors(folder, lambda tensors: tensors.pop(name))
    assert f"tensor {name} has shape None" in refusal(folder, model)


def test_an_adapter_without_tensors_is_refused(saved):
    folder, model, _ = saved()
    edit_tensors(folder, lambda tensors: tensors.clear())
    assert refusal(folder, model)


def test_a_truncated_adapter_is_refused(saved):
    folder, model, _ = saved()
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-4])
    assert "not a whole safetensors file" in refusal(folder, model)


# -- which modules PEFT adapts --------------------------------------------------------------------------------------------


def llada_modules(layers):
    """Every module of the published LLaDA."""
    inner = "attn_norm attn_out dropout ff_norm ff_out ff_proj k_proj q_proj rotary_emb up_proj v_proj act".split()
    blocks = [f"model.transformer.blocks.{layer}" for layer in range(layers)]
    inside = [f"{block}.{name}" for block in blocks for name in inner]
    outer = [f"model.transformer.{name}" for name in ("wte", "emb_drop", "ln_f", "blocks", "ff_out")]
    return ["model", "model.transformer", *outer, *blocks, *inside]


@pytest.mark.parametrize("prefix", ["", "base_model."])
def test_pattern_matches_the_mlps_of_all_blocks_and_never_the_head(saved, prefix):
    folder, _, _ = saved(lora=LoraConfig(rank=3, targets=("q_proj", "ff_out")))
    pattern = json.loads((folder / CONFIG).read_text())["target_modules"]
    matched = {name for name in llada_modules(32) if re.fullmatch(pattern, prefix + name)}  # as PEFT does
    assert matched == {
        f"model.transformer.blocks.{layer}.{name}" for layer in range(32) for name in ("q_proj", "ff_out")
    }
    assert not re.fullmatch(pattern, "model.transformer.ff_out")


# -- PEFT itself ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def dream(tiny):
    """(torch model with Dream's names, our model, our variables), the same weights in both."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("peft", reason="PEFT is an extra: pip install 'd1jax[torch]'")
    model, variables = tiny(lora=LORA, **SHAPE["dream"])
    config = transformers.Qwen2Config(
        vocab_size=14, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, dtype="float32",
    )  # fmt: skip
    published = transformers.Qwen2ForCausalLM(config)
    base = to_published({"params": variables["params"]}, model.config, FAMILIES["dream"])
    published.load_state_dict({name: torch.tensor(np.asarray(tensor)) for name, tensor in base.items()})
    return published, model, variables


def assert_merges_to(peft_model, variables, lora, config):
    theirs = peft_model.merge_and_unload().state_dict()
    ours = to_published(merge(variables, lora), config, FAMILIES["dream"])
    base = to_published({"params": variables["params"]}, config, FAMILIES["dream"])
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        np.testing.assert_allclose(tensor, theirs[name].detach().numpy(), atol=1e-6, rtol=1e-6, err_msg=name)
    return {name for name in ours if np.abs(ours[name] - base[name]).max() > 1e-3}


LINEAR = {
    "q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj", "ff_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj", "ff_out": "mlp.down_proj",
}  # fmt: skip


@pytest.mark.torch
@pytest.mark.parametrize("targets", [LORA.targets, ("q_proj", "ff_out")], ids="+".join)
def test_peft_loads_our_adapter_onto_the_intended_modules_and_merges_to_our_weights(dream, tmp_path, targets):
    import peft

    published, model, variables = dream
    adapters = {"blocks": {name: variables["lora"]["blocks"][name] for name in targets}}
    save_adapter(adapters, LORA, model.config, FAMILIES["dream"], tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(published, tmp_path / "adapter")
    intended = {f"model.layers.{layer}.{LINEAR[name]}" for layer in range(2) for name in targets}
    adapted = {name for name, module in loaded.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == intended
    moved = assert_merges_to(loaded, {**variables, "lora": adapters}, LORA, model.config)
    assert moved == {f"{name}.weight" for name in intended}


@pytest.mark.torch
@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
def test_an_adapter_that_peft_saved_merges_to_pefts_weights(dream, tmp_path, rslora):
    import peft

    published, model, variables = dream
    settings = peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=["q_proj", "v_proj"], init_lora_weights=False, use_rslora=rslora,
        lora_dropout=0.1, task_type="CAUSAL_LM",
    )  # fmt: skip
    theirs = peft.get_peft_model(published, settings)
    theirs.save_pretrained(tmp_path / "adapter")
    lora, adapters = read(tmp_path / "adapter", Transformer(model.config), eight_devices)
    assert lora.targets == ("q_proj", "v_proj") and lora.rank == 3
    moved = assert_merges_to(theirs, {"params": variables["params"], **adapters}, lora, model.config)
    assert len(moved) == 4


@pytest.mark.torch
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "weight adapts the vocabulary head"),
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"bias": "all"}, "bias = 'all' is not supported"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern = {'q_proj': 2} is not supported"),
        ({"modules_to_save": ["norm"]}, "modules_to_save = ['norm'] is not supported"),
        ({"layers_to_transform": [0]}, "layers_to_transform = [0] is not supported"),
        ({"lora_bias": True}, "lora_bias = True is not supported"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_a_variant_that_peft_saved_is_refused(dream, tmp_path, changes, message):
    import peft

    published, model, _ = dream
    settings = peft.LoraConfig(**{"r": 3, "target_modules": ["q_proj"], "init_lora_weights": False, **changes})
    peft.get_peft_model(published, settings).save_pretrained(tmp_path / "adapter")
    assert message in refusal(tmp_path / "adapter", model)
