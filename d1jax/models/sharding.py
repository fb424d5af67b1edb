"""The device mesh and the one table that says where every array lives.

Parameters and activations carry logical axis names ("embed", "heads", "batch", ...). `RULES` maps a logical name to mesh axes;
changing the parallelism of d1jax means changing this table. An axis whose size the mesh does not divide is kept whole.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as Spec

from d1jax.config import MeshConfig, UserError

AXES = ("data", "fsdp", "tensor")

RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "sequence": None,
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "experts": "tensor",  # where it does not divide their number, the hidden units of each are cut instead
    "vocab": "tensor",
    "layers": None,
    "rank": "fsdp",  # of adapters, whose other axis is not always cut by fsdp
}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over these devices; None: over all of this run.

    Raises UserError where the axes do not multiply to their number, where there is no device, and under JAX_ENABLE_X64: random
    draws and loop counters would be of 64 bits, and a seed would mean other masks and other texts.
    """
    _check_32_bits()
    try:
        count = jax.device_count() if devices is None else len(devices)
    except (RuntimeError, AssertionError) as error:  # JAX_PLATFORMS names a backend that is not there
        reason = str(error).strip().partition("\n")[0] or f"JAX_PLATFORMS = {os.environ.get('JAX_PLATFORMS')}"
        raise UserError(
            f"JAX has no device to run on: {reason}; unset JAX_PLATFORMS, or install what it names"
        ) from None
    shape = [config.data, config.fsdp, config.tensor]
    fixed = math.prod(size for size in shape if size != -1)
    if any(size == 0 or size < -1 for size in shape) or count % fixed or (-1 not in shape and fixed != count):
        raise UserError(
            f"config: mesh = data {shape[0]} x fsdp {shape[1]} x tensor {shape[2]} does not cover {count} devices; use -1 for one axis"
        )
    shape = [count // fixed if size == -1 else size for size in shape]
    # Auto: gathers over a sharded vocabulary raise in Explicit mode, which is the default axis type.
    return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def check_mesh(mesh: Mesh) -> None:
    """Of a mesh that a user has made: raises UserError for other axes than `make_mesh` makes, and under JAX_ENABLE_X64."""
    _check_32_bits()
    if mesh.axis_names != AXES or any(kind != AxisType.Auto for kind in mesh.axis_types):
        made = ", ".join(f"{name} ({kind.name})" for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True))
        raise UserError(
            f"mesh: its axes are {made}; make it with jax.make_mesh(shape, {AXES}, axis_types=(AxisType.Auto,) * 3), or give a MeshConfig"
        )


def _check_32_bits() -> None:
    if jax.config.jax_enable_x64:
        raise UserError(
            "JAX_ENABLE_X64 is set, and d1jax computes in 32 bits; unset it, or jax.config.update it to False"
        )


def platform() -> str:
    """What the arrays of the mesh that is set lie on, "cpu", "tpu" or a kind of GPU; without a mesh, JAX's default."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return getattr(device, "platform", None) or jax.default_backend()


def row_shards(mesh: Mesh | jax.sharding.AbstractMesh) -> int:
    """How many parts a batch is cut into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def spec(shape: Sequence[int], logical: Sequence[str | None], mesh: Mesh | jax.sharding.AbstractMesh) -> Spec:
    """The PartitionSpec of an array whose axes have these logical names. A mesh axis cuts an array once: the first name has it."""
    placed: list[str | tuple[str, ...] | None] = []
    used: set[str] = set()
    for size, name in zip(shape, logical, strict=True):
        axes = RULES[name] if name is not None else None
        names = (axes,) if isinstance(axes, str) else axes or ()
        fits = size % math.prod(mesh.shape[axis] for axis in names) == 0 and not used & set(names)
        placed.append(axes if names and fits else None)
        used |= set(names) if names and fits else set()
    return Spec(*placed)


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Pins an activation to the table's placement; does nothing where no mesh is set (notebooks, unit tests)."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(x.shape, logical, mesh))


def rows_sharding(mesh: Mesh, x: Any) -> NamedSharding:
    """Where an array of rows lives: its first axis over data and fsdp."""
    return NamedSharding(mesh, spec(x.shape, ("batch",) + (None,) * (x.ndim - 1), mesh))


def shard_batch(mesh: Mesh, tree: Any) -> Any:
    """Host arrays of rows -> arrays on the mesh. Of several processes each has all rows and hands its own over."""

    def placed(x: Any) -> jax.Array:
        where = rows_sharding(mesh, x)
        if isinstance(x, jax.Array) or where.is_fully_addressable:
            return jax.device_put(x, where)
        return jax.make_array_from_callback(x.shape, where, lambda index: x[index])

    return jax.tree.map(placed, tree)


def fetch(tree: Any) -> Any:
    """Arrays on the mesh -> whole host arrays, in every process. All processes must ask."""

    def whole(x: Any) -> Any:
        if isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated:
            return multihost_utils.process_allgather(x, tiled=True)
        return x

    return jax.device_get(jax.tree.map(whole, tree))


def gathered(placed: Sharding) -> Sharding:
    """The same placement without the cut over fsdp; of an array on one device (a policy of a notebook) that one."""
    if not isinstance(placed, NamedSharding):
        return placed

    def without(axes: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        names = (axes,) if isinstance(axes, str) else axes or ()
        kept = tuple(name for name in names if name != "fsdp")
        return kept if len(kept) > 1 else next(iter(kept), None)

    return NamedSharding(placed.mesh, Spec(*map(without, placed.spec)))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, Spec())
