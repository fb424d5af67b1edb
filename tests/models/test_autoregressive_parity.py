"""Checkpoints as transformers writes its own Llama, Qwen2 and Qwen3, read by d1jax: logits, gradients, and what comes back."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from d1jax import load_pretrained, save_pretrained, train
from d1jax.config.parse import parse
from d1jax.models.transformer import Transformer, head_matrix, hidden_states, project
from d1jax.weights.names import to_published
from tests.weights.test_adapted import write_tokenizer

torch = pytest.importorskip("torch", reason="PyTorch is an extra: pip install 'd1jax[torch]'")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch

SIZES = dict(hidden_size=24, num_hidden_layers=2, intermediate_size=40, vocab_size=50, max_position_embeddings=64)
VARIANTS = {
    "llama": ("Llama", {"num_attention_heads": 4, "num_key_value_heads": 4}),
    "llama, grouped queries, tied head": (
        "Llama", {"num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True}
    ),
    "qwen2": ("Qwen2", {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10}),
    "qwen3, tied head": (
        "Qwen3", {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4, "tie_word_embeddings": True}
    ),
}  # fmt: skip


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def both(request, tmp_path):
    """(d1jax's policy, transformers' model) of one directory."""
    kind, changes = request.param
    torch.manual_seed(0)
    settings = getattr(transformers, f"{kind}Config")(
        **SIZES, **changes, rope_parameters={"rope_type": "default", "rope_theta": 1e4}, attn_implementation="eager",
        bos_token_id=1, eos_token_id=2, pad_token_id=None,
    )  # fmt: skip
    theirs = getattr(transformers, f"{kind}ForCausalLM")(settings).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            if weight.ndim == 1:  # norms and biases that say something
                weight.add_(0.3 * torch.randn(weight.shape))
    theirs.save_pretrained(tmp_path / "checkpoint")
    return load_pretrained(tmp_path / "checkpoint"), theirs


def ours(model: Transformer, variables, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None, :], tokens.shape)
    lengths = jnp.full(tokens.shape[0], tokens.shape[1])
    return project(hidden_states(model, variables, tokens, positions, lengths), head_matrix(variables))


def tokens_of(rows=3, columns=11):
    return np.random.default_rng(0).integers(0, SIZES["vocab_size"], (rows, columns))


def test_causal_logits_agree(both):
    policy, theirs = both
    assert policy.config.attention_mask == "causal" and policy.config.alignment == "shifted"
    tokens = tokens_of()
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(ours(policy.model, policy.variables, jnp.array(tokens)), expected, rtol=0, atol=1e-4)


def test_the_same_weights_without_the_mask_agree_with_a_mask_of_zeros(both):
    policy, theirs = both
    tokens = tokens_of()
    with torch.no_grad():
        seen = torch.zeros((3, 1, 11, 11))
        expected = theirs(torch.tensor(tokens), attention_mask=seen).logits.numpy()
    model = Transformer(dataclasses.replace(policy.config, attention_mask="full"))
    found = ours(model, policy.variables, jnp.array(tokens))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert np.abs(found - np.asarray(ours(policy.model, policy.variables, jnp.array(tokens)))).max() > 1e-2


def test_gradients_of_the_next_token_loss_agree(both):
    policy, theirs = both
    tokens = tokens_of()
    theirs(torch.tensor(tokens), labels=torch.tensor(tokens)).loss.backward()

    def loss(variables):
        logp = jax.nn.log_softmax(ours(policy.model, variables, jnp.array(tokens))[:, :-1])
        return -jnp.mean(jnp.take_along_axis(logp, jnp.array(tokens)[:, 1:, None], axis=2))

    gradients = to_published(jax.grad(loss)(policy.variables), policy.config, policy.family)
    expected = {name: weight.grad.numpy() for name, weight in theirs.named_parameters()}
    assert set(gradients) == set(expected)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, expected[name], rtol=0, atol=1e-5, err_msg=name)


def test_what_is_exported_is_loaded_strictly_with_equal_logits(both, tmp_path):
    policy, theirs = both
    save_pretrained(policy, tmp_path / "out")
    again, report = type(theirs).from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    tokens = torch.tensor(tokens_of())
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, theirs(tokens).logits, rtol=0, atol=0)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == theirs.config.model_type


def test_llama_3_s_scaled_positions_are_refused(tmp_path):
    settings = transformers.LlamaConfig(
        **SIZES, num_attention_heads=4, num_key_value_heads=4,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    )  # fmt: skip
    transformers.LlamaForCausalLM(settings).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="rope_parameters = .*llama3.* is not supported"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
def test_what_is_made_of_it_exports_as_a_dream_that_pytorch_loads_strictly(tmp_path, kind):
    """Dream is a Qwen2 without a mask: the same names, biases on q, k and v, logits of row i for token i + 1."""
    torch.manual_seed(1)
    settings = getattr(transformers, f"{kind}Config")(
        **SIZES, num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    getattr(transformers, f"{kind}ForCausalLM")(settings).save_pretrained(tmp_path / "causal")
    write_tokenizer(tmp_path / "causal", *(f"<{number}>" for number in range(43)))  # as many ids as rows
    text = tmp_path / "text.txt"
    text.write_text("abcdabcd" * 60)
    given = {
        "run_dir": tmp_path / "run", "init_from": tmp_path / "causal", "stages": "[adapt]", "model.alignment": "shifted",
        "adapt.data": f"{{{text}: 1}}", "adapt.steps": 2, "adapt.batch_size": 8, "adapt.length": 8, "adapt.validation_windows": 4,
        "adapt.order_windows": 0, "adapt.optimizer.learning_rate": 0.02,
    }  # fmt: skip
    train.run(parse([f"--{key}={value}" for key, value in given.items()]))
    policy = load_pretrained(tmp_path / "run")
    save_pretrained(policy, tmp_path / "out")
    published = json.loads((tmp_path / "out" / "config.json").read_text())
    assert published["model_type"] == "Dream" and published["vocab_size"] == 64 and published["mask_token_id"] == 50

    dream = transformers.Qwen2Config(
        **{
            name: value
            for name, value in published.items()
            if name not in ("model_type", "architectures", "torch_dtype")
        },
        attn_implementation="eager",
    )
    theirs = transformers.Qwen2ForCausalLM(dream).eval()
    tensors = {name: torch.tensor(x) for name, x in load_file(tmp_path / "out" / "model.safetensors").items()}
    theirs.load_state_dict(tensors, strict=True)
    tokens = np.array([[0, 50, 3, 50, 50, 1], [5, 4, 50, 2, 0, 50]])
    with torch.no_grad():
        logits = theirs(torch.tensor(tokens), attention_mask=torch.zeros((2, 1, 6, 6))).logits.numpy()
    np.testing.assert_allclose(policy.logits(tokens)[:, 1:], logits[:, :-1], rtol=0, atol=1e-4)
