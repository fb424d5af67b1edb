"""Checkpoints with experts: published names and bits there and back, on any mesh; what is wrong in one is named; they decode."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import d1jax
from d1jax.config import LoraConfig, MeshConfig, MixtureOfExperts, ModelConfig, UserError
from d1jax.models.config_json import read_config, write_config
from d1jax.models.families import FAMILIES, family_for
from d1jax.models.sharding import make_mesh
from d1jax.models.transformer import Transformer, initialize
from d1jax.weights.hf_directory import open_checkpoint
from d1jax.weights.names import expected_shapes, from_published, parameter_count, to_published
from d1jax.weights.peft import read_adapter, save_adapter

MINI = Path(__file__).resolve().parents[2].parent / "shared" / "checkpoints" / "LLaDA2.0-mini"
SIZES = dict(width=16, layers=3, heads=4, kv_heads=2, mlp_width=24, vocab_size=14, max_positions=64, qk_norm=True)
CONFIGS = {
    "lladamoe": ModelConfig(
        **SIZES, rope_full_precision=False,
        mlp=MixtureOfExperts(experts=4, experts_per_token=2, expert_width=8, shared_width=12, dense_layers=1),
    ),
    "llada2": ModelConfig(
        **SIZES, head_size=8, rotary_columns=4, rope_full_precision=False, attention_mask="block_causal", mask_block=32,
        mlp=MixtureOfExperts(
            experts=8, experts_per_token=3, expert_width=8, shared_width=8, dense_layers=1, router="sigmoid", scaling=2.5, groups=4,
            groups_per_token=2,
        ),
    ),
}  # fmt: skip


@pytest.fixture(params=CONFIGS)
def published(request, tmp_path):
    """(directory that d1jax did not write, its tensors, config)."""
    config, rng = CONFIGS[request.param], np.random.default_rng(0)
    shapes = expected_shapes(config, family_for(config))
    tensors = {
        n: (rng.standard_normal(s) * 0.3 + n.endswith("norm.weight")).astype("float32") for n, s in shapes.items()
    }
    folder = tmp_path / "published"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(write_config(config, {"mask_token_id": 13, "eos_token_id": 12})))
    return folder, tensors, config


def test_names_are_the_published_ones():
    shapes = expected_shapes(CONFIGS["llada2"], FAMILIES["llada2"])
    assert shapes["model.layers.0.attention.query_key_value.weight"] == ((4 + 2 * 2) * 8, 16)
    assert shapes["model.layers.0.mlp.gate_proj.weight"] == (24, 16)
    assert shapes["model.layers.2.mlp.experts.7.down_proj.weight"] == (16, 8)
    assert shapes["model.layers.1.mlp.gate.expert_bias"] == (8,) and shapes["model.layers.1.mlp.gate.weight"] == (8, 16)
    assert "model.layers.0.mlp.gate.weight" not in shapes and "model.layers.1.mlp.gate_proj.weight" not in shapes
    shapes = expected_shapes(CONFIGS["lladamoe"], FAMILIES["lladamoe"])
    assert shapes["model.layers.1.mlp.experts.0.gate_proj.weight"] == (8, 16)
    assert shapes["model.layers.1.shared_expert.up_proj.weight"] == (12, 16)
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == (8, 16)


def test_the_published_llada2_mini_is_read_to_the_tensor():
    if not MINI.is_dir():
        pytest.skip("the files of the published checkpoint are not on this machine")
    config = read_config(json.loads((MINI / "config.json").read_text()), "config.json")
    assert config == ModelConfig(
        width=2048, layers=20, heads=16, kv_heads=4, mlp_width=5120, vocab_size=157184, max_positions=32768, rope_theta=600000,
        rotary_columns=64, norm_eps=1e-6, qk_norm=True, rope_full_precision=False, attention_mask="block_causal", mask_block=32,
        mlp=MixtureOfExperts(
            experts=256, experts_per_token=8, expert_width=512, shared_width=512, dense_layers=1, router="sigmoid", scaling=2.5,
            groups=8, groups_per_token=4,
        ),
    )  # fmt: skip
    index = json.loads((MINI / "model.safetensors.index.json").read_text())
    assert (
        expected_shapes(config, FAMILIES["llada2"]).keys() == index["weight_map"].keys()
        and len(index["weight_map"]) == 14813
    )
    assert 2 * parameter_count(config) == index["metadata"]["total_size"]  # 16,255,643,392 parameters
    passed = config.width * (config.mlp_columns(active=True) + 2 * config.vocab_size + 20 * 128 * (2 * 16 + 2 * 4))
    assert 1.3e9 < passed < 1.5e9  # "A1.4B"


def test_there_and_back_bit_for_bit_in_shards_and_on_a_mesh(published, tmp_path):
    folder, tensors, config = published
    checkpoint = open_checkpoint(folder)
    assert dataclasses.replace(checkpoint.config, param_dtype=config.param_dtype) == config
    for name, mesh in {"one": MeshConfig(), "cut": MeshConfig(data=2, fsdp=2, tensor=2)}.items():
        policy = d1jax.load_pretrained(folder, mesh=mesh)
        d1jax.save_pretrained(policy, tmp_path / name)
        again = load_file(tmp_path / name / "model.safetensors")
        assert again.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert again[key].tobytes() == tensor.tobytes(), key
    assert json.loads((tmp_path / "cut" / "config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )


def test_native_form_there_and_back(published, tmp_path):
    folder, tensors, config = published
    d1jax.save_pretrained(d1jax.load_pretrained(folder), tmp_path / "native", native=True)
    back = d1jax.load_pretrained(tmp_path / "native")
    found = to_published(back.variables, config, family_for(config))
    for key, tensor in tensors.items():
        assert np.asarray(found[key]).tobytes() == tensor.tobytes(), key


def test_a_loaded_model_gives_the_logits_of_a_plain_loop(published, plain_mixture):
    folder, tensors, config = published
    tokens = np.random.default_rng(1).integers(0, 12, (1, 40))
    found = d1jax.load_pretrained(folder).logits(tokens, np.ones_like(tokens))
    expected = plain_mixture(config, from_published(tensors, config, family_for(config)), tokens[0])
    np.testing.assert_allclose(found[0], expected, atol=2e-4)


@pytest.mark.parametrize("gone", ["experts.2.up_proj.weight", "mlp.gate.weight", "mlp.experts.3.down_proj.weight"])
def test_missing_tensors_of_experts_are_named(published, gone):
    folder, tensors, _ = published
    name = next(name for name in tensors if name.endswith(gone))
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, folder / "model.safetensors")
    with pytest.raises(UserError, match=f"missing tensors: {name}"):
        open_checkpoint(folder)


def test_an_expert_that_is_not_finite_is_named(published):
    folder, tensors, _ = published
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    tensors[name][1, 2] = np.nan
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=f"{name} holds NaN"):
        d1jax.load_pretrained(folder)


def test_eight_bit_weights_are_refused_before_anything_is_read(published):
    folder, tensors, _ = published
    import ml_dtypes

    save_file({n: t.astype(ml_dtypes.float8_e4m3fn) for n, t in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(UserError, match="weights are stored as F8_E4M3; d1jax reads float32"):
        open_checkpoint(folder)


def test_an_adapter_of_fused_queries_is_no_peft_adapter_and_merges(tmp_path):
    config, mesh = CONFIGS["llada2"], make_mesh(MeshConfig())
    lora = LoraConfig(rank=2, targets=("q_proj", "attn_out"))
    with jax.set_mesh(mesh):
        variables = initialize(Transformer(config, lora), jax.random.key(0), mesh, ("params", "lora"))
    assert set(variables["lora"]) == {"blocks", "blocks_dense"}
    with pytest.raises(UserError, match="q, k and v of a llada2 model are one tensor"):
        save_adapter(variables["lora"], lora, config, FAMILIES["llada2"], tmp_path / "adapter")
    variables["lora"] = jax.tree.map(lambda x: x + 0.1, variables["lora"])
    merged = d1jax.models.lora.merge(variables, lora)["params"]
    for stack in ("blocks", "blocks_dense"):
        moved = np.abs(merged[stack]["q_proj"]["kernel"] - variables["params"][stack]["q_proj"]["kernel"])
        assert moved.max() > 0.1
        assert not np.any(merged[stack]["k_proj"]["kernel"] - variables["params"][stack]["k_proj"]["kernel"])


def test_an_adapter_of_llada_moe_survives_peft_s_form(tmp_path):
    config, mesh, family = CONFIGS["lladamoe"], make_mesh(MeshConfig()), FAMILIES["lladamoe"]
    lora = LoraConfig(rank=2, targets=("q_proj", "attn_out"))
    with jax.set_mesh(mesh):
        made = initialize(Transformer(config, lora), jax.random.key(0), mesh, ("lora",))["lora"]
    save_adapter(made, lora, config, family, tmp_path / "adapter")
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(names) == 3 * 2 * 2 and "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight" in names
    again, variables = read_adapter(tmp_path / "adapter", config, family, mesh)
    assert again.targets == lora.targets
    jax.tree.map(np.testing.assert_array_equal, variables["lora"], made)


@pytest.mark.parametrize(
    "name, cache", [("lladamoe", c) for c in ("none", "prefix", "dual")] + [("llada2", c) for c in ("none", "dual")]
)
def test_a_mixture_decodes(name, cache, tmp_path):
    config = dataclasses.replace(CONFIGS[name], max_positions=128)
    length = 8 if name == "lladamoe" else 64
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        variables = initialize(Transformer(config), jax.random.key(0), mesh)
    family = family_for(config)
    (tmp_path / "config.json").write_text(json.dumps(write_config(config, {"mask_token_id": 13, "eos_token_id": 12})))
    tensors = {key: np.asarray(tensor) for key, tensor in to_published(variables, config, family).items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    policy = d1jax.load_pretrained(tmp_path)
    sampler = d1jax.SamplerConfig(completion_length=length, block_length=length // 2, steps=4, cache=cache)
    rollout = d1jax.sample(policy, [[1, 2, 3], [4, 5]], sampler, seed=0)
    assert len(rollout.text) == 2
    if name == "llada2":  # finished blocks do not depend on what comes later, so that their keys are exact
        plain = d1jax.sample(policy, [[1, 2, 3], [4, 5]], dataclasses.replace(sampler, cache="none"), seed=0)
        assert rollout.text == plain.text
