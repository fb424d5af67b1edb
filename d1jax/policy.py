"""A model as a notebook user sees it: load, ask for logits, sample, save.

    policy = d1jax.load_pretrained("path/to/checkpoint", dtype="bfloat16")
    logits = policy.logits(tokens, mask)
    rollout = d1jax.sample(policy, ["2+2=?"], d1jax.SamplerConfig(...), seed=0)
    d1jax.save_pretrained(policy, "out")

B rows, T columns, P prompt columns, C completion columns, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from d1jax.config import ConfigError, MeshConfig, ModelConfig
from d1jax.data.tokenizers import Tokenizer, load_small_tokenizer
from d1jax.models import lora
from d1jax.models.families import Family, family_for, family_of
from d1jax.models.transformer import Transformer, Variables, head_matrix, hidden_states, project
from d1jax.runtime import mesh as mesh_rules
from d1jax.runtime.run_directory import is_run, open_run
from d1jax.setup import set_up, trained_at
from d1jax.weights.checkpoint_directory import copy_companions, is_checkpoint, open_checkpoint, read_json
from d1jax.weights.huggingface import in_memory, load_weights, save_native, save_weights
from d1jax.weights.peft_adapter import read_adapter
from d1jax.weights.tokenizer_files import load_tokenizer, write_new_companions


@dataclass(frozen=True)
class Policy:
    """A model with its weights, tokenizer and mesh."""

    model: Transformer
    variables: Variables
    tokenizer: Tokenizer
    mesh: Mesh
    source: Path | None  # what it was loaded from: exporting copies its configuration, tokenizer and remote code

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def family(self) -> Family:
        if self.source is not None and is_checkpoint(self.source):
            return family_of(read_json(self.source / "config.json"), str(self.source / "config.json"))
        return family_for(self.config)

    def logits(self, tokens: Any, mask: Any = None) -> Array:
        """fp32 [B, T, V] in natural order and aligned for every family: row i scores token i.

        `mask` [B, T] is 1 for real tokens; padding may be left, right or in between, and the logits of real tokens do not
        depend on it. The rows of padding are zeros. In a model with shifted logits row i comes from the output before it, and
        the first real token from its own, as Dream does. Raises ValueError for wrong shapes and ids outside the vocabulary.
        """
        tokens_BT = np.asarray(tokens)
        mask_BT = np.ones_like(tokens_BT) if mask is None else np.asarray(mask)
        if tokens_BT.ndim != 2 or mask_BT.shape != tokens_BT.shape:
            raise ValueError(f"logits: tokens {tokens_BT.shape} and mask {mask_BT.shape} must have one shape [B, T]")
        if not np.issubdtype(tokens_BT.dtype, np.integer):
            raise ValueError(f"logits: tokens are {tokens_BT.dtype}; give integer ids")
        check_ids(tokens_BT, self.config, "logits")
        check_length(int(mask_BT.astype(bool).sum(axis=1).max(initial=0)), self.config, "logits")
        placed = mesh_rules.place_rows(self.mesh, (tokens_BT.astype(np.int32), mask_BT.astype(bool)))
        with jax.set_mesh(self.mesh):
            return _logits(self.model, self.variables, *placed)


@partial(jax.jit, static_argnames="model")
def _logits(model: Transformer, variables: Variables, tokens_BT: Array, mask_BT: Array) -> Array:
    order_BT = jnp.argsort(~mask_BT, axis=1, stable=True)  # real tokens first, as the transformer wants them
    rank_BT = jnp.argsort(order_BT, axis=1)
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None, :], tokens_BT.shape)
    packed_BT = jnp.take_along_axis(tokens_BT, order_BT, axis=1)
    hidden_BTD = hidden_states(model, variables, packed_BT, positions_BT, mask_BT.sum(axis=1))
    scored_by_BT = jnp.maximum(rank_BT - 1, 0) if model.config.alignment == "shifted" else rank_BT
    hidden_BTD = jnp.take_along_axis(hidden_BTD, scored_by_BT[:, :, None], axis=1)
    return jnp.where(mask_BT[:, :, None], project(hidden_BTD, head_matrix(variables)), 0.0)


# -- loading and saving ---------------------------------------------------------------------------------------------------


def load_pretrained(
    path: str | Path,
    *,
    dtype: str | None = None,
    mesh: Mesh | MeshConfig | None = None,
    adapter: str | Path | None = None,
) -> Policy:
    """The policy in a checkpoint directory, a run directory (its last weights), or RUN/checkpoints/STAGE/STEP.

    dtype: of weights and activations, "float32" or "bfloat16" (None: as stored; fp16 weights run in fp32). mesh: a MeshConfig
    or a Mesh (None: every device holds the model). adapter: a PEFT directory, kept beside the weights. Raises ConfigError.
    """
    if dtype not in (None, "float32", "bfloat16"):
        raise ConfigError(f"load_pretrained: dtype = {dtype!r} is not one of float32, bfloat16")
    path = Path(path)
    if not isinstance(mesh, Mesh):
        mesh = mesh_rules.make_mesh(mesh or MeshConfig())
    with jax.set_mesh(mesh):
        policy = _of_checkpoint(path, dtype, mesh) if is_checkpoint(path) else _of_run(path, dtype, mesh)
        if adapter is None:
            return policy
        settings, adapters = read_adapter(adapter, policy.config, policy.family, mesh)
        model = Transformer(policy.config, settings)
        return dataclasses.replace(policy, model=model, variables={**policy.variables, **adapters})


def _of_checkpoint(path: Path, dtype: str | None, mesh: Mesh) -> Policy:
    checkpoint = open_checkpoint(path)
    tokenizer = load_tokenizer(path)
    config = _in_dtype(checkpoint.config, dtype)
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"checkpoint {str(path)!r}: the tokenizer has {tokenizer.vocab_size} ids, the embedding only {config.vocab_size} rows"
        )
    return Policy(Transformer(config), load_weights(checkpoint, config, mesh), tokenizer, mesh, path)


def _of_run(path: Path, dtype: str | None, mesh: Mesh) -> Policy:
    if "\0" in str(path):  # which no path has; resolving it would raise
        raise ConfigError(f"{str(path)!r}: no such directory")
    stage, step = None, None
    parts = path.resolve().parts
    if not is_run(path) and len(parts) > 3 and parts[-3] == "checkpoints" and parts[-1].isdigit():
        path, stage, step = Path(*parts[:-3]), parts[-2], int(parts[-1])
    if not os.path.isdir(path):
        raise ConfigError(f"{str(path)!r}: no such directory")
    if not is_run(path):
        raise ConfigError(f"{str(path)!r} is neither a checkpoint (config.json) nor a run (config.yaml)")
    run, config = open_run(path)
    setup = set_up(config, run.source, mesh)
    if stage is None:
        saved = [name for name, done in run.saved_steps(config.stages).items() if done]
        if not saved:
            raise ConfigError(f"run {str(path)!r} has no checkpoint yet")
        stage = saved[-1]
    try:
        variables, _ = trained_at(setup, run, stage, step)
    except ConfigError as error:  # about what that run started from, not about what was asked for here
        raise ConfigError(f"run {str(path)!r}: {error}") from None
    model = _in_dtype(setup.model.config, dtype) if dtype else setup.model.config
    # Cast first: bf16 weights would round most of a small adapter away.
    params = jax.tree.map(lambda x: x.astype(model.param_dtype), variables["params"])
    merged = lora.merge({**variables, "params": params}, config.lora)
    return Policy(Transformer(model), merged, setup.tokenizer, mesh, run.source)


def _in_dtype(config: ModelConfig, dtype: str | None) -> ModelConfig:
    """Weights as stored or in `dtype`; activations like them, but never in fp16, whose range is too small for the residuals."""
    stored = dtype or config.param_dtype
    return dataclasses.replace(config, param_dtype=stored, dtype="float32" if stored == "float16" else stored)


def save_pretrained(policy: Policy, out: str | Path, *, native: bool = False) -> None:
    """Writes a directory that PyTorch users load like the original, adapters merged, in the dtype of the policy's weights.

    native: d1jax's own form of the weights instead of safetensors. Raises FileExistsError where `out` holds anything.
    """
    out, family = Path(out), policy.family

    def companions(beside: Path) -> None:
        if policy.source is not None and is_checkpoint(policy.source) and _is_published(policy.source):
            copy_companions(policy.source, beside, policy.config.param_dtype)
        else:
            write_new_companions(policy.config, policy.tokenizer, beside, published=not native)

    arrays = in_memory(policy.variables, policy.config, family)
    if "lora" in policy.variables:
        arrays = lora.merge_each(arrays, policy.variables["lora"], policy.model.lora)
    with jax.set_mesh(policy.mesh):
        (save_native if native else save_weights)(arrays, policy.config, family, out, companions)


def _is_published(source: Path) -> bool:
    """Whether the files there are those of a published checkpoint, and not d1jax's own for a small model."""
    return load_small_tokenizer(source) is None


def check_ids(tokens: np.ndarray, config: ModelConfig, where: str) -> None:
    wrong = np.argwhere((tokens < 0) | (tokens >= config.vocab_size))
    if len(wrong):
        row, column = wrong[0]
        # A gather would clamp it silently.
        raise ConfigError(
            f"{where}: id {tokens[row, column]} at row {row}, column {column} is outside the vocabulary of {config.vocab_size}"
        )


def check_length(length: int, config: ModelConfig, where: str) -> None:
    if config.max_positions and length > config.max_positions:
        raise ConfigError(f"{where}: {length} tokens in all are more than the model's {config.max_positions} positions")
