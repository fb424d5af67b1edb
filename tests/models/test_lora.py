"""Adapters: what they change, what they leave alone, how they are merged, where they live."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as Spec

from d1jax.config import LoraConfig, MeshConfig, UserError
from d1jax.models.lora import Rounding, check_targets, merge, merge_each, parameter_table, warn_of_rounding
from d1jax.models.sharding import make_mesh
from d1jax.models.transformer import Transformer, head_matrix, hidden_states, project

TARGETS = LoraConfig().targets
LORA = LoraConfig(rank=3, alpha=5.0)


run = jax.jit(hidden_states, static_argnums=0)


@pytest.fixture(scope="module")
def inputs():
    tokens_BT = jnp.asarray(np.random.default_rng(0).integers(0, 13, (2, 6)))
    return tokens_BT, jnp.broadcast_to(jnp.arange(6)[None, :], (2, 6)), jnp.array([6, 4])


def logits(model, variables, inputs):
    return np.asarray(project(run(model, variables, *inputs), head_matrix(variables)))


def only(adapters, kept):
    """The adapters with b = 0 outside `kept`."""
    return {
        "blocks": {name: {"a": pair["a"], "b": pair["b"] * (name in kept)} for name, pair in adapters["blocks"].items()}
    }


def test_fresh_adapter_draws_a_and_leaves_b_at_zero(initialized):
    adapters = initialized["lora"]["blocks"]
    assert set(adapters) == set(TARGETS)
    for name, pair in adapters.items():
        bound = pair["a"].shape[1] ** -0.5
        assert not pair["b"].any(), name
        assert bound * 0.8 < np.abs(pair["a"]).max() <= bound, name
        assert np.abs(pair["a"][0] - pair["a"][1]).max() > 0.1, name


def test_adapter_with_zero_b_changes_nothing(tiny, inputs):
    model, variables = tiny(seed=2, lora=LORA)
    base = logits(Transformer(model.config), {"params": variables["params"]}, inputs)
    np.testing.assert_array_equal(logits(model, {"params": variables["params"]}, inputs), base)
    np.testing.assert_array_equal(logits(model, {**variables, "lora": only(variables["lora"], ())}, inputs), base)


@pytest.mark.parametrize("targets", [*((name,) for name in TARGETS), TARGETS], ids=lambda names: "+".join(names))
def test_adapter_equals_its_merged_weights(tiny, inputs, targets):
    model, variables = tiny(seed=2, lora=LORA)
    variables = {**variables, "lora": only(variables["lora"], targets)}
    adapted, merged = logits(model, variables, inputs), merge(variables, LORA)
    assert set(merged) == {"params"}
    np.testing.assert_allclose(logits(Transformer(model.config), merged, inputs), adapted, atol=1e-5, rtol=0)
    assert np.abs(adapted - logits(model, {"params": variables["params"]}, inputs)).max() > 0.05


def test_merging_adds_a_b_alpha_over_r_to_the_kernels_of_the_targets_only(tiny):
    lora = LoraConfig(rank=3, alpha=5.0, targets=("v_proj", "ff_out"))
    _, variables = tiny(lora=lora, qkv_bias=True)
    merged = merge(variables, lora)["params"]
    for name, layer in variables["params"]["blocks"].items():
        for kind, before in layer.items():
            delta = np.asarray(merged["blocks"][name][kind] - before)
            if name in lora.targets and kind == "kernel":
                pair = variables["lora"]["blocks"][name]
                expected = [pair["a"][i] @ pair["b"][i] * 5.0 / 3.0 for i in range(2)]
                np.testing.assert_allclose(delta, np.stack(expected), atol=1e-5)
            else:
                assert not delta.any(), (name, kind)


def test_merging_without_an_adapter_is_the_identity(tiny):
    _, variables = tiny()
    jax.tree.map(np.testing.assert_array_equal, merge(variables, LORA), variables)


def test_merged_weights_keep_their_dtype(tiny):
    _, variables = tiny(lora=LORA, param_dtype="bfloat16")
    kernels = jax.tree.leaves(merge(variables, LORA))
    assert {kernel.dtype for kernel in kernels} == {jnp.dtype("bfloat16")}


def test_a_small_adapter_is_merged_in_fp32_and_what_bf16_rounds_away_is_known(tiny):
    """b is scaled down until the adapter is far below a bf16 step of the weights."""
    _, variables = tiny(lora=LORA, param_dtype="bfloat16")
    arrays = [
        (("blocks", name, "kernel"), layer["kernel"])
        for name, layer in variables["params"]["blocks"].items()
        if "kernel" in layer
    ]
    shares = {}
    for scale in (1.0, 1e-3, 1e-6):
        adapters = jax.tree_util.tree_map_with_path(
            lambda path, x, scale=scale: x * scale if path[-1].key == "b" else x, variables["lora"]
        )
        whole = merge({**variables, "lora": adapters}, LORA, "float32")["params"]["blocks"]
        assert {x.dtype for x in jax.tree.leaves(whole)} == {jnp.dtype("float32")}
        rounding = Rounding()
        stored = dict(merge_each(arrays, adapters, LORA, rounding))
        kept, size = 0.0, 0.0
        for (_, name, _), array in stored.items():
            before = np.asarray(variables["params"]["blocks"][name]["kernel"], np.float64)
            assert array.dtype == jnp.bfloat16
            delta = np.asarray(whole[name]["kernel"], np.float64) - before
            kept += np.sum((np.asarray(array, np.float64) - before) * delta)
            size += np.sum(delta**2)
        shares[scale] = rounding.share
        np.testing.assert_allclose(rounding.share, kept / size, rtol=0.05, atol=1e-3)
    assert shares[1.0] > 0.99 and shares[1e-6] < 0.2 and shares[1.0] > shares[1e-3] > shares[1e-6]


def test_a_merge_that_loses_much_warns():
    with pytest.warns(
        UserWarning, match="merged into bfloat16 weights, 15% of the adapter's effect is left; do better"
    ):
        warn_of_rounding(Rounding(0.15, 1.0), "bfloat16", "do better")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_rounding(Rounding(0.995, 1.0), "bfloat16", "")
        warn_of_rounding(Rounding(), "bfloat16", "")


def test_weights_are_rounded_once_after_the_sum(tiny):
    """An fp32 base that is rounded before would feel nothing of an adapter that is far below a bf16 step."""
    _, variables = tiny(lora=LORA)
    adapters = jax.tree_util.tree_map_with_path(
        lambda path, x: x * 1e-3 if path[-1].key == "b" else x, variables["lora"]
    )
    variables = {**variables, "lora": adapters}
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), merge(variables, LORA))
    jax.tree.map(np.testing.assert_array_equal, merge(variables, LORA, "bfloat16"), expected)
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables["params"])
    twice = merge({"params": base, "lora": adapters}, LORA)
    same = [bool((a == b).all()) for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(twice), strict=True)]
    assert not all(same)


def test_gradients_reach_every_adapter_and_nothing_else_moves(tiny, inputs):
    model, variables = tiny(seed=3, lora=LORA)
    fresh = {**variables, "lora": only(variables["lora"], ())}

    def loss(adapters, params):
        return jnp.mean(jnp.tanh(hidden_states(model, {"params": params, "lora": adapters}, *inputs)) ** 3)

    gradient = jax.jit(jax.grad(loss))
    first = gradient(fresh["lora"], variables["params"])["blocks"]
    for name, pair in first.items():
        assert not pair["a"].any(), f"{name}: b is zero, so a has no gradient yet"
        assert pair["b"].any(axis=(1, 2)).all(), f"{name}: every layer's b learns"
    later = gradient(variables["lora"], variables["params"])["blocks"]
    assert all(pair["a"].any(axis=(1, 2)).all() for pair in later.values())

    stepped = {
        "params": variables["params"],
        "lora": {"blocks": jax.tree.map(lambda w, g: w - g, fresh["lora"]["blocks"], first)},
    }
    base = logits(model, {"params": variables["params"]}, inputs)
    assert np.abs(logits(model, stepped, inputs) - base).max() > 1e-4
    np.testing.assert_array_equal(logits(model, {"params": stepped["params"]}, inputs), base)


def test_unknown_target_is_an_error_that_names_the_choices(tiny):
    _, variables = tiny()
    with pytest.raises(UserError) as caught:
        check_targets(variables["params"], LoraConfig(rank=2, targets=("q_proj", "qproj", "attn_norm")))
    message = str(caught.value)
    assert "['attn_norm', 'qproj']" in message
    assert message.endswith("choices: attn_out, ff_out, ff_proj, k_proj, q_proj, up_proj, v_proj")
    check_targets(variables["params"], LoraConfig(rank=2))


def test_head_is_never_adapted_though_a_target_shares_its_name(tiny):
    lora = LoraConfig(rank=2, targets=("ff_out",))
    _, variables = tiny(lora=lora)
    assert set(variables["lora"]) == {"blocks"} and set(variables["lora"]["blocks"]) == {"ff_out"}
    # [L, mlp, r] and [L, r, width]: the block's projection, not the head's [width, vocab].
    assert jax.tree.map(jnp.shape, variables["lora"]["blocks"]["ff_out"]) == {"a": (2, 24, 2), "b": (2, 2, 16)}
    merged = merge(variables, lora)
    np.testing.assert_array_equal(head_matrix(merged), head_matrix(variables))
    assert (
        np.abs(merged["params"]["blocks"]["ff_out"]["kernel"] - variables["params"]["blocks"]["ff_out"]["kernel"]).max()
        > 0
    )


def test_rank_zero_has_no_adapter(tiny):
    _, variables = tiny(lora=LoraConfig(rank=0))
    assert set(variables) == {"params"}


def test_table_names_every_array_and_counts_it(tiny):
    model, variables = tiny(lora=LoraConfig(rank=2, targets=("q_proj",)))
    table = parameter_table(variables)
    assert ("lora/blocks/q_proj/a", (2, 16, 2), 64) in table and ("params/wte", (13, 16), 208) in table
    assert sum(count for _, _, count in table) == sum(leaf.size for leaf in jax.tree.leaves(variables))


# What the rule table must give on data 2 x fsdp 2 x tensor 2, written out by hand; layers and ranks are never cut.
IN = ("q_proj", "k_proj", "v_proj", "ff_proj", "up_proj")  # reads the residual stream
OUT = ("attn_out", "ff_out")  # writes to it
PLACES = {
    "params/wte": Spec("tensor", "fsdp"),
    "params/ff_out": Spec("fsdp", "tensor"),
    "params/ln_f/scale": Spec(None),
    **{f"params/blocks/{name}/scale": Spec(None, None) for name in ("attn_norm", "ff_norm")},
    **{f"params/blocks/{name}/kernel": Spec(None, "fsdp", "tensor") for name in IN},
    **{f"params/blocks/{name}/bias": Spec(None, "tensor") for name in ("q_proj", "k_proj", "v_proj")},
    **{f"params/blocks/{name}/kernel": Spec(None, "tensor", "fsdp") for name in OUT},
    **{f"lora/blocks/{name}/a": Spec(None, "fsdp", None) for name in IN},
    **{f"lora/blocks/{name}/b": Spec(None, None, "tensor") for name in IN},
    **{f"lora/blocks/{name}/a": Spec(None, "tensor", None) for name in OUT},
    **{f"lora/blocks/{name}/b": Spec(None, None, "fsdp") for name in OUT},
}  # fmt: skip


def test_parameters_are_created_where_the_rule_table_wants_them(initialized):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    leaves = jax.tree_util.tree_flatten_with_path(initialized)[0]
    places = {"/".join(key.key for key in path): leaf for path, leaf in leaves}
    assert set(places) == set(PLACES)
    for path, leaf in places.items():
        expected = jax.NamedSharding(mesh, PLACES[path])
        assert leaf.sharding.is_equivalent_to(expected, leaf.ndim), (path, leaf.sharding)
        cut = np.prod([mesh.shape[axis] for axis in jax.tree.leaves(tuple(PLACES[path])) if axis])
        assert leaf.addressable_shards[0].data.size == leaf.size // int(cut), path
