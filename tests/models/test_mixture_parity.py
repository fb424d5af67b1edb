"""LLaDA-MoE and LLaDA2 against models of transformers that compute the same under their mask: Qwen3-MoE and GLM-4-MoE."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from d1jax import load_pretrained
from d1jax.models.transformer import head_matrix, hidden_states, project
from d1jax.weights.names import to_published

torch = pytest.importorskip("torch", reason="PyTorch is an extra: pip install 'd1jax[torch]'")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch

SIZES = dict(
    hidden_size=24, num_hidden_layers=3, num_attention_heads=4, vocab_size=50, max_position_embeddings=64, rms_norm_eps=1e-5,
    num_experts_per_tok=3, bos_token_id=1, eos_token_id=2, pad_token_id=None, attn_implementation="eager",
    experts_implementation="eager",
)  # fmt: skip
PUBLISHED = dict(
    hidden_size=24, num_hidden_layers=3, num_attention_heads=4, vocab_size=50, max_position_embeddings=64, rms_norm_eps=1e-5,
    num_experts_per_tok=3, rope_theta=1e4, rope_scaling=None, hidden_act="silu", tie_word_embeddings=False, num_experts=8,
)  # fmt: skip


def randomized(model):
    """Gains, biases of the router and all matrices such that each says something."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("e_score_correction_bias"):
                weight.copy_(0.2 * torch.rand(weight.shape))
            elif weight.ndim == 1 and "norm" in name:
                weight.add_(0.3 * torch.randn(weight.shape))
            elif weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape) / weight.shape[-1] ** 0.5)
    return model.eval()


def by_expert(tensors):
    """transformers 5 keeps the experts of a layer in one tensor: gate and up [E, 2 F, D], down [E, D, F]."""
    made = {}
    for name, tensor in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            for expert, one in enumerate(tensor):
                gate, up = np.split(one, 2)
                made[name.replace("gate_up_proj", f"{expert}.gate_proj.weight")] = gate
                made[name.replace("gate_up_proj", f"{expert}.up_proj.weight")] = up
        elif name.endswith("experts.down_proj"):
            made |= {name.replace("down_proj", f"{e}.down_proj.weight"): one for e, one in enumerate(tensor)}
        else:
            made[name] = tensor
    return made


def lladamoe():
    """(config.json, tensors, transformers' model)."""
    settings = transformers.Qwen3MoeConfig(
        **SIZES, num_key_value_heads=4, head_dim=6, num_experts=8, moe_intermediate_size=20, norm_topk_prob=False,
        decoder_sparse_step=1, mlp_only_layers=[], rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    theirs = randomized(transformers.Qwen3MoeForCausalLM(settings))
    published = dict(
        PUBLISHED, model_type="llada", architectures=["LLaDAMoEModelLM"], num_key_value_heads=4, expert_intermediate_size=20,
        dense_intermediate_size=40, shared_expert_intermediate_size=None, moe_layer_freq=[1, 1, 1], qk_layernorm=True,
        moe_router_score_function="softmax", moe_router_enable_expert_bias=False, norm_topk_prob=None, routed_scaling_factor=1,
        router_num_group=None, router_topk_group=None, clip_qkv=None, attention_bias=False, partial_rotary_factor=1,
        output_router_logits=False, router_aux_loss_coef=0.01,
    )  # fmt: skip
    return published, by_expert({name: weight.numpy() for name, weight in theirs.state_dict().items()}), theirs


def llada2():
    settings = transformers.Glm4MoeConfig(
        **SIZES, num_key_value_heads=2, head_dim=8, n_routed_experts=8, moe_intermediate_size=20, intermediate_size=40,
        n_shared_experts=1, n_group=4, topk_group=2, norm_topk_prob=True, routed_scaling_factor=2.5, first_k_dense_replace=1,
        use_qk_norm=True, attention_bias=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    )  # fmt: skip
    theirs = randomized(transformers.Glm4MoeForCausalLM(settings))
    published = dict(
        PUBLISHED, model_type="llada2_moe", architectures=["LLaDA2MoeModelLM"], num_key_value_heads=2, head_dim=8,
        moe_intermediate_size=20, intermediate_size=40, num_shared_experts=1, n_group=4, topk_group=2, norm_topk_prob=True,
        routed_scaling_factor=2.5, first_k_dense_replace=1, use_qk_norm=True, partial_rotary_factor=0.5, rotary_dim=4,
        moe_router_enable_expert_bias=True, score_function="sigmoid", router_dtype="fp32", use_bias=False, use_qkv_bias=False,
        use_rmsnorm=True, norm_head=False, norm_softmax=False, use_sliding_window=False, using_split_qkv_in_self_attention=False,
    )  # fmt: skip
    renamed = {}
    others = {
        "embed_tokens": "word_embeddings", "self_attn.o_proj": "attention.dense", "self_attn.q_norm": "attention.query_layernorm",
        "self_attn.k_norm": "attention.key_layernorm", "gate.e_score_correction_bias": "gate.expert_bias",
    }  # fmt: skip
    tensors = by_expert({name: weight.numpy() for name, weight in theirs.state_dict().items()})
    for name, tensor in tensors.items():
        for old, new in others.items():
            name = name.replace(old, new)
        renamed[name] = tensor
    for layer in range(3):
        own = [renamed.pop(f"model.layers.{layer}.self_attn.{part}_proj.weight") for part in "qkv"]
        renamed[f"model.layers.{layer}.attention.query_key_value.weight"] = np.concatenate(own)
    return published, renamed, theirs


@pytest.fixture(params=[lladamoe, llada2])
def both(request, tmp_path):
    published, tensors, theirs = request.param()
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**published, "torch_dtype": "float32", "mask_token_id": 3}))
    return load_pretrained(tmp_path), theirs, tensors


def bias_of(config, columns):
    """[1, 1, T, T]: 0 where the model's mask lets a column see another one."""
    block = np.arange(columns) // (config.mask_block or columns)
    return torch.tensor(np.where(block[None, :] <= block[:, None], 0.0, -1e30)[None, None], dtype=torch.float32)


def test_logits_and_gradients_agree(both):
    policy, theirs, tensors = both
    tokens = np.random.default_rng(0).integers(0, 50, (2, 40))
    output = theirs(torch.tensor(tokens), attention_mask=bias_of(policy.config, 40).expand(2, -1, -1, -1)).logits
    positions = jnp.broadcast_to(jnp.arange(40)[None, :], tokens.shape)

    def logits(variables):
        hidden = hidden_states(policy.model, variables, jnp.asarray(tokens), positions, jnp.full(2, 40))
        return project(hidden, head_matrix(variables))

    np.testing.assert_allclose(logits(policy.variables), output.detach().numpy(), rtol=0, atol=1e-4)
    aim = np.random.default_rng(1).standard_normal(output.shape).astype(np.float32)
    (output * torch.tensor(aim)).mean().backward()
    found = to_published(jax.grad(lambda v: jnp.mean(logits(v) * aim))(policy.variables), policy.config, policy.family)
    assert found.keys() == tensors.keys()
    routers = {
        name: weight.grad.numpy() for name, weight in theirs.named_parameters() if name.endswith("mlp.gate.weight")
    }
    assert routers
    for name, gradient in routers.items():
        np.testing.assert_allclose(found[name], gradient, rtol=0, atol=1e-5, err_msg=name)
