"""What distinguishes one family of published masked diffusion models from another, all of it in one place.

A family says how its config.json spells a ModelConfig, which tensor holds which weight, which logit scores which token, and
which token closes a turn of a chat. A new family is one more `Family` in FAMILIES.

Padding: LLaDA hides padding from keys only, Dream from keys and queries. The rows of real tokens come out the same, and only
those are defined here (canvas.py keeps padding behind the text and hides it from keys).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from d1jax.config import Alignment, ModelConfig, UserError

UNBOUNDED = 4096  # what a model without a limit of its own writes as its longest text


@dataclass(frozen=True)
class Names:
    """Names of published tensors, without ".weight" and ".bias". `layer` maps a module of our block to theirs."""

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

FAMILIES = {family.name: family for family in (_LLADA, _MMADA, _DREAM)}


def family_of(published: Mapping[str, Any], where: str) -> Family:
    """The family that a config.json belongs to. Raises UserError for a model type that d1jax does not know."""
    model_type = published.get("model_type")
    for family in FAMILIES.values():
        if model_type in family.model_types:
            return family
    known = ", ".join(repr(kind) for family in FAMILIES.values() for kind in family.model_types)
    raise UserError(
        f"{where}: model_type {model_type!r} (architectures {published.get('architectures')}) is none of {known}; "
        "d1jax loads masked diffusion models of these families"
    )


def family_for(config: ModelConfig) -> Family:
    """The family that can publish a model with this architecture: Dream's logits are shifted, LLaDA's are not.

    Raises UserError for combinations that neither can express.
    """
    family = _DREAM if config.alignment == "shifted" else _LLADA
    odd = [name for name, value in family.implied.items() if getattr(config, name) != value]
    if odd:
        needed = ", ".join(f"model.{name} = {family.implied[name]}" for name in odd)
        raise UserError(f"this model cannot be written as a {family.name} checkpoint, which needs {needed}")
    return family


def read_config(published: Mapping[str, Any], where: str) -> ModelConfig:
    """The architecture that a config.json describes. Raises UserError naming the setting that is missing or not supported."""
    family = family_of(published, where)
    published = _without_redundant(_with_theta(published, where), family, where)
    known = {*family.fields.values(), *family.fixed, *family.harmless}
    unknown = sorted(published.keys() - known)
    if unknown:
        raise UserError(
            f"{where}: d1jax does not know {', '.join(map(repr, unknown))} of a {family.name} model, which may change what it "
            "computes; take out of config.json what does not"
        )
    for name, allowed in family.fixed.items():
        if published.get(name, allowed[0]) not in allowed:
            raise UserError(
                f"{where}: {name} = {published[name]!r} is not supported; d1jax implements {name} = {allowed[0]!r}"
            )
    values = {ours: published.get(theirs) for ours, theirs in family.fields.items()}
    # embedding_size counts padding rows too; it may be absent, and older than a vocab_size that was extended (MMaDA).
    rows = [published[name] for name in ("embedding_size", "vocab_size") if isinstance(published.get(name), int)]
    values["vocab_size"] = max(rows, default=None)
    if values["kv_heads"] is None:
        values["kv_heads"] = 1 if published.get("multi_query_attention") else values["heads"]
    if values["mlp_width"] is None and isinstance(published.get("mlp_ratio"), int) and isinstance(values["width"], int):
        values["mlp_width"] = published["mlp_ratio"] * values["width"]
    defaults = {"qkv_bias": False, "tied_head": False, "rope_full_precision": True}
    values = {name: defaults.get(name) if value is None else value for name, value in values.items()}
    missing = [family.fields[name] for name, value in values.items() if value is None]
    if missing:
        raise UserError(f"{where}: has no {', '.join(missing)}; it is needed to build a {family.name} model")
    for name, value in values.items():
        kinds = (int, float) if name in ("rope_theta", "norm_eps") else (bool,) if name in defaults else (int,)
        number_wanted = kinds != (bool,)
        if not isinstance(value, kinds) or (
            number_wanted and (isinstance(value, bool) or not 0 < value < float("inf"))
        ):
            raise UserError(f"{where}: {family.fields[name]} = {value!r} is not a valid size or switch")
    config = ModelConfig(**{**values, **family.implied}, alignment=family.alignment)
    if config.width % config.heads or config.heads % config.kv_heads:
        raise UserError(
            f"{where}: heads = {config.heads} must divide width = {config.width}, and be divided by "
            f"kv_heads = {config.kv_heads}"
        )
    return config


def _with_theta(published: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """A config.json with `rope_theta` on its own, as before transformers 5, which keeps it in `rope_parameters`.

    Raises UserError for every way of scaling the positions: d1jax implements none.
    """
    plain = {name: value for name, value in published.items() if name not in ("rope_parameters", "rope_scaling")}
    for name in ("rope_parameters", "rope_scaling"):
        given = published.get(name)
        if given is None:
            continue
        rest = dict(given) if isinstance(given, Mapping) else {"": given}
        kinds = {rest.pop(key, "default") for key in ("rope_type", "type")}
        theta, rotated = rest.pop("rope_theta", None), rest.pop("partial_rotary_factor", None)
        if kinds != {"default"} or rotated not in (None, 1) or rest:
            raise UserError(
                f"{where}: {name} = {given!r} is not supported; d1jax implements {name} = None, or rope_type = 'default' "
                "with a rope_theta alone"
            )
        if theta is not None and plain.get("rope_theta") not in (None, theta):
            raise UserError(
                f"{where}: rope_theta = {plain['rope_theta']!r}, but {name} says {theta!r}; write the one that is right"
            )
        if theta is not None:
            plain["rope_theta"] = theta
    return plain


def _without_redundant(published: Mapping[str, Any], family: Family, where: str) -> Mapping[str, Any]:
    """A config.json without what newer versions write beside what it follows from. Raises UserError where it does not follow."""
    heads, width = (published.get(family.fields[name]) for name in ("heads", "width"))
    derived = {
        "head_dim": lambda value: isinstance(value, int) and isinstance(heads, int) and value * heads == width,
        "layer_types": lambda value: isinstance(value, list) and set(value) <= {"full_attention"},
        "partial_rotary_factor": lambda value: value == 1,
        "attention_bias": lambda value: value is family.implied.get("qkv_bias"),
        "mlp_bias": lambda value: value is False,
        "is_decoder": lambda value: value is False,
        "is_encoder_decoder": lambda value: value is False,
        "add_cross_attention": lambda value: value is False,
        "pruned_heads": lambda value: value == {},
    }
    for name, follows in derived.items():
        value = published.get(name)
        if value is not None and not follows(value):
            raise UserError(f"{where}: {name} = {value!r:.80} is not supported by d1jax for a {family.name} model")
    return {name: value for name, value in published.items() if name not in derived}


def write_config(config: ModelConfig, token_ids: Mapping[str, int]) -> dict[str, Any]:
    """A config.json for a model that was not made from a published one. `token_ids` are its *_token_id entries."""
    family = family_for(config)
    return {
        "architectures": [family.architecture],
        "model_type": family.model_types[0],
        **{theirs: getattr(config, ours) for ours, theirs in family.fields.items()},
        **{name: allowed[0] for name, allowed in family.fixed.items()},
        "vocab_size": config.vocab_size,
        family.fields["max_positions"]: config.max_positions or UNBOUNDED,
        **token_ids,
        "torch_dtype": config.param_dtype,
    }
