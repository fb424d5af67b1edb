"""Pure, invertible name maps between published checkpoints and d1jax's parameter tree.

A linear weight is [out, in] in PyTorch and [in, out] here; the layers of a block are stacked on a leading axis [L, ...].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from d1jax.config import ModelConfig

BLOCK = "model.transformer.blocks.{layer}.{name}"
NORMS = ("attn_norm", "ff_norm")
LINEARS = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")
BIASED = ("q_proj", "k_proj", "v_proj")


def llada_keys(config: ModelConfig) -> list[str]:
    """Every tensor name of a LLaDA checkpoint with this architecture."""
    return sorted(to_llada(_names_only(config), config))


def from_llada(tensors: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """A LLaDA state dict -> {"params": ...}. Raises KeyError with every missing and every unexpected name."""
    expected = set(llada_keys(config))
    missing, unexpected = sorted(expected - tensors.keys()), sorted(tensors.keys() - expected)
    if missing or unexpected:
        raise KeyError(f"LLaDA checkpoint: missing tensors {missing}, unexpected tensors {unexpected}")

    def stack(name: str, transpose: bool = False) -> Any:
        layers = [tensors[BLOCK.format(layer=layer, name=name)] for layer in range(config.layers)]
        return jnp.stack([layer.T if transpose else layer for layer in layers])

    blocks = {name: {"scale": stack(f"{name}.weight")} for name in NORMS}
    for name in LINEARS:
        blocks[name] = {"kernel": stack(f"{name}.weight", transpose=True)}
        if config.qkv_bias and name in BIASED:
            blocks[name]["bias"] = stack(f"{name}.bias")
    params = {
        "wte": jnp.asarray(tensors["model.transformer.wte.weight"]),
        "blocks": blocks,
        "ln_f": {"scale": jnp.asarray(tensors["model.transformer.ln_f.weight"])},
    }
    if not config.tied_head:
        params["ff_out"] = jnp.asarray(tensors["model.transformer.ff_out.weight"]).T
    return {"params": params}


def to_llada(variables: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The inverse of `from_llada`, bit for bit."""
    params = variables["params"]
    tensors = {
        "model.transformer.wte.weight": params["wte"],
        "model.transformer.ln_f.weight": params["ln_f"]["scale"],
    }
    if not config.tied_head:
        tensors["model.transformer.ff_out.weight"] = params["ff_out"].T
    for layer in range(config.layers):
        for name, leaves in params["blocks"].items():
            for kind, stacked in leaves.items():
                suffix = "bias" if kind == "bias" else "weight"
                value = stacked[layer].T if kind == "kernel" else stacked[layer]
                tensors[BLOCK.format(layer=layer, name=f"{name}.{suffix}")] = value
    return tensors


def _names_only(config: ModelConfig) -> dict[str, Any]:
    """A tree of empty arrays with the structure of the parameters."""
    empty = np.zeros((config.layers, 0, 0))
    blocks: dict[str, Any] = {name: {"scale": empty} for name in NORMS}
    for name in LINEARS:
        biased = config.qkv_bias and name in BIASED
        blocks[name] = {"kernel": empty, "bias": empty} if biased else {"kernel": empty}
    return {"params": {"wte": empty, "ln_f": {"scale": empty}, "blocks": blocks, "ff_out": empty}}
