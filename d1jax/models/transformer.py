"""LLaDA's transformer: RMSNorm, RoPE, SwiGLU, every column seen by every other unless `model.attention_mask` says otherwise. Flax
linen, used purely functionally.

B rows, T columns, L layers, D width, H heads, K key heads, h head size, F MLP width, V vocabulary.

The parameter tree maps one to one to the LLaDA checkpoint (weights/names.py):

    wte [V, D]   blocks/{attn_norm, q_proj, k_proj, v_proj, attn_out, ff_norm, ff_proj, up_proj, ff_out} [L, ...]   ln_f   ff_out [D, V]

and q_norm, k_norm in the blocks of a model that normalises them (Qwen3). Blocks with a mixture of experts have router, experts_ff_proj,
experts_up_proj, experts_ff_out [L, E, ...] and shared_* instead; the first blocks of such a model may be dense, a stack of their own:
blocks_dense.

`hidden_states` runs the blocks; the head is applied by whoever needs logits, and only to the columns that are needed
(token_logprobs.py, sampler.py). Adapters live in a second collection, "lora": the same call without it is the base model.
A pass over all columns may keep its keys and values; a later pass over a run of columns then uses them for all others.

W columns of such a run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding

from d1jax.config import LoraConfig, MixtureOfExperts, ModelConfig
from d1jax.models import sharding
from d1jax.models.attention import attend, rotary_angles, rotate, visible
from d1jax.models.experts import mixture
from d1jax.models.products import product
from d1jax.models.swiglu import swiglu
from d1jax.models.xla_attention import attend_to_past

Variables = Mapping[str, Any]  # {"params": ..., "lora": ... (optional)}
# What of a block the backward pass finds where the forward pass left it; None: nothing.
REMAT = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}
MASTER = jnp.float32  # the dtype of all that is trained


class KeyValues(NamedTuple):
    """What attention reads of all columns, [L, B, T, K, h]; inside a block without L. Keys are stored after rotation."""

    key: Array
    value: Array


class Window(NamedTuple):
    """The run of columns that a pass computes."""

    start: Array | int  # its first column
    fresh_from: Array | int  # columns before it keep their old keys and values
    hidden_BT: Array | None = None  # kept columns that it does not see


def stacks(config: ModelConfig) -> dict[str, range]:
    """{name in the tree: its layers}. Blocks of one kind are stacked; those without experts come first."""
    if not 0 < config.dense_layers < config.layers:
        return {"blocks": range(config.layers)}
    return {"blocks_dense": range(config.dense_layers), "blocks": range(config.dense_layers, config.layers)}


class RMSNorm(nn.Module):
    eps: float
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale_D = self.param(
            "scale", nn.with_logical_partitioning(nn.initializers.ones, (None,)), x.shape[-1:], self.param_dtype
        )
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        # The checkpoint was trained with the product in the activation dtype, after the cast.
        return normed.astype(x.dtype) * jnp.broadcast_to(scale_D.astype(x.dtype), x.shape)


class Dense(nn.Module):
    """x W (+ bias) (+ x A B alpha / r, when the "lora" collection has this layer)."""

    features: int
    axes: tuple[str, str]
    lora: LoraConfig
    dtype: Any
    param_dtype: Any
    use_bias: bool = False
    init_scale: float = 1.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        size = x.shape[-1]
        init = nn.with_logical_partitioning(nn.initializers.normal(self.init_scale * size**-0.5), self.axes)
        kernel = self.param("kernel", init, (size, self.features), self.param_dtype)
        y = product(x, kernel.astype(self.dtype))
        if self.use_bias:
            bias_init = nn.with_logical_partitioning(nn.initializers.zeros, (self.axes[1],))
            bias = self.param("bias", bias_init, (self.features,), self.param_dtype)
            y = y + jnp.broadcast_to(bias.astype(self.dtype), y.shape)
        adapted = self.name in self.lora.targets and self.lora.rank > 0
        if adapted and (self.has_variable("lora", "a") or self.is_mutable_collection("lora")):
            # PEFT's initialisation: uniform(-1/sqrt(in), 1/sqrt(in)) and zeros, so that an untrained adapter changes nothing.
            bound = size**-0.5
            a_init = nn.with_logical_partitioning(
                lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -bound, bound), (self.axes[0], "rank")
            )
            b_init = nn.with_logical_partitioning(
                lambda key, shape: jnp.zeros(shape, jnp.float32), ("rank", self.axes[1])
            )
            key = self.make_rng("lora") if self.is_mutable_collection("lora") else None
            a = self.variable("lora", "a", a_init, key, (size, self.lora.rank)).value
            b = self.variable("lora", "b", b_init, None, (self.lora.rank, self.features)).value
            y = y + ((x @ a.astype(self.dtype)) @ b.astype(self.dtype)) * (self.lora.alpha / self.lora.rank)
        return y


class Block(nn.Module):
    config: ModelConfig
    lora: LoraConfig
    keep_keys: bool = False
    sparse: bool = False  # with a mixture of experts

    @nn.compact
    def __call__(
        self,
        x_BTD: Array,
        cos_BTh: Array,
        sin_BTh: Array,
        length_B: Array,
        visible_BTT: Array | None = None,
        past: KeyValues | None = None,
        window: Window | None = None,
    ) -> tuple[Array, KeyValues | None]:
        cfg, dtype, param_dtype = self.config, jnp.dtype(self.config.dtype), jnp.dtype(self.config.param_dtype)
        head_size = cfg.head_columns

        def norm(name: str, x: Array) -> Array:
            return RMSNorm(cfg.norm_eps, param_dtype, name=name)(x)

        # What writes to the residual stream starts small, so that the stream does not grow with depth (GPT-2).
        init_scale = dict.fromkeys(("attn_out", "ff_out", "shared_ff_out"), (2 * cfg.layers) ** -0.5)

        def dense(name: str, x: Array, features: int, axes: tuple[str, str], use_bias: bool = False) -> Array:
            scale = init_scale.get(name, 1.0)
            return Dense(features, axes, self.lora, dtype, param_dtype, use_bias, scale, name=name)(x)

        def heads(name: str, x: Array, count: int) -> Array:
            y = dense(name, x, count * head_size, ("embed", "heads"), cfg.qkv_bias)
            return y.reshape(*y.shape[:2], count, head_size)

        self.sow("intermediates", "block_in", x_BTD)
        h_BTD = norm("attn_norm", x_BTD)
        q_BTHh, k_BTKh = heads("q_proj", h_BTD, cfg.heads), heads("k_proj", h_BTD, cfg.kv_heads)
        if cfg.qk_norm:
            q_BTHh, k_BTKh = norm("q_norm", q_BTHh), norm("k_norm", k_BTKh)
        q_BTHh = rotate(q_BTHh, cos_BTh, sin_BTh, cfg.rope_full_precision)
        k_BTKh = rotate(k_BTKh, cos_BTh, sin_BTh, cfg.rope_full_precision)
        keys = KeyValues(k_BTKh, heads("v_proj", h_BTD, cfg.kv_heads))
        if past is None:
            mixed_BTHh = attend(q_BTHh, *keys, length_B, cfg.attention, visible_BTT)
        else:
            mixed_BTHh = attend_to_past(q_BTHh, keys, past, length_B, *window)
        mixed_BTD = mixed_BTHh.reshape(*x_BTD.shape[:2], cfg.heads * head_size)
        x_BTD = x_BTD + dense("attn_out", mixed_BTD, cfg.width, ("heads", "embed"))
        h_BTD = norm("ff_norm", x_BTD)

        def mlp(prefix: str, width: int) -> Array:
            gate_BTF = dense(f"{prefix}ff_proj", h_BTD, width, ("embed", "mlp"))
            up_BTF = dense(f"{prefix}up_proj", h_BTD, width, ("embed", "mlp"))
            return dense(f"{prefix}ff_out", swiglu(gate_BTF, up_BTF), cfg.width, ("mlp", "embed"))

        if self.sparse and isinstance(cfg.mlp, MixtureOfExperts):
            said_BTD = mixture(h_BTD, cfg.mlp, dtype, param_dtype, init_scale["ff_out"])
            if cfg.mlp.shared_width:
                said_BTD = said_BTD + mlp("shared_", cfg.mlp.shared_width)
            x_BTD = x_BTD + said_BTD
        else:
            x_BTD = x_BTD + mlp("", cfg.mlp_width)
        return sharding.constrain(x_BTD, "batch", "sequence", None), keys if self.keep_keys else None


class Transformer(nn.Module):
    config: ModelConfig
    lora: LoraConfig = LoraConfig()

    @nn.compact
    def __call__(
        self,
        tokens_BT: Array,
        positions_BT: Array,
        length_B: Array,
        past: KeyValues | None = None,
        window: Window | None = None,
        keep_keys: bool = False,
        visible_BTT: Array | None = None,
    ) -> tuple[Array, KeyValues | None]:
        cfg, param_dtype = self.config, jnp.dtype(self.config.param_dtype)
        embed_init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", "embed"))
        wte_VD = self.param("wte", embed_init, (cfg.vocab_size, cfg.width), param_dtype)
        if not cfg.tied_head:
            head_init = nn.with_logical_partitioning(nn.initializers.normal(cfg.width**-0.5), ("embed", "vocab"))
            self.param("ff_out", head_init, (cfg.width, cfg.vocab_size), param_dtype)
        x_BTD = sharding.constrain(wte_VD[tokens_BT].astype(cfg.dtype), "batch", "sequence", None)
        cos_BTh, sin_BTh = rotary_angles(positions_BT, cfg.rotary_columns or cfg.head_columns, cfg.rope_theta)
        if visible_BTT is None:
            visible_BTT = visible(cfg.attention_mask, positions_BT, cfg.mask_block)
        block = Block
        if cfg.remat != "none":
            block = nn.remat(Block, prevent_cse=False, policy=REMAT[cfg.remat])
        kept = []
        for name, layers in stacks(cfg).items():
            blocks = nn.scan(
                block,
                variable_axes={"params": 0, "lora": 0, "intermediates": 0},
                split_rngs={"params": True, "lora": True},
                in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast, 0, nn.broadcast),
                length=len(layers),
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(cfg, self.lora, keep_keys, layers.start >= cfg.dense_layers, name=name)
            of_these = past
            if past is not None and len(layers) < cfg.layers:
                of_these = KeyValues(*(x[layers.start : layers.stop] for x in past))
            x_BTD, keys = blocks(x_BTD, cos_BTh, sin_BTh, length_B, visible_BTT, of_these, window)
            kept.append(keys)
        keys = kept[0] if len(kept) == 1 else jax.tree.map(lambda *of: jnp.concatenate(of), *kept)
        return RMSNorm(cfg.norm_eps, param_dtype, name="ln_f")(x_BTD), keys


def hidden_states(
    model: Transformer,
    variables: Variables,
    tokens_BT: Array,
    positions_BT: Array,
    length_B: Array,
    visible_BTT: Array | None = None,
) -> Array:
    """The final hidden states [B, T, D] after ln_f; columns at or beyond length_B are padding that nobody attends to.

    visible_BTT: the columns that each column sees, [B or 1, T, T] (None: those of the model's attention_mask).
    """
    return model.apply(variables, tokens_BT, positions_BT, length_B, visible_BTT=visible_BTT)[0]


def hidden_states_and_keys(
    model: Transformer, variables: Variables, tokens_BT: Array, positions_BT: Array, length_B: Array
) -> tuple[Array, KeyValues]:
    """(final hidden states [B, T, D] after ln_f, keys and values of all columns); columns at or beyond length_B are padding."""
    return model.apply(variables, tokens_BT, positions_BT, length_B, keep_keys=True)


def hidden_states_of_window(
    model: Transformer,
    variables: Variables,
    tokens_BW: Array,
    positions_BW: Array,
    length_B: Array,
    past: KeyValues,
    window: Window,
) -> Array:
    """The final hidden states of a run of columns [B, W, D], which attends to itself and, outside of itself, to `past`.

    Approximate in a bidirectional model: what changed in the window should have changed all other keys too.
    """
    return model.apply(variables, tokens_BW, positions_BW, length_B, past, window)[0]


def head_matrix(variables: Variables) -> Array:
    """The output head [D, V]: its own matrix, or the transposed embedding where they are tied."""
    params = variables["params"]
    return params["ff_out"] if "ff_out" in params else params["wte"].T


def project(hidden: Array, head_DV: Array) -> Array:
    """Logits [..., V], accumulated and returned in fp32."""
    return product(hidden, head_DV.astype(hidden.dtype), jnp.float32)


def in_model_dtype(variables: Variables, config: ModelConfig) -> Variables:
    """The variables in the dtype of the activations, for many passes over the same weights.

    The model casts every weight to that dtype where it uses it, so no result changes by a bit; weights that are trained in fp32
    are just not read and cast again in every denoising step.
    """
    return jax.tree.map(lambda x: x.astype(config.dtype), variables)


def initialize(model: Transformer, key: Array, mesh: Mesh, collections: tuple[str, ...] = ("params",)) -> Variables:
    """Random variables of the named collections, each created where the rule table wants it."""
    return _initializer(model, mesh, collections)(key)


@lru_cache(maxsize=16)
def _initializer(model: Transformer, mesh: Mesh, collections: tuple[str, ...]) -> Callable[[Array], Variables]:
    """The compiled function of `initialize`; one for all seeds."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_variables(model, mesh, collections))
    return jax.jit(lambda key: nn.unbox(_init(model, collections, key)), out_shardings=shardings)


def abstract_variables(model: Transformer, mesh: Mesh, collections: tuple[str, ...] = ("params",)) -> Variables:
    """The shape, dtype and placement of every variable, without making any."""
    boxed = _shapes(model, collections)

    def place(box: nn.LogicallyPartitioned) -> jax.ShapeDtypeStruct:
        placed = NamedSharding(mesh, sharding.spec(box.value.shape, box.names, mesh))
        return jax.ShapeDtypeStruct(box.value.shape, box.value.dtype, sharding=placed)

    return jax.tree.map(place, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


@lru_cache(maxsize=64)
def _shapes(model: Transformer, collections: tuple[str, ...]) -> Any:
    """The boxed shapes of all variables: the model is traced once, however often they are asked for."""
    return jax.eval_shape(partial(_init, model, collections), jax.eval_shape(jax.random.key, 0))


def _init(model: Transformer, collections: tuple[str, ...], key: Array) -> Variables:
    params_key, lora_key = jax.random.split(key)
    tokens_BT, length_B = jnp.zeros((1, 1), jnp.int32), jnp.ones((1,), jnp.int32)
    made = model.init({"params": params_key, "lora": lora_key}, tokens_BT, tokens_BT, length_B)
    return {name: made[name] for name in collections}
