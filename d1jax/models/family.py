"""What a family of published models says of itself: `Family`, and what every config.json may hold besides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from d1jax.config import Alignment
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
