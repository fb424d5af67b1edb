"""The masked SFT loss: golden values, plain numpy, and independence of how the batch is cut."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from d1jax.diffusion.canvas import Canvas
from d1jax.diffusion.forward_process import apply_mask
from d1jax.models.families import FAMILIES
from d1jax.sft.loss import NORMALIZERS, masked_loss
from d1jax.weights.names import to_published


@pytest.fixture
def batch(golden):
    """The golden rows: the whole sequence stands in the completion, and the prompt part of it is never eligible."""
    io = {name.removeprefix("sft/"): value for name, value in golden.io.items() if name.startswith("sft/")}
    ids = jnp.asarray(io["input_ids"])
    rows = ids.shape[0]
    clean = Canvas(ids, jnp.zeros((rows, 0), jnp.int32), jnp.zeros(rows, jnp.int32))
    eligible = np.arange(ids.shape[1])[None] >= io["prompt_lengths"][:, None]
    probability = jnp.asarray(io["p_mask"]).reshape(rows, -1)[:, 0]
    corruption = apply_mask(clean, jnp.asarray(io["loss_mask"]), probability, golden.special.mask)
    np.testing.assert_array_equal(corruption.canvas.completion_BC, io["noisy_ids"])
    return io, clean, corruption, eligible


@pytest.mark.smoke
@pytest.mark.parametrize(("normalizer", "expected"), [("per_row", "loss_llada"), ("batch_token", "loss_d1")])
def test_golden_losses(golden, batch, normalizer, expected):
    io, clean, corruption, eligible = batch
    value = masked_loss(golden.model, golden.variables, clean, corruption, eligible, NORMALIZERS[normalizer](eligible))
    np.testing.assert_allclose(value, io[expected], atol=1e-4)


def test_golden_gradients(golden, batch):
    io, clean, corruption, eligible = batch
    weight = NORMALIZERS["per_row"](eligible)
    gradient = jax.jit(jax.grad(lambda v: masked_loss(golden.model, v, clean, corruption, eligible, weight)))(
        golden.variables
    )
    np.testing.assert_allclose(optax.tree.norm(gradient), io["grad_global_norm"], rtol=1e-4)
    tensors = to_published(gradient, golden.config, FAMILIES["llada"])
    checked = [name for name in io if name.startswith("grad/")]
    assert len(checked) == 3
    for name in checked:
        np.testing.assert_allclose(tensors[name.removeprefix("grad/")], io[name], atol=1e-4)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_normalizers_equal_their_definition(normalizer):
    eligible = np.array([[1, 1, 1, 0], [1, 0, 0, 0]], bool)
    expected = {"per_row": [1 / (2 * 3), 1 / (2 * 1)], "batch_token": [1 / 4, 1 / 4]}[normalizer]
    np.testing.assert_allclose(NORMALIZERS[normalizer](jnp.asarray(eligible)), expected)


def test_only_hidden_tokens_count(golden, batch):
    """Another target at a position that is not hidden changes nothing."""
    io, clean, corruption, eligible = batch
    weight = NORMALIZERS["per_row"](eligible)
    other = clean._replace(completion_BC=jnp.where(corruption.masked_BC, clean.completion_BC, 7))
    losses = [masked_loss(golden.model, golden.variables, c, corruption, eligible, weight) for c in (clean, other)]
    assert float(losses[0]) == float(losses[1])


def test_only_eligible_tokens_count(golden, batch):
    io, clean, corruption, eligible = batch
    everywhere = corruption._replace(masked_BC=jnp.ones_like(corruption.masked_BC))
    weight = NORMALIZERS["per_row"](eligible)
    value = masked_loss(golden.model, golden.variables, clean, everywhere, eligible, weight)
    eligible_only = everywhere._replace(masked_BC=jnp.asarray(eligible))
    only = masked_loss(golden.model, golden.variables, clean, eligible_only, np.ones_like(eligible), weight)
    assert float(value) == float(only)
