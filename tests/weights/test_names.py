"""Name maps between published checkpoints and the parameter tree: invertible bit for bit, strict about names and shapes."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.config import MeshConfig, ModelConfig, UserError
from d1jax.models.config_json import read_config
from d1jax.models.families import FAMILIES, family_for
from d1jax.models.sharding import make_mesh
from d1jax.models.transformer import Transformer, abstract_variables
from d1jax.weights.names import (
    check_tensors,
    entries,
    expected_shapes,
    from_published,
    leaf,
    our_shape,
    parameter_count,
    to_published,
)

PUBLISHED = Path(__file__).resolve().parents[2].parent / "shared" / "checkpoints"
LLADA, DREAM = FAMILIES["llada"], FAMILIES["dream"]
AS_DREAM = dict(alignment="shifted", qkv_bias=True, rope_full_precision=False)


def bits(array):
    """NaNs, infinities and signs of zero count."""
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def assert_same_bits(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    assert jax.tree.map(lambda x: (x.dtype, x.shape), ours) == jax.tree.map(lambda x: (x.dtype, x.shape), theirs)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(bits(a), bits(b)), ours, theirs)


# -- there and back -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fixture, family", [("golden", LLADA), ("golden_dream", DREAM)], ids=["llada", "dream"])
def test_a_checkpoint_survives_the_round_trip_bit_for_bit(request, fixture, family):
    golden = request.getfixturevalue(fixture)
    variables = from_published(golden.tensors, golden.config, family)
    assert_same_bits(variables, golden.variables)
    assert_same_bits(to_published(variables, golden.config, family), dict(golden.tensors))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied_head": True},
        {"heads": 4, "kv_heads": 1, "qkv_bias": True, "layers": 1},
        {"heads": 4, "kv_heads": 2, **AS_DREAM},
        {"tied_head": True, **AS_DREAM},
    ],
    ids=["llada", "llada, tied", "llada, grouped, biases, one layer", "dream, grouped", "dream, tied"],
)
def test_parameters_survive_the_round_trip_bit_for_bit(tiny, changes, dtype):
    model, variables = tiny(**changes, param_dtype=dtype)
    family = family_for(model.config)
    tensors = to_published(variables, model.config, family)
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected_shapes(model.config, family)
    assert_same_bits(from_published(tensors, model.config, family), variables)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@given(seed=st.integers(0, 2**32 - 1))
def test_any_number_survives(dtype, seed):
    # Of NaN only the usual one: XLA on CPU rewrites the payload of a bfloat16 NaN.
    config = ModelConfig(width=4, layers=2, heads=2, kv_heads=1, mlp_width=3, vocab_size=5)
    rng, dtype = np.random.default_rng(seed), jnp.dtype(dtype)
    kind = f"u{dtype.itemsize}"

    def draw(shape):
        drawn = rng.integers(0, 1 << 8 * dtype.itemsize, shape, kind).view(dtype)
        drawn.flat[:3] = np.array([-0.0, np.inf, jnp.finfo(dtype).smallest_subnormal])
        with np.errstate(invalid="ignore"):
            return np.where(np.isnan(drawn), np.array(np.nan, dtype), drawn)

    tensors = {name: draw(shape) for name, shape in expected_shapes(config, LLADA).items()}
    assert_same_bits(to_published(from_published(tensors, config, LLADA), config, LLADA), tensors)


def test_every_weight_of_a_llada_is_where_the_model_looks_for_it(golden):
    params, prefix = golden.variables["params"], "model.transformer"
    for layer in range(golden.config.layers):
        for name in ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"):
            tensor = golden.tensors[f"{prefix}.blocks.{layer}.{name}.weight"]
            np.testing.assert_array_equal(params["blocks"][name]["kernel"][layer], tensor.T)
        for name in ("attn_norm", "ff_norm"):
            tensor = golden.tensors[f"{prefix}.blocks.{layer}.{name}.weight"]
            np.testing.assert_array_equal(params["blocks"][name]["scale"][layer], tensor)
    np.testing.assert_array_equal(params["wte"], golden.tensors[f"{prefix}.wte.weight"])
    np.testing.assert_array_equal(params["ff_out"], golden.tensors[f"{prefix}.ff_out.weight"].T)
    np.testing.assert_array_equal(params["ln_f"]["scale"], golden.tensors[f"{prefix}.ln_f.weight"])


QWEN = {
    "q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj", "ff_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj", "ff_out": "mlp.down_proj",
    "attn_norm": "input_layernorm", "ff_norm": "post_attention_layernorm",
}  # fmt: skip


def test_every_weight_of_a_dream_is_where_the_model_looks_for_it(tiny):
    model, variables = tiny(heads=4, kv_heads=2, **AS_DREAM)
    tensors, params = to_published(variables, model.config, DREAM), variables["params"]
    seen = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for layer in range(2):
        for name, theirs in QWEN.items():
            for kind, stacked in params["blocks"][name].items():
                key = f"model.layers.{layer}.{theirs}.{'bias' if kind == 'bias' else 'weight'}"
                np.testing.assert_array_equal(tensors[key], stacked[layer].T)
                seen.add(key)
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], params["wte"])
    np.testing.assert_array_equal(tensors["lm_head.weight"], params["ff_out"].T)
    np.testing.assert_array_equal(tensors["model.norm.weight"], params["ln_f"]["scale"])
    assert seen == set(tensors)


# -- names and shapes -----------------------------------------------------------------------------------------------------


def llada_names(layers):
    modules = "attn_norm attn_out ff_norm ff_out ff_proj k_proj q_proj up_proj v_proj".split()
    blocks = [f"model.transformer.blocks.{layer}.{module}.weight" for layer in range(layers) for module in modules]
    return sorted([*blocks, *(f"model.transformer.{name}.weight" for name in ("wte", "ln_f", "ff_out"))])


def dream_names(layers):
    weights = [f"{module}.weight" for module in QWEN.values()]
    biases = [f"self_attn.{name}_proj.bias" for name in "qkv"]
    blocks = [f"model.layers.{layer}.{name}" for layer in range(layers) for name in (*weights, *biases)]
    return sorted([*blocks, "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])


@pytest.mark.parametrize(
    "changes, family, names",
    [({}, LLADA, llada_names), (AS_DREAM, DREAM, dream_names)],
    ids=["llada", "dream"],
)
def test_names_of_a_model_of_two_layers_are_the_published_ones(changes, family, names):
    config = ModelConfig(width=16, layers=2, heads=4, kv_heads=2, mlp_width=24, vocab_size=13, **changes)
    assert sorted(expected_shapes(config, family)) == names(2)


@pytest.mark.parametrize(
    "checkpoint, family, names, layers, count",
    [
        ("LLaDA-8B-Instruct", LLADA, llada_names, 32, 291),
        ("Dream-v0-Instruct-7B", DREAM, dream_names, 28, 339),
    ],
    ids=["LLaDA-8B", "Dream-7B"],
)
def test_names_are_those_of_the_published_checkpoint_key_for_key(checkpoint, family, names, layers, count):
    folder = PUBLISHED / checkpoint
    if not (folder / "model.safetensors.index.json").is_file():
        pytest.skip("the index of the published checkpoint is not on this machine")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    config = read_config(json.loads((folder / "config.json").read_text()), "config.json")
    assert len(index["weight_map"]) == count
    assert sorted(expected_shapes(config, family)) == sorted(index["weight_map"]) == names(layers)
    assert 2 * parameter_count(config) == index["metadata"]["total_size"]


def test_published_layout_is_out_by_in():
    config = ModelConfig(width=16, layers=2, heads=4, kv_heads=2, mlp_width=24, vocab_size=13, **AS_DREAM)
    shapes = expected_shapes(config, DREAM)
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == (13, 16)
    layer = {name.removeprefix("model.layers.1."): shape for name, shape in shapes.items() if ".layers.1." in name}
    assert layer == {
        "self_attn.q_proj.weight": (16, 16), "self_attn.q_proj.bias": (16,),
        "self_attn.k_proj.weight": (8, 16), "self_attn.k_proj.bias": (8,),
        "self_attn.v_proj.weight": (8, 16), "self_attn.v_proj.bias": (8,),
        "self_attn.o_proj.weight": (16, 16),
        "mlp.gate_proj.weight": (24, 16), "mlp.up_proj.weight": (24, 16), "mlp.down_proj.weight": (16, 24),
        "input_layernorm.weight": (16,), "post_attention_layernorm.weight": (16,),
    }  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True}, AS_DREAM], ids=["llada", "llada, biases", "dream"])
def test_entries_cover_exactly_the_variables_of_the_model_the_largest_first(changes, tied):
    config = ModelConfig(
        width=16, layers=3, heads=4, kv_heads=2, mlp_width=24, vocab_size=13, tied_head=tied, **changes
    )
    plan, like = entries(config, family_for(config)), abstract_variables(Transformer(config), make_mesh(MeshConfig()))
    assert len({entry.path for entry in plan}) == len(plan) == len(jax.tree.leaves(like))
    for entry in plan:
        assert our_shape(entry) == leaf(like, entry.path).shape, entry.path
    sizes = [leaf(like, entry.path).size for entry in plan]
    assert sizes == sorted(sizes, reverse=True)
    assert parameter_count(config) == sum(sizes)


# -- what is refused ------------------------------------------------------------------------------------------------------


def test_missing_unexpected_and_wrongly_shaped_tensors_are_named_together(golden):
    tensors = dict(golden.tensors)
    gone = ["model.transformer.blocks.1.up_proj.weight", "model.transformer.ln_f.weight"]
    for name in gone:
        del tensors[name]
    tensors["model.transformer.wpe.weight"] = np.zeros(3)
    wrong = "model.transformer.blocks.0.ff_out.weight"
    tensors[wrong] = tensors[wrong].T
    with pytest.raises(UserError) as caught:
        from_published(tensors, golden.config, LLADA)
    message = str(caught.value)
    assert "not a llada checkpoint" in message
    assert f"missing tensors: {', '.join(gone)}\n" in message
    assert "unexpected tensors: model.transformer.wpe.weight\n" in message
    assert f"tensor {wrong} has shape (160, 64), config.json says (64, 160)" in message


def test_a_long_list_of_problems_is_cut_and_counted(golden):
    found = {name: (1, *shape) for name, shape in expected_shapes(golden.config, LLADA).items()}
    with pytest.raises(UserError, match="and 25 more") as caught:
        check_tensors(found, golden.config, LLADA, "here")
    assert str(caught.value).startswith("here: ") and str(caught.value).count("has shape") == 5
    with pytest.raises(UserError, match="missing tensors: .* and 24 more"):
        check_tensors({}, golden.config, LLADA, "here")


@pytest.mark.parametrize("changes, family", [({}, LLADA), (AS_DREAM, DREAM)], ids=["llada", "dream"])
def test_a_tied_model_does_not_accept_a_head_nor_an_untied_one_its_absence(tiny, changes, family):
    (plain, variables), (tied, tied_variables) = tiny(**changes), tiny(tied_head=True, **changes)
    head = f"{family.names.head}.weight"
    with pytest.raises(UserError, match=f"unexpected tensors: {head}"):
        from_published(to_published(variables, plain.config, family), tied.config, family)
    with pytest.raises(UserError, match=f"missing tensors: {head}"):
        from_published(to_published(tied_variables, tied.config, family), plain.config, family)


def test_a_checkpoint_of_another_depth_is_refused(golden):
    with pytest.raises(UserError, match=r"missing tensors: .*blocks\.3\.attn_norm"):
        from_published(golden.tensors, dataclasses.replace(golden.config, layers=4), LLADA)
    with pytest.raises(UserError, match=r"unexpected tensors: .*blocks\.2\.attn_norm"):
        from_published(golden.tensors, dataclasses.replace(golden.config, layers=2), LLADA)


def test_biases_are_not_dropped_silently(tiny):
    model, variables = tiny(qkv_bias=True)
    tensors = to_published(variables, model.config, LLADA)
    with pytest.raises(UserError, match=r"unexpected tensors: .*k_proj\.bias"):
        from_published(tensors, dataclasses.replace(model.config, qkv_bias=False), LLADA)


def test_a_family_does_not_read_the_others_names(golden):
    dream = dataclasses.replace(golden.config, **AS_DREAM)
    with pytest.raises(UserError, match=r"not a dream checkpoint(.|\n)*missing tensors: lm_head\.weight"):
        from_published(golden.tensors, dream, DREAM)
