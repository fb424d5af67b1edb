"""Loss terms against numpy written from the equations, and against the golden diffu-GRPO step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from d1jax.diffusion.canvas import Canvas
from d1jax.diffusion.likelihood import all_masked_view, score
from d1jax.models.families import FAMILIES
from d1jax.rl.objective import POOLINGS, k3, token_terms
from d1jax.weights.convert import to_published


def numpy_loss(new, old, reference, advantage, low, high, beta):
    loss = np.zeros_like(new)
    for i in range(new.shape[0]):
        for k in range(new.shape[1]):
            ratio = np.exp(new[i, k] - old[i, k])
            clipped = min(max(ratio, 1 - low), 1 + high)
            d = reference[i, k] - new[i, k]
            loss[i, k] = -min(ratio * advantage[i], clipped * advantage[i]) + beta * (np.exp(d) - d - 1)
    return loss


def test_terms_equal_plain_numpy():
    rng = np.random.default_rng(0)
    new, old, reference = (-rng.exponential(1.0, (5, 7)).astype(np.float32) for _ in range(3))
    advantage = np.array([1.0, -0.5, 0.0, 2.0, -1.5], np.float32)
    terms = token_terms(new, old, reference, advantage, clip_low=0.2, clip_high=0.3, kl_coefficient=0.04)
    np.testing.assert_allclose(
        terms.loss_BC, numpy_loss(new, old, reference, advantage, 0.2, 0.3, 0.04), rtol=1e-5, atol=1e-6
    )
    ratio = np.exp(new - old)
    np.testing.assert_array_equal(terms.clipped_high_BC, (ratio > 1.3) & (advantage[:, None] > 0))
    np.testing.assert_array_equal(terms.clipped_low_BC, (ratio < 0.8) & (advantage[:, None] < 0))


def test_a_clipped_token_has_no_gradient():
    old = jnp.zeros((2, 2))
    new = jnp.log(jnp.array([[1.5, 1.1], [0.5, 0.9]]))
    gradient = jax.grad(
        lambda x: token_terms(
            x, old, None, jnp.array([1.0, -1.0]), clip_low=0.2, clip_high=0.2, kl_coefficient=0.0
        ).loss_BC.sum()
    )(new)
    assert (np.asarray(gradient) == 0).tolist() == [[True, False], [True, False]]


def test_k3_is_not_negative_and_flat_at_the_reference():
    x = jnp.linspace(-3, 3, 31)
    assert float(k3(x, jnp.zeros(31)).min()) >= 0
    assert float(jax.grad(lambda p: k3(p, jnp.float32(-1.0)))(jnp.float32(-1.0))) == 0.0


def test_k3_is_an_unbiased_estimate_of_the_kl():
    policy, reference = jax.nn.log_softmax(jnp.array([0.3, -1.0, 0.5])), jax.nn.log_softmax(jnp.array([-0.2, 0.4, 0.1]))
    expected = jnp.sum(jnp.exp(policy) * (policy - reference))
    np.testing.assert_allclose(jnp.sum(jnp.exp(policy) * k3(policy, reference)), expected, rtol=1e-5)


@pytest.mark.parametrize("name", POOLINGS)
def test_pooling_equals_its_definition(name):
    rng = np.random.default_rng(1)
    lengths = [1, 4, 6]
    mask = (np.arange(6)[None] < np.array(lengths)[:, None]).astype(np.float32)
    loss = rng.standard_normal((3, 6)).astype(np.float32)
    expected = {
        "bnpo": sum(loss[i, : lengths[i]].sum() for i in range(3)) / sum(lengths),
        "grpo": sum(loss[i, : lengths[i]].mean() for i in range(3)) / 3,
        "dr_grpo": sum(loss[i, : lengths[i]].sum() for i in range(3)) / (3 * 6),
    }[name]
    np.testing.assert_allclose((POOLINGS[name](mask) * loss).sum(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.smoke
def test_golden_diffu_grpo_step(golden):
    """Per-token log-probabilities, KL, loss and gradients of the reference implementation."""
    io = {name.removeprefix("grpo/"): value for name, value in golden.io.items() if name.startswith("grpo/")}
    prompt = int(io["prompt_len"])
    ids = jnp.asarray(io["prompt_completion_ids"])
    canvas = Canvas(ids[:, prompt:], ids[:, :prompt], jnp.full(ids.shape[0], prompt))
    views = all_masked_view(canvas, jnp.asarray(io["prompt_token_mask"])[:, :prompt], golden.special.mask)
    np.testing.assert_array_equal(np.concatenate([views.prompt_NBP[0], views.completion_NBC[0]], 1), io["noisy_ids"])
    eps, beta = map(float, io["eps_beta"])

    def loss(variables):
        logp = score(golden.model, variables, canvas, views).logp
        terms = token_terms(
            logp, io["old_logps"], io["ref_logps"], io["advantages"], clip_low=eps, clip_high=eps, kl_coefficient=beta
        )
        return jnp.sum(POOLINGS["bnpo"](io["completion_mask"].astype(np.float32)) * terms.loss_BC), (logp, terms)

    (value, (logp, terms)), gradient = jax.value_and_grad(loss, has_aux=True)(golden.variables)
    np.testing.assert_allclose(logp, io["per_token_logps"], atol=1e-4)
    np.testing.assert_allclose(terms.kl_BC, io["per_token_kl"], atol=1e-4)
    np.testing.assert_allclose(terms.loss_BC, io["per_token_loss"], atol=1e-4)
    np.testing.assert_allclose(value, io["loss"], atol=1e-4)
    np.testing.assert_allclose(optax.tree.norm(gradient), io["grad_global_norm"], rtol=1e-4)
    tensors = to_published(gradient, golden.model.config, FAMILIES["llada"])
    checked = [name for name in io if name.startswith("grad/")]
    assert len(checked) == 4
    for name in checked:
        np.testing.assert_allclose(tensors[name.removeprefix("grad/")], io[name], atol=1e-4)
