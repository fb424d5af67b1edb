"""What distinguishes one family of published models from another, all of it in one place.

A family says how its config.json spells a ModelConfig (config_json.py reads and writes it), which tensor holds which weight, which
logit scores which token, which columns see which, and which token closes a turn of a chat. A new family is one more `Family` in FAMILIES.
The autoregressive ones are what masked diffusion models are made from (adapt/).

Padding: LLaDA hides padding from keys only, Dream from keys and queries. The rows of real tokens come out the same, and only
those are defined here (canvas.py keeps padding behind the text and hides it from keys).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from d1jax.config import Alignment, MixtureOfExperts, ModelConfig, UserError
from d1jax.config.model import AttentionMask


@dataclass(frozen=True)
class Names:
    """Names of published tensors, without ".weight" and ".bias". `layer` maps a module of our block to theirs, experts' with {expert}."""

    embedding: str
    final_norm: str
    head: str
    block: str  # with {layer}
    layer: Mapping[str, str]


@dataclass(frozen=True)
class Family:
    name: str
    model_types: tuple[str, ...]  # in config.json
    architecture: str  # what config.json calls the class, where d1jax writes one
    alignment: Alignment  # same_position: logit row p scores token p; shifted: token p + 1
    fields: Mapping[str, str]  # ModelConfig field -> its name in config.json
    fixed: Mapping[str, tuple[Any, ...]]  # settings that change the forward pass: the values that d1jax implements
    implied: Mapping[str, Any]  # ModelConfig fields that the architecture implies, without a setting for them
    harmless: frozenset[str]  # what else its config.json says, without a say in the forward pass
    names: Names
    turn_end: str  # the token that closes a turn
    assistant_header: str  # what a rendered chat ends with before the answer
    attention_mask: AttentionMask = "full"
    assumed: Mapping[str, Any] = field(default_factory=dict)  # what its config.json means where it does not say it
    experts: Mapping[str, str] = field(
        default_factory=dict
    )  # MixtureOfExperts field -> its name; {}: every block is dense
    router: str = ""  # of the experts
    fused: bool = False  # whether q, k and v are the rows of one tensor


# What every model of transformers may write: names, generation, training, how it is run. None of it reaches a logit.
HARMLESS = frozenset(
    """
    _name_or_path name_or_path architectures auto_map model_type transformers_version torch_dtype dtype torchscript
    _attn_implementation _attn_implementation_autoset attn_implementation attn_implementation_internal _flash_attn_2_enabled
    _commit_hash use_cache use_bfloat16 tf_legacy_loss return_dict return_dict_in_generate output_attentions
    output_hidden_states output_scores chunk_size_feed_forward gradient_checkpointing initializer_range
    bos_token_id eos_token_id pad_token_id mask_token_id sep_token_id decoder_start_token_id
    id2label label2id num_labels problem_type finetuning_task task_specific_params tokenizer_class prefix
    max_length min_length max_new_tokens do_sample num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids early_stopping
    num_return_sequences forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty
    suppress_tokens begin_suppress_tokens attention_dropout
    """.split()
)


_LLADA = Family(
    name="llada",
    model_types=("llada",),
    architecture="LLaDAModelLM",
    alignment="same_position",
    fields={
        "width": "d_model",
        "layers": "n_layers",
        "heads": "n_heads",
        "kv_heads": "n_kv_heads",
        "mlp_width": "mlp_hidden_size",
        "vocab_size": "embedding_size",
        "max_positions": "max_sequence_length",
        "rope_theta": "rope_theta",
        "norm_eps": "rms_norm_eps",
        "qkv_bias": "include_qkv_bias",
        "tied_head": "weight_tying",
        "rope_full_precision": "rope_full_precision",
    },
    fixed={
        "block_type": ("llama",),
        "block_group_size": (1,),
        "activation_type": ("silu",),
        "layer_norm_type": ("rms",),
        "layer_norm_with_affine": (True,),
        "rope": (True,),
        "alibi": (False,),
        "attention_layer_norm": (False,),
        "bias_for_layer_norm": (False, None),
        "include_bias": (False,),
        "input_emb_norm": (False,),
        "scale_logits": (False,),
    },
    implied={},
    # The dropouts are of training; alibi_bias_max and attention_layer_norm_with_affine belong to what is off above.
    harmless=HARMLESS
    | frozenset(
        """
        alibi_bias_max attention_layer_norm_with_affine embedding_dropout residual_dropout flash_attention flash_attn_varlen
        init_device init_fn init_std init_cutoff_factor precision mlp_ratio multi_query_attention vocab_size
        tie_word_embeddings
        """.split()
    ),
    names=Names(
        embedding="model.transformer.wte",
        final_norm="model.transformer.ln_f",
        head="model.transformer.ff_out",
        block="model.transformer.blocks.{layer}",
        # The MLP's output and the head are both called ff_out there; the head is not in a block.
        layer={
            name: name
            for name in (
                "attn_norm",
                "ff_norm",
                "q_proj",
                "k_proj",
                "v_proj",
                "attn_out",
                "ff_proj",
                "up_proj",
                "ff_out",
            )
        },
    ),
    turn_end="<|eot_id|>",
    assistant_header="<|start_header_id|>assistant<|end_header_id|>\n\n",
)

# LLaDA with an embedding that also has rows for image codes, and one line break instead of two after a header.
_MMADA = dataclasses.replace(
    _LLADA,
    name="mmada",
    model_types=("mmada",),
    architecture="MMadaModelLM",
    harmless=_LLADA.harmless
    | frozenset(
        """
        codebook_size llm_model_path llm_vocab_size new_vocab_size num_new_special_tokens num_vq_tokens
        pretrained_model_path w_clip_vit
        """.split()
    ),
    assistant_header="<|start_header_id|>assistant<|end_header_id|>\n",
)

# Dream-7B, Dream-Coder and DiffuCoder: Qwen2 made bidirectional.
_DREAM = Family(
    name="dream",
    model_types=("Dream",),
    architecture="DreamModel",
    alignment="shifted",
    fields={
        "width": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "mlp_width": "intermediate_size",
        "vocab_size": "vocab_size",
        "max_positions": "max_position_embeddings",
        "rope_theta": "rope_theta",
        "norm_eps": "rms_norm_eps",
        "tied_head": "tie_word_embeddings",
    },
    fixed={
        "hidden_act": ("silu",),
        "rope_scaling": (None,),
        "use_sliding_window": (False,),
        "use_mrope": (False, None),
    },
    implied={"qkv_bias": True, "rope_full_precision": False},
    harmless=HARMLESS | {"max_window_layers", "sliding_window"},  # of windows, which are off above
    names=Names(
        embedding="model.embed_tokens",
        final_norm="model.norm",
        head="lm_head",
        block="model.layers.{layer}",
        layer={
            "attn_norm": "input_layernorm",
            "ff_norm": "post_attention_layernorm",
            "q_proj": "self_attn.q_proj",
            "k_proj": "self_attn.k_proj",
            "v_proj": "self_attn.v_proj",
            "attn_out": "self_attn.o_proj",
            "ff_proj": "mlp.gate_proj",
            "up_proj": "mlp.up_proj",
            "ff_out": "mlp.down_proj",
        },
    ),
    turn_end="<|im_end|>",
    assistant_header="<|im_start|>assistant\n",
)

# The autoregressive families: Dream's names and spellings, and each token is scored from those before it.
_CAUSAL = dataclasses.replace(
    _DREAM,
    attention_mask="causal",
    fields={**_DREAM.fields, "head_size": "head_dim"},
    fixed={**_DREAM.fixed, "rope_interleaved": (False, None)},
    implied={"qkv_bias": False, "rope_full_precision": False},
    assumed={"rope_theta": 1e4, "norm_eps": 1e-6, "tied_head": False, "hidden_act": "silu"},
    harmless=_DREAM.harmless | {"pretraining_tp", "is_llama_config", "transformers.js_config"},
)
# Llama 2 and 3, SmolLM2.
_LLAMA = dataclasses.replace(_CAUSAL, name="llama", model_types=("llama",), architecture="LlamaForCausalLM")
# Qwen2 and Qwen2.5.
_QWEN2 = dataclasses.replace(
    _CAUSAL,
    name="qwen2",
    model_types=("qwen2",),
    architecture="Qwen2ForCausalLM",
    implied={"qkv_bias": True, "rope_full_precision": False},
)
_QWEN3 = dataclasses.replace(
    _CAUSAL,
    name="qwen3",
    model_types=("qwen3",),
    architecture="Qwen3ForCausalLM",
    implied={**_CAUSAL.implied, "qk_norm": True},
    names=dataclasses.replace(
        _CAUSAL.names,
        layer={**_CAUSAL.names.layer, "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"},
    ),
)
CAUSAL = (_LLAMA, _QWEN2, _QWEN3)


def _a2d(base: Family) -> Family:
    """The same architecture made bidirectional, as the library dllm publishes it (Tiny-A2D); right_shift_logits is d1jax's addition."""
    return dataclasses.replace(
        base,
        name=f"a2d-{base.name}",
        model_types=(f"a2d-{base.name}",),
        architecture=f"A2D{base.architecture.removesuffix('ForCausalLM')}LMHeadModel",
        alignment="same_position",
        attention_mask="full",
    )


# SDAR and TraDo: a Qwen3 whose columns see their block of four, and the blocks before it. By the sheets of its makers; a config.json
# that says no block_size means 4.
_SDAR = dataclasses.replace(
    _QWEN3,
    name="sdar",
    model_types=("sdar",),
    architecture="SDARForCausalLM",
    alignment="same_position",
    attention_mask="block_causal",
    fields={**_QWEN3.fields, "mask_block": "block_size"},
    assumed={**_QWEN3.assumed, "mask_block": 4},
    harmless=_QWEN3.harmless | {"fuse_cross_entropy"},
)
# Mixtures of experts by inclusionAI. q and k are normalised by head, and rotated in the dtype of the activations.
_LLADA_MOE = Family(
    name="lladamoe",
    model_types=("lladamoe",),  # as published "llada", of LLaDAMoEModelLM
    architecture="LLaDAMoEModelLM",
    alignment="same_position",
    fields={
        **{ours: theirs for ours, theirs in _DREAM.fields.items() if ours != "mlp_width"},
        "mlp_width": "dense_intermediate_size",
        "qk_norm": "qk_layernorm",
    },
    # norm_topk_prob, the groups and the scaling are in config.json, and the published code does not read them.
    fixed={
        "hidden_act": ("silu",),
        "clip_qkv": (None,),
        "moe_router_score_function": ("softmax", None),
        "moe_router_enable_expert_bias": (False, None),
        "norm_topk_prob": (None, False),
        "routed_scaling_factor": (1, None),
        "router_num_group": (None, 1, 0, -2),
        "router_topk_group": (None, 1, 0, -2),
    },
    implied={"qkv_bias": False, "rope_full_precision": False},
    assumed={"qk_norm": False, "tied_head": False},
    harmless=HARMLESS | {"output_router_logits", "router_aux_loss_coef"},
    names=Names(
        embedding="model.embed_tokens",
        final_norm="model.norm",
        head="lm_head",
        block="model.layers.{layer}",
        layer={
            **_QWEN3.names.layer,
            "router": "mlp.gate",
            "experts_ff_proj": "mlp.experts.{expert}.gate_proj",
            "experts_up_proj": "mlp.experts.{expert}.up_proj",
            "experts_ff_out": "mlp.experts.{expert}.down_proj",
            "shared_ff_proj": "shared_expert.gate_proj",
            "shared_up_proj": "shared_expert.up_proj",
            "shared_ff_out": "shared_expert.down_proj",
        },
    ),
    turn_end="<|role_end|>",
    assistant_header="<role>ASSISTANT</role>",
    experts={
        "experts": "num_experts",
        "experts_per_token": "num_experts_per_tok",
        "expert_width": "expert_intermediate_size",
        "shared_width": "shared_expert_intermediate_size",
        "dense_layers": "moe_layer_freq",
    },
    router="softmax",
)
_LLADA2 = dataclasses.replace(
    _LLADA_MOE,
    name="llada2",
    model_types=("llada2_moe",),
    architecture="LLaDA2MoeModelLM",
    attention_mask="block_causal",
    fields={**_DREAM.fields, "head_size": "head_dim", "qk_norm": "use_qk_norm"},
    fixed={
        "hidden_act": ("silu",),
        "moe_router_enable_expert_bias": (True,),
        "norm_head": (False,),
        "norm_softmax": (False,),
        "norm_topk_prob": (True,),
        "router_dtype": ("fp32", None),
        "score_function": ("sigmoid", None),
        "use_bias": (False,),
        "use_qkv_bias": (False,),
        "use_rmsnorm": (True,),
        "use_sliding_window": (False,),
        "using_split_qkv_in_self_attention": (False,),
    },
    # Blocks of 32 are what it was trained with; config.json does not say so.
    implied={**_LLADA_MOE.implied, "mask_block": 32},
    harmless=_DREAM.harmless | {"output_router_logits", "embedding_dropout", "output_dropout"},
    names=Names(
        embedding="model.word_embeddings",
        final_norm="model.norm",
        head="lm_head",
        block="model.layers.{layer}",
        layer={
            **_LLADA_MOE.names.layer,
            **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "attention.query_key_value"),
            "attn_out": "attention.dense",
            "q_norm": "attention.query_layernorm",
            "k_norm": "attention.key_layernorm",
            "shared_ff_proj": "mlp.shared_experts.gate_proj",
            "shared_up_proj": "mlp.shared_experts.up_proj",
            "shared_ff_out": "mlp.shared_experts.down_proj",
        },
    ),
    experts={
        "experts": "num_experts",
        "experts_per_token": "num_experts_per_tok",
        "expert_width": "moe_intermediate_size",
        "shared_width": "num_shared_experts",
        "dense_layers": "first_k_dense_replace",
        "scaling": "routed_scaling_factor",
        "groups": "n_group",
        "groups_per_token": "topk_group",
    },
    router="sigmoid",
    fused=True,
)
_A2D = {base.name: _a2d(base) for base in CAUSAL}
FAMILIES = {
    family.name: family for family in (_LLADA, _MMADA, _DREAM, *CAUSAL, *_A2D.values(), _SDAR, _LLADA_MOE, _LLADA2)
}
# How a turn is closed, and what a rendered chat ends with before the answer.
TURNS = tuple(dict.fromkeys((family.turn_end, family.assistant_header) for family in (_DREAM, _LLADA, _LLADA2)))


def is_a2d(family: Family) -> bool:
    """Whether it is one of the families whose config.json says how its logits are aligned."""
    return family in _A2D.values()


def family_of(published: Mapping[str, Any], where: str) -> Family:
    """The family that a config.json belongs to. Raises UserError for a model type that d1jax does not know."""
    model_type = published.get("model_type")
    if model_type in _LLADA.model_types and published.get("architectures") == [_LLADA_MOE.architecture]:
        return _LLADA_MOE
    for family in FAMILIES.values():
        if model_type in family.model_types:
            return family
    known = ", ".join(repr(kind) for family in FAMILIES.values() for kind in family.model_types)
    raise UserError(
        f"{where}: model_type {model_type!r} (architectures {published.get('architectures')}) is none of {known}; "
        "d1jax loads models of these families"
    )


def adapted_family(config: ModelConfig) -> Family:
    """The family that publishes a model which was made from an autoregressive one: Dream with shifted logits, else an A2D one."""
    dream = config.alignment == "shifted" and not config.qk_norm and not config.head_size
    return _DREAM if dream else _A2D[_autoregressive(config).name]


def _autoregressive(config: ModelConfig) -> Family:
    return _QWEN3 if config.qk_norm else _QWEN2 if config.qkv_bias else _LLAMA


def family_for(config: ModelConfig) -> Family:
    """The family that can publish a model with this architecture.

    Dream's logits are shifted, LLaDA's are not; normalised queries and heads of another size need Qwen3's kin; a causal model is Llama's or
    Qwen's. Raises UserError for combinations that none can express.
    """
    if isinstance(config.mlp, MixtureOfExperts):
        return _checked(config, _LLADA2 if config.mlp.router == "sigmoid" else _LLADA_MOE)
    base = _autoregressive(config)
    if config.attention_mask == "causal":
        family = base
    elif config.attention_mask == "block_causal":
        family = _SDAR
    elif config.qk_norm or config.head_size:
        family = _A2D[base.name]
    else:
        family = _DREAM if config.alignment == "shifted" else _LLADA
    return _checked(config, family)


def _checked(config: ModelConfig, family: Family) -> Family:
    """The family. Raises UserError for what it cannot express."""
    fixed = {**family.implied, "attention_mask": family.attention_mask}
    if not family.experts:
        fixed["rotary_columns"] = 0
    if not is_a2d(family):
        fixed["alignment"] = family.alignment
    odd = [name for name, value in fixed.items() if getattr(config, name) != value]
    if odd:
        needed = ", ".join(f"model.{name} = {fixed[name]}" for name in odd)
        raise UserError(f"this model cannot be written as a {family.name} checkpoint, which needs {needed}")
    return family
