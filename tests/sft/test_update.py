"""The compiled SFT step: one program, the same result however the batch is cut, and a loss that falls."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d1jax.config import MeshConfig, ModelConfig, OptimizerConfig, SftConfig
from d1jax.data.tokenizers import SpecialTokens
from d1jax.diffusion.canvas import Canvas
from d1jax.models.sharding import make_mesh, shard_batch
from d1jax.models.transformer import Transformer, initialize
from d1jax.sft.loop import make_update
from d1jax.training.optimizer import make_optimizer, new_state

SPECIAL = SpecialTokens(mask=9, end=8)
MODEL = Transformer(ModelConfig(width=16, layers=1, heads=2, kv_heads=2, mlp_width=24, vocab_size=16, rope_theta=100))
CONFIG = SftConfig(steps=30, batch_size=16, optimizer=OptimizerConfig(learning_rate=1e-2))


def setup(mesh_config=MeshConfig(), grad_accumulation_steps=1):  # noqa: B008, a frozen dataclass
    mesh = make_mesh(mesh_config)
    config = dataclasses.replace(CONFIG, grad_accumulation_steps=grad_accumulation_steps)
    optimizer = make_optimizer(config.optimizer, config.steps)
    state = new_state(optimizer, initialize(MODEL, jax.random.key(0), mesh), mesh)
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 8, (16, 4)).astype(np.int32)
    clean = Canvas(prompt[:, ::-1].copy(), prompt, np.full(16, 4, np.int32))
    return make_update(MODEL, optimizer, config, SPECIAL, state), state, shard_batch(mesh, clean)


def test_compiles_once_and_learns():
    update, state, clean = setup()
    losses = []
    for step in range(30):
        state, metrics = update(state, {}, clean, jax.random.fold_in(jax.random.key(1), step))
        losses.append(float(metrics["loss"]))
    assert update._cache_size() == 1
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_does_not_depend_on_micro_batches_or_mesh():
    results = []
    for mesh, parts in ((MeshConfig(), 1), (MeshConfig(), 2), (MeshConfig(data=2, fsdp=2, tensor=2), 1)):
        update, state, clean = setup(mesh, parts)
        results.append(update(state, {}, clean, jax.random.key(2)))
    (first, expected), *others = results
    for state, metrics in others:
        np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)
        np.testing.assert_allclose(metrics["grad_norm"], expected["grad_norm"], rtol=1e-4)
        assert float(metrics["mask/frac"]) == float(expected["mask/frac"])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-4), state.trainable, first.trainable)


def test_start_of_a_stage_is_not_donated_away():
    """The update donates its state; the weights it was made from stay usable."""
    mesh = make_mesh(MeshConfig())
    start = initialize(MODEL, jax.random.key(0), mesh)
    optimizer = make_optimizer(CONFIG.optimizer, 10)
    state = new_state(optimizer, start, mesh)
    update = make_update(MODEL, optimizer, CONFIG, SPECIAL, state)
    update(state, {}, setup()[2], jax.random.key(0))
    assert np.isfinite(jnp.sum(start["params"]["wte"]))


@pytest.mark.parametrize("learning_rate", [1e-2, 1e-6])
def test_a_curve_with_bf16_weights_lies_on_that_of_fp32(learning_rate):
    """param_dtype says what comes in and goes out; training is in fp32 masters either way. At 1e-6 bf16 weights would hardly move."""
    curves, moved, clean = {}, {}, setup()[2]
    for dtype in ("float32", "bfloat16"):
        model = Transformer(dataclasses.replace(MODEL.config, param_dtype=dtype))
        mesh, settings = make_mesh(MeshConfig()), dataclasses.replace(CONFIG.optimizer, learning_rate=learning_rate)
        optimizer = make_optimizer(settings, CONFIG.steps)
        start = jax.tree.map(lambda x: x.astype(jnp.bfloat16), initialize(MODEL, jax.random.key(0), mesh))
        state = new_state(optimizer, jax.tree.map(lambda x, kind=dtype: x.astype(kind), start), mesh)
        update, losses = make_update(model, optimizer, CONFIG, SPECIAL, state), []
        for step in range(40):
            state, metrics = update(state, {}, clean, jax.random.fold_in(jax.random.key(1), step))
            losses.append(float(metrics["loss"]))
        curves[dtype] = losses
        ends = zip(jax.tree.leaves(state.trainable), jax.tree.leaves(start), strict=True)
        moved[dtype] = np.mean(np.concatenate([np.ravel(np.asarray(a) != np.asarray(b, np.float32)) for a, b in ends]))
    np.testing.assert_allclose(curves["bfloat16"], curves["float32"], rtol=1e-4)
    assert abs(moved["bfloat16"] - moved["float32"]) < 0.01 and moved["float32"] > 0.5
