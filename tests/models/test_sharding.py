"""The rule table: who is cut where, and what happens when sizes do not divide."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as Spec

from d1jax.config import MeshConfig, UserError
from d1jax.diffusion.canvas import row_uniforms
from d1jax.diffusion.noise import KeyedNoise
from d1jax.models import sharding
from d1jax.models.sharding import (
    AXES,
    check_mesh,
    constrain,
    gathered,
    make_mesh,
    replicated,
    row_shards,
    rows_sharding,
    shard_batch,
    spec,
)


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(data=-1, fsdp=2, tensor=2), (2, 2, 2)),
        (MeshConfig(data=1, fsdp=-1), (1, 8, 1)),
        (MeshConfig(data=2, fsdp=1, tensor=4), (2, 1, 4)),
    ],
)
def test_the_mesh_covers_all_devices(config, shape):
    mesh = make_mesh(config)
    assert mesh.axis_names == ("data", "fsdp", "tensor") and mesh.devices.shape == shape
    assert set(mesh.devices.flat) == set(jax.devices())
    # In Explicit mode a gather over a sharded vocabulary raises.
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert row_shards(mesh) == shape[0] * shape[1]


@pytest.mark.parametrize(
    "axes", [(3, 1, 1), (2, 2, 1), (-1, 3, 1), (16, 1, 1), (0, 1, 1), (-2, 1, 1), (-1, 0, 1), (-1, 16, 1)]
)
def test_axes_that_do_not_multiply_to_the_devices_are_an_error(axes):
    message = "config: mesh = data {} x fsdp {} x tensor {} does not cover 8 devices; use -1 for one axis".format(*axes)
    with pytest.raises(UserError) as caught:
        make_mesh(MeshConfig(*axes))
    assert str(caught.value) == message


def test_logical_axes_are_cut_where_the_table_says():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert spec((8, 4, 16), ("batch", "sequence", None), mesh) == Spec(("data", "fsdp"), None, None)
    assert spec((2, 16, 24), ("layers", "embed", "mlp"), mesh) == Spec(None, "fsdp", "tensor")
    assert spec((12, 16), ("vocab", "embed"), mesh) == Spec("tensor", "fsdp")
    assert spec((16, 3), ("heads", "rank"), mesh) == Spec("tensor", None)
    assert spec((), (), mesh) == Spec()


def test_an_axis_that_does_not_divide_is_kept_whole():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert spec((13, 16), ("vocab", "embed"), mesh) == Spec(None, "fsdp")
    assert spec((6, 4), ("batch", None), mesh) == Spec(None, None)  # 2 x 2 shards: all or nothing
    wide = make_mesh(MeshConfig(data=1, fsdp=1, tensor=8))
    assert spec((4, 12), ("heads", "mlp"), wide) == Spec(None, None)


def test_every_logical_name_is_in_the_table_and_unknown_ones_are_not():
    mesh = make_mesh(MeshConfig())
    for name in sharding.RULES:
        spec((8,), (name,), mesh)
    with pytest.raises(KeyError, match="batches"):
        spec((8,), ("batches",), mesh)


def test_constrain_does_nothing_without_a_mesh():
    x = jnp.ones((8, 4))
    assert constrain(x, "batch", None) is x
    assert "sharding_constraint" not in str(jax.make_jaxpr(lambda x: constrain(x, "batch", None))(x))


def test_constrain_pins_an_activation_under_a_mesh():
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: constrain(x + 1, "batch", None))(jnp.ones((8, 4)))
        odd = jax.jit(lambda x: constrain(x + 1, "batch", None))(jnp.ones((6, 4)))
    assert y.sharding.is_equivalent_to(jax.NamedSharding(mesh, Spec(("data", "fsdp"))), 2)
    assert y.addressable_shards[0].data.shape == (1, 4) and odd.addressable_shards[0].data.shape == (6, 4)


def test_rows_are_placed_over_data_and_fsdp():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    rows = {"tokens": np.arange(24).reshape(8, 3), "ids": np.arange(8), "odd": np.arange(5)}
    placed = shard_batch(mesh, rows)
    jax.tree.map(np.testing.assert_array_equal, placed, rows)
    assert placed["tokens"].addressable_shards[0].data.shape == (2, 3)
    assert placed["ids"].sharding == rows_sharding(mesh, rows["ids"]) == jax.NamedSharding(mesh, Spec(("data", "fsdp")))
    assert placed["odd"].sharding.is_fully_replicated and replicated(mesh).is_fully_replicated


@pytest.mark.parametrize("error", [RuntimeError("Unable to initialize backend 'cuda'\nand more"), AssertionError()])
def test_a_backend_that_is_not_there_is_a_mistake_of_the_user(monkeypatch, error):
    def fail():
        raise error

    monkeypatch.setattr(jax, "device_count", fail)
    with pytest.raises(UserError, match="no device to run on: .*JAX_PLATFORMS, or install"):
        make_mesh(MeshConfig())


def test_64_bits_are_refused_instead_of_drawing_other_masks():
    with jax.enable_x64(True), pytest.raises(UserError, match="JAX_ENABLE_X64 is set"):
        make_mesh(MeshConfig())


@pytest.mark.parametrize(
    ("axes", "kind"), [(("x", "y", "z"), AxisType.Auto), (AXES, AxisType.Explicit), (AXES[::-1], AxisType.Auto)]
)
def test_a_mesh_by_hand_has_the_axes_that_the_rules_name(axes, kind):
    with pytest.raises(UserError, match="mesh: its axes are "):
        check_mesh(jax.make_mesh((2, 2, 2), axes, axis_types=(kind,) * 3))
    made = jax.make_mesh((2, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3)
    check_mesh(made)
    with jax.enable_x64(True), pytest.raises(UserError, match="JAX_ENABLE_X64 is set"):
        check_mesh(made)


def test_random_draws_do_not_depend_on_the_default_dtype():
    rows = jnp.arange(3, dtype=jnp.int32)
    key = jax.random.key(0)
    draws = []
    for wide in (False, True):
        with jax.enable_x64(wide):
            order = KeyedNoise(key, rows).uniform(jnp.zeros(3, jnp.int32), (3, 4))
            draws.append([np.asarray(row_uniforms(key, rows, 5)), np.asarray(order)])
    for narrow, wide in zip(*draws, strict=True):
        assert narrow.dtype == np.float32 and np.array_equal(narrow, wide)


def test_what_is_gathered_is_cut_over_the_other_axes_only():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    for before, after in (
        (Spec("fsdp", "tensor"), Spec(None, "tensor")),
        (Spec(("data", "fsdp"), None), Spec("data", None)),
        (Spec(None, ("data", "tensor")), Spec(None, ("data", "tensor"))),
        (Spec(), Spec()),
    ):
        assert gathered(NamedSharding(mesh, before)).spec == after
