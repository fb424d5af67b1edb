"""A model as a notebook user sees it: load, ask for logits, sample, save.

    policy = d1jax.load_pretrained("path/to/checkpoint", dtype="bfloat16")
    logits = policy.logits(tokens, mask)
    rollout = d1jax.sample(policy, ["2+2=?"], d1jax.SamplerConfig(...), seed=0)
    d1jax.save_pretrained(policy, "out")

B rows, T columns, P prompt columns, C completion columns, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from d1jax.config import MeshConfig, ModelConfig, SamplerConfig, UserError
from d1jax.config.sampler import Even, LeftToRight
from d1jax.data.hf_tokenizer import PretrainedTokenizer
from d1jax.data.tokenizers import SmallTokenizer, Tokenizer, load_small_tokenizer
from d1jax.models import lora, sharding
from d1jax.models.families import family_for, family_of
from d1jax.models.family import Family
from d1jax.models.transformer import Transformer, Variables, head_matrix, hidden_states, project
from d1jax.training.setup import set_up
from d1jax.weights.generation_config import read_sampler, write_end_ids, write_sampler
from d1jax.weights.hf_directory import copy_companions, is_checkpoint, read_json
from d1jax.weights.hf_io import in_memory, load_weights, save_native, save_weights
from d1jax.weights.peft import read_adapter
from d1jax.weights.run import is_run
from d1jax.weights.source import CheckpointSource, RunSource, open_source
from d1jax.weights.tokenizer_files import (
    TOKENIZER_FILES,
    has_tokenizer,
    load_tokenizer,
    save_small_tokenizer,
    token_ids_only,
    write_new_companions,
)
from d1jax.weights.variables import variables_at

EXPORT_CURE = "export in float32, or the adapter by itself, to keep all of it"
# Of a checkpoint that does not say how to sample from it.
PUBLISHED_SAMPLER = SamplerConfig(completion_length=128, block_length=32, steps=64)
# Of an autoregressive one: a column that is not decided yet is seen by none that is, so this order is exactly its own way of writing.
AUTOREGRESSIVE_SAMPLER = SamplerConfig(
    completion_length=128, block_length=128, steps=128, remasking=LeftToRight(), schedule=Even()
)


@dataclass(frozen=True)
class Policy:
    """A masked diffusion language model in memory: architecture, weights, tokenizer, devices and its way of sampling.

    Made by `load_pretrained`; `sample`, `watch`, `infill`, `evaluate`, `sft`, `rl` and `save_pretrained` take it. It is frozen:
    training returns another one.

        policy = d1jax.load_pretrained("runs/quickstart")
        policy                                  # one line: family, sizes, dtype, where it lies
        policy.logits([[1, 2, 3]])              # fp32 [1, 3, V]
    """

    model: Transformer  # the architecture, model.config, and the adapter's, model.lora
    variables: Variables  # {"params": tree of arrays} and, with an adapter beside the weights, {"lora": ...}
    tokenizer: Tokenizer
    mesh: Mesh  # the devices that the weights lie on
    source: Path | None  # what it was loaded from: exporting copies its configuration, tokenizer and remote code
    sampler: SamplerConfig | None = None  # how to sample by default: as its run did, or as its checkpoint says

    @property
    def config(self) -> ModelConfig:
        """The architecture: width, layers, heads, vocab_size, dtype, ..."""
        return self.model.config

    def __repr__(self) -> str:
        config, devices = self.config, self.mesh.devices.flatten()
        count = sum(x.size for x in jax.tree.leaves(self.variables))
        sizes = f"{count:,} parameters, {config.layers} layers of {config.width}, vocabulary {config.vocab_size}"
        adapter = f", adapter of rank {self.model.lora.rank}" if "lora" in self.variables else ""
        where = f"{len(devices)} x {devices[0].device_kind}"
        source = self.source
        of_run = source is not None and source.name == "source" and is_run(source.parent)
        origin = source.parent if source is not None and of_run else source
        return f"Policy({self.family.name}, {sizes}{adapter}, {config.param_dtype}, on {where}, from {str(origin)!r})"

    @property
    def family(self) -> Family:
        """Which published family of models it belongs to: names of tensors, chat turns, alignment of logits."""
        if self.source is not None and is_checkpoint(self.source):
            return family_of(read_json(self.source / "config.json"), str(self.source / "config.json"))
        return family_for(self.config)

    def logits(self, tokens: Any, mask: Any = None) -> Array:
        """Logits of every position given all others: fp32 [B, T, V], row i scores token i, whatever the family.

        tokens: ids [B, T]; hide a position by the mask id, `policy.tokenizer.special.mask`. mask: [B, T], 1 for real tokens
        (None: all are); padding may be left, right or in between, and the logits of real tokens do not depend on it. The rows of
        padding are zeros. In a model with shifted logits row i comes from the output before it, and the first real token from
        its own, as Dream does. Raises ValueError for wrong shapes, ids outside the vocabulary and rows that are too long.

            logp = jax.nn.log_softmax(policy.logits(tokens))   # nats
        """
        tokens_BT = np.asarray(tokens)
        mask_BT = np.ones_like(tokens_BT) if mask is None else np.asarray(mask)
        if tokens_BT.ndim != 2 or mask_BT.shape != tokens_BT.shape:
            raise ValueError(f"logits: tokens {tokens_BT.shape} and mask {mask_BT.shape} must have one shape [B, T]")
        if not np.issubdtype(tokens_BT.dtype, np.integer):
            raise ValueError(f"logits: tokens are {tokens_BT.dtype}; give integer ids")
        check_ids(tokens_BT, self.config, "logits")
        check_length(int(mask_BT.astype(bool).sum(axis=1).max(initial=0)), self.config, "logits")
        placed = sharding.shard_batch(self.mesh, (tokens_BT.astype(np.int32), mask_BT.astype(bool)))
        with jax.set_mesh(self.mesh):
            return _logits(self.model, self.variables, *placed)


@partial(jax.jit, static_argnames="model")
def _logits(model: Transformer, variables: Variables, tokens_BT: Array, mask_BT: Array) -> Array:
    order_BT = jnp.argsort(~mask_BT, axis=1, stable=True)  # real tokens first, as the transformer wants them
    rank_BT = jnp.argsort(order_BT, axis=1)
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None, :], tokens_BT.shape)
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
    tokenizer: str | Path | None = None,
) -> Policy:
    """The `Policy` in a checkpoint directory, a GGUF file, a run directory (its last weights), or in RUN/checkpoints/STAGE/STEP.

    dtype: of weights and activations, "float32" or "bfloat16" (None: as stored; fp16 weights run in fp32).
    mesh: a MeshConfig or a Mesh (None: every device holds the whole model).
    adapter: a PEFT directory; it is kept beside the weights.
    tokenizer: a directory with tokenizer files, for a checkpoint that has none. Without any, logits and sampling work on token
    ids, and a completion's text is its ids.

    The way of sampling comes along: a run's sampler, or what a checkpoint's generation_config.json holds for d1jax. Raises
    UserError where the directory is none of these, is broken, or has parts that do not fit together.

        policy = d1jax.load_pretrained("path/to/LLaDA-8B-Instruct", dtype="bfloat16", mesh=d1jax.MeshConfig(data=1, fsdp=-1))
    """
    if dtype not in (None, "float32", "bfloat16"):
        raise UserError(f"load_pretrained: dtype = {dtype!r} is not one of float32, bfloat16")
    source = open_source(path)
    if isinstance(source, RunSource) and tokenizer is not None:
        raise UserError(f"load_pretrained: {str(path)!r} is a run, which has its tokenizer; leave tokenizer out")
    if isinstance(mesh, Mesh):
        sharding.check_mesh(mesh)
    else:
        mesh = sharding.make_mesh(mesh or MeshConfig())
    with jax.set_mesh(mesh):
        if isinstance(source, CheckpointSource):
            policy = _of_checkpoint(source, dtype, mesh, None if tokenizer is None else Path(tokenizer))
        else:
            policy = _of_run(source, dtype, mesh)
        if adapter is None:
            return policy
        settings, adapters = read_adapter(adapter, policy.config, policy.family, mesh)
        model = Transformer(policy.config, settings)
        return dataclasses.replace(policy, model=model, variables={**policy.variables, **adapters})


def _of_checkpoint(source: CheckpointSource, dtype: str | None, mesh: Mesh, apart: Path | None) -> Policy:
    path, config = source.path, _in_dtype(source.model, dtype)
    tokenizer: Tokenizer
    if apart is not None:
        tokenizer = load_tokenizer(apart, path)
    elif has_tokenizer(path):
        tokenizer = load_tokenizer(path)
    else:
        tokenizer = token_ids_only(path, config.vocab_size)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"checkpoint {str(path)!r}: the tokenizer has {tokenizer.vocab_size} ids, the embedding only {config.vocab_size} rows"
        )
    weights = load_weights(source.checkpoint, config, mesh)
    return Policy(Transformer(config), weights, tokenizer, mesh, path, source.sampler)


def sampler_of(path: str | Path) -> SamplerConfig:
    """The default way of sampling from what `load_pretrained` would load, without loading it."""
    source = open_source(path)
    return source.sampler or default_sampler(source.model)


def default_sampler(config: ModelConfig) -> SamplerConfig:
    """How to sample from a model that does not say how."""
    if config.attention_mask == "block_causal":
        size = config.mask_block
        length = -(-128 // size) * size
        return SamplerConfig(completion_length=length, block_length=size, steps=length)
    return AUTOREGRESSIVE_SAMPLER if config.attention_mask == "causal" else PUBLISHED_SAMPLER


def _of_run(source: RunSource, dtype: str | None, mesh: Mesh) -> Policy:
    setup = set_up(source.config, source.run.source, mesh)
    try:
        variables, _ = variables_at(setup, source.run, source.last_stage, source.step)
    except UserError as error:  # perhaps about what that run started from
        named = f"run {str(source.path)!r}"
        raise UserError(str(error) if str(error).startswith(named) else f"{named}: {error}") from None
    model = _in_dtype(setup.model.config, dtype) if dtype else setup.model.config
    # An adapter stays beside its base: merged into bf16 weights, most of a small one would be rounded away.
    params = jax.tree.map(lambda x: x.astype(model.param_dtype), variables["params"])
    variables = {**variables, "params": params}
    built = Transformer(model, source.config.lora)
    return Policy(built, variables, setup.tokenizer, mesh, source.run.source, source.sampler)


def _in_dtype(config: ModelConfig, dtype: str | None) -> ModelConfig:
    """Weights as stored or in `dtype`; activations like them, but never in fp16, whose range is too small for the residuals."""
    stored = dtype or config.param_dtype
    return dataclasses.replace(config, param_dtype=stored, dtype="float32" if stored == "float16" else stored)


def save_pretrained(policy: Policy, out: str | Path, *, native: bool = False, dtype: str | None = None) -> None:
    """Writes a Hugging Face directory that PyTorch users load like the original; returns nothing.

    Adapters are merged in fp32; weights are stored in `dtype` (None: that of the policy's), with a warning where its rounding loses
    much of an adapter. Tokenizer,
    config.json, remote code and licence of what the policy was loaded from are copied, and its way of sampling is written into
    generation_config.json. native: d1jax's own form of the weights instead of safetensors. Raises FileExistsError where `out`
    is there and not empty; a directory that was not finished is removed.

        d1jax.save_pretrained(policy, "exported")
        d1jax.load_pretrained("exported")       # the same logits, the same way of sampling
    """
    out, family = Path(out), policy.family

    def companions(beside: Path) -> None:
        if policy.source is not None and is_checkpoint(policy.source) and _is_published(policy.source):
            copy_companions(policy.source, beside, config.param_dtype)
            _copy_tokenizer(policy, beside, native)
        else:
            write_new_companions(config, policy.tokenizer, beside, published=not native)
        if policy.sampler is not None and policy.sampler != read_sampler(beside):
            write_sampler(beside, policy.sampler)

    config = dataclasses.replace(policy.config, param_dtype=dtype or policy.config.param_dtype)
    adapters = policy.variables.get("lora", {"blocks": {}})
    rounding = lora.Rounding()
    arrays = lora.merge_each(
        in_memory(policy.variables, config, family), adapters, policy.model.lora, rounding, config.param_dtype
    )
    with jax.set_mesh(policy.mesh):
        (save_native if native else save_weights)(arrays, config, family, out, companions)
    lora.warn_of_rounding(rounding, config.param_dtype, EXPORT_CURE)


def _copy_tokenizer(policy: Policy, beside: Path, native: bool) -> None:
    """The files of a tokenizer that was kept apart from its checkpoint."""
    if isinstance(policy.tokenizer, SmallTokenizer):
        save_small_tokenizer(policy.tokenizer, beside, published=not native)
    elif isinstance(policy.tokenizer, PretrainedTokenizer) and policy.tokenizer.directory != policy.source:
        for name in TOKENIZER_FILES:
            if (policy.tokenizer.directory / name).is_file():
                shutil.copyfile(policy.tokenizer.directory / name, beside / name)
        write_end_ids(beside, policy.tokenizer.special.end_ids)


def _is_published(source: Path) -> bool:
    """Whether the files there are those of a published checkpoint, and not d1jax's own for a small model."""
    return load_small_tokenizer(source) is None


def check_ids(tokens: np.ndarray, config: ModelConfig, where: str) -> None:
    wrong = np.argwhere((tokens < 0) | (tokens >= config.vocab_size))
    if len(wrong):
        row, column = wrong[0]
        # A gather would clamp it silently.
        raise UserError(
            f"{where}: id {tokens[row, column]} at row {row}, column {column} is outside the vocabulary of {config.vocab_size}"
        )


def check_sees_both_sides(config: ModelConfig, where: str) -> None:
    """Raises UserError for a model whose columns do not see what stands behind them."""
    if config.attention_mask != "full":
        raise UserError(
            f"{where}: this model has attention_mask = {config.attention_mask}, so what is masked does not see the text behind it; take a "
            "masked diffusion model"
        )


def check_length(length: int, config: ModelConfig, where: str) -> None:
    if config.max_positions and length > config.max_positions:
        raise UserError(f"{where}: {length} tokens in all are more than the model's {config.max_positions} positions")
