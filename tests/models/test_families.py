"""What a config.json means: sizes, alignment, biases; what is refused, and that what d1jax writes reads back the same."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.config import MixtureOfExperts, ModelConfig, UserError
from d1jax.models.config_json import read_config, write_config
from d1jax.models.families import FAMILIES, family_for, family_of
from d1jax.weights.names import parameter_count

TESTS = Path(__file__).resolve().parents[1]
PUBLISHED = TESTS.parents[1] / "shared" / "checkpoints"


def golden_json(name):
    return json.loads((TESTS / "golden" / name / "config.json").read_text())


@pytest.fixture
def llada():
    return golden_json("llada-mha")


@pytest.fixture
def dream():
    return golden_json("dream-gqa")


def read(published):
    return read_config(published, "config.json")


# -- what published files say ---------------------------------------------------------------------------------------------

SIZES = dict(width=64, layers=3, heads=4, mlp_width=160, vocab_size=512, max_positions=128)


def test_golden_llada(llada):
    assert read(llada) == ModelConfig(
        **SIZES, kv_heads=4, rope_theta=5e5, norm_eps=1e-5, qkv_bias=False, tied_head=False, rope_full_precision=True,
        alignment="same_position",
    )  # fmt: skip


def test_golden_dream(dream):
    assert read(dream) == ModelConfig(
        **SIZES, kv_heads=2, rope_theta=1e6, norm_eps=1e-6, qkv_bias=True, tied_head=False, rope_full_precision=False,
        alignment="shifted",
    )  # fmt: skip


@pytest.mark.parametrize(
    "name, family, count, expected",
    [
        (
            "LLaDA-8B-Instruct", "llada", 8_015_581_184,
            ModelConfig(
                width=4096, layers=32, heads=32, kv_heads=32, mlp_width=12288, vocab_size=126464, max_positions=4096,
                rope_theta=5e5, norm_eps=1e-5, rope_full_precision=True, alignment="same_position",
            ),
        ),
        (
            "Dream-v0-Instruct-7B", "dream", 7_615_616_512,
            ModelConfig(
                width=3584, layers=28, heads=28, kv_heads=4, mlp_width=18944, vocab_size=152064, max_positions=131072,
                rope_theta=1e6, norm_eps=1e-6, qkv_bias=True, rope_full_precision=False, alignment="shifted",
            ),
        ),
    ],
    ids=["LLaDA-8B", "Dream-7B"],
)  # fmt: skip
def test_published_model_is_read_and_has_the_published_number_of_weights(name, family, count, expected):
    # The same numbers without the files, so that this holds on every machine.
    assert parameter_count(expected) == count
    file = PUBLISHED / name / "config.json"
    if not file.is_file():
        pytest.skip("the config of the published checkpoint is not on this machine")
    published = json.loads(file.read_text())
    assert family_of(published, "config.json") is FAMILIES[family]
    assert read(published) == expected


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"embedding_size": 640}, {"vocab_size": 640}),
        ({"vocab_size": 640}, {"vocab_size": 640}),
        ({"embedding_size": None, "vocab_size": 500}, {"vocab_size": 500}),
        ({"embedding_size": ...}, {"vocab_size": 512}),
        ({"n_kv_heads": None}, {"kv_heads": 4}),
        ({"n_kv_heads": ...}, {"kv_heads": 4}),
        ({"n_kv_heads": None, "multi_query_attention": True}, {"kv_heads": 1}),
        ({"n_kv_heads": 2, "multi_query_attention": True}, {"kv_heads": 2}),
        ({"mlp_hidden_size": None}, {"mlp_width": 256}),
        ({"mlp_hidden_size": ..., "mlp_ratio": 3}, {"mlp_width": 192}),
        ({"include_qkv_bias": True}, {"qkv_bias": True}),
        ({"include_qkv_bias": None, "weight_tying": ...}, {}),
        ({"weight_tying": True}, {"tied_head": True}),
        # iLLaDA-8B's make (arXiv 2606.25331): fewer key heads, a tied head, a longer context.
        (
            {"n_kv_heads": 2, "weight_tying": True, "embedding_size": 1024, "max_sequence_length": 8192},
            {"kv_heads": 2, "tied_head": True, "vocab_size": 1024, "max_positions": 8192},
        ),
        ({"rope_full_precision": False}, {"rope_full_precision": False}),
        ({"rope_full_precision": ...}, {}),
        ({"rope_theta": 500_000}, {}),
        ({"bias_for_layer_norm": None, "alibi": ...}, {}),
        ({"model_type": "mmada", "embedding_size": 512, "vocab_size": 700}, {"vocab_size": 700}),
    ],
    ids=str,
)  # fmt: skip
def test_setting_of_a_llada_changes_just_what_it_means(llada, changes, expected):
    assert read(changed(llada, changes)) == dataclasses.replace(read(llada), **expected)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"num_key_value_heads": None}, {"kv_heads": 4}),
        ({"tie_word_embeddings": True}, {"tied_head": True}),
        ({"tie_word_embeddings": ...}, {}),
        ({"rope_scaling": ..., "use_mrope": False}, {}),
        ({"sliding_window": 4096}, {}),
    ],
    ids=str,
)
def test_setting_of_a_dream_changes_just_what_it_means(dream, changes, expected):
    assert read(changed(dream, changes)) == dataclasses.replace(read(dream), **expected)


def changed(published, changes):
    """`...` removes a setting."""
    merged = {**published, **changes}
    return {name: value for name, value in merged.items() if value is not ...}


def test_mmada_is_a_llada_that_breaks_one_line_after_a_header(llada):
    family = family_of({**llada, "model_type": "mmada"}, "config.json")
    assert family.name == "mmada" and family.alignment == "same_position"
    assert family.names == FAMILIES["llada"].names
    assert FAMILIES["llada"].assistant_header == family.assistant_header + "\n"


# -- what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["mistral", None, "dream", ["llada"]], ids=str)
def test_an_unknown_model_type_is_named_with_the_known_ones(llada, model_type):
    with pytest.raises(UserError) as caught:
        read({**llada, "model_type": model_type})
    message = str(caught.value)
    assert f"config.json: model_type {model_type!r}" in message and "LLaDAModelLM" in message
    assert all(repr(kind) in message for kind in ("llada", "mmada", "Dream", "llama", "qwen3"))


@pytest.mark.parametrize(
    "name, setting",
    [
        *(("llada-mha", name) for name in ("d_model", "n_layers", "n_heads", "max_sequence_length", "rope_theta", "rms_norm_eps")),
        *(("dream-gqa", name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                                           "vocab_size", "max_position_embeddings", "rope_theta", "rms_norm_eps")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("gone", [None, ...], ids=["null", "absent"])
def test_a_missing_size_is_named(name, setting, gone):
    with pytest.raises(UserError, match=rf"config\.json: has no .*{setting}.*; it is needed to build a"):
        read(changed(golden_json(name), {setting: gone}))


@pytest.mark.parametrize("ratio", [None, ...], ids=["null", "absent"])
def test_a_llada_needs_the_width_of_its_mlp_or_a_ratio(llada, ratio):
    with pytest.raises(UserError, match="has no mlp_hidden_size"):
        read(changed(llada, {"mlp_hidden_size": ..., "mlp_ratio": ratio}))


def test_a_llada_needs_rows_of_the_embedding(llada):
    with pytest.raises(UserError, match="has no embedding_size"):
        read(changed(llada, {"embedding_size": None, "vocab_size": ...}))


# As SmolLM2-135M, Qwen2.5-0.5B and Qwen3-0.6B are published; Llama 2 says no rope_theta.
AUTOREGRESSIVE = {
    "llama": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 576, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152,
        "max_position_embeddings": 8192, "rope_theta": 100000, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
        "attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "rope_interleaved": False, "rope_scaling": None,
        "pretraining_tp": 1, "is_llama_config": True, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    },
    "qwen2": {
        "model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "intermediate_size": 4864, "vocab_size": 151936, "max_position_embeddings": 32768, "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "use_sliding_window": False, "sliding_window": 32768,
        "max_window_layers": 21, "hidden_act": "silu", "use_mrope": False, "attention_dropout": 0.0,
    },
    "qwen3": {
        "model_type": "qwen3", "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 3072, "vocab_size": 151936, "max_position_embeddings": 40960,
        "rope_theta": 1000000, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "attention_bias": False,
        "use_sliding_window": False, "sliding_window": None, "max_window_layers": 28, "hidden_act": "silu", "rope_scaling": None,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "name, count, expected",
    [
        ("llama", 134_515_008, {"width": 576, "heads": 9, "kv_heads": 3, "rope_theta": 1e5, "tied_head": True}),
        ("qwen2", 494_032_768, {"qkv_bias": True, "kv_heads": 2, "norm_eps": 1e-6}),
        ("qwen3", 596_049_920, {"qk_norm": True, "head_size": 128, "width": 1024, "heads": 16, "qkv_bias": False}),
    ],
)
def test_an_autoregressive_model_is_read_as_causal_and_shifted(name, count, expected):
    found = read(AUTOREGRESSIVE[name])
    assert {field: getattr(found, field) for field in expected} == expected
    assert (found.attention_mask, found.alignment, found.rope_full_precision) == ("causal", "shifted", False)
    assert parameter_count(found) == count  # as their cards say: 134.5, 494 and 596 million
    assert family_for(found) is FAMILIES[name]


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
@pytest.mark.parametrize("shift", [True, False, ...], ids=str)
def test_its_a2d_form_is_bidirectional_and_says_how_its_logits_are_aligned(name, shift):
    causal = read(AUTOREGRESSIVE[name])
    published = {**AUTOREGRESSIVE[name], "model_type": f"a2d-{name}", "mask_token_id": 7}
    published |= {} if shift is ... else {"right_shift_logits": shift}
    found = read(published)
    alignment = "shifted" if shift is True else "same_position"
    assert found == dataclasses.replace(causal, attention_mask="full", alignment=alignment)
    assert read(write_config(found, {}, FAMILIES[f"a2d-{name}"])) == found


@pytest.mark.parametrize("more, block", [({}, 4), ({"block_size": 16, "fuse_cross_entropy": True}, 16)])
def test_an_sdar_is_a_qwen3_in_blocks(more, block):
    found = read({**AUTOREGRESSIVE["qwen3"], "model_type": "sdar", "mask_token_id": 151669, **more})
    causal = read(AUTOREGRESSIVE["qwen3"])
    assert found == dataclasses.replace(
        causal, attention_mask="block_causal", mask_block=block, alignment="same_position"
    )
    assert family_for(found) is FAMILIES["sdar"] and read(write_config(found, {})) == found


def test_a_shift_that_is_no_switch_is_refused():
    with pytest.raises(UserError, match="right_shift_logits = 1 is not true or false"):
        read({**AUTOREGRESSIVE["qwen3"], "model_type": "a2d-qwen3", "right_shift_logits": 1})


def test_a_llama_may_leave_out_what_has_always_been_so():
    published = {**AUTOREGRESSIVE["llama"]}
    for name in ("rope_theta", "tie_word_embeddings", "num_key_value_heads", "rms_norm_eps"):
        del published[name]
    found = read(published)
    assert (found.rope_theta, found.tied_head, found.kv_heads, found.norm_eps) == (1e4, False, 9, 1e-6)


@pytest.mark.parametrize("name, bias", [("llama", True), ("qwen3", True)])
def test_biases_that_the_family_has_not_are_refused(name, bias):
    with pytest.raises(UserError, match="attention_bias = True is not supported"):
        read({**AUTOREGRESSIVE[name], "attention_bias": bias})


# Settings of the mixtures of experts; as the published LLaDA2.0-mini, tests/weights/test_mixtures.py reads the file itself.
OF_MIXTURES = {
    "lladamoe": {
        "model_type": "llada", "architectures": ["LLaDAMoEModelLM"], "hidden_size": 2048, "num_hidden_layers": 16,
        "num_attention_heads": 16, "num_key_value_heads": 16, "dense_intermediate_size": 8192, "expert_intermediate_size": 1024,
        "shared_expert_intermediate_size": None, "num_experts": 64, "num_experts_per_tok": 8, "moe_layer_freq": [1] * 16,
        "vocab_size": 157184, "max_position_embeddings": 8192, "rope_theta": 50000, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "qk_layernorm": True, "norm_topk_prob": None, "partial_rotary_factor": 1, "rope_scaling": None, "clip_qkv": None,
        "attention_bias": False, "moe_router_score_function": "softmax", "moe_router_enable_expert_bias": False,
        "routed_scaling_factor": 1, "router_num_group": None, "router_topk_group": None, "tie_word_embeddings": False,
        "output_router_logits": False, "router_aux_loss_coef": 0.01, "pad_token_id": 156892, "eos_token_id": 156892,
    },
    "llada2": {
        "model_type": "llada2_moe", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "intermediate_size": 96, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2,
        "num_shared_experts": 1, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5,
        "vocab_size": 99, "max_position_embeddings": 128, "rope_theta": 600000, "rms_norm_eps": 1e-6, "use_qk_norm": True,
        "partial_rotary_factor": 0.5, "rotary_dim": 8, "norm_topk_prob": True, "tie_word_embeddings": False,
    },
}  # fmt: skip


def test_llada_moe_is_read_as_published():
    found = read(OF_MIXTURES["lladamoe"])
    assert found == ModelConfig(
        width=2048, layers=16, heads=16, kv_heads=16, mlp_width=8192, vocab_size=157184, max_positions=8192, rope_theta=50000,
        norm_eps=1e-5, qk_norm=True, rope_full_precision=False,
        mlp=MixtureOfExperts(experts=64, experts_per_token=8, expert_width=1024),
    )  # fmt: skip
    assert parameter_count(found) == 7_356_880_896  # 7.36 B, of which a token passes through 1.4 B
    assert family_for(found) is FAMILIES["lladamoe"] and read(write_config(found, {})) == found


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("llada2", {"num_experts_per_tok": 9}, "num_experts_per_tok = 9 is more than .*experts = 8"),
        ("llada2", {"num_experts_per_tok": None}, "has no num_experts_per_tok"),
        ("llada2", {"num_experts": "8"}, "num_experts = '8' is not a valid size"),
        ("llada2", {"num_experts": 0}, "num_experts = 0 must be above 0"),
        ("llada2", {"n_group": 3}, "n_group = 3 does not divide num_experts = 8"),
        ("llada2", {"topk_group": 5}, "topk_group = 5 is more than n_group = 4"),
        ("llada2", {"first_k_dense_replace": 3}, "first_k_dense_replace leaves none of 3 layers"),
        ("llada2", {"rotary_dim": 6}, "must name the same even number of the 16 columns"),
        ("llada2", {"partial_rotary_factor": None, "rotary_dim": None}, "has no partial_rotary_factor"),
        ("llada2", {"intermediate_size": None}, "has no intermediate_size"),
        ("llada2", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config: the weights are quantised"),
        ("lladamoe", {"moe_layer_freq": [0, 1, 0] + [1] * 13}, "dense layers behind others"),
        ("lladamoe", {"moe_layer_freq": [1, 1]}, "is not a list of a 0 or 1 for each of 16 layers"),
    ],
)  # fmt: skip
def test_impossible_mixtures_are_refused_by_their_published_names(name, changes, message):
    with pytest.raises(UserError, match=rf"config\.json: .*{message}"):
        read({**OF_MIXTURES[name], **changes})


UNSUPPORTED = [
    ("lladamoe", "clip_qkv", 8.0),
    ("lladamoe", "moe_router_score_function", "sigmoid"),
    ("lladamoe", "moe_router_enable_expert_bias", True),
    ("lladamoe", "norm_topk_prob", True),
    ("lladamoe", "routed_scaling_factor", 2.5),
    ("lladamoe", "router_num_group", 8),
    ("lladamoe", "router_topk_group", 4),
    ("llada2", "score_function", "softmax"),
    ("llada2", "norm_head", True),
    ("llada2", "norm_softmax", True),
    ("llada2", "router_dtype", "bf16"),
    ("llada2", "use_bias", True),
    ("llada2", "use_qkv_bias", True),
    ("llada2", "use_rmsnorm", False),
    ("llada2", "using_split_qkv_in_self_attention", True),
    ("llada-mha", "alibi", True),
    ("llada-mha", "rope", False),
    ("llada-mha", "include_bias", True),
    ("llada-mha", "bias_for_layer_norm", True),
    ("llada-mha", "input_emb_norm", True),
    ("llada-mha", "scale_logits", True),
    ("llada-mha", "attention_layer_norm", True),
    ("llada-mha", "layer_norm_with_affine", False),
    ("llada-mha", "layer_norm_type", "default"),
    ("llada-mha", "activation_type", "swiglu"),
    ("llada-mha", "block_type", "sequential"),
    ("llada-mha", "block_group_size", 2),
    ("dream-gqa", "hidden_act", "gelu"),
    ("dream-gqa", "rope_scaling", {"type": "yarn", "factor": 4.0}),
    ("dream-gqa", "use_sliding_window", True),
    ("dream-gqa", "use_mrope", True),
    ("llama", "rope_interleaved", True),
    ("qwen3", "use_sliding_window", True),
    ("llama", "rope_scaling", {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5}),
]


@pytest.mark.parametrize("name, setting, value", UNSUPPORTED, ids=[setting for _, setting, _ in UNSUPPORTED])
def test_a_setting_that_would_change_the_forward_pass_is_refused_by_name(name, setting, value):
    with pytest.raises(UserError) as caught:
        read({**(AUTOREGRESSIVE.get(name) or OF_MIXTURES.get(name) or golden_json(name)), setting: value})
    assert f"config.json: {setting} = {value!r} is not supported; d1jax implements {setting} = " in str(caught.value)


def test_every_fixed_setting_is_tried_above():
    fixed = {setting for family in FAMILIES.values() for setting in family.fixed}
    assert fixed == {setting for _, setting, _ in UNSUPPORTED}


@pytest.mark.parametrize("name", ["llada-mha", "dream-gqa"])
@pytest.mark.parametrize(
    "key, value", [("qk_norm", True), ("logit_softcap", 30.0), ("quantization_config", {"bits": 4})]
)
def test_a_key_that_nobody_knows_is_refused_by_name(name, key, value):
    with pytest.raises(UserError, match=rf"config\.json: d1jax does not know '{key}' of a (llada|dream) model"):
        read({**golden_json(name), key: value})


@pytest.mark.parametrize("file", sorted(PUBLISHED.glob("[DL]*[!i]/config.json")), ids=lambda file: file.parent.name)
def test_every_key_of_a_published_config_is_known(file):
    read(json.loads(file.read_text()))


def as_transformers_5_writes_it(dream, **rope):
    plain = {name: value for name, value in dream.items() if name not in ("rope_scaling", "rope_theta", "torch_dtype")}
    layers = ["full_attention"] * dream["num_hidden_layers"]
    return {**plain, "dtype": "float32", "layer_types": layers, "rope_parameters": rope}


@pytest.mark.parametrize("theta", [1e6, 5e5])
@pytest.mark.parametrize("kind", [{"rope_type": "default"}, {"type": "default"}, {}], ids=str)
def test_the_form_of_transformers_5_means_the_same(dream, kind, theta):
    written = as_transformers_5_writes_it(dream, rope_theta=theta, **kind)
    assert read(written) == dataclasses.replace(read(dream), rope_theta=theta)
    assert read({**written, "head_dim": 16, "partial_rotary_factor": 1.0, "attention_bias": True}) == read(written)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, "original_max_position_embeddings": 32768},
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6},
        {"type": "dynamic", "rope_theta": 1e6},
        {"rope_type": "default", "rope_theta": 1e6, "factor": 4.0},
        {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
        {"full_attention": {"rope_type": "default", "rope_theta": 1e6}},
    ],
    ids=str,
)
def test_scaled_positions_are_refused(dream, rope):
    with pytest.raises(UserError, match="rope_parameters = .* is not supported"):
        read(as_transformers_5_writes_it(dream, **rope))


def test_two_thetas_that_disagree_are_refused(dream):
    written = as_transformers_5_writes_it(dream, rope_type="default", rope_theta=1e6)
    assert read({**written, "rope_theta": 1e6}) == read(dream)
    with pytest.raises(UserError, match="rope_theta = 10000.0, but rope_parameters says 1000000.0"):
        read({**written, "rope_theta": 1e4})


@pytest.mark.parametrize(
    "key, value",
    [
        ("head_dim", 32), ("layer_types", ["sliding_attention"] * 3), ("attention_bias", False), ("mlp_bias", True),
        ("partial_rotary_factor", 0.5), ("is_decoder", True),
    ],
)  # fmt: skip
def test_what_does_not_follow_from_the_sizes_is_refused(dream, key, value):
    with pytest.raises(UserError, match=f"{key} = .* is not supported by d1jax for a dream model"):
        read({**dream, key: value})


@pytest.mark.parametrize("name", ["llada-mha", "dream-gqa"])
@pytest.mark.parametrize("value", ["64", 64.0, True, 0, -64, [64]], ids=repr)
def test_a_size_of_the_wrong_type_or_sign_is_named(name, value):
    setting = {"llada-mha": "d_model", "dream-gqa": "hidden_size"}[name]
    with pytest.raises(UserError) as caught:
        read({**golden_json(name), setting: value})
    assert f"config.json: {setting} = {value!r} is not a valid size" in str(caught.value)


@pytest.mark.parametrize(
    "setting, value",
    [("rope_theta", "5e5"), ("rope_theta", True), ("rms_norm_eps", 0), ("weight_tying", 1), ("include_qkv_bias", "no")],
)
def test_a_number_or_switch_of_the_wrong_type_is_named(llada, setting, value):
    with pytest.raises(UserError, match=rf"{setting} = {value!r} is not a valid"):
        read({**llada, setting: value})


@pytest.mark.parametrize("changes", [{"n_heads": 5, "n_kv_heads": 5}, {"n_kv_heads": 3}], ids=str)
def test_heads_that_do_not_divide_are_refused(llada, changes):
    with pytest.raises(UserError, match="must divide width = 64"):
        read({**llada, **changes})


# -- what d1jax writes ----------------------------------------------------------------------------------------------------

POSITIVE = st.floats(1e-12, 1e12)


@st.composite
def architectures(draw):
    heads = draw(st.sampled_from([1, 2, 4, 6, 28]))
    dream = draw(st.booleans())
    return ModelConfig(
        width=heads * draw(st.integers(1, 64)) * 2,
        layers=draw(st.integers(1, 40)),
        heads=heads,
        kv_heads=draw(st.sampled_from([k for k in range(1, heads + 1) if heads % k == 0])),
        mlp_width=draw(st.integers(1, 20000)),
        vocab_size=draw(st.integers(1, 200_000)),
        max_positions=draw(st.integers(1, 200_000)),
        rope_theta=draw(POSITIVE),
        norm_eps=draw(POSITIVE),
        qkv_bias=dream or draw(st.booleans()),
        tied_head=draw(st.booleans()),
        rope_full_precision=not dream and draw(st.booleans()),
        alignment="shifted" if dream else "same_position",
    )


@given(architectures())
def test_what_is_written_reads_back_the_same(config):
    ids = {"mask_token_id": 3, "eos_token_id": 2, "pad_token_id": 2}
    written = json.loads(json.dumps(write_config(config, ids)))
    assert read(written) == config
    assert written.items() >= ids.items() and written["torch_dtype"] == config.param_dtype
    assert family_of(written, "config.json") is family_for(config)
    assert parameter_count(config) > 0


@pytest.mark.parametrize("alignment", ["same_position", "shifted"])
def test_a_model_without_a_limit_is_written_with_one(alignment):
    shifted = alignment == "shifted"
    config = ModelConfig(vocab_size=9, alignment=alignment, qkv_bias=shifted, rope_full_precision=not shifted)
    assert read(write_config(config, {})) == dataclasses.replace(config, max_positions=4096)


@pytest.mark.parametrize("changes", [{"qkv_bias": False}, {"rope_full_precision": True}], ids=str)
def test_a_shifted_model_that_is_no_dream_cannot_be_published(changes):
    dream = ModelConfig(vocab_size=9, alignment="shifted", qkv_bias=True, rope_full_precision=False)
    assert family_for(dream) is FAMILIES["dream"]
    ((setting, value),) = changes.items()
    with pytest.raises(UserError, match=f"dream checkpoint, which needs model.{setting} = {not value}"):
        family_for(dataclasses.replace(dream, **changes))
