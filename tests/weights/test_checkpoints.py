"""Checkpoints round-trip bit for bit, land where they are asked to, a torn one is none, and a damaged one says so."""

import json
import os
import resource
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d1jax.config import MeshConfig, OptimizerConfig, UserError
from d1jax.models import processes
from d1jax.models.sharding import make_mesh, shard_batch
from d1jax.training.optimizer import in_host_memory, make_optimizer, new_state
from d1jax.weights import checkpoints
from d1jax.weights.checkpoints import RECORD, Checkpoints, DamagedCheckpoint


@pytest.fixture
def state():
    mesh = make_mesh(MeshConfig())
    params = shard_batch(mesh, {"params": {"wte": np.arange(32.0, dtype=np.float32).reshape(8, 4)}})
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


def test_moments_that_wait_on_the_host_are_saved_and_loaded_to_there(tmp_path, state):
    away = in_host_memory(state)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"optimizer": away.optimizer})
    loaded = checkpoints.load(1, {"optimizer": away.optimizer})["optimizer"]
    jax.tree.map(np.testing.assert_array_equal, loaded, state.optimizer)
    kinds = [[x.sharding.memory_kind for x in jax.tree.leaves(tree)] for tree in (loaded, away.optimizer)]
    assert kinds[0] == kinds[1] and "pinned_host" in kinds[0]
    here = Checkpoints(tmp_path).load(1, {"optimizer": state.optimizer})["optimizer"]
    jax.tree.map(np.testing.assert_array_equal, here, state.optimizer)


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


# -- damage ------------------------------------------------------------------------------------------------------------


def damaged(tmp_path, state, damage, items=("trainable", "optimizer")):
    """What is said of step 3 after `damage` was done to its folder; step 2 still loads."""
    checkpoints = Checkpoints(tmp_path)
    tree = {"trainable": state.trainable, "optimizer": state.optimizer}
    for step in (2, 3):
        checkpoints.save(step, tree)
    checkpoints.close()
    damage(tmp_path / "3")
    checkpoints = Checkpoints(tmp_path)
    like = {name: tree[name] for name in items}
    with pytest.raises(DamagedCheckpoint) as caught:
        checkpoints.load(3, like)
    assert caught.value.step == 3 and str(tmp_path / "3") in str(caught.value) and "\n" not in str(caught.value)
    assert checkpoints.last_good(3, like) == 2
    return str(caught.value)


def data_files(folder):
    return [path for path in folder.glob("trainable/**/d/*") if path.is_file()]


def test_a_cut_data_file_is_told_in_a_line_and_nothing_else(tmp_path, state, capfd, caplog):
    def cut(folder):
        for file in data_files(folder):
            os.truncate(file, 30)

    assert "step 3 is damaged" in damaged(tmp_path, state, cut, ("trainable",))
    assert capfd.readouterr().err == "" and caplog.text == ""


@pytest.mark.parametrize("at", [0.2, 0.4, 0.5, 0.6, 0.8])
def test_a_bit_that_flipped_is_noticed_wherever_it_is(tmp_path, at):
    """Orbax loads most of them without a word."""
    noise = jax.random.normal(jax.random.key(0), (64, 64))

    def flip(folder):
        largest = max(data_files(folder), key=lambda file: file.stat().st_size)
        content = bytearray(largest.read_bytes())
        content[int(at * len(content))] ^= 4
        largest.write_bytes(content)

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"trainable": {"w": noise}})
    flip(tmp_path / "1")
    with pytest.raises(DamagedCheckpoint, match="step 1 is damaged"):
        checkpoints.load(1, {"trainable": {"w": noise}})


def test_what_is_missing_is_named(tmp_path, state):
    message = damaged(tmp_path, state, lambda folder: shutil.rmtree(folder / "optimizer"))
    assert f"{tmp_path / '3' / 'optimizer'} is missing" in message


@pytest.mark.parametrize("damage", [shutil.rmtree, lambda folder: (folder / RECORD).unlink()])
def test_an_empty_folder_is_a_damaged_step(tmp_path, state, damage):
    def empty(folder):
        damage(folder)
        folder.mkdir(exist_ok=True)

    assert f"{tmp_path / '3' / RECORD} is missing" in damaged(tmp_path, state, empty)


def test_a_cut_record_is_a_damaged_step(tmp_path, state):
    assert "is not readable" in damaged(tmp_path, state, lambda folder: os.truncate(folder / RECORD, 50))


def test_a_step_under_another_name_is_refused(tmp_path, state):
    def exchange(folder):
        shutil.rmtree(folder)
        shutil.copytree(folder.parent / "2", folder)

    assert "holds step 2 under another name" in damaged(tmp_path, state, exchange)


@pytest.mark.parametrize("damage", ["record", "trainable", "data", "shape"])
def test_what_one_of_several_processes_finds_all_of_them_are_told(tmp_path, state, monkeypatch, damage):
    """Else this one would go on to the checkpoint before, and the others would wait for it."""
    Checkpoints(tmp_path).save(1, {"trainable": state.trainable})
    like, told = {"trainable": state.trainable}, []
    if damage == "record":
        (tmp_path / "1" / RECORD).unlink()
    elif damage == "trainable":
        shutil.rmtree(tmp_path / "1" / "trainable")
    elif damage == "data":
        for file in data_files(tmp_path / "1"):
            os.truncate(file, 30)
    else:
        like = {"trainable": {"params": {"wte": jnp.zeros(3)}}}
    monkeypatch.setattr(processes, "gathered", lambda value: told.append(value) or [None, value])
    with pytest.raises(UserError) as mine:
        Checkpoints(tmp_path).load(1, like)
    is_damaged, words = told[-1]
    assert words in str(mine.value) and is_damaged == isinstance(mine.value, DamagedCheckpoint) == (damage != "shape")


def test_what_another_process_finds_is_raised_here(tmp_path, state, monkeypatch):
    Checkpoints(tmp_path).save(1, {"trainable": state.trainable})
    for other, kind in (([True, "1/_METADATA is missing"], DamagedCheckpoint), ([False, "another model"], UserError)):
        monkeypatch.setattr(processes, "gathered", lambda value, other=other: [value, other])
        with pytest.raises(kind, match=other[1]):
            Checkpoints(tmp_path).load(1, {"trainable": state.trainable})


def test_a_checkpoint_from_before_there_were_digests_still_loads(tmp_path, state):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"trainable": state.trainable})
    record = tmp_path / "1" / RECORD
    record.write_text(json.dumps(json.loads(record.read_text()) | {"custom_metadata": {}}))
    loaded = Checkpoints(tmp_path).load(1, {"trainable": state.trainable})
    jax.tree.map(np.testing.assert_array_equal, loaded["trainable"], state.trainable)


@pytest.mark.parametrize("like", [{"w": (4,)}, {"w": (3,), "v": (3,)}, {"w": (3, 1)}], ids=str)
def test_a_checkpoint_of_another_model_is_not_a_damaged_one(tmp_path, like):
    """It must not be set aside: the version or configuration that made it can read it."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"trainable": {"w": jnp.zeros(3)}})
    with pytest.raises(UserError, match="was saved by another configuration or version") as refused:
        checkpoints.load(1, {"trainable": {name: jnp.zeros(shape) for name, shape in like.items()}})
    assert not isinstance(refused.value, DamagedCheckpoint)


def test_another_dtype_may_be_asked_for_and_is_still_checked(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"trainable": {"w": jnp.arange(8, dtype=jnp.float32)}})
    loaded = checkpoints.load(1, {"trainable": {"w": jnp.zeros(8, jnp.bfloat16)}})
    assert loaded["trainable"]["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(loaded["trainable"]["w"].astype(np.float32), np.arange(8, dtype=np.float32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint8", "bool"])
def test_a_digest_sees_values_places_and_nothing_of_the_mesh(dtype):
    values = (np.arange(64).reshape(8, 8) % 2).astype(dtype)
    moved = values.copy()
    moved[0], moved[3, 3] = values[0][::-1], values[3, 3]
    mesh = make_mesh(MeshConfig())
    digests = [checkpoints._digests([x])["0"] for x in (jnp.asarray(values), shard_batch(mesh, values))]
    assert digests[0] == digests[1] and digests[0].startswith(dtype)
    assert checkpoints._digests([jnp.asarray(moved)])["0"] != digests[0]
    flipped = values.copy()
    flipped[7, 7] = not flipped[7, 7]
    assert checkpoints._digests([jnp.asarray(flipped)])["0"] != digests[0]


def test_a_save_that_fails_raises_at_once_and_what_was_saved_is_good(tmp_path, state, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"trainable": state.trainable})
    shutil.move(tmp_path, tmp_path.with_name("elsewhere"))  # root may write everywhere, but not into what is not there
    with pytest.raises(OSError):
        checkpoints.save(2, {"trainable": state.trainable})
    shutil.move(tmp_path.with_name("elsewhere"), tmp_path)

    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: no space left on device\nand a page more")

    monkeypatch.setattr(checkpoints._checkpointer, "save_checkpointables", full)
    with pytest.raises(OSError, match="2 cannot be written .*no space left on device"):
        checkpoints.save(2, {"trainable": state.trainable})
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1"]
    Checkpoints(tmp_path).load(1, {"trainable": state.trainable})


def test_where_files_cannot_grow_one_error_says_so(tmp_path, state, monkeypatch):
    """A full disk, as far as a test can have one. Orbax's threads fail too, and print nothing of it."""
    printed = []
    monkeypatch.setattr(threading, "excepthook", printed.append)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"trainable": state.trainable})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(OSError, match="/2 cannot be written"):
            checkpoints.save(2, {"trainable": state.trainable})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert printed == [] and threading.excepthook == printed.append
    assert Checkpoints(tmp_path).steps() == [1]
    Checkpoints(tmp_path).load(1, {"trainable": state.trainable})


def test_keep_says_which_checkpoints_stay(tmp_path, state):
    checkpoints = Checkpoints(tmp_path, owner=True, keep=lambda steps: {2, steps[-1]})
    for step in (1, 2, 3, 4):
        checkpoints.save(step, {"trainable": state.trainable})
    assert checkpoints.steps() == [2, 4] and sorted(path.name for path in tmp_path.iterdir()) == ["2", "4"]
