"""Rotary positions, attention masks by name, and which kernel computes attention on which device.

B rows, T columns, H query heads, K key heads, h head size.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh
from jax.typing import DTypeLike

from d1jax.config import ModelConfig, UserError
from d1jax.config.model import Attention, AttentionMask
from d1jax.models import sharding
from d1jax.models.xla_attention import attend_by_xla

GPUS = ("cuda", "rocm", "gpu")
TILE = 128  # kernels work on so many columns at a time
LONG = 1024  # columns from which on splash is chosen
TOLERANCE = {2: 2e-2, 4: 1e-4}  # relative, by the bytes of a number


def rotary_angles(positions_BT: Array, head_size: int, theta: float) -> tuple[Array, Array]:
    """cos and sin of p * theta^(-2i/h), [B, T, h/2]. fp32: bf16 would round position 257 to 256."""
    frequency_h = theta ** (-jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size)
    angle_BTh = positions_BT.astype(jnp.float32)[:, :, None] * frequency_h[None, None, :]
    return jnp.cos(angle_BTh), jnp.sin(angle_BTh)


def rotate(x_BTHh: Array, cos_BTh: Array, sin_BTh: Array, full_precision: bool = True) -> Array:
    """Half rotation (NeoX pairs i, i + h/2), returned in the dtype of x. Columns beyond those of cos and sin stay as they are.

    full_precision: in fp32, as LLaDA's rope_full_precision does. Otherwise cos and sin are rounded to the dtype of x and the
    rotation runs in it, as Dream (Qwen2) does; in fp32 both are the same.
    """
    dtype = jnp.float32 if full_precision else x_BTHh.dtype
    rotated = 2 * cos_BTh.shape[-1]
    if rotated < x_BTHh.shape[-1]:
        turned = rotate(x_BTHh[..., :rotated], cos_BTh, sin_BTh, full_precision)
        return jnp.concatenate([turned, x_BTHh[..., rotated:]], axis=-1)
    first, second = jnp.split(x_BTHh.astype(dtype), 2, axis=-1)
    cos, sin = (angle_BTh.astype(dtype)[:, :, None, :] for angle_BTh in (cos_BTh, sin_BTh))
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTHh.dtype)


def visible(mask: AttentionMask, positions_BT: Array, block: int) -> Array | None:
    """[B, T, T]: whether the column of the second T may be seen from that of the first, by their positions in the text; None: always.

    causal: what stands at the position itself or before it, as autoregressive models were trained. block_causal: what is in the
    same block of `block` positions or in an earlier one (SDAR, LLaDA2.0, Fast-dLLM v2).
    """
    if mask == "full":
        return None
    place_BT = positions_BT // block if mask == "block_causal" else positions_BT
    return place_BT[:, None, :] <= place_BT[:, :, None]


def annealed(key: Array, columns: int, share: Array | float) -> Array:
    """[1, T, T]: the causal mask of a text in natural order, with each later column opened with probability `share`, for all rows alike.

    share 0 is causal, 1 is full. Source: DiffuLLaMA, arXiv 2410.17891, section 3.2: one draw of the matrix an update.
    """
    place_T = jnp.arange(columns, dtype=jnp.int32)
    opened_TT = jax.random.uniform(key, (columns, columns), jnp.float32) < share
    return (opened_TT | (place_T[None, :] <= place_T[:, None]))[None]


def attend(
    q_BTHh: Array,
    k_BTKh: Array,
    v_BTKh: Array,
    length_B: Array,
    implementation: Attention = "xla",
    visible_BTT: Array | None = None,
) -> Array:
    """softmax(q k' / sqrt(h)) v over the first length_B columns of each row, [B, T, H, h]; the softmax is fp32.

    Only keys are hidden: a query in the padding still attends to the real columns and stays finite, as in LLaDA. Queries may be fewer than
    keys. implementation: `chosen` says what "auto" is; all compute the same up to rounding. visible_BTT: which of these columns each
    query sees (None: all of them), by XLA whatever the implementation.
    """
    columns, head_size = q_BTHh.shape[1], q_BTHh.shape[3]
    if visible_BTT is not None:
        return attend_by_xla(q_BTHh, k_BTKh, v_BTKh, length_B, visible_BTT)
    name = chosen(implementation, sharding.platform(), q_BTHh.dtype, columns, head_size)
    if name == "splash":
        return _splash(q_BTHh, k_BTKh, v_BTKh, length_B)
    if name == "cudnn":
        # Kernels of cuDNN were wrong in the backward pass at lengths of 128 n + 64 (pytorch issue 196678).
        q, k, v = (_padded(x, TILE) for x in (q_BTHh, k_BTKh, v_BTKh))
        mixed = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=length_B, implementation="cudnn")
        return mixed[:, :columns]
    return attend_by_xla(q_BTHh, k_BTKh, v_BTKh, length_B)


def chosen(implementation: Attention, platform: str, dtype: DTypeLike, columns: int, head_size: int) -> str:
    """What computes the attention of so many query columns: "xla", "cudnn" or "splash".

    auto: cuDNN's kernels on GPUs in half precision, JAX's splash kernel on TPUs from LONG columns on (below it the scores take little
    memory; which is faster there was not measured), else XLA.
    """
    if implementation != "auto":
        return implementation
    half = jnp.dtype(dtype).itemsize == 2
    if platform in GPUS and half and head_size % 8 == 0 and head_size <= 128:
        return "cudnn"
    if platform == "tpu" and columns >= LONG and head_size % 64 == 0:
        return "splash"
    return "xla"


def _padded(x_BTNh: Array, multiple: int) -> Array:
    """With zeros behind the last column, up to a multiple."""
    return jnp.pad(x_BTNh, ((0, 0), (0, -x_BTNh.shape[1] % multiple), (0, 0), (0, 0)))


def _splash(q_BTHh: Array, k_BTKh: Array, v_BTKh: Array, length_B: Array) -> Array:
    """By JAX's splash kernel for TPUs, each device for its rows and heads; on a CPU it is interpreted, for tests."""
    columns, heads = q_BTHh.shape[1:3]
    interpret = sharding.platform() == "cpu"
    q, k, v = (_padded(x, TILE) for x in (q_BTHh, k_BTKh, v_BTKh))
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _splash_here(q, k, v, length_B, interpret)[:, :columns]
    by_head = ("batch", None, "heads", None)
    of_q, of_k = (sharding.spec(x.shape, by_head, mesh) for x in (q, k))
    if of_q[2] != of_k[2]:
        # Fewer key heads than parts: repeated, each query head has its own, and both are cut alike.
        k, v = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (k, v))
        of_k = of_q
    of_length = sharding.spec(length_B.shape, ("batch",), mesh)
    own = jax.shard_map(
        partial(_splash_here, interpret=interpret),
        mesh=mesh,
        in_specs=(of_q, of_k, of_k, of_length),
        out_specs=of_q,
        check_vma=False,  # the kernel does not say over which axes its result varies
    )
    return own(q, k, v, length_B)[:, :columns]


def _splash_here(q_BTHh: Array, k_BTKh: Array, v_BTKh: Array, length_B: Array, interpret: bool) -> Array:
    """On one device. All queries are of segment 1, and so are the keys that may be seen."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

    rows, columns, heads, head_size = q_BTHh.shape
    keys, groups = k_BTKh.shape[1:3]
    mask = splash_mask.MultiHeadMask([splash_mask.FullMask((columns, keys))] * (heads // groups))
    kernel = splash.make_splash_mqa_single_device(mask=mask, interpret=interpret)
    segment_Q = jnp.ones(columns, jnp.int32)

    def of_row(q_KGTh: Array, k_KTh: Array, v_KTh: Array, length: Array) -> Array:
        segments = splash.SegmentIds(q=segment_Q, kv=(jnp.arange(keys, dtype=jnp.int32) < length).astype(jnp.int32))
        return jax.vmap(lambda q, k, v: kernel(q, k, v, segment_ids=segments))(q_KGTh, k_KTh, v_KTh)

    # The kernel does not scale. Query heads h K + g read key head h, as in the other implementations.
    q_BKGTh = (q_BTHh * head_size**-0.5).astype(q_BTHh.dtype).swapaxes(1, 2)
    q_BKGTh = q_BKGTh.reshape(rows, groups, heads // groups, columns, head_size)
    mixed_BKGTh = jax.vmap(of_row)(q_BKGTh, k_BTKh.swapaxes(1, 2), v_BTKh.swapaxes(1, 2), length_B)
    return mixed_BKGTh.reshape(rows, heads, columns, head_size).swapaxes(1, 2)


# -- is it right on this device? -------------------------------------------------------------------------------------------


def check(config: ModelConfig, mesh: Mesh) -> None:
    """Raises UserError where `model.attention` names what the devices do not have, or where what is chosen does not run there or
    computes something else.

    The comparison is with XLA in fp32, forward and backward, on a few random rows of different lengths; a second or two, and only where the
    choice is not XLA. Kernels of vendors have been wrong for single shapes and versions, without a word.
    """
    platform, head_size = mesh.devices.flat[0].platform, config.head_columns
    has = {"cudnn": platform in GPUS, "splash": platform == "tpu"}
    if not has.get(config.attention, True):
        raise UserError(
            f"config: model.attention = {config.attention} needs another device than {platform}; set it to auto or xla"
        )
    dtype = jnp.dtype(config.dtype)
    columns = LONG + TILE // 2
    name = chosen(config.attention, platform, dtype, columns, head_size)
    if name == "xla":
        return
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        rows = sharding.row_shards(mesh)
        keys = jax.random.split(jax.random.key(0), 4)
        shapes = [(rows, columns, heads, head_size) for heads in (config.heads, config.kv_heads, config.kv_heads)]
        arrays = [jax.random.normal(key, shape, dtype) for key, shape in zip(keys[:3], shapes, strict=True)]
        weight = jax.random.normal(keys[3], shapes[0], jnp.float32)
        length_B = columns - 7 * jnp.arange(rows, dtype=jnp.int32) % TILE

        def value(arrays: list[Array], how: Attention) -> tuple[Array, Array]:
            mixed = attend(*arrays, length_B, how).astype(jnp.float32)
            return jnp.sum(mixed * weight), mixed

        of = jax.jit(jax.grad(value, has_aux=True), static_argnums=1)
        try:
            found = of(arrays, name)
        except (RuntimeError, NotImplementedError, ValueError) as error:  # an old GPU, a library that is missing
            raise UserError(
                f"config: model.attention = {config.attention} is {name} on this device ({platform}, {dtype}, heads of {head_size}), and "
                f"does not run there ({str(error).strip().partition(chr(10))[0]}); set it to xla"
            ) from None
        right = of([x.astype(jnp.float32) for x in arrays], "xla")
        far = max(jax.tree.leaves(jax.device_get(jax.tree.map(_distance, found, right))))
    if not far < TOLERANCE[dtype.itemsize]:
        raise UserError(
            f"config: model.attention = {config.attention} is {name} on this device ({platform}, {dtype}, heads of {head_size}), and its "
            f"result or its gradient is {far:.2g} away from XLA's in fp32 (relative); set it to xla, or install other drivers"
        )


def _distance(found: Array, right: Array) -> Array:
    return jnp.linalg.norm(found.astype(jnp.float32) - right) / jnp.linalg.norm(right)
