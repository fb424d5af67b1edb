"""The compiled sampler against PyTorch's decodings; its distribution and its early exit."""

import dataclasses
import functools
import itertools
import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType
from scipy import stats
from scipy.special import softmax

from d1jax.config import (
    Chance,
    DualCache,
    Even,
    Factor,
    Klass,
    LowConfidence,
    LowEntropy,
    MeshConfig,
    NoCache,
    PrefixCache,
    RandomOrder,
    SamplerConfig,
    Threshold,
    Time,
    TopkMargin,
)
from d1jax.data.tokenizers import SpecialTokens
from d1jax.diffusion.canvas import Canvas
from d1jax.diffusion.decoding import Decoding, Prompts, text_is_decided
from d1jax.diffusion.likelihood import Views, score
from d1jax.diffusion.noise import KeyedNoise
from d1jax.diffusion.sampler import Sampler
from d1jax.diffusion.schedule import time_schedule
from d1jax.models import sharding

END, TURN_END, MASK = 10, 11, 12
SPECIAL = SpecialTokens(mask=MASK, end=END, turn_end=TURN_END)
GREEDY = SamplerConfig(completion_length=8, block_length=4, steps=6)


class RecordedNoise(NamedTuple):
    """draws[step][row] as a source of noise."""

    token_NBx: jax.Array | None = None
    uniform_NBS: jax.Array | None = None

    def token(self, step_B, shape):
        return self.token_NBx[step_B, jnp.arange(shape[0])]

    def uniform(self, step_B, shape):
        return self.uniform_NBS[step_B, jnp.arange(shape[0])]


def gumbel_max(logits_BSV, logits_mask, gumbel_BSV):
    return jnp.argmax(logits_mask(logits_BSV, jnp.arange(logits_BSV.shape[-1])[None, None]) + gumbel_BSV, axis=-1)


class NoiseOfWholeCompletions(NamedTuple):
    """draws[step][row] over all columns of a completion: the block that the step works on is cut out."""

    token_NBx: jax.Array
    uniform_NBC: jax.Array
    steps_per_block: int

    def token(self, step_B, shape):
        return self.token_NBx[step_B, jnp.arange(shape[0])]

    def uniform(self, step_B, shape):
        start = step_B[0] // self.steps_per_block * shape[1]
        return jax.lax.dynamic_slice_in_dim(self.uniform_NBC[step_B[0]], start, shape[1], axis=1)


# -- PyTorch's decodings -----------------------------------------------------------------------------------------------

OFFICIAL = (
    "off_b32_s32", "off_b32_s16", "off_b8_s32", "off_b8_s12", "off_b16_s10", "off_b8_s4", "off_single_b16_s16",
    "off_eosinf_b16_s16", "off_confeos_b16_s16", "off_random_b16_s16", "off_gumbel_t0.7",
    "off_cfg1.5_b16_s16", "off_cfg0.5_b32_s8",
)  # fmt: skip


DREAM = (
    *(f"{rule}_s{steps}" for rule in ("maskgit_plus", "topk_margin", "entropy") for steps in (32, 20, 8)),
    *(f"{rule}_single_s16" for rule in ("maskgit_plus", "topk_margin", "entropy")),
    "entropy_topk5_s16", "entropy_topk50_s16", "origin_s16",
)  # fmt: skip
RULES = {
    "maskgit_plus": LowConfidence(confidence_of="sampling"), "topk_margin": TopkMargin(confidence_of="sampling"),
    "entropy": LowEntropy(confidence_of="sampling"), "origin": RandomOrder(),
}  # fmt: skip


@pytest.mark.parametrize("name", DREAM)
def test_tokens_and_steps_equal_dreams_sampler(golden_dream, name):
    case, io = golden_dream.cases[name], golden_dream.io
    left_BP, real_BP = io["smp_prompt_ids"], io["smp_prompt_mask"]
    rows, width, length = 1 if case["prompt"] == "row0_only" else 3, left_BP.shape[1], case["max_new_tokens"]
    prompt_BP, length_B = np.full_like(left_BP, golden_dream.special.end), real_BP.sum(axis=1)
    for row, real in enumerate(length_B):
        prompt_BP[row, :real] = left_BP[row, real_BP[row] > 0]
    config = SamplerConfig(
        completion_length=length, block_length=length, steps=case["steps"], remasking=RULES[case["alg"]],
        schedule=Chance() if case["alg"] == "origin" else Time(),
        top_k=case["top_k"] or 0, top_p=case["top_p"] or 1.0, early_exit=False,
    )  # fmt: skip
    expected_BC = io[f"{name}/unmask_step"][:rows, width:]
    uniform = np.zeros((case["steps"], rows, length), np.float32)
    if case["alg"] == "origin":  # one number a position that is still masked, row after row
        for step, used in enumerate(io[f"{name}/uniform_used_len"]):
            masked = expected_BC >= step
            assert masked.sum() == used
            uniform[step][masked] = io[f"{name}/uniform"][step, :used]
    rollout = Sampler(golden_dream.model, config, golden_dream.special).sample(
        golden_dream.variables, Prompts(prompt_BP[:rows], length_B[:rows]), RecordedNoise(uniform_NBS=uniform)
    )
    np.testing.assert_array_equal(rollout.tokens_BC, io[f"{name}/tokens"][:rows, width:])
    np.testing.assert_array_equal(rollout.unmask_step_BC, expected_BC)
    if case["alg"] != "origin":  # Dream also runs the steps that unmask nothing
        wasted = int((time_schedule(length, case["steps"]) == 0).sum())
        assert (rollout.nfe_B == case["forward_calls"] - wasted).all()


@pytest.mark.smoke
@pytest.mark.parametrize("name", OFFICIAL)
def test_tokens_and_steps_equal_lladas_sampler(golden, name):
    case, io = golden.cases[name], golden.io
    left_BP, real_BP = io["smp_prompt_ids"], io["smp_prompt_mask"]
    prompt_BP, length_B = np.full_like(left_BP, golden.special.end), real_BP.sum(axis=1)
    for row, length in enumerate(length_B):
        prompt_BP[row, :length] = left_BP[row, real_BP[row] > 0]
    rows, width, block = 1 if case["prompt"] == "row0_only" else 3, left_BP.shape[1], case["block_length"]
    end_token = (
        "forbidden" if case.get("logits_eos_inf") else "last" if case.get("confidence_eos_eot_inf") else "allowed"
    )
    config = SamplerConfig(
        completion_length=case["gen_length"], block_length=block, steps=case["steps"],
        remasking=case["remasking"], end_token=end_token, early_exit=False, guidance=case.get("cfg_scale", 0.0),
    )  # fmt: skip
    steps_per_block = case["steps"] * block // case["gen_length"]
    uniform = io.get(f"{name}/uniform", np.full((1, 1, width), 0.5))[:, :, width:]
    noise = NoiseOfWholeCompletions(-np.log(-np.log(uniform)), uniform, steps_per_block)
    sampler = Sampler(golden.model, config, golden.special, case["temperature"], token_sampler=gumbel_max)
    rollout = sampler.sample(golden.variables, Prompts(prompt_BP[:rows], length_B[:rows]), noise)
    np.testing.assert_array_equal(rollout.tokens_BC, io[f"{name}/tokens"][:, width:])
    np.testing.assert_array_equal(rollout.unmask_step_BC, io[f"{name}/unmask_step"][:, width:])
    # Guidance is one call on a doubled batch there, two passes here.
    assert (np.asarray(rollout.nfe_B) == case["forward_calls"] * (2 if case.get("cfg_scale") else 1)).all()


PARALLEL = (
    "fast_nocache_b8_s16", "fast_nocache_b8_thr", "fast_nocache_b16_thr", "fast_factor1.0_b8", "fast_factor0.5_b8",
)  # fmt: skip


@pytest.mark.parametrize("name", PARALLEL)
def test_tokens_and_steps_equal_parallel_decoding(golden, name):
    case, io = golden.cases[name], golden.io
    prompt_BP = io["fast_prompt_ids"]
    schedule = (
        Factor(case["factor"]) if "factor" in case else Threshold(case["threshold"]) if "threshold" in case else Even()
    )
    config = SamplerConfig(
        completion_length=case["gen_length"], block_length=case["block_length"], steps=case.get("steps", 32), schedule=schedule,
        early_exit=False,
    )  # fmt: skip
    prompts = Prompts(prompt_BP, np.array([prompt_BP.shape[1]]))
    rollout = Sampler(golden.model, config, golden.special).sample(golden.variables, prompts, RecordedNoise())
    np.testing.assert_array_equal(rollout.tokens_BC, io[f"{name}/tokens"][:, prompt_BP.shape[1] :])
    np.testing.assert_array_equal(rollout.unmask_step_BC, io[f"{name}/unmask_step"][:, prompt_BP.shape[1] :])
    assert (rollout.nfe_B == case["nfe"]).all()


CACHED = tuple(f"fast_{cache}_{kind}" for cache in ("prefix", "dual") for kind in ("b8_s16", "b8_thr", "b16_thr"))
CACHED_DREAM = tuple(f"fast_{cache}_conf_{block}" for cache in ("prefix", "dual") for block in ("b8", "b16"))


@pytest.mark.parametrize("name", [*CACHED, *CACHED_DREAM])
def test_tokens_steps_and_passes_equal_decoding_with_a_cache(golden, golden_dream, name):
    reference = golden_dream if "conf" in name else golden
    case, io = reference.cases[name], reference.io
    prompt_BP = io["fast_prompt_ids"]
    width = prompt_BP.shape[1]
    config = SamplerConfig(
        completion_length=32, block_length=case["block_length"], steps=case["steps"], early_exit=False,
        schedule=Threshold(case["threshold"]) if "threshold" in case else Even(),
        cache=PrefixCache() if "prefix" in name else DualCache(),
    )  # fmt: skip
    rollout = Sampler(reference.model, config, reference.special).sample(
        reference.variables, Prompts(prompt_BP, np.array([width])), RecordedNoise()
    )
    np.testing.assert_array_equal(rollout.tokens_BC, io[f"{name}/tokens"][:, width:])
    np.testing.assert_array_equal(rollout.unmask_step_BC, io[f"{name}/unmask_step"][:, width:])
    # The reference runs a pass in vain when a block is full after its first one; in these cases none is.
    assert set(range(case["nfe"])) == set(io[f"{name}/unmask_step"][0, width:].tolist())
    assert rollout.nfe_B.tolist() == [case["nfe"]]
    assert rollout.cached_nfe_B.tolist() == [io[f"{name}/call_is_cached"].sum()]


def test_every_golden_case_is_covered(golden, golden_dream):
    assert set(golden.cases) == {*OFFICIAL, *PARALLEL, *CACHED}
    assert set(golden_dream.cases) == {*DREAM, *CACHED_DREAM}


# -- what every decoding keeps -----------------------------------------------------------------------------------------


@pytest.fixture
def decode_24(tiny, random_prompts, towards_end):
    """24 rows of one model; most tests share these compiled programs."""

    def decode(config=GREEDY, temperature=0.0, strength=1.2, key=0, rows=range(24)):
        model, variables = tiny(seed=1)
        prompt_BP, length_B = random_prompts(0, 24, 3)
        rows = jnp.array(rows)
        rollout = Sampler(model, config, SPECIAL, temperature).sample(
            towards_end(variables, strength),
            Prompts(prompt_BP[rows], length_B[rows]),
            KeyedNoise(jax.random.key(key), 7 * rows),
        )
        return jax.device_get(rollout)

    return decode


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_each_step_reveals_its_scheduled_count_inside_its_block(decode_24, temperature):
    rollout = decode_24(dataclasses.replace(GREEDY, early_exit=False), temperature)
    assert not (rollout.tokens_BC == MASK).any() and (rollout.unmask_step_BC >= 0).all()
    for steps_C in rollout.unmask_step_BC:
        # Two blocks of 4 tokens in 3 steps each: 2, 1, 1.
        assert np.bincount(steps_C[:4], minlength=6).tolist() == [2, 1, 1, 0, 0, 0]
        assert np.bincount(steps_C[4:], minlength=6).tolist() == [0, 0, 0, 2, 1, 1]
    assert (rollout.confidence_BC > 0).all() and (rollout.confidence_BC <= 1).all()


def test_a_model_that_shouts_mask_still_leaves_none(tiny, random_prompts, towards_end):
    model, variables = tiny(seed=1)
    shouting = towards_end(variables, 0.0)
    shouting["params"]["ff_out"] = shouting["params"]["ff_out"].at[0, MASK].add(40.0)
    sampler = Sampler(model, dataclasses.replace(GREEDY, early_exit=False), SPECIAL, temperature=1.0)
    rollout = sampler.sample(
        shouting, Prompts(*random_prompts(0, 24, 3)), KeyedNoise(jax.random.key(0), jnp.arange(24))
    )
    assert not (np.asarray(rollout.tokens_BC) == MASK).any()
    assert np.asarray(rollout.confidence_BC).max() < 0.1  # most of the probability was the mask's


def test_recorded_entropies_are_those_of_the_predictions_and_change_nothing(tiny, random_prompts):
    """One step decodes all: then they are what the all-masked view says."""
    model, variables = tiny(seed=1)
    prompts = random_prompts(0, 6, 3)
    config = SamplerConfig(completion_length=8, block_length=8, steps=1, early_exit=False)
    noise = KeyedNoise(jax.random.key(0), jnp.arange(6))
    found = {
        record: Sampler(model, config, SPECIAL, 1.0, record_entropy=record).sample(variables, Prompts(*prompts), noise)
        for record in (False, True)
    }
    np.testing.assert_array_equal(found[True].tokens_BC, found[False].tokens_BC)
    assert (np.asarray(found[False].entropy_BC) == 0).all()
    canvas = Canvas(found[True].tokens_BC, *prompts)
    masked = Views(
        jnp.full((1, *canvas.completion_BC.shape), MASK),
        canvas.prompt_BP[None],
        jnp.ones((1, *canvas.completion_BC.shape)),
    )
    entropy_BC = jax.jit(score, static_argnums=0)(model, variables, canvas, masked).entropy
    np.testing.assert_allclose(found[True].entropy_BC, entropy_BC, atol=1e-4)


# -- early exit --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_early_exit_changes_nothing_before_the_end_and_saves_forward_passes(decode_24, temperature):
    on, off = (decode_24(dataclasses.replace(GREEDY, early_exit=early), temperature) for early in (True, False))
    assert (off.nfe_B == 6).all() and (on.nfe_B <= 6).all()
    assert (on.nfe_B < 6).sum() >= 5, "rows that stop early"
    assert len(set(on.nfe_B.tolist())) >= 3, "at different steps"
    np.testing.assert_array_equal(on.length_B, off.length_B)
    for row in range(24):
        text = slice(0, on.length_B[row])
        for field in ("tokens_BC", "unmask_step_BC", "confidence_BC"):
            np.testing.assert_array_equal(getattr(on, field)[row, text], getattr(off, field)[row, text])
        # Unmasked tokens are never taken back; what was not decided yet is end tokens of no step.
        decided = on.unmask_step_BC[row] >= 0
        np.testing.assert_array_equal(decided, off.unmask_step_BC[row] < on.nfe_B[row])
        np.testing.assert_array_equal(on.tokens_BC[row, decided], off.tokens_BC[row, decided])
        assert (on.tokens_BC[row, ~decided] == END).all() and (on.unmask_step_BC[row, ~decided] == -1).all()
        assert (on.confidence_BC[row, ~decided] == 0).all() and not decided.all() == (on.nfe_B[row] < 6)
        # It stops at the first step after which the text through the end token is decided.
        moments = [
            s for s in range(6) if is_decided(np.where(off.unmask_step_BC[row] <= s, off.tokens_BC[row], MASK).tolist())
        ]
        assert on.nfe_B[row] == (moments[0] + 1 if moments else 6)


def is_decided(tokens):
    ends = [place for place, token in enumerate(tokens) if token in (END, TURN_END)]
    return bool(ends) and MASK not in tokens[: ends[0]]


def test_the_loop_ends_with_its_last_row(tiny, random_prompts, towards_end):
    model, variables = tiny(seed=1)
    calls = []

    class CountedNoise(NamedTuple):
        def uniform(self, step_B, shape):
            jax.debug.callback(lambda step_B: calls.append(int(step_B[0])), step_B)
            return jnp.zeros(shape)

    config = dataclasses.replace(GREEDY, remasking="random")  # equal priorities: left to right
    rollout = Sampler(model, config, SPECIAL).sample(
        towards_end(variables, 30.0), Prompts(*random_prompts(0, 3, 3)), CountedNoise()
    )
    jax.effects_barrier()
    assert calls == [0] and rollout.nfe_B.tolist() == [1, 1, 1]
    assert (np.asarray(rollout.tokens_BC) == END).all() and rollout.length_B.tolist() == [1, 1, 1]
    assert np.asarray(rollout.unmask_step_BC).tolist() == [[0, 0, -1, -1, -1, -1, -1, -1]] * 3


@given(st.lists(st.lists(st.sampled_from([1, END, MASK]), min_size=5, max_size=5), min_size=1, max_size=4))
def test_text_is_decided_when_no_mask_stands_before_an_end_token(rows):
    decided_B = jax.jit(text_is_decided, static_argnums=1)(jnp.array(rows), SPECIAL)
    assert decided_B.tolist() == [is_decided(row) for row in rows]


# -- randomness --------------------------------------------------------------------------------------------------------


def test_noise_is_a_function_of_key_row_id_and_step():
    ids, shape, steps = jnp.array([3, 9, 4]), (3, 2), jnp.array([0, 0, 0])
    noise = KeyedNoise(jax.random.key(0), ids)
    first = np.asarray(noise.token(steps, shape))
    assert first.shape == (3, 2, 2) and ((first >= 0) & (first < 1)).all()
    turned = KeyedNoise(jax.random.key(0), ids[::-1])
    np.testing.assert_array_equal(turned.token(steps, shape), first[::-1])
    later = np.asarray(noise.token(jnp.array([0, 1, 2]), shape))
    np.testing.assert_array_equal(later[0], first[0])
    assert (later[1:] != first[1:]).all()
    assert (np.asarray(KeyedNoise(jax.random.key(1), ids).token(steps, shape)) != first).all()
    uniform = np.asarray(noise.uniform(steps, shape))
    assert uniform.shape == (3, 2) and len(np.unique(np.concatenate([uniform.ravel(), first.ravel()]))) == 18
    np.testing.assert_array_equal(turned.uniform(steps, shape), uniform[::-1])


WAYS = [
    {},
    {"remasking": "random"},
    {"schedule": Threshold(0.3)},
    {"cache": DualCache()},
    {"cache": PrefixCache(), "schedule": Threshold(0.3)},
    {"schedule": Klass(0.2, 0.5), "cache": DualCache()},
]


@pytest.mark.parametrize("changes", WAYS, ids=str)
def test_a_rows_sample_does_not_depend_on_its_batch(decode_24, changes):
    draw = partial(decode_24, dataclasses.replace(GREEDY, **changes), 1.0)
    together = draw()
    shuffled, company = list(range(24))[::-1], [5, 5, 2] * 8
    for rows in (shuffled, company, [3]):
        part = draw(rows=rows)
        for field in ("tokens_BC", "unmask_step_BC", "length_B", "nfe_B", "cached_nfe_B"):
            np.testing.assert_array_equal(getattr(part, field), getattr(together, field)[rows], err_msg=field)
    assert (draw(key=1).tokens_BC != together.tokens_BC).any(axis=1).mean() > 0.8


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.4])
@pytest.mark.parametrize("remasking", ["left_to_right", "random"])
def test_whole_sequences_follow_the_enumerated_distribution(tiny, oracle, remasking, temperature):
    """Three tokens and the mask, three positions, 30,000 rows: chi-square of all 27 texts against the exact probabilities."""
    model, variables = tiny(seed=3, layers=1, vocab_size=4)
    variables = {"params": {**variables["params"], "ff_out": variables["params"]["ff_out"] / 8}}
    config = SamplerConfig(completion_length=3, block_length=3, steps=3, remasking=remasking, early_exit=False)
    special, rows, mask = SpecialTokens(mask=3, end=2), 30_000, 3
    forward_alone = oracle(model, variables)
    forward = functools.cache(lambda tokens: forward_alone(list(tokens))[1].astype(np.float64))

    def probability_of(text, temperature):
        """Sum over the orders of positions of the product of conditionals."""
        orders = [(0, 1, 2)] if remasking == "left_to_right" else list(itertools.permutations(range(3)))
        total = 0.0
        for order in orders:
            tokens, p = [mask] * 3, 1 / len(orders)
            for place in order:
                p *= softmax(forward((1, *tokens))[1 + place, :3] / temperature)[text[place]]
                tokens[place] = text[place]
            total += p
        return total

    rollout = Sampler(model, config, special, temperature).sample(
        variables,
        Prompts(jnp.ones((rows, 1), jnp.int32), jnp.ones(rows, jnp.int32)),
        KeyedNoise(jax.random.key(0), jnp.arange(rows)),
    )
    texts = list(itertools.product(range(3), repeat=3))
    codes = np.asarray(rollout.tokens_BC) @ [9, 3, 1]
    counts = np.bincount(codes, minlength=27)
    expected = np.array([probability_of(text, temperature) for text in texts])
    assert expected.min() * rows > 5, "every text is expected often enough"
    np.testing.assert_allclose(expected.sum(), 1, atol=1e-6)
    assert stats.chisquare(counts, rows * expected).pvalue > 1e-3
    other = np.array([probability_of(text, 1.25 * temperature) for text in texts])
    assert stats.chisquare(counts, rows * other).pvalue < 1e-6  # the test can tell a wrong temperature
    # exp(log-probability of the tokens and of the order) is that of the path: averaged over samples, 1 / p counts the paths.
    path_logp = np.asarray(rollout.token_logp_BC + rollout.order_logp_BC).sum(axis=1)
    paths = 27 * (6 if remasking == "random" else 1)
    inverse = np.exp(-path_logp.astype(np.float64))
    assert abs(inverse.mean() - paths) < 4 * inverse.std() / rows**0.5


def test_random_remasking_reveals_every_position_first_equally_often(tiny):
    model, variables = tiny(seed=1, layers=1)
    prompts = jnp.zeros((2000, 1), jnp.int32), jnp.ones(2000, jnp.int32)
    config = SamplerConfig(completion_length=4, block_length=4, steps=4, remasking="random", early_exit=False)
    rollout = Sampler(model, config, SPECIAL).sample(
        variables, Prompts(*prompts), KeyedNoise(jax.random.key(0), jnp.arange(2000))
    )
    first = np.argmin(np.asarray(rollout.unmask_step_BC), axis=1)
    assert stats.chisquare(np.bincount(first, minlength=4)).pvalue > 1e-3


# -- devices and compilation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", WAYS, ids=str)
@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_eight_devices_decode_what_one_decodes(tiny, initialized, random_prompts, axes, changes):
    model, host_variables = tiny(heads=4, kv_heads=2, vocab_size=14, qkv_bias=True)
    mesh = sharding.make_mesh(MeshConfig(**axes))
    prompt_BP, length_B = random_prompts(5, 8, 3)
    host = (np.asarray(prompt_BP), np.asarray(length_B), np.arange(8, dtype=np.int32))

    sampler = Sampler(model, dataclasses.replace(GREEDY, **changes), SPECIAL, temperature=0.5 if changes else 0.0)

    def decode(variables, prompt_BP, length_B, row_ids_B):
        return sampler.sample(variables, Prompts(prompt_BP, length_B), KeyedNoise(jax.random.key(0), row_ids_B))

    with jax.set_mesh(mesh):
        cut = jax.tree.map(lambda x: x.sharding, {"params": initialized["params"]})  # over fsdp and tensor
        variables = jax.device_put(host_variables, cut if "tensor" in axes else sharding.replicated(mesh))
        placed = sharding.shard_batch(mesh, host)
        many = decode(variables, *placed)
    shards = sharding.row_shards(mesh)
    assert placed[0].addressable_shards[0].data.shape == (8 // shards, 3)
    assert len(variables["params"]["ff_out"].sharding.device_set) == 8
    one = decode(host_variables, *map(jnp.asarray, host))
    assert len(one.tokens_BC.sharding.device_set) == 1
    for field in ("tokens_BC", "unmask_step_BC", "length_B", "nfe_B", "cached_nfe_B"):
        np.testing.assert_array_equal(getattr(many, field), getattr(one, field), err_msg=field)
    assert len(np.unique(one.tokens_BC)) > 3


def test_repeated_calls_compile_once(tiny, random_prompts, towards_end):
    model, variables = tiny(seed=8, layers=1)
    before = Sampler._compiled_run._cache_size()

    def call(seed, config):
        sampler = Sampler(
            type(model)(dataclasses.replace(model.config)),
            dataclasses.replace(config),
            SpecialTokens(MASK, END, TURN_END),
        )
        noise = KeyedNoise(jax.random.key(seed), jnp.arange(2) + seed)
        sampler.sample(towards_end(variables, float(seed)), Prompts(*random_prompts(seed, 2, 3)), noise)

    for seed in range(4):
        call(seed, GREEDY)
    assert Sampler._compiled_run._cache_size() == before + 1
    call(0, dataclasses.replace(GREEDY, steps=4))
    assert Sampler._compiled_run._cache_size() == before + 2  # the count does see another program


def test_temperatures_and_thresholds_share_a_program(tiny, random_prompts):
    model, variables = tiny(seed=3)
    arguments = variables, Prompts(*random_prompts(2, 6, 3)), KeyedNoise(jax.random.key(0), jnp.arange(6))
    before = Sampler._compiled_run._cache_size()

    def texts(temperature, schedule):
        config = dataclasses.replace(GREEDY, schedule=schedule)
        rollout = Sampler(model, config, SPECIAL, temperature).sample(*arguments)
        return np.asarray(rollout.tokens_BC).tolist(), np.asarray(rollout.unmask_step_BC).tolist()

    cold, warm, hot, _ = (texts(temperature, Even()) for temperature in (0.01, np.float32(0.7), 3.0, 1))
    assert cold != warm != hot, "the temperature is read"
    assert Sampler._compiled_run._cache_size() == before + 1
    assert (
        texts(0.0, Even())[0] == texts(0, Even())[0] == cold[0] and Sampler._compiled_run._cache_size() == before + 2
    )  # greedy draws nothing
    slow, fast = (texts(0.0, Threshold(threshold)) for threshold in (1, 0.05))
    assert np.max(slow[1]) > np.max(fast[1]), "the threshold is read"
    assert Sampler._compiled_run._cache_size() == before + 3


# -- the steps ---------------------------------------------------------------------------------------------------------


STEPS = (
    "init",
    "is_running",
    "needs_refresh",
    "full_step",
    "cached_step",
    "block",
    "predict",
    "select",
    "unmask",
    "finish",
)


@pytest.mark.parametrize("changes", [{}, *WAYS[2:]], ids=str)
def test_the_compiled_loop_and_the_stream_call_the_same_steps(tiny, random_prompts, changes):
    """Traces of each step by its name; the subclass makes programs of its own, so each is traced here."""
    model, variables = tiny(seed=1)
    traced = []

    def spied(name):
        def step(self, *arguments, **named):
            traced.append(name)
            return getattr(Sampler, name)(self, *arguments, **named)

        return step

    Spy = dataclasses.dataclass(frozen=True)(type("Spy", (Sampler,), {name: spied(name) for name in STEPS}))
    sampler = Spy(model, dataclasses.replace(GREEDY, **changes), SPECIAL, temperature=1.0)
    arguments = variables, Prompts(*random_prompts(0, 4, 3)), KeyedNoise(jax.random.key(0), jnp.arange(4))
    rollout = sampler.sample(*arguments)
    compiled = set(traced)
    traced.clear()
    *states, last = sampler.stream(*arguments)
    # Without a cache every step is a full one, and only the host asks whether it is.
    without_cache = set() if "cache" in changes else {"cached_step"}
    assert set(traced) == set(STEPS) - without_cache
    assert compiled == set(traced) - (set() if "cache" in changes else {"needs_refresh"})
    assert len(states) == int(states[-1].step) > 1 and all(isinstance(state, Decoding) for state in states)
    for name, value in rollout._asdict().items():
        np.testing.assert_array_equal(getattr(last, name), value, err_msg=name)


@pytest.mark.parametrize("axes", [{}, {"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("cache", ["none", "dual"])
def test_a_stream_compiles_each_step_once(tiny, initialized, random_prompts, axes, cache):
    model, host_variables = tiny(heads=4, kv_heads=2, vocab_size=14, qkv_bias=True)
    sampler = Sampler(
        model,
        dataclasses.replace(GREEDY, cache={"none": NoCache(), "dual": DualCache()}[cache], early_exit=False),
        SPECIAL,
    )
    prompts = jax.tree.map(np.asarray, Prompts(*random_prompts(5, 8, 3)))
    ids_B = np.arange(8, dtype=np.int32)
    shape = tuple(axes.get(axis, 1) for axis in sharding.AXES)
    devices = jax.devices()[: math.prod(shape)]
    mesh = jax.make_mesh(shape, sharding.AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
    counted = (Sampler._compiled_init, Sampler._compiled_step)
    before = [function._cache_size() for function in counted]
    with jax.set_mesh(mesh):
        variables = jax.device_put(host_variables, sharding.replicated(mesh))
        prompts, ids_B = sharding.shard_batch(mesh, (prompts, ids_B))
        for key in range(2):
            list(sampler.stream(variables, prompts, KeyedNoise(jax.random.key(key), ids_B)))
    after = [function._cache_size() for function in counted]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 2 if cache == "dual" else 1]


def test_a_step_can_be_called_by_itself(tiny, random_prompts):
    model, variables = tiny(seed=1)
    sampler = Sampler(model, dataclasses.replace(GREEDY, cache=DualCache()), SPECIAL)
    inputs = sampler.inputs(variables, Prompts(*random_prompts(0, 4, 3)), None)
    state = sampler.init(inputs)
    assert sampler.is_running(state) and sampler.needs_refresh(state)
    assert (np.asarray(state.tokens_BC) == MASK).all()
    one, cache = sampler.full_step(inputs, state)
    # Two blocks of 4 tokens in 3 steps each: 2, 1, 1.
    assert (np.asarray(one.tokens_BC != MASK).sum(axis=1) == 2).all() and (one.cache_age, one.step) == (1, 1)
    assert not sampler.needs_refresh(one)
    two = sampler.cached_step(inputs, one, cache)
    assert (np.asarray(two.tokens_BC != MASK).sum(axis=1) == 3).all() and (two.cache_age, two.step) == (2, 2)
    assert two.nfe_B.tolist() == [2] * 4 and two.cached_nfe_B.tolist() == [1] * 4
    three = sampler.cached_step(inputs, two, cache)
    assert sampler.needs_refresh(three), "the first block is full"
    # A choice by hand: what `unmask` writes is what `select` says, and nothing else.
    block = sampler.block(state, sampler.block_start(state), is_first_pass=jnp.bool(True))
    hidden_BSD = jnp.ones((4, 4, model.config.width))
    predictions = sampler.predict(inputs, block, hidden_BSD, None)
    selection = sampler.select(inputs, state, block, predictions, None)
    after = sampler.unmask(inputs, state, block, hidden_BSD)
    expected_BS = np.where(selection.unmask_BS, predictions.token_BS, MASK)
    np.testing.assert_array_equal(after.tokens_BC, np.concatenate([expected_BS, np.full((4, 4), MASK)], axis=1))
    assert (np.asarray(sampler.finish(state).tokens_BC) == END).all()
