"""Logits and gradients of every parameter against the same architecture written in PyTorch, on random small configurations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d1jax.config import ModelConfig
from d1jax.models.families import FAMILIES
from d1jax.models.transformer import head_matrix, hidden_states, project
from d1jax.weights.convert import to_published

torch = pytest.importorskip("torch", reason="PyTorch is an extra: pip install 'd1jax[torch]'")
pytestmark = pytest.mark.torch

VARIANTS = {
    "multi-head": {},
    "grouped-query": {"heads": 4, "kv_heads": 2},
    "biases": {"qkv_bias": True},
    "tied head": {"tied_head": True},
    "all of it": {
        "width": 32,
        "layers": 3,
        "heads": 4,
        "kv_heads": 1,
        "qkv_bias": True,
        "tied_head": True,
        "rope_theta": 1e4,
    },
}


def torch_logits(tensors, config, tokens):
    """LLaDA's forward pass for unpadded rows, from a state dict with its names."""
    rows, columns = tokens.shape
    size = config.width // config.heads

    def norm(x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config.norm_eps) * tensors[f"{name}.weight"]

    def linear(x, name):
        return torch.nn.functional.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    frequency = 1.0 / config.rope_theta ** (torch.arange(0, size, 2).float() / size)
    angle = torch.outer(torch.arange(columns).float(), frequency)
    cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()

    def rope(x):
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    x = tensors["model.transformer.wte.weight"][tokens]
    for layer in range(config.layers):
        block = f"model.transformer.blocks.{layer}."
        h = norm(x, block + "attn_norm")
        q, k, v = (
            linear(h, block + f"{name}_proj").view(rows, columns, heads, size).transpose(1, 2)
            for name, heads in (("q", config.heads), ("k", config.kv_heads), ("v", config.kv_heads))
        )
        k, v = (t.repeat_interleave(config.heads // config.kv_heads, dim=1) for t in (k, v))
        mixed = torch.nn.functional.scaled_dot_product_attention(rope(q), rope(k), v)
        x = x + linear(mixed.transpose(1, 2).reshape(rows, columns, -1), block + "attn_out")
        h = norm(x, block + "ff_norm")
        gated = torch.nn.functional.silu(linear(h, block + "ff_proj")) * linear(h, block + "up_proj")
        x = x + linear(gated, block + "ff_out")
    head = "model.transformer.wte.weight" if config.tied_head else "model.transformer.ff_out.weight"
    return norm(x, "model.transformer.ln_f") @ tensors[head].T


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_equal_pytorch(tiny, variant):
    model, variables = tiny(**VARIANTS[variant])
    config: ModelConfig = model.config
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 7))
    weight = np.random.default_rng(1).standard_normal((2, 7, config.vocab_size)).astype(np.float32)

    def loss(variables):
        positions = jnp.broadcast_to(jnp.arange(7)[None], tokens.shape)
        hidden = hidden_states(model, variables, jnp.asarray(tokens), positions, jnp.full(2, 7))
        logits = project(hidden, head_matrix(variables))
        return jnp.sum(weight * jnp.tanh(logits)), logits

    (_, logits), gradient = jax.value_and_grad(loss, has_aux=True)(variables)

    tensors = {
        name: torch.tensor(np.array(value)).requires_grad_()
        for name, value in to_published(variables, config, FAMILIES["llada"]).items()
    }
    expected = torch_logits(tensors, config, torch.tensor(tokens))
    (torch.tensor(weight) * torch.tanh(expected)).sum().backward()

    np.testing.assert_allclose(logits, expected.detach().numpy(), atol=1e-4)
    got = to_published(gradient, config, FAMILIES["llada"])
    assert got.keys() == tensors.keys()
    for name, tensor in tensors.items():
        expected_gradient = tensor.grad.numpy()
        scale = max(np.abs(expected_gradient).max(), 1.0)  # fp32 rounds relative to the largest entry
        np.testing.assert_allclose(got[name] / scale, expected_gradient / scale, atol=2e-5, err_msg=name)
