"""Mixtures of experts: routing against a plain loop, every token through all of its experts, gradients, and the mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d1jax.config import LoraConfig, MeshConfig, MixtureOfExperts, ModelConfig, UserError
from d1jax.config.check import check
from d1jax.config.schema import Config
from d1jax.models.experts import mixed, route
from d1jax.models.lora import check_targets
from d1jax.models.sharding import make_mesh
from d1jax.models.transformer import (
    Transformer,
    Window,
    abstract_variables,
    head_matrix,
    hidden_states,
    hidden_states_and_keys,
    hidden_states_of_window,
    initialize,
    project,
)

SOFTMAX = MixtureOfExperts(experts=6, experts_per_token=3, expert_width=10)
SIGMOID = MixtureOfExperts(
    experts=8, experts_per_token=3, expert_width=10, shared_width=10, dense_layers=1, router="sigmoid", scaling=2.5, groups=4,
    groups_per_token=2,
)  # fmt: skip
SHAPES = {
    "lladamoe": dict(mlp=SOFTMAX, qk_norm=True, rope_full_precision=False),
    "llada2": dict(
        mlp=SIGMOID, layers=3, heads=4, kv_heads=2, head_size=6, rotary_columns=4, qk_norm=True, rope_full_precision=False,
        attention_mask="block_causal", mask_block=4,
    ),
}  # fmt: skip


@pytest.fixture(params=SHAPES)
def moe(request, tiny):
    return tiny(**SHAPES[request.param])


def logits_of(model, variables, tokens, lengths=None):
    tokens = jnp.asarray(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None, :], tokens.shape)
    lengths = jnp.full(tokens.shape[0], tokens.shape[1]) if lengths is None else lengths
    return project(hidden_states(model, variables, tokens, positions, lengths), head_matrix(variables))


def tokens_of(rows, columns, seed=0):
    return np.random.default_rng(seed).integers(0, 13, (rows, columns))


# -- routing ---------------------------------------------------------------------------------------------------------------


def by_loop(logits, bias, config):
    """[(expert, weight), ...] of one token, the way the published code says it; of equal scores the first."""
    first = lambda scores, count: sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]  # noqa: E731
    if config.router == "softmax":
        chance = np.exp(logits - logits.max())
        chance = chance / chance.sum()
        return [(e, chance[e]) for e in first(chance, config.experts_per_token)]
    score = 1 / (1 + np.exp(-logits))
    biased, size = score + bias, config.experts // config.groups
    groups = [biased[g * size : (g + 1) * size] for g in range(config.groups)]
    sums = [sum(sorted(group)[-2:]) for group in groups] if config.groups > 1 else [0.0]
    best = first(sums, config.groups_per_token)
    allowed = [biased[e] if e // size in best else -np.inf for e in range(config.experts)]
    chosen = first(allowed, config.experts_per_token)
    total = sum(score[e] for e in chosen) + 1e-20 if config.experts_per_token > 1 else 1.0
    return [(e, config.scaling * score[e] / total) for e in chosen]


@pytest.mark.parametrize(
    "config",
    [
        SOFTMAX,
        dataclasses.replace(SOFTMAX, experts_per_token=1),
        SIGMOID,
        dataclasses.replace(SIGMOID, experts_per_token=1),
        dataclasses.replace(SIGMOID, groups=1, groups_per_token=1),
        dataclasses.replace(SIGMOID, experts_per_token=8, groups_per_token=4),
    ],
)
@pytest.mark.parametrize("ties", [False, True])
def test_routing_equals_a_plain_loop(config, ties):
    rng = np.random.default_rng(1)
    x, kernel = rng.standard_normal((40, 12)), rng.standard_normal((12, config.experts))
    bias = rng.standard_normal(config.experts)
    if ties:  # whole numbers, so that sums are exact and many scores are equal
        x, kernel, bias = rng.integers(-1, 2, x.shape), rng.integers(0, 2, kernel.shape), np.zeros(config.experts)
        kernel[:, 1::2] = kernel[:, ::2]
    arrays = (jnp.asarray(a, jnp.float32) for a in (x, kernel, bias))
    weights, experts = route(*arrays, config)
    for token in range(len(x)):
        chosen = by_loop(np.asarray(x[token] @ kernel, np.float32), np.float32(bias), config)
        assert experts[token].tolist() == [e for e, _ in chosen]
        np.testing.assert_allclose(weights[token], [w for _, w in chosen], rtol=1e-5)


def test_experts_equal_a_plain_loop_and_none_drops_a_token():
    rng = np.random.default_rng(0)
    x, gate, up, out = (rng.standard_normal(s) for s in ((9, 5), (4, 5, 7), (4, 5, 7), (4, 7, 5)))
    weight, expert = (
        rng.random((9, 2)),
        np.stack([np.zeros(9, int), rng.integers(1, 4, 9)], 1),
    )  # all want the first one
    expected = np.zeros((9, 5))
    for token in range(9):
        for w, e in zip(weight[token], expert[token], strict=True):
            a = x[token] @ gate[e]
            expected[token] += w * ((a / (1 + np.exp(-a)) * (x[token] @ up[e])) @ out[e])
    f32 = lambda *of: tuple(jnp.asarray(a, jnp.float32) for a in of)  # noqa: E731
    found = mixed(*f32(x, weight), jnp.asarray(expert), f32(gate, up, out))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    parts = [
        mixed(*f32(x, weight), jnp.asarray(expert), f32(gate[i : i + 2], up[i : i + 2], out[i : i + 2]), i)
        for i in (0, 2)
    ]
    np.testing.assert_allclose(parts[0] + parts[1], expected, atol=1e-4)


def test_gradients_equal_those_of_all_experts_masked_and_reach_the_router():
    rng = np.random.default_rng(0)
    f32 = lambda *of: tuple(jnp.asarray(rng.standard_normal(s), jnp.float32) for s in of)  # noqa: E731
    given = f32((9, 5), (5, 8), (8,), (8, 5, 7), (8, 5, 7), (8, 7, 5))
    aim = f32((9, 5))[0]

    def sparse(x, router, bias, *kernels):
        return jnp.sum(aim * mixed(x, *route(x, router, bias, SIGMOID), kernels))

    def dense(x, router, bias, gate, up, out):
        weight, expert = route(x, router, bias, SIGMOID)
        of_each = jnp.sum(jax.nn.one_hot(expert, 8) * weight[:, :, None], axis=1)
        hidden = jax.nn.silu(jnp.einsum("ND,EDF->NEF", x, gate)) * jnp.einsum("ND,EDF->NEF", x, up)
        return jnp.sum(aim * jnp.einsum("NEF,EFD,NE->ND", hidden, out, of_each))

    found, expected = (jax.grad(f, tuple(range(6)))(*given) for f in (sparse, dense))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
    assert np.abs(found[1]).max() > 1e-3 and not np.any(found[2])  # the bias chooses, and is not trained
    step, eps = f32((5, 8))[0], 1e-3  # finite differences, along a direction in which the choice stays
    ends = [sparse(given[0], given[1] + sign * eps * step, *given[2:]) for sign in (1, -1)]
    assert float((ends[0] - ends[1]) / (2 * eps)) == pytest.approx(float(jnp.sum(found[1] * step)), rel=2e-2)


# -- in a model ------------------------------------------------------------------------------------------------------------


def test_logits_equal_a_plain_loop(moe, plain_mixture):
    model, variables = moe
    tokens = tokens_of(2, 9)
    found = logits_of(model, variables, tokens)
    for row, expected in zip(found, (plain_mixture(model.config, variables, row) for row in tokens), strict=True):
        np.testing.assert_allclose(row, expected, atol=2e-4)


def test_a_row_depends_neither_on_other_rows_nor_on_padding(moe):
    model, variables = moe
    tokens = tokens_of(5, 8)
    alone = jnp.concatenate([logits_of(model, variables, row[None]) for row in tokens])
    np.testing.assert_allclose(logits_of(model, variables, tokens), alone, atol=1e-4)
    longer = np.concatenate([tokens, np.zeros((5, 6), int)], axis=1)
    padded = logits_of(model, variables, longer, jnp.full(5, 8))
    np.testing.assert_allclose(padded[:, :8], alone, atol=1e-4)


@pytest.mark.parametrize("mesh", [dict(data=2, fsdp=2, tensor=2), dict(data=1, fsdp=2, tensor=4)])
@pytest.mark.parametrize("shape", SHAPES)
def test_eight_devices_equal_one_with_gradients(tiny, shape, mesh):
    model, variables = tiny(**SHAPES[shape])
    tokens = tokens_of(4, 8)

    def value(variables):
        return jnp.mean(jnp.sin(logits_of(model, variables, tokens)))

    one, gradients = jax.jit(jax.value_and_grad(value))(variables)
    devices = make_mesh(MeshConfig(**mesh))
    with jax.set_mesh(devices):
        placed = jax.tree.map(
            lambda x, like: jax.device_put(x, like.sharding), variables, abstract_variables(model, devices)
        )
        spec = placed["params"]["blocks"]["experts_ff_proj"]["kernel"].sharding.spec
        # Six experts over four devices do not go: then each expert is cut (ten hidden units over four do not go either).
        assert ("tensor" in spec) == (model.config.mlp.experts % mesh["tensor"] == 0)
        many, there = jax.jit(jax.value_and_grad(value))(placed)
    np.testing.assert_allclose(many, one, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), there, gradients)


def test_hidden_units_are_cut_where_the_devices_do_not_divide_the_experts(tiny):
    model, variables = tiny(mlp=MixtureOfExperts(experts=3, experts_per_token=2, expert_width=8))
    tokens = tokens_of(4, 8)
    expected = logits_of(model, variables, tokens)
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=4))
    with jax.set_mesh(mesh):
        placed = jax.tree.map(
            lambda x, like: jax.device_put(x, like.sharding), variables, abstract_variables(model, mesh)
        )
        assert placed["params"]["blocks"]["experts_ff_proj"]["kernel"].sharding.spec[3] == "tensor"
        found = jax.jit(lambda variables: logits_of(model, variables, tokens))(placed)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_window_over_fresh_keys_is_the_whole_pass(tiny):
    model, variables = tiny(**{**SHAPES["llada2"], "attention_mask": "full", "mask_block": 0})
    tokens = jnp.asarray(tokens_of(2, 9))
    positions = jnp.broadcast_to(jnp.arange(9)[None, :], tokens.shape)
    hidden, keys = hidden_states_and_keys(model, variables, tokens, positions, jnp.full(2, 9))
    assert keys.key.shape[0] == 3  # of the dense layer, and of those with experts
    window = hidden_states_of_window(
        model, variables, tokens[:, 3:7], positions[:, 3:7], jnp.full(2, 9), keys, Window(3, 3)
    )
    np.testing.assert_allclose(window, hidden[:, 3:7], atol=1e-4)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_what_is_computed_again_changes_no_gradient(tiny, remat):
    model, variables = tiny(**SHAPES["llada2"])
    again = Transformer(dataclasses.replace(model.config, remat=remat))
    of = lambda model: jax.grad(lambda v: jnp.mean(jnp.sin(logits_of(model, v, tokens_of(2, 6)))))(variables)  # noqa: E731
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), of(again), of(model))


def test_a_fresh_model_is_finite_and_its_bias_zero():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    model = Transformer(ModelConfig(width=16, layers=3, heads=2, kv_heads=2, mlp_width=24, vocab_size=13, mlp=SIGMOID))
    with jax.set_mesh(mesh):
        variables = initialize(model, jax.random.key(0), mesh)
        assert np.isfinite(logits_of(model, variables, tokens_of(2, 5))).all()
    assert not np.any(variables["params"]["blocks"]["router"]["expert_bias"])
    assert set(variables["params"]) == {"wte", "ff_out", "ln_f", "blocks", "blocks_dense"}


# -- what is refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(experts=4, experts_per_token=5), "experts_per_token = 5 is more than experts = 4"),
        (dict(router="sigmoid", experts=9, groups=2), "groups = 2 does not divide experts = 9"),
        (dict(router="sigmoid", experts=4, groups=4), "judged by its two best"),
        (dict(router="sigmoid", groups=2, groups_per_token=3), "groups_per_token = 3 is more than groups = 2"),
        (dict(router="sigmoid", groups=4, experts_per_token=3), "hold 2 experts"),
        (dict(groups=2), "read by router = sigmoid alone"),
        (dict(dense_layers=3), "model.mlp.dense_layers = 3: model.layers = 3 leaves none"),
    ],
)
def test_impossible_mixtures_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        check(Config(model=ModelConfig(mlp=MixtureOfExperts(**changes))))


def test_adapters_of_experts_are_refused_with_the_cure(tiny):
    model, variables = tiny(**SHAPES["llada2"])
    with pytest.raises(UserError, match=r"set lora.targets to \[q_proj, k_proj, v_proj, attn_out\]"):
        check_targets(variables["params"], LoraConfig(rank=2))
    check_targets(variables["params"], LoraConfig(rank=2, targets=("q_proj", "attn_out")))
