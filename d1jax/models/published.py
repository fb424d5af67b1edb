"""The families of published models, one `Family` each; families.py finds the one that a model belongs to.

Padding: LLaDA hides padding from keys only, Dream from keys and queries. The rows of real tokens come out the same, and only
those are defined here (canvas.py keeps padding behind the text and hides it from keys).
"""

from __future__ import annotations

import dataclasses

from d1jax.models.family import HARMLESS, Family, Names

LLADA = Family(
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
MMADA = dataclasses.replace(
    LLADA,
    name="mmada",
    model_types=("mmada",),
    architecture="MMadaModelLM",
    harmless=LLADA.harmless
    | frozenset(
        """
        codebook_size llm_model_path llm_vocab_size new_vocab_size num_new_special_tokens num_vq_tokens
        pretrained_model_path w_clip_vit
        """.split()
    ),
    assistant_header="<|start_header_id|>assistant<|end_header_id|>\n",
)

# Dream-7B, Dream-Coder and DiffuCoder: Qwen2 made bidirectional.
DREAM = Family(
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
AUTOREGRESSIVE = dataclasses.replace(
    DREAM,
    attention_mask="causal",
    fields={**DREAM.fields, "head_size": "head_dim"},
    fixed={**DREAM.fixed, "rope_interleaved": (False, None)},
    implied={"qkv_bias": False, "rope_full_precision": False},
    assumed={"rope_theta": 1e4, "norm_eps": 1e-6, "tied_head": False, "hidden_act": "silu"},
    harmless=DREAM.harmless | {"pretraining_tp", "is_llama_config", "transformers.js_config"},
)
# Llama 2 and 3, SmolLM2.
LLAMA = dataclasses.replace(AUTOREGRESSIVE, name="llama", model_types=("llama",), architecture="LlamaForCausalLM")
# Qwen2 and Qwen2.5.
QWEN2 = dataclasses.replace(
    AUTOREGRESSIVE,
    name="qwen2",
    model_types=("qwen2",),
    architecture="Qwen2ForCausalLM",
    implied={"qkv_bias": True, "rope_full_precision": False},
)
QWEN3 = dataclasses.replace(
    AUTOREGRESSIVE,
    name="qwen3",
    model_types=("qwen3",),
    architecture="Qwen3ForCausalLM",
    implied={**AUTOREGRESSIVE.implied, "qk_norm": True},
    names=dataclasses.replace(
        AUTOREGRESSIVE.names,
        layer={**AUTOREGRESSIVE.names.layer, "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"},
    ),
)
CAUSAL = (LLAMA, QWEN2, QWEN3)


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
SDAR = dataclasses.replace(
    QWEN3,
    name="sdar",
    model_types=("sdar",),
    architecture="SDARForCausalLM",
    alignment="same_position",
    attention_mask="block_causal",
    fields={**QWEN3.fields, "mask_block": "block_size"},
    assumed={**QWEN3.assumed, "mask_block": 4},
    harmless=QWEN3.harmless | {"fuse_cross_entropy"},
)
# Mixtures of experts by inclusionAI. q and k are normalised by head, and rotated in the dtype of the activations.
LLADA_MOE = Family(
    name="lladamoe",
    model_types=("lladamoe",),  # as published "llada", of LLaDAMoEModelLM
    architecture="LLaDAMoEModelLM",
    alignment="same_position",
    fields={
        **{ours: theirs for ours, theirs in DREAM.fields.items() if ours != "mlp_width"},
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
    names=dataclasses.replace(
        QWEN3.names,
        layer={
            **QWEN3.names.layer,
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
LLADA2 = dataclasses.replace(
    LLADA_MOE,
    name="llada2",
    model_types=("llada2_moe",),
    architecture="LLaDA2MoeModelLM",
    attention_mask="block_causal",
    fields={**DREAM.fields, "head_size": "head_dim", "qk_norm": "use_qk_norm"},
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
    implied={**LLADA_MOE.implied, "mask_block": 32},
    harmless=DREAM.harmless | {"output_router_logits", "embedding_dropout", "output_dropout"},
    names=dataclasses.replace(
        QWEN3.names,
        embedding="model.word_embeddings",
        layer={
            **LLADA_MOE.names.layer,
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
A2D = {base.name: _a2d(base) for base in CAUSAL}
