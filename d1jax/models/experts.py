"""A mixture of experts in the place of a block's SwiGLU: a router chooses a few SwiGLUs for each token and mixes what they say.

Dropless: no expert has a capacity, every token passes through all that were chosen for it, so a token's result depends on nothing
but the token. The pairs of a token and an expert are sorted by expert, and `ragged_dot` multiplies each run with its own matrix.

The loss that balances the load of experts is of pre-training and no part of post-training, so there is none here: gradients reach the
router through the weights of the chosen alone. LLaDA2's bias, which pre-training moves to balance the load, chooses only and stays.

N tokens, D width, E experts, S = experts of a token, F hidden units of an expert, R = N S rows.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from d1jax.config import MixtureOfExperts
from d1jax.models import sharding
from d1jax.models.swiglu import swiglu

LEAST = 1e-20  # beside the sum of the sigmoids, as in the published code


def route(x_ND: Array, kernel_DE: Array, bias_E: Array | None, config: MixtureOfExperts) -> tuple[Array, Array]:
    """(weight [N, S] in fp32, expert [N, S]) of each token's chosen experts, the best first; of equal ones the first.

        softmax   p = softmax(x W); the S largest p, not divided by their sum            (LLaDA-MoE)
        sigmoid   s = sigmoid(x W) in fp32; groups by the sum of their two largest s + b, then the S largest s + b in the best groups;
                  scaling s / (sum of the S chosen s + 1e-20)                            (LLaDA2; one of one is not divided)

    Source: the modeling code that the published checkpoints of LLaDA-MoE and LLaDA2.0 bring along.
    """
    if config.router == "softmax":
        logits_NE = (x_ND @ kernel_DE.astype(x_ND.dtype)).astype(jnp.float32)
        return jax.lax.top_k(jax.nn.softmax(logits_NE, axis=-1), config.experts_per_token)
    # First in the dtype of the activations: a sampler that casts all weights once then chooses the same experts.
    kernel_DE = kernel_DE.astype(x_ND.dtype).astype(jnp.float32)
    score_NE = jax.nn.sigmoid(jnp.matmul(x_ND.astype(jnp.float32), kernel_DE, precision="highest"))
    chance_NE = jax.lax.stop_gradient(score_NE)
    if bias_E is not None:
        chance_NE = chance_NE + jax.lax.stop_gradient(bias_E.astype(x_ND.dtype).astype(jnp.float32))[None, :]
    if config.groups > 1:
        chance_NE = jnp.where(_in_best_groups(chance_NE, config), chance_NE, -jnp.inf)
    expert_NS = jax.lax.top_k(chance_NE, config.experts_per_token)[1]
    weight_NS = jnp.take_along_axis(score_NE, expert_NS, axis=-1)
    if config.experts_per_token > 1:
        weight_NS = weight_NS / (jnp.sum(weight_NS, axis=-1, keepdims=True) + LEAST)
    return weight_NS * config.scaling, expert_NS


def _in_best_groups(chance_NE: Array, config: MixtureOfExperts) -> Array:
    """[N, E]: whether the expert is in one of the token's best groups."""
    tokens, experts = chance_NE.shape
    of_group_NGe = chance_NE.reshape(tokens, config.groups, experts // config.groups)
    best_NG = jnp.sum(jax.lax.top_k(of_group_NGe, 2)[0], axis=-1)
    chosen_Ng = jax.lax.top_k(best_NG, config.groups_per_token)[1]
    allowed_NG = jnp.any(jax.nn.one_hot(chosen_Ng, config.groups, dtype=bool), axis=1)
    return jnp.repeat(allowed_NG, experts // config.groups, axis=1)


def mixed(
    x_ND: Array, weight_NS: Array, expert_NS: Array, kernels: tuple[Array, Array, Array], first: Array | int = 0
) -> Array:
    """sum over the chosen of weight x SwiGLU of that expert, [N, D] in fp32.

    kernels: gate [E, D, F], up [E, D, F], out [E, F, D] of the experts from `first` on; others add nothing here (another device has them).
    """
    (tokens, chosen), experts = expert_NS.shape, kernels[0].shape[0]
    own_R = expert_NS.reshape(-1) - first
    own_R = jnp.where((own_R >= 0) & (own_R < experts), own_R, experts)  # those of others are sorted behind
    order_R = jnp.argsort(own_R, stable=True)
    sizes_E = jnp.bincount(own_R, length=experts).astype(jnp.int32)
    # What ragged_dot says of rows beyond the last run is not defined everywhere, nor is what it says on the way back.
    valid_R1 = (jnp.arange(tokens * chosen, dtype=jnp.int32) < jnp.sum(sizes_E))[:, None]
    rows_RD = jnp.where(valid_R1, x_ND[order_R // chosen], 0)
    gate_RF, up_RF = (jax.lax.ragged_dot(rows_RD, kernel, sizes_E) for kernel in kernels[:2])
    hidden_RF = jnp.where(valid_R1, swiglu(gate_RF, up_RF), 0)
    out_RD = jnp.where(valid_R1, jax.lax.ragged_dot(hidden_RF, kernels[2], sizes_E), 0)
    out_NSD = out_RD[jnp.argsort(order_R)].reshape(tokens, chosen, -1)
    return jnp.einsum("NSD,NS->ND", out_NSD.astype(jnp.float32), weight_NS, precision="highest")


def spread(x_BTD: Array, weight_BTS: Array, expert_BTS: Array, kernels: tuple[Array, Array, Array]) -> Array:
    """`mixed` over the mesh that is set: each device takes its rows through its experts, and the devices of `tensor` add up, in fp32.

    Where `tensor` does not divide the experts, each device has a part of every expert's hidden units.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _local(x_BTD, weight_BTS, expert_BTS, *kernels, axis=None, by_expert=False)
    rows = sharding.spec(x_BTD.shape, ("batch", None, None), mesh)
    cut = [sharding.spec(kernel.shape, names, mesh) for kernel, names in zip(kernels, AXES, strict=True)]
    # Gathered over fsdp, as every weight is where it is used.
    cut = [PartitionSpec(*(axis if axis == "tensor" else None for axis in one)) for one in cut]
    summed = "tensor" if any("tensor" in one for one in cut) else None
    own = partial(_local, axis=summed, by_expert=cut[0][0] == "tensor")
    over = jax.shard_map(own, mesh=mesh, in_specs=(rows, rows, rows, *cut), out_specs=rows, check_vma=False)
    return over(x_BTD, weight_BTS, expert_BTS, *kernels)


def _local(
    x_BTD: Array, weight_BTS: Array, expert_BTS: Array, *kernels: Array, axis: str | None, by_expert: bool
) -> Array:
    x_ND, weight_NS, expert_NS = (x.reshape(-1, x.shape[-1]) for x in (x_BTD, weight_BTS, expert_BTS))
    first = jax.lax.axis_index("tensor") * kernels[0].shape[0] if by_expert else 0
    y_ND = mixed(x_ND, weight_NS, expert_NS, kernels, first)
    return (y_ND if axis is None else jax.lax.psum(y_ND, axis)).reshape(x_BTD.shape)


# -- as a part of a block ------------------------------------------------------------------------------------------------

NAMES = ("experts_ff_proj", "experts_up_proj", "experts_ff_out")
AXES = (("experts", "embed", "mlp"), ("experts", "embed", "mlp"), ("experts", "mlp", "embed"))


class Matrices(nn.Module):
    """A kernel of each expert, [E, in, out]."""

    shape: tuple[int, int, int]
    axes: tuple[str, str, str]
    scale: float
    param_dtype: Any

    @nn.compact
    def __call__(self) -> Array:
        init = nn.with_logical_partitioning(nn.initializers.normal(self.scale), self.axes)
        return self.param("kernel", init, self.shape, self.param_dtype)


class Router(nn.Module):
    """`route` of a stream [N, D]."""

    config: MixtureOfExperts
    param_dtype: Any

    @nn.compact
    def __call__(self, x_ND: Array) -> tuple[Array, Array]:
        width, experts = x_ND.shape[-1], self.config.experts
        init = nn.with_logical_partitioning(nn.initializers.normal(width**-0.5), ("embed", None))
        kernel_DE = self.param("kernel", init, (width, experts), self.param_dtype)
        bias_E = None
        if self.config.router == "sigmoid":
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, (None,))
            bias_E = self.param("expert_bias", zeros, (experts,), self.param_dtype)
        return route(x_ND, kernel_DE, bias_E, self.config)


def mixture(x_BTD: Array, config: MixtureOfExperts, dtype: Any, param_dtype: Any, out_scale: float) -> Array:
    """What the experts of a block say of its normalised stream, without the shared one. To be called in the block's own method, whose
    parameters `router`, `experts_ff_proj`, `experts_up_proj` and `experts_ff_out` are made here."""
    width, hidden = x_BTD.shape[-1], config.expert_width
    shapes = ((width, hidden), (width, hidden), (hidden, width))
    scales = (width**-0.5, width**-0.5, out_scale * hidden**-0.5)
    gate, up, out = (
        Matrices((config.experts, *shape), axes, scale, param_dtype, name=name)().astype(dtype)
        for name, shape, axes, scale in zip(NAMES, shapes, AXES, scales, strict=True)
    )
    chosen = Router(config, param_dtype, name="router")(x_BTD.reshape(-1, width))
    weight_BTS, expert_BTS = (x.reshape(*x_BTD.shape[:2], -1) for x in chosen)
    return spread(x_BTD, weight_BTS, expert_BTS, (gate, up, out)).astype(dtype)
