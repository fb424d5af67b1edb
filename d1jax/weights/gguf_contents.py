"""What a GGUF file holds, read from its header: the architecture, the tokenizer, and which of its tensors is which weight.

Everything that can be wrong with a file is found here, before a weight is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from d1jax.config import UserError
from d1jax.files import to_json
from d1jax.weights.gguf_tokenizer import token_ids, tokenizer_files
from d1jax.weights.hf_directory import first_line

# A tensor of the file -> (its name there, the axes of its shape): D width, Q and K heads x H, F width of the MLP, V vocabulary.
TOP = {
    "token_embd.weight": ("model.embed_tokens.weight", "VD"),
    "output_norm.weight": ("model.norm.weight", "D"),
    "output.weight": ("lm_head.weight", "VD"),
}
LAYER = {
    "attn_norm.weight": ("input_layernorm.weight", "D"),
    "attn_q.weight": ("self_attn.q_proj.weight", "QD"),
    "attn_k.weight": ("self_attn.k_proj.weight", "KD"),
    "attn_v.weight": ("self_attn.v_proj.weight", "KD"),
    "attn_output.weight": ("self_attn.o_proj.weight", "DQ"),
    "ffn_norm.weight": ("post_attention_layernorm.weight", "D"),
    "ffn_gate.weight": ("mlp.gate_proj.weight", "FD"),
    "ffn_up.weight": ("mlp.up_proj.weight", "FD"),
    "ffn_down.weight": ("mlp.down_proj.weight", "DF"),
}


class Architecture(NamedTuple):
    """What `general.architecture` stands for."""

    published: str  # the class in transformers
    settings: Mapping[str, Any]  # of config.json, beside the sizes
    layer: Mapping[str, tuple[str, str]]  # the tensors of a layer
    interleaved: bool  # the rows of q and k are stored for rotations of neighbouring pairs


# llama.cpp rotates pairs (2i, 2i + 1) of a `llama` head and pairs (i, i + H/2) of a `qwen2` or `qwen3` one (llama_model_rope_type:
# NORM and NEOX), and its convert_hf_to_gguf.py permutes the rows of q and k for the first (LlamaModel.permute; not in Qwen2Model,
# from which Qwen3Model comes). Hugging Face's and d1jax's rotation is the second.
ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", {"attention_bias": False, "mlp_bias": False}, LAYER, interleaved=True),
    "qwen2": Architecture(
        "Qwen2ForCausalLM",
        {"use_sliding_window": False},
        LAYER | {f"attn_{x}.bias": (f"self_attn.{x}_proj.bias", "Q" if x == "q" else "K") for x in "qkv"},
        interleaved=False,
    ),
    "qwen3": Architecture(
        "Qwen3ForCausalLM",
        {"attention_bias": False, "use_sliding_window": False},
        LAYER | {f"attn_{x}_norm.weight": (f"self_attn.{x}_norm.weight", "H") for x in "qk"},
        interleaved=False,
    ),
}
SIZES = (
    "context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.dimension_count",
)  # fmt: skip
REFUSED = {
    "rope.scal": "scaled positions",
    "attention.sliding_window": "sliding windows",
    "expert": "a mixture of experts",
}


class Contents(NamedTuple):
    """What a file holds, checked, and nothing of its weights read."""

    file: Path
    config: dict[str, Any]  # config.json
    texts: dict[str, str]  # {file: text} of all that is not weights
    tensors: dict[str, tuple[Any, int]]  # {Hugging Face's name: (tensor, the heads whose rows are interleaved, or 0)}


def read(file: Path) -> Contents:
    """What a GGUF file holds. Raises UserError: no library to read it, not whole, a model or a tokenizer that is not supported,
    tensors that are missing, unexpected or of a wrong shape."""
    library, where = library_of(file), str(file)
    reader = _opened(library, file)
    values = _values(reader, where)
    config = published_config(values, _shapes(reader), where)
    texts = tokenizer_files(values, config["vocab_size"], config["max_position_embeddings"], where)
    tensors = dict(_planned(reader, config, where))
    for kind in {tensor.tensor_type for tensor, _ in tensors.values()}:
        _check_kind(library, kind, where)
    generation: dict[str, Any] = {name: config[name] for name in ("bos_token_id", "pad_token_id") if name in config}
    if ends := token_ids(values, "eos", "eot"):
        generation["eos_token_id"] = ends
    jsons = {"config.json": config, "generation_config.json": generation}
    texts |= {name: to_json(value, indent=2) + "\n" for name, value in jsons.items()}
    return Contents(file, config, texts, tensors)


def library_of(file: Path) -> Any:
    """The library that reads this file. Raises UserError where it is not installed."""
    try:
        import gguf
    except ModuleNotFoundError:
        raise UserError(f"{file}: GGUF files need the library gguf; `pip install 'd1jax[gguf]'`") from None
    return gguf


def _opened(library: Any, file: Path) -> Any:
    try:
        reader = library.GGUFReader(file)
    except (
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        OverflowError,
        RecursionError,
    ) as error:  # it has no class of its own
        raise UserError(
            f"{file}: not a whole GGUF file of version 2 or 3 ({first_line(error)}); it was cut off or changed, so "
            "download it again"
        ) from None
    if reader.byte_order != "I":
        raise UserError(f"{file}: its numbers are stored in the other byte order; download the file for this machine")
    return reader


def _values(reader: Any, where: str) -> dict[str, Any]:
    """{key: value} of the file's metadata."""
    try:
        return {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError) as error:
        raise UserError(
            f"{where}: its metadata cannot be read ({first_line(error)}); it was changed, so download it again"
        ) from None


def _shapes(reader: Any) -> dict[str, tuple[int, ...]]:
    """{tensor: shape}, the last axis the one that lies together in memory (the file names it first)."""
    return {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in reader.tensors}


def published_config(values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str) -> dict[str, Any]:
    """config.json, in Hugging Face's words. Raises UserError for a model that d1jax would not compute as llama.cpp does."""
    name = values.get("general.architecture")
    if name not in ARCHITECTURES:
        raise UserError(
            f"{where}: general.architecture = {name!r} is none of {', '.join(ARCHITECTURES)}, which d1jax reads"
        )
    _check_settings(values, name, where)

    def number(key: str, default: float | None = None, kinds: tuple[type, ...] = (int,)) -> Any:
        value = values.get(f"{name}.{key}", default)
        if not isinstance(value, kinds) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise UserError(
                f"{where}: {name}.{key} = {value!r:.80} is not the one positive number that d1jax needs there"
            )
        return value

    def decimal(key: str, default: float | None = None) -> float:
        return float(str(np.float32(number(key, default, (int, float)))))  # 1e-05, not the nearest float32 in 17 digits

    width, heads = number("embedding_length"), number("attention.head_count")
    head_dim = number("attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if number(key, head_dim) != head_dim or head_dim % 2:
            raise UserError(
                f"{where}: {name}.{key} = {number(key, head_dim)}, and a head has {head_dim}; d1jax needs the same even number"
            )
    embedding = shapes.get("token_embd.weight")
    if embedding is None:
        raise UserError(f"{where}: missing tensors: token_embd.weight")
    ids = {f"{kind}_token_id": found[0] for kind in ("bos", "eos", "pad", "mask") if (found := token_ids(values, kind))}
    architecture = ARCHITECTURES[name]
    return {
        "architectures": [architecture.published],
        "model_type": name,
        "hidden_size": width,
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": number("feed_forward_length"),
        "vocab_size": embedding[0],
        "max_position_embeddings": number("context_length"),
        "rope_theta": decimal("rope.freq_base", 10000.0),
        "rms_norm_eps": decimal("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in shapes,
        "hidden_act": "silu",
        **architecture.settings,
        **ids,
        "torch_dtype": "float32",
    }


def _check_settings(values: Mapping[str, Any], name: str, where: str) -> None:
    """Raises UserError for what changes the forward pass, and is none of the sizes; 0, false and 'none' switch a thing off."""
    if values.get("general.type", "model") != "model":
        raise UserError(
            f"{where}: holds no model, but general.type = {values['general.type']!r}; name the model's own file"
        )
    if values.get("split.count") not in (None, 0, 1):
        raise UserError(
            f"{where}: is one of {values['split.count']} parts; put them together first (llama-gguf-split --merge)"
        )
    if values.get(f"{name}.attention.causal", True) is not True:
        raise UserError(f"{where}: {name}.attention.causal is off; d1jax reads causal models from GGUF files")
    known = {f"{name}.{key}" for key in (*SIZES, "attention.causal")}
    for key, value in values.items():
        if not key.startswith(f"{name}.") or key in known or value in (0, "", "none"):
            continue
        what = next((what for part, what in REFUSED.items() if key.removeprefix(f"{name}.").startswith(part)), None)
        reason = (
            f"d1jax does not support {what}"
            if what
            else "d1jax does not know it, and it may change what the model computes"
        )
        raise UserError(f"{where}: {key} = {value!r:.80}: {reason}")


# -- tensors ----------------------------------------------------------------------------------------------------------------


def _planned(reader: Any, config: Mapping[str, Any], where: str) -> Iterator[tuple[str, tuple[Any, int]]]:
    """(Hugging Face's name, (tensor, the heads whose rows are interleaved or 0)). Raises UserError naming what is missing or wrong."""
    architecture = ARCHITECTURES[config["model_type"]]
    layers, heads, kv_heads = (config[f"num_{x}"] for x in ("hidden_layers", "attention_heads", "key_value_heads"))
    head = config["head_dim"]
    axes = {"D": config["hidden_size"], "F": config["intermediate_size"], "V": config["vocab_size"], "H": head}
    axes |= {"Q": heads * head, "K": kv_heads * head}
    found = {tensor.name: tensor for tensor in reader.tensors}
    if layers > len(found):  # before as many names are made
        raise UserError(f"{where}: its block_count is {layers}, but it has only {len(found)} tensors")
    if "rope_freqs.weight" in found:
        raise UserError(
            f"{where}: tensor rope_freqs.weight scales the positions; d1jax does not support scaled positions"
        )
    expected = {
        name: entry for name, entry in TOP.items() if name != "output.weight" or not config["tie_word_embeddings"]
    }
    for layer in range(layers):
        for name, (theirs, shape) in architecture.layer.items():
            expected[f"blk.{layer}.{name}"] = (f"model.layers.{layer}.{theirs}", shape)
    for what, names in (("missing", expected.keys() - found), ("unexpected", found.keys() - expected)):
        if names:
            shown = ", ".join(sorted(names)[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
            raise UserError(f"{where}: {what} tensors: {shown}")
    stored = _shapes(reader)
    for name, (theirs, letters) in expected.items():
        shape = tuple(axes[letter] for letter in letters)
        if stored[name] != shape:
            raise UserError(f"{where}: tensor {name} has shape {stored[name]}, its metadata says {shape}")
        interleaved = architecture.interleaved and name.endswith(("attn_q.weight", "attn_k.weight"))
        yield theirs, (found[name], {"Q": heads, "K": kv_heads}[letters[0]] if interleaved else 0)


def _check_kind(library: Any, kind: Any, where: str) -> None:
    """Raises UserError where the library cannot turn blocks of this kind into numbers."""
    _, size = library.GGML_QUANT_SIZES[kind]
    try:
        library.quants.dequantize(np.zeros((1, size), np.uint8), kind)
    except NotImplementedError:
        raise UserError(
            f"{where}: holds tensors of type {kind.name}, which the library gguf does not read; take a file of another quantisation"
        ) from None
