"""The forward pass against PyTorch's numbers and against a slow float64 one."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d1jax.config import LoraConfig, MeshConfig
from d1jax.models.sharding import make_mesh
from d1jax.models.transformer import Transformer, head_matrix, hidden_states, initialize, project

ARCHITECTURES = {
    "multi-head": {},
    "grouped-query": {"width": 32, "heads": 4, "kv_heads": 2},
    "multi-query": {"heads": 4, "kv_heads": 1, "layers": 1},
    "qkv biases": {"qkv_bias": True},
    "tied head": {"tied_head": True, "layers": 1},
    "all of it": {
        "heads": 4,
        "kv_heads": 2,
        "qkv_bias": True,
        "tied_head": True,
        "rope_theta": 100.0,
        "norm_eps": 1e-2,
    },
}


run = jax.jit(hidden_states, static_argnums=0)
head = jax.jit(project)


def columns(tokens_BT):
    """Positions of rows that are stored in natural order."""
    return jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None, :], tokens_BT.shape)


def forward(model, variables, tokens_BT, length_B):
    """(hidden, logits) of rows in natural order, as host arrays."""
    tokens_BT = jnp.asarray(tokens_BT)
    hidden_BTD = run(model, variables, tokens_BT, columns(tokens_BT), jnp.asarray(length_B))
    return np.asarray(hidden_BTD), np.asarray(head(hidden_BTD, head_matrix(variables)))


# -- the golden checkpoint ---------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_logits_and_every_hidden_state_equal_pytorch(golden):
    tokens_BT = jnp.asarray(golden.io["fwd_input_ids"])
    length_B = jnp.full(tokens_BT.shape[:1], tokens_BT.shape[1])
    apply = jax.jit(partial(golden.model.apply, mutable=["intermediates"]))
    (final_BTD, _), kept = apply(golden.variables, tokens_BT, columns(tokens_BT), length_B)
    (into_LBTD,) = kept["intermediates"]["blocks"]["block_in"]
    assert into_LBTD.shape == golden.io["fwd_hidden_layer_in"].shape
    np.testing.assert_allclose(into_LBTD, golden.io["fwd_hidden_layer_in"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(final_BTD, golden.io["fwd_hidden_final_norm"], atol=1e-4, rtol=0)
    logits_BTV = head(final_BTD, head_matrix(golden.variables))
    np.testing.assert_allclose(logits_BTV, golden.io["fwd_logits"], atol=1e-4, rtol=0)


def test_right_padded_rows_equal_pytorch_even_in_their_padding(golden):
    _, logits_BTV = forward(golden.model, golden.variables, golden.io["fwd_right_ids"], golden.io["fwd_lens"])
    np.testing.assert_allclose(logits_BTV, golden.io["fwd_right_logits"], atol=1e-4, rtol=0)


def test_left_padded_rows_equal_pytorch_when_laid_out_right_padded(golden):
    left_BT, length_B = golden.io["fwd_left_ids"], golden.io["fwd_lens"]
    width = left_BT.shape[1]
    right_BT = np.full_like(left_BT, golden.special.end)
    for row, length in enumerate(length_B):
        right_BT[row, :length] = left_BT[row, width - length :]
    _, logits_BTV = forward(golden.model, golden.variables, right_BT, length_B)
    for row, length in enumerate(length_B):
        expected = golden.io["fwd_left_logits"][row, width - length :]
        np.testing.assert_allclose(logits_BTV[row, :length], expected, atol=1e-4, rtol=0)


# -- the float64 oracle ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_equals_the_float64_oracle_at_every_length(tiny, oracle, name):
    model, variables = tiny(seed=1, **ARCHITECTURES[name])
    rng = np.random.default_rng(2)
    tokens_BT = rng.integers(0, model.config.vocab_size, (4, 9))
    length_B = np.array([9, 6, 2, 1])
    hidden_BTD, logits_BTV = forward(model, variables, tokens_BT, length_B)
    row_alone = oracle(model, variables)
    for row, length in enumerate(length_B):
        hidden_TD, logits_TV = row_alone(tokens_BT[row, :length])
        np.testing.assert_allclose(hidden_BTD[row, :length], hidden_TD, atol=2e-5, rtol=0)
        np.testing.assert_allclose(logits_BTV[row, :length], logits_TV, atol=5e-5, rtol=0)
    assert np.ptp(logits_BTV) > 1  # the comparison is of something


def test_what_stands_in_the_padding_does_not_matter(tiny):
    model, variables = tiny()
    length_B = np.array([3, 5])
    first_BT = np.random.default_rng(0).integers(0, 13, (2, 6))
    second_BT = np.where(np.arange(6)[None, :] < length_B[:, None], first_BT, 12 - first_BT)
    assert (first_BT != second_BT).any(axis=1).all()
    (first, _), (second, _) = (forward(model, variables, tokens, length_B) for tokens in (first_BT, second_BT))
    for row, length in enumerate(length_B):
        np.testing.assert_array_equal(first[row, :length], second[row, :length])


def test_storage_order_is_free_because_positions_are_explicit(tiny):
    model, variables = tiny()
    rng = np.random.default_rng(3)
    tokens_BT, order = jnp.asarray(rng.integers(0, 13, (2, 6))), rng.permutation(6)
    full_B = jnp.full(2, 6)
    natural = run(model, variables, tokens_BT, columns(tokens_BT), full_B)
    permuted = run(model, variables, tokens_BT[:, order], columns(tokens_BT)[:, order], full_B)
    np.testing.assert_allclose(permuted, natural[:, order], atol=1e-5, rtol=0)
    misplaced = run(model, variables, tokens_BT[:, order], columns(tokens_BT), full_B)
    assert np.abs(misplaced - natural[:, order]).max() > 1e-2


# -- remat, dtypes, initialisation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("remat", ["full", "dots", "offload"])
def test_remat_recomputes_and_gives_the_same_gradients(tiny, remat):
    model, variables = tiny(heads=4, kv_heads=2, qkv_bias=True)
    again = Transformer(dataclasses.replace(model.config, remat=remat))
    tokens_BT = jnp.asarray(np.random.default_rng(4).integers(0, 13, (2, 6)))

    def gradient(which):
        def loss(variables):
            hidden_BTD = hidden_states(which, variables, tokens_BT, columns(tokens_BT), jnp.array([6, 4]))
            return jnp.mean(jnp.tanh(hidden_BTD) ** 3)

        return str(jax.make_jaxpr(loss)(variables)), jax.jit(jax.grad(loss))(variables)

    (plain_program, plain), (remat_program, again_gradient) = gradient(model), gradient(again)
    assert "remat" in remat_program or "checkpoint" in remat_program
    assert "remat" not in plain_program and "checkpoint" not in plain_program
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=0), plain, again_gradient)
    # The head is not part of the hidden states; everything else learns.
    learns = jax.tree.map(lambda g: bool(jnp.any(g != 0)), plain["params"])
    assert not learns.pop("ff_out") and all(jax.tree.leaves(learns))


def test_what_is_kept_is_not_multiplied_again(tiny):
    """none keeps all products but the scores, dots and offload those with weights, full none."""
    _, variables = tiny()
    tokens_BT = jnp.ones((2, 6), jnp.int32)

    def products(remat):
        model, _ = tiny(remat=remat)

        def loss(variables):
            return jnp.sum(hidden_states(model, variables, tokens_BT, columns(tokens_BT), jnp.array([6, 4])))

        return str(jax.make_jaxpr(jax.grad(loss))(variables)).count("dot_general")

    none, dots, offload, full = (products(remat) for remat in ("none", "dots", "offload", "full"))
    assert none < dots == offload < full
    # Of a block: q, k, v, out, gate, up are made again, and the two of attention.
    assert (dots - none, full - none) == (2, 8)


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_bfloat16_stays_close_and_keeps_logits_in_float32(tiny, param_dtype):
    model, variables = tiny(seed=5)
    config = dataclasses.replace(model.config, dtype="bfloat16", param_dtype=param_dtype)
    rounded = jax.tree.map(lambda x: x.astype(param_dtype), variables)
    tokens_BT = jnp.asarray(np.random.default_rng(5).integers(0, 13, (3, 8)))
    arguments = (tokens_BT, columns(tokens_BT), jnp.array([8, 5, 1]))
    exact_BTD = run(model, variables, *arguments)
    hidden_BTD = run(Transformer(config), rounded, *arguments)
    logits_BTV = project(hidden_BTD, head_matrix(rounded))
    assert hidden_BTD.dtype == jnp.bfloat16 and logits_BTV.dtype == jnp.float32
    assert np.isfinite(logits_BTV).all()
    error = np.abs(logits_BTV - project(exact_BTD, head_matrix(variables)))
    assert 0 < error.mean() < 0.15


def test_initial_weights_have_the_documented_scale(initialized):
    params = jax.device_get(initialized["params"])
    for name, layer in params["blocks"].items():
        for kind, value in layer.items():
            if kind == "kernel":
                # 1 / sqrt(fan in); what writes to the residual stream, 1 / sqrt(2 layers) of that.
                small = 4**-0.5 if name in ("attn_out", "ff_out") else 1.0
                np.testing.assert_allclose(value.std(), small * value.shape[1] ** -0.5, rtol=0.15, err_msg=name)
                assert np.abs(value[0] - value[1]).max() > 0.1, f"{name}: both layers got the same weights"
            else:
                assert (value == (1.0 if kind == "scale" else 0.0)).all(), name
    np.testing.assert_allclose(params["wte"].std(), 1.0, rtol=0.15)
    np.testing.assert_allclose(params["ff_out"].std(), params["ff_out"].shape[0] ** -0.5, rtol=0.15)


def test_initialize_makes_only_what_it_is_asked_for_and_the_same_on_any_mesh(tiny):
    lora = LoraConfig(rank=2, targets=("q_proj",))
    model, _ = tiny(layers=1, lora=lora)

    def make(seed, *names, **axes):
        return initialize(model, jax.random.key(seed), make_mesh(MeshConfig(**axes)), names)

    both, alone = make(0, "params", "lora", data=8), make(0, "lora", data=2, fsdp=2, tensor=2)
    assert set(both) == {"params", "lora"} and set(alone) == {"lora"}
    np.testing.assert_array_equal(alone["lora"]["blocks"]["q_proj"]["a"], both["lora"]["blocks"]["q_proj"]["a"])
    other = make(1, "lora", data=8)
    assert np.abs(other["lora"]["blocks"]["q_proj"]["a"] - both["lora"]["blocks"]["q_proj"]["a"]).max() > 0.01


def test_tied_head_is_the_transposed_embedding(tiny):
    _, variables = tiny(tied_head=True)
    assert "ff_out" not in variables["params"]
    np.testing.assert_array_equal(head_matrix(variables), variables["params"]["wte"].T)
