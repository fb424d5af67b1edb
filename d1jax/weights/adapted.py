"""An autoregressive model as what a masked diffusion model begins with: its architecture without the causal mask, its weights with a row
for the mask token.

V rows of the embedding, D width.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from d1jax.config import ModelConfig
from d1jax.models.transformer import Transformer, Variables, abstract_variables

ROWS = 64  # a grown embedding has a multiple of so many rows, which divide over a mesh


def is_adapted(mine: ModelConfig, theirs: ModelConfig) -> bool:
    """Whether `mine` is to be made from an autoregressive model."""
    return theirs.attention_mask == "causal" != mine.attention_mask


def bidirectional(mine: ModelConfig, theirs: ModelConfig) -> ModelConfig:
    """The architecture of a causal model under the mask and the alignment of `mine`.

    With shifted logits it gets biases on q, k and v, zeros at first, where it has none: then it is a Dream, which others load. Models
    with normalised queries have no such form. A larger vocabulary of `mine` stays: it has grown before.
    """
    dream = mine.alignment == "shifted" and not theirs.qk_norm and not theirs.head_size
    return dataclasses.replace(
        theirs,
        alignment=mine.alignment,
        attention_mask=mine.attention_mask,
        mask_block=mine.mask_block,
        qkv_bias=theirs.qkv_bias or dream,
        vocab_size=max(mine.vocab_size, theirs.vocab_size),
    )


def grown(rows: int, tokens: int) -> int:
    """The rows of an embedding that has one for every token."""
    return rows if tokens <= rows else -(-tokens // ROWS) * ROWS


def begun(theirs: ModelConfig, mine: ModelConfig) -> ModelConfig:
    """The architecture of the stored weights, stored and computed as `mine` says."""
    names = ("dtype", "param_dtype", "attention", "remat", "max_positions")
    rows = theirs.vocab_size or mine.vocab_size  # 0: as many as the tokenizer has, which is the same one then
    return dataclasses.replace(theirs, vocab_size=rows, **{name: getattr(mine, name) for name in names})


def as_diffusion(variables: Variables, config: ModelConfig, mesh: Any, new_ids_from: int | None) -> Variables:
    """The weights of a causal model as those of `config`: biases that it had not are zero; the rows of new tokens, and all rows that it
    had not, are the mean of the others, in the embedding and in the head.

    new_ids_from: the first id that the tokenizer of the causal model had not; None where it had all.
    """
    like = abstract_variables(Transformer(config), mesh)
    places = jax.tree.map(lambda x: x.sharding, like)
    fill = partial(_filled, like=like["params"], new_ids_from=new_ids_from)
    return {**variables, "params": jax.jit(fill, out_shardings=places["params"])(variables["params"])}


def _filled(params: Any, like: Any, new_ids_from: int | None) -> Any:
    wte_VD = params["wte"]
    known = wte_VD.shape[0] if new_ids_from is None else min(new_ids_from, wte_VD.shape[0])
    rows = like["wte"].shape[0]
    made = {**params, "wte": _with_rows(wte_VD, known, rows)}
    if "ff_out" in params:
        made["ff_out"] = _with_rows(params["ff_out"].T, known, rows).T
    blocks = dict(params["blocks"])
    for name, layer in like["blocks"].items():
        if "bias" in layer and "bias" not in blocks[name]:
            blocks[name] = {**blocks[name], "bias": jnp.zeros(layer["bias"].shape, layer["bias"].dtype)}
    return {**made, "blocks": blocks}


def _with_rows(table_VD: Array, known: int, rows: int) -> Array:
    """The first `known` rows, and their mean in all others."""
    mean_1D = jnp.mean(table_VD[:known].astype(jnp.float32), axis=0, keepdims=True).astype(table_VD.dtype)
    return jnp.concatenate([table_VD[:known], jnp.broadcast_to(mean_1D, (rows - known, table_VD.shape[1]))])
