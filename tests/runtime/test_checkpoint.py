"""Checkpoints round-trip bit for bit, land where they are asked to, and a torn one is none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d1jax.config import MeshConfig, OptimizerConfig
from d1jax.runtime.checkpoint import Checkpoints
from d1jax.runtime.mesh import make_mesh, place_rows
from d1jax.runtime.optimizer import make_optimizer, new_state


@pytest.fixture
def state():
    mesh = make_mesh(MeshConfig())
    params = place_rows(mesh, {"params": {"wte": np.arange(32.0, dtype=np.float32).reshape(8, 4)}})
    return new_state(make_optimizer(OptimizerConfig(), 10), params, mesh)


def test_round_trip_is_exact_and_keeps_placement(tmp_path, state):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() is None
    checkpoints.save(3, {"trainable": state.trainable, "optimizer": state.optimizer})
    example = jax.tree.map(jnp.zeros_like, state)
    loaded = checkpoints.load(3, {"trainable": example.trainable, "optimizer": example.optimizer})
    jax.tree.map(np.testing.assert_array_equal, loaded["trainable"], state.trainable)
    jax.tree.map(np.testing.assert_array_equal, loaded["optimizer"], state.optimizer)
    assert loaded["trainable"]["params"]["wte"].sharding == example.trainable["params"]["wte"].sharding
    assert jax.tree.structure(loaded["optimizer"]) == jax.tree.structure(state.optimizer)


def test_part_of_a_checkpoint_can_be_loaded(tmp_path, state):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"trainable": state.trainable, "optimizer": state.optimizer})
    assert set(checkpoints.load(1, {"trainable": state.trainable})) == {"trainable"}


def test_nothing_saved_is_deleted_or_overwritten(tmp_path, state):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 5):
        checkpoints.save(step, {"trainable": state.trainable})
    assert checkpoints.steps() == [1, 2, 5] and checkpoints.latest() == 5
    with pytest.raises(Exception, match="5"):
        checkpoints.save(5, {"trainable": state.trainable})
    with pytest.raises(KeyError, match=r"step 4.*\[1, 2, 5\]"):
        checkpoints.load(4, {"trainable": state.trainable})


def test_a_torn_checkpoint_is_none(tmp_path, state):
    """What a killed save leaves behind has a temporary name and is not taken for a step."""
    Checkpoints(tmp_path).save(1, {"trainable": state.trainable})
    torn = tmp_path / "2.orbax-checkpoint-tmp"
    torn.mkdir()
    (torn / "half").write_text("x")
    assert Checkpoints(tmp_path).latest() == 1 and torn.exists()  # a reader deletes nothing: the save may be under way
