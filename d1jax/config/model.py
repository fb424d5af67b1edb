"""The sections of a model and of where it runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from d1jax.config.setting import Rule, choice, setting, with_fields
from d1jax.config.values import WithChoices

Attention = Literal["auto", "xla", "cudnn", "splash"]
AttentionMask = Literal["full", "causal", "block_causal"]
Remat = Literal["none", "full", "dots", "offload"]
Alignment = Literal["same_position", "shifted"]
MAX_PARAMETERS = 10**13


# -- the feed-forward half of a block ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DenseMLP:
    """One SwiGLU of model.mlp_width for every token."""

    name: ClassVar[str] = "dense"


@dataclass(frozen=True)
class MixtureOfExperts:
    """Several SwiGLUs, of which a router chooses a few for each token: LLaDA-MoE (softmax), LLaDA2 (sigmoid)."""

    name: ClassVar[str] = "moe"
    experts: int = setting(8, "SwiGLUs that the router chooses from", above=0, at_most=2**14)
    experts_per_token: int = setting(2, "how many of them a token passes through", above=0, at_most=2**14)
    expert_width: int = setting(64, "hidden units of each", above=0, at_most=2**20)
    shared_width: int = setting(
        0, "hidden units of one that every token passes through (0 = none)", at_least=0, at_most=2**20
    )
    dense_layers: int = setting(0, "first blocks, whose SwiGLU is one of model.mlp_width", at_least=0, at_most=2**12)
    router: Literal["softmax", "sigmoid"] = setting(
        "softmax",
        "weights of the chosen: their softmax among all experts (LLaDA-MoE), or their sigmoids over the sum of these, chosen with a bias "
        "of each expert (LLaDA2)",
    )
    scaling: float = setting(1.0, "factor of the weights of the chosen", above=0)
    groups: int = setting(1, "groups of experts, neighbours, that are chosen first", above=0, at_most=2**14)
    groups_per_token: int = setting(
        1, "groups whose experts a token may have: those of the largest sums of two scores", above=0, at_most=2**14
    )

    def rules(self) -> Iterator[Rule]:
        yield (
            self.experts_per_token > self.experts,
            f"experts_per_token = {self.experts_per_token} is more than experts = {self.experts}",
        )
        yield self.experts % self.groups != 0, f"groups = {self.groups} does not divide experts = {self.experts}"
        yield (
            self.groups > 1 and self.experts < 2 * self.groups,
            f"groups = {self.groups}: a group is judged by its two best experts, and experts = {self.experts} are too few",
        )
        yield (
            self.groups_per_token > self.groups,
            f"groups_per_token = {self.groups_per_token} is more than groups = {self.groups}",
        )
        allowed = self.experts // self.groups * self.groups_per_token
        yield (
            self.experts_per_token > allowed,
            f"experts_per_token = {self.experts_per_token}, but groups_per_token = {self.groups_per_token} of groups = {self.groups} "
            f"hold {allowed} experts",
        )
        yield (
            self.router == "softmax" and (self.groups > 1 or self.scaling != 1),
            "groups and scaling are read by router = sigmoid alone; leave them out",
        )


MLP = DenseMLP | MixtureOfExperts


@with_fields
@dataclass(frozen=True)
class ModelConfig(WithChoices):
    """A transformer with LLaDA's architecture, or its autoregressive kin's: Llama's, Qwen2's, Qwen3's."""

    width: int = setting(64, "residual stream", above=0, at_most=2**17)
    layers: int = setting(3, "blocks", above=0, at_most=2**12)
    heads: int = setting(4, "query heads", above=0, at_most=2**12)
    kv_heads: int = setting(
        4, "key and value heads (grouped-query attention where fewer than heads)", above=0, at_most=2**12
    )
    head_size: int = setting(0, "columns of a head (0 = width / heads; Qwen3's is another)", at_least=0, at_most=2**16)
    mlp_width: int = setting(160, "hidden units of the SwiGLU", above=0, at_most=2**20)
    mlp: MLP = choice(
        DenseMLP(), "one SwiGLU for every token, or a mixture of experts of which each token passes through a few"
    )
    vocab_size: int = setting(0, "rows of the embedding (0 = as many as the tokenizer has)", at_least=0, at_most=2**24)
    max_positions: int = setting(0, "longest prompt and completion together (0 = no limit)", at_least=0, at_most=2**24)
    rope_theta: float = setting(5e5, "base of the rotary angles", above=0)
    rotary_columns: int = setting(
        0, "columns of a head that RoPE rotates, its first ones (0 = all; LLaDA2: half)", at_least=0, at_most=2**16
    )
    norm_eps: float = setting(1e-5, "epsilon of RMSNorm", above=0)
    qkv_bias: bool = setting(False, "biases on q, k, v (Dream)")
    qk_norm: bool = setting(False, "RMSNorm on every head of q and k (Qwen3)")
    tied_head: bool = setting(False, "the head is the transposed embedding")
    rope_full_precision: bool = setting(True, "rotate in fp32 (LLaDA), or in the dtype of the activations (Dream)")
    alignment: Alignment = setting("same_position", "row p of the output scores token p (LLaDA) or p + 1 (Dream)")
    attention_mask: AttentionMask = setting(
        "full",
        "what a column sees: all columns; itself and those before it (causal: autoregressive models); its block of mask_block "
        "positions and the blocks before it (block_causal)",
    )
    mask_block: int = setting(0, "positions of a block of attention_mask = block_causal", at_least=0, at_most=2**24)
    dtype: Literal["float32", "bfloat16"] = setting("float32", "activations")
    param_dtype: Literal["float32", "bfloat16", "float16"] = setting(
        "float32",
        "weights that are not trained (the base of an adapter), and exported ones; what is trained is kept in float32 (master "
        "weights)",
    )
    attention: Attention = setting(
        "auto",
        "what computes it: XLA, cuDNN (GPUs, half precision), JAX's splash kernel (TPUs), or what suits the device",
    )
    remat: Remat = setting(
        "none",
        "what the backward pass computes again: none of it; full: each block but its input; dots: all of a block but its products with "
        "weights; offload: as dots, and these wait in the memory of the host",
    )

    def rules(self) -> Iterator[Rule]:
        yield (
            self.parameters > MAX_PARAMETERS,
            f"model has {self.parameters:.1e} parameters, more than {MAX_PARAMETERS:.0e}; lower its width, layers or vocabulary",
        )
        yield (
            self.param_dtype == "float16",
            "model.param_dtype = float16 is for reading checkpoints; train with bfloat16 or float32",
        )
        yield (
            self.head_size == 0 and self.width % self.heads != 0,
            f"model.heads = {self.heads} does not divide model.width = {self.width}",
        )
        yield (
            self.head_columns % 2 == 1,
            f"model.head_size, or model.width / model.heads, = {self.head_columns} is odd; RoPE rotates pairs",
        )
        yield (
            self.rotary_columns % 2 == 1 or self.rotary_columns > self.head_columns,
            f"model.rotary_columns = {self.rotary_columns} must be even and at most the {self.head_columns} columns of a head",
        )
        yield (
            self.dense_layers >= self.layers and self.mlp != DenseMLP(),
            f"model.mlp.dense_layers = {self.dense_layers}: model.layers = {self.layers} leaves none for experts; use model.mlp = dense",
        )
        yield (
            (self.attention_mask == "block_causal") != (self.mask_block > 0),
            f"model.mask_block = {self.mask_block}: model.attention_mask = block_causal has blocks of so many positions, and no other mask "
            "has blocks; set both or neither",
        )
        yield (
            self.attention_mask != "full" and self.attention in ("cudnn", "splash"),
            f"model.attention = {self.attention} has no model.attention_mask but full; set it to auto or xla",
        )
        yield (
            self.heads % self.kv_heads != 0,
            f"model.kv_heads = {self.kv_heads} does not divide model.heads = {self.heads}",
        )

    @property
    def head_columns(self) -> int:
        """The columns of a head."""
        return self.head_size or self.width // self.heads

    @property
    def dense_layers(self) -> int:
        """The first blocks, which have no experts."""
        return self.mlp.dense_layers if isinstance(self.mlp, MixtureOfExperts) else self.layers

    @property
    def parameters(self) -> int:
        """About how many weights a model of these sizes has."""
        attention = 4 * self.layers * self.heads * self.head_columns
        return self.width * (attention + self.mlp_columns(active=False) + 2 * self.vocab_size)

    def mlp_columns(self, active: bool) -> int:
        """Weights of the feed-forward halves of all blocks, over model.width; active: those that a token passes through."""
        dense = 3 * self.dense_layers * self.mlp_width
        if not isinstance(self.mlp, MixtureOfExperts):
            return dense
        passed = self.mlp.experts_per_token if active else self.mlp.experts
        sparse = 3 * (passed * self.mlp.expert_width + self.mlp.shared_width) + self.mlp.experts
        return dense + (self.layers - self.dense_layers) * sparse

    @property
    def hidden_columns(self) -> int:
        """The most hidden units that a token passes through in a block."""
        if not isinstance(self.mlp, MixtureOfExperts):
            return self.mlp_width
        sparse = self.mlp.experts_per_token * self.mlp.expert_width + self.mlp.shared_width
        return max(sparse, self.mlp_width if self.dense_layers else 0)


@with_fields
@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters; rank 0 trains all weights."""

    rank: int = setting(0, "0 = full fine-tuning", at_least=0, at_most=2**16)
    alpha: float = setting(64.0, "adapters are scaled by alpha / rank", above=0)
    targets: tuple[str, ...] = setting(
        ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"),
        "linear layers of a block (never the head)",
    )

    def rules(self) -> Iterator[Rule]:
        yield self.rank > 0 and not self.targets, "lora.targets is empty"


@with_fields
@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one of them may be -1 (all that are left)."""

    data: int = setting(-1, "copies of the model")
    fsdp: int = setting(1, "shards of every weight, gathered when used")
    tensor: int = setting(1, "shards of heads, MLP and vocabulary")
    rollout_weights: Literal["gathered", "as_trained"] = setting(
        "gathered",
        "for decoding, weights that fsdp cuts are gathered once an update, in the dtype of the activations, or anew in every step "
        "(as_trained: where a whole copy does not fit)",
    )

    def rules(self) -> Iterator[Rule]:
        yield [self.data, self.fsdp, self.tensor].count(-1) > 1, "mesh: at most one axis may be -1"
