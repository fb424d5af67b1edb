"""Logits and gradients of every parameter against transformers' Llama and Qwen2, made bidirectional by an additive 4-D mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from d1jax.models.families import FAMILIES
from d1jax.models.transformer import head_matrix, hidden_states, project
from d1jax.weights.hf_io import in_memory, save_weights
from d1jax.weights.names import to_published

torch = pytest.importorskip("torch", reason="PyTorch is an extra: pip install 'd1jax[torch]'")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch

QWEN = {"qkv_bias": True, "rope_full_precision": False, "norm_eps": 1e-6}
VARIANTS = {
    "llama": ("Llama", {}),
    "llama, grouped queries": ("Llama", {"heads": 4, "kv_heads": 2}),
    "llama, tied head": ("Llama", {"tied_head": True, "rope_theta": 1e4}),
    "qwen2": ("Qwen2", QWEN),
    "qwen2, grouped queries": ("Qwen2", {**QWEN, "heads": 4, "kv_heads": 1, "rope_theta": 1e6}),
    "qwen2, all of it": ("Qwen2", {**QWEN, "width": 32, "layers": 3, "heads": 4, "kv_heads": 2, "tied_head": True}),
}
NAMES = FAMILIES["dream"]  # Dream is a Qwen2, and Llama's tensors have the same names


def reference(kind, config):
    """The random PyTorch model of this architecture."""
    settings = getattr(transformers, f"{kind}Config")(
        hidden_size=config.width, num_hidden_layers=config.layers, num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads, intermediate_size=config.mlp_width, vocab_size=config.vocab_size,
        rms_norm_eps=config.norm_eps, tie_word_embeddings=config.tied_head, max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta}, attn_implementation="eager",
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForCausalLM")(settings).eval()


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def both(request, tiny):
    kind, changes = request.param
    model, variables = tiny(**changes)
    torch_model = reference(kind, model.config)
    tensors = {name: torch.tensor(np.array(x)) for name, x in to_published(variables, model.config, NAMES).items()}
    expected = {name for name in torch_model.state_dict() if not (model.config.tied_head and name == "lm_head.weight")}
    assert set(tensors) == expected
    torch_model.load_state_dict(tensors, strict=not model.config.tied_head)  # a tied head is no tensor of its own
    return model, variables, torch_model


def inputs(config, lengths=(9, 9)):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (len(lengths), max(lengths)))
    real = np.arange(max(lengths))[None, :] < np.array(lengths)[:, None]
    hidden = np.where(real, 0.0, np.finfo(np.float32).min)[:, None, None, :]
    mask = torch.tensor(np.broadcast_to(hidden, (len(lengths), 1, max(lengths), max(lengths))).astype(np.float32))
    return tokens, real, mask


def ours(model, variables, tokens, lengths):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None, :], tokens.shape)
    return project(hidden_states(model, variables, tokens, positions, jnp.array(lengths)), head_matrix(variables))


@pytest.mark.parametrize("lengths", [(9, 9), (9, 5)], ids=["no padding", "padding"])
def test_logits_agree(both, lengths):
    model, variables, torch_model = both
    tokens, real, mask = inputs(model.config, lengths)
    with torch.no_grad():
        theirs = torch_model(torch.tensor(tokens), attention_mask=mask).logits.numpy()
    # fp32 adds up in another order on every machine: the logits of the widest case reach 18.
    close = max(1e-4, 1e-5 * np.abs(theirs[real]).max())
    np.testing.assert_allclose(
        ours(model, variables, jnp.array(tokens), lengths)[real], theirs[real], rtol=0, atol=close
    )


def test_the_last_token_reaches_the_first_logits(both):
    """The mask of the comparison really makes the reference bidirectional."""
    model, _, torch_model = both
    tokens, _, mask = inputs(model.config)
    changed = tokens.copy()
    changed[:, -1] = (changed[:, -1] + 1) % model.config.vocab_size
    with torch.no_grad():
        first, second = (torch_model(torch.tensor(x), attention_mask=mask).logits[:, 0] for x in (tokens, changed))
    assert (first - second).abs().max() > 1e-3


def test_gradients_of_every_parameter_agree(both):
    model, variables, torch_model = both
    tokens, _, mask = inputs(model.config)
    weight = np.random.default_rng(1).standard_normal((*tokens.shape, model.config.vocab_size)).astype(np.float32)
    torch_model.zero_grad()
    (torch_model(torch.tensor(tokens), attention_mask=mask).logits * torch.tensor(weight)).sum().backward()
    theirs = {name: parameter.grad.numpy() for name, parameter in torch_model.named_parameters()}
    gradient = jax.jit(jax.grad(lambda v: jnp.sum(ours(model, v, jnp.array(tokens), (9, 9)) * weight)))(variables)
    found = to_published(gradient, model.config, NAMES)
    assert set(found) == set(theirs)
    for name, value in theirs.items():
        np.testing.assert_allclose(found[name], value, atol=1e-4 * max(1.0, np.abs(value).max()), err_msg=name)


def test_an_exported_directory_loads_strictly_and_gives_equal_logits(both, tmp_path):
    model, variables, torch_model = both
    arrays = in_memory(variables, model.config, NAMES)
    save_weights(arrays, model.config, NAMES, tmp_path / "out", lambda beside: None)
    stored = {name: torch.tensor(x) for name, x in load_file(tmp_path / "out" / "model.safetensors").items()}
    fresh = reference("Qwen2" if model.config.qkv_bias else "Llama", model.config)
    if model.config.tied_head:
        stored["lm_head.weight"] = stored["model.embed_tokens.weight"]
    fresh.load_state_dict(stored, strict=True)
    tokens, _, mask = inputs(model.config)
    with torch.no_grad():
        theirs = [m(torch.tensor(tokens), attention_mask=mask).logits for m in (torch_model, fresh)]
    assert torch.equal(*theirs)
