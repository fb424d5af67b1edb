"""Name maps between LLaDA checkpoints and the parameter tree: invertible bit for bit, strict about names."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from d1jax.config import ModelConfig
from d1jax.weights.convert import from_llada, llada_keys, to_llada

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
LLADA_8B = SHARED / "checkpoints" / "LLaDA-8B-Instruct"


def test_a_checkpoint_survives_the_round_trip_bit_for_bit(golden):
    back = to_llada(from_llada(golden.tensors, golden.config), golden.config)
    assert set(back) == set(golden.tensors)
    for name, tensor in golden.tensors.items():
        assert back[name].dtype == tensor.dtype
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied_head": True},
        {"qkv_bias": True},
        {"heads": 4, "kv_heads": 1, "qkv_bias": True, "param_dtype": "bfloat16"},
    ],
    ids=["plain", "tied", "biases", "grouped, biases, bfloat16"],
)
def test_parameters_survive_the_round_trip_bit_for_bit(tiny, changes):
    model, variables = tiny(**changes)
    tensors = to_llada(variables, model.config)
    assert sorted(tensors) == llada_keys(model.config)
    back = from_llada(tensors, model.config)
    assert jax.tree.structure(back) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, back, variables)
    assert jax.tree.map(lambda x: x.dtype, back) == jax.tree.map(lambda x: x.dtype, variables)


def test_matrices_are_transposed_and_layers_stacked(golden):
    params = golden.variables["params"]
    for layer in range(golden.config.layers):
        for name in ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"):
            tensor = golden.tensors[f"model.transformer.blocks.{layer}.{name}.weight"]
            np.testing.assert_array_equal(params["blocks"][name]["kernel"][layer], tensor.T)
    np.testing.assert_array_equal(params["wte"], golden.tensors["model.transformer.wte.weight"])
    np.testing.assert_array_equal(params["ff_out"], golden.tensors["model.transformer.ff_out.weight"].T)


def test_torch_layout_is_out_by_in(tiny):
    model, variables = tiny(heads=4, kv_heads=2)
    tensors = to_llada(variables, model.config)
    assert tensors["model.transformer.blocks.1.k_proj.weight"].shape == (8, 16)
    assert tensors["model.transformer.blocks.0.up_proj.weight"].shape == (24, 16)
    assert tensors["model.transformer.blocks.0.ff_out.weight"].shape == (16, 24)
    assert tensors["model.transformer.ff_out.weight"].shape == (13, 16)


@pytest.mark.skipif(not LLADA_8B.is_dir(), reason="the index of the published checkpoint is not on this machine")
def test_names_are_those_of_the_published_8b_checkpoint():
    published = json.loads((LLADA_8B / "config.json").read_text())
    index = json.loads((LLADA_8B / "model.safetensors.index.json").read_text())["weight_map"]
    config = ModelConfig(
        width=published["d_model"], layers=published["n_layers"], heads=published["n_heads"],
        kv_heads=published["n_kv_heads"], mlp_width=published["mlp_hidden_size"], vocab_size=published["vocab_size"],
        tied_head=published["weight_tying"], qkv_bias=published["include_qkv_bias"],
    )  # fmt: skip
    assert len(index) == 291
    assert llada_keys(config) == sorted(index)


def test_missing_and_unexpected_tensors_are_named_together(golden):
    tensors = dict(golden.tensors)
    gone = ["model.transformer.blocks.1.up_proj.weight", "model.transformer.ln_f.weight"]
    for name in gone:
        del tensors[name]
    tensors["model.transformer.wpe.weight"] = np.zeros(3)
    with pytest.raises(KeyError) as caught:
        from_llada(tensors, golden.config)
    message = caught.value.args[0]
    assert f"missing tensors {gone}" in message
    assert "unexpected tensors ['model.transformer.wpe.weight']" in message


def test_a_tied_model_does_not_accept_a_head_nor_an_untied_one_its_absence(tiny):
    (plain, variables), (tied, tied_variables) = tiny(), tiny(tied_head=True)
    head = "model.transformer.ff_out.weight"
    with pytest.raises(KeyError, match=f"unexpected tensors .*{head}"):
        from_llada(to_llada(variables, plain.config), tied.config)
    with pytest.raises(KeyError, match=f"missing tensors .*{head}"):
        from_llada(to_llada(tied_variables, tied.config), plain.config)


def test_a_checkpoint_of_another_depth_is_refused(golden):
    with pytest.raises(KeyError, match=r"missing tensors .*blocks\.3\.attn_norm"):
        from_llada(golden.tensors, dataclasses.replace(golden.config, layers=4))
    with pytest.raises(KeyError, match=r"unexpected tensors .*blocks\.2\.attn_norm"):
        from_llada(golden.tensors, dataclasses.replace(golden.config, layers=2))
