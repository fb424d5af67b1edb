"""The compiled sampler against PyTorch's decodings and a plain Python loop; its law and its early exit."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from d1jax.config import MeshConfig, SamplerConfig
from d1jax.data.tokenizers import SpecialTokens
from d1jax.diffusion.sampler import Noise, denoise, keyed_noise, sample, text_is_decided
from d1jax.diffusion.schedule import time_schedule
from d1jax.runtime import mesh as mesh_rules

END, TURN_END, MASK = 10, 11, 12
SPECIAL = SpecialTokens(mask=MASK, end=END, turn_end=TURN_END)
GREEDY = SamplerConfig(completion_length=8, block_length=4, steps=6)


def random_prompts(seed, rows, width):
    """(right-padded prompts, lengths) of different lengths, at least one full row.

    None is empty: without a prompt all positions of the first step see the same and tie exactly, up to rounding.
    """
    rng = np.random.default_rng(seed)
    length_B = rng.integers(1, width + 1, rows)
    length_B[rng.integers(rows)] = width
    prompt_BP = np.where(np.arange(width)[None, :] < length_B[:, None], rng.integers(0, 10, (rows, width)), END)
    return jnp.asarray(prompt_BP, jnp.int32), jnp.asarray(length_B, jnp.int32)


def towards_end(variables, strength):
    """The same model, but every position likes the end token more: channel 0 feeds its column of the head."""
    params = variables["params"]
    wte = params["wte"].at[:, 0].add(6.0)
    return {"params": {**params, "wte": wte, "ff_out": params["ff_out"].at[0, END].add(strength)}}


NO_NOISE = Noise(None, None, None)


def recorded(draws_NBx):
    """draws[step][row] as a source of noise."""
    draws_NBx = jnp.asarray(draws_NBx, jnp.float32)
    return lambda step_B, shape: draws_NBx[step_B, jnp.arange(shape[0])]


def gumbel_max(logits_xV, gumbel_xV):
    return jnp.argmax(logits_xV + gumbel_xV, axis=-1)


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
RULES = {"maskgit_plus": "low_confidence", "topk_margin": "topk_margin", "entropy": "entropy", "origin": "random"}


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
        schedule="chance" if case["alg"] == "origin" else "time", confidence_of="sampling",
        top_k=case["top_k"] or 0, top_p=case["top_p"] or 1.0, early_exit=False,
    )  # fmt: skip
    expected_BC = io[f"{name}/unmask_step"][:rows, width:]
    uniform = np.zeros((case["steps"], rows, length), np.float32)
    if case["alg"] == "origin":  # one number a position that is still masked, row after row
        for step, used in enumerate(io[f"{name}/uniform_used_len"]):
            masked = expected_BC >= step
            assert masked.sum() == used
            uniform[step][masked] = io[f"{name}/uniform"][step, :used]
    rollout = denoise(
        golden_dream.model, golden_dream.variables, jnp.asarray(prompt_BP[:rows]), jnp.asarray(length_B[:rows]),
        Noise(None, None, recorded(uniform)),
        config=config, special=golden_dream.special, temperature=0.0,
    )  # fmt: skip
    np.testing.assert_array_equal(rollout.tokens_BC, io[f"{name}/tokens"][:rows, width:])
    np.testing.assert_array_equal(rollout.reveal_step_BC, expected_BC)
    if case["alg"] != "origin":  # Dream also runs the steps that commit nothing
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

    def uniform_of_block(step_B, shape):
        whole_BC = jnp.asarray(uniform)[step_B[0]]
        return jax.lax.dynamic_slice_in_dim(whole_BC, step_B[0] // steps_per_block * block, block, axis=1)

    rollout = denoise(
        golden.model, golden.variables, jnp.asarray(prompt_BP[:rows]), jnp.asarray(length_B[:rows]),
        Noise(recorded(-np.log(-np.log(uniform))), gumbel_max, uniform_of_block),
        config=config, special=golden.special, temperature=case["temperature"],
    )  # fmt: skip
    np.testing.assert_array_equal(rollout.tokens_BC, io[f"{name}/tokens"][:, width:])
    np.testing.assert_array_equal(rollout.reveal_step_BC, io[f"{name}/unmask_step"][:, width:])
    # Guidance is one call on a doubled batch there, two passes here.
    assert (np.asarray(rollout.nfe_B) == case["forward_calls"] * (2 if case.get("cfg_scale") else 1)).all()


PARALLEL = (
    "fast_nocache_b8_s16", "fast_nocache_b8_thr", "fast_nocache_b16_thr", "fast_factor1.0_b8", "fast_factor0.5_b8",
)  # fmt: skip


@pytest.mark.parametrize("name", PARALLEL)
def test_tokens_and_steps_equal_parallel_decoding(golden, name):
    case, io = golden.cases[name], golden.io
    prompt_BP = io["fast_prompt_ids"]
    rule = "factor" if "factor" in case else "threshold" if "threshold" in case else "even"
    config = SamplerConfig(
        completion_length=case["gen_length"], block_length=case["block_length"], steps=case.get("steps", 32), schedule=rule,
        threshold=case.get("threshold", 0.9), factor=case.get("factor", 1.0), early_exit=False,
    )  # fmt: skip
    rollout = denoise(
        golden.model, golden.variables, jnp.asarray(prompt_BP), jnp.asarray([prompt_BP.shape[1]]),
        NO_NOISE, config=config, special=golden.special, temperature=0.0,
    )  # fmt: skip
    np.testing.assert_array_equal(rollout.tokens_BC, io[f"{name}/tokens"][:, prompt_BP.shape[1] :])
    np.testing.assert_array_equal(rollout.reveal_step_BC, io[f"{name}/unmask_step"][:, prompt_BP.shape[1] :])
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
        schedule="threshold" if "threshold" in case else "even", threshold=case.get("threshold", 0.9),
        cache="prefix" if "prefix" in name else "dual",
    )  # fmt: skip
    rollout = denoise(
        reference.model, reference.variables, jnp.asarray(prompt_BP), jnp.asarray([width]), NO_NOISE,
        config=config, special=reference.special, temperature=0.0,
    )  # fmt: skip
    np.testing.assert_array_equal(rollout.tokens_BC, io[f"{name}/tokens"][:, width:])
    np.testing.assert_array_equal(rollout.reveal_step_BC, io[f"{name}/unmask_step"][:, width:])
    # The reference runs a pass in vain when a block is full after its first one; in these cases none is.
    assert set(range(case["nfe"])) == set(io[f"{name}/unmask_step"][0, width:].tolist())
    assert rollout.nfe_B.tolist() == [case["nfe"]]
    assert rollout.cached_nfe_B.tolist() == [io[f"{name}/call_is_cached"].sum()]


def test_every_golden_case_is_covered(golden, golden_dream):
    assert set(golden.cases) == {*OFFICIAL, *PARALLEL, *CACHED}
    assert set(golden_dream.cases) == {*DREAM, *CACHED_DREAM}


# -- a plain Python loop -----------------------------------------------------------------------------------------------


def softmax(values):
    weights = np.exp(values - np.max(values))
    return weights / weights.sum()


def plain_counts(config):
    """[(step, first column, positions to commit or -1, chance)] in the words of the two samplers."""
    length, block, steps = config.completion_length, config.block_length, config.steps
    if config.schedule == "even":
        per_block = steps // (length // block)
        shares = [block // per_block + (step % per_block < block % per_block) for step in range(steps)]
        return [(step, step // per_block * block, shares[step], 0.0) for step in range(steps)]
    if config.schedule in ("threshold", "factor", "entropy_bound"):
        return [(step, None, 1, 0.0) for step in range(length)]
    time = np.linspace(1, 1e-3, steps + 1)
    rows, left = [], length
    for step in range(steps):
        chance = 1.0 if step == steps - 1 else 1 - time[step + 1] / time[step]
        share = -1 if config.schedule == "chance" else int(left * chance)
        left -= max(share, 0)
        rows += [(step, 0, share, chance)] * (share != 0)
    return rows


def plain_accepted(config, options):
    """The options that go together: (-priority, place, token, confidence), the first of the order first."""
    taken = options[:1]
    for n, option in enumerate(options[1:], start=2):
        if config.schedule == "threshold":
            if option[3] >= config.threshold:
                taken.append(option)
        elif config.schedule == "factor":
            last = n == len(options)
            if -option[0] < 1 - config.factor / (n + 1) and not last:
                break
            taken.append(option)
        else:
            if sum(entropy for entropy, *_ in taken) > config.entropy_bound:
                break
            taken.append(option)
    return taken


def plain_priority(config, p, token, uniform, place):
    best = sorted(p, reverse=True)
    return {
        "low_confidence": p[token],
        "topk_margin": best[0] - best[1],
        "entropy": float(np.sum(p * np.log(p + 1e-10))),
        "random": uniform,
        "left_to_right": -place,
    }[config.remasking]


def decode_row(row_alone, alignment, prompt, config, temperature, gumbel, uniform):
    """One row alone in natural order: (tokens, steps, confidences, forward passes). gumbel[step][slot][token]."""
    length, block = config.completion_length, config.block_length
    tokens, steps, confidences, calls = [MASK] * length, [-1] * length, [0.0] * length, 0

    def score(prompt):
        _, z = row_alone(prompt + tokens)
        return np.concatenate([z[:1], z[:-1]]) if alignment == "shifted" else z

    adaptive = config.schedule in ("threshold", "factor", "entropy_bound")
    for step, start, share, chance in plain_counts(config):
        if MASK not in tokens:
            break
        if adaptive:
            start = tokens.index(MASK) // block * block
        z = score(prompt)
        if config.guidance:
            hidden = score([MASK] * len(prompt))
            z = hidden + (config.guidance + 1) * (z - hidden)
        calls += 2 if config.guidance else 1
        options = []
        for slot in range(block):
            place = start + slot
            if tokens[place] != MASK:
                continue
            logits = z[len(prompt) + place].copy()
            if config.end_token == "forbidden":
                logits[END] = -np.inf
            sampled = logits / temperature if temperature else logits.copy()
            if config.top_k:
                sampled[sampled < np.sort(sampled)[-config.top_k]] = -np.inf
            wanted = sampled + gumbel[step][slot] if temperature else sampled.copy()
            wanted[MASK] = -np.inf
            token = int(wanted.argmax())
            scored = sampled.copy() if config.confidence_of == "sampling" else logits
            if config.end_token == "last":
                scored[[END, TURN_END]] = -np.inf
            p = softmax(scored)
            priority = plain_priority(config, p, token, uniform[step][slot], slot)
            if config.end_token == "last" and token in (END, TURN_END):
                priority = -np.inf
            if share >= 0 or adaptive or uniform[step][slot] < chance:
                options.append((-priority, place, token, p[token]))
        if adaptive:
            options, share = plain_accepted(config, sorted(options)), len(options)
        for _, place, token, confidence in sorted(options)[: share if share >= 0 else None]:
            tokens[place], steps[place], confidences[place] = token, step, confidence
        if config.early_exit and END in tokens and MASK not in tokens[: tokens.index(END)]:
            break
    tokens = [END if token == MASK else token for token in tokens]
    return tokens, steps, confidences, calls


@st.composite
def decodings(draw):
    schedule = draw(st.sampled_from(["even", "even", "time", "chance", "threshold", "factor", "entropy_bound"]))
    whole = schedule in ("time", "chance")
    blocks, block = draw(st.sampled_from([(1, 5), (1, 8)] if whole else [(1, 5), (2, 3), (2, 4), (3, 2)]))
    rules = ["low_confidence", "topk_margin", "entropy", "random", "left_to_right"]
    config = SamplerConfig(
        completion_length=blocks * block,
        block_length=block,
        steps=blocks * draw(st.integers(1, block)),
        remasking={"chance": "random", "factor": "low_confidence", "entropy_bound": "entropy"}.get(schedule)
        or draw(st.sampled_from(rules)),
        threshold=draw(st.sampled_from([0.2, 0.5])),
        factor=draw(st.sampled_from([0.8, 2.0])),
        entropy_bound=draw(st.sampled_from([0.5, 2.0])),
        schedule=schedule,
        confidence_of=draw(st.sampled_from(["model", "sampling"])),
        top_k=draw(st.sampled_from([0, 4])),
        guidance=draw(st.sampled_from([0.0, 0.0, 0.8])),
        end_token=draw(st.sampled_from(["allowed", "forbidden", "last"])),
        early_exit=draw(st.booleans()),
    )
    return config, draw(st.sampled_from([0.0, 0.7])), draw(st.sampled_from(["same_position", "shifted"]))


@settings(max_examples=24)
@given(decodings())
def test_the_compiled_sampler_equals_a_python_loop_token_for_token_and_step_for_step(tiny, oracle, decoding):
    config, temperature, alignment = decoding
    model, variables = tiny(seed=1, layers=1, alignment=alignment)
    rows, width, block = 3, 3, config.block_length
    draws = np.random.default_rng(0)
    gumbel = draws.gumbel(size=(config.completion_length, rows, block, 13))
    uniform = draws.random((config.completion_length, rows, block))
    noise = Noise(recorded(gumbel), gumbel_max, recorded(uniform))
    decode = jax.jit(partial(denoise, model, noise=noise, config=config, special=SPECIAL, temperature=temperature))
    for seed, strength in ((0, 0.0), (1, 1.5)):
        prompt_BP, length_B = random_prompts(seed, rows, width)
        model_with_ends = towards_end(variables, strength)
        rollout = decode(model_with_ends, prompt_BP, length_B)
        row_alone = oracle(model, model_with_ends)
        for row, n in enumerate(np.asarray(length_B)):
            prompt = np.asarray(prompt_BP)[row, :n].tolist()
            tokens, steps, confidences, calls = decode_row(
                row_alone, alignment, prompt, config, temperature, gumbel[:, row], uniform[:, row]
            )
            assert np.asarray(rollout.tokens_BC)[row].tolist() == tokens
            assert np.asarray(rollout.reveal_step_BC)[row].tolist() == steps
            np.testing.assert_allclose(rollout.confidence_BC[row], confidences, atol=1e-4)
            assert rollout.nfe_B[row] == calls
            assert rollout.length_B[row] == (tokens.index(END) + 1 if END in tokens else len(tokens))


# -- what every decoding keeps -----------------------------------------------------------------------------------------


def decode_24(tiny, config=GREEDY, temperature=0.0, strength=1.2, key=0, rows=range(24)):
    """24 rows of one model; most tests share these compiled programs."""
    model, variables = tiny(seed=1)
    prompt_BP, length_B = random_prompts(0, 24, 3)
    rows = jnp.array(rows)
    rollout = sample(
        model, towards_end(variables, strength), prompt_BP[rows], length_B[rows], jax.random.key(key), 7 * rows,
        config=config, special=SPECIAL, temperature=temperature,
    )  # fmt: skip
    return jax.device_get(rollout)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_each_step_reveals_its_scheduled_count_inside_its_block(tiny, temperature):
    rollout = decode_24(tiny, dataclasses.replace(GREEDY, early_exit=False), temperature)
    assert not (rollout.tokens_BC == MASK).any() and (rollout.reveal_step_BC >= 0).all()
    for steps_C in rollout.reveal_step_BC:
        # Two blocks of 4 tokens in 3 steps each: 2, 1, 1.
        assert np.bincount(steps_C[:4], minlength=6).tolist() == [2, 1, 1, 0, 0, 0]
        assert np.bincount(steps_C[4:], minlength=6).tolist() == [0, 0, 0, 2, 1, 1]
    assert (rollout.confidence_BC > 0).all() and (rollout.confidence_BC <= 1).all()


def test_a_model_that_shouts_mask_still_leaves_none(tiny):
    model, variables = tiny(seed=1)
    shouting = towards_end(variables, 0.0)
    shouting["params"]["ff_out"] = shouting["params"]["ff_out"].at[0, MASK].add(20.0)
    rollout = sample(
        model, shouting, *random_prompts(0, 24, 3), jax.random.key(0), jnp.arange(24),
        config=dataclasses.replace(GREEDY, early_exit=False), special=SPECIAL, temperature=1.0,
    )  # fmt: skip
    assert not (np.asarray(rollout.tokens_BC) == MASK).any()
    assert np.asarray(rollout.confidence_BC).max() < 0.1  # most of the probability was the mask's


# -- early exit --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_early_exit_changes_nothing_before_the_end_and_saves_forward_passes(tiny, temperature):
    on, off = (decode_24(tiny, dataclasses.replace(GREEDY, early_exit=early), temperature) for early in (True, False))
    assert (off.nfe_B == 6).all() and (on.nfe_B <= 6).all()
    assert (on.nfe_B < 6).sum() >= 5, "rows that stop early"
    assert len(set(on.nfe_B.tolist())) >= 3, "at different steps"
    np.testing.assert_array_equal(on.length_B, off.length_B)
    for row in range(24):
        text = slice(0, on.length_B[row])
        for field in ("tokens_BC", "reveal_step_BC", "confidence_BC"):
            np.testing.assert_array_equal(getattr(on, field)[row, text], getattr(off, field)[row, text])
        # Committed tokens are never taken back; what was not decided yet is end tokens of no step.
        decided = on.reveal_step_BC[row] >= 0
        np.testing.assert_array_equal(decided, off.reveal_step_BC[row] < on.nfe_B[row])
        np.testing.assert_array_equal(on.tokens_BC[row, decided], off.tokens_BC[row, decided])
        assert (on.tokens_BC[row, ~decided] == END).all() and (on.reveal_step_BC[row, ~decided] == -1).all()
        assert (on.confidence_BC[row, ~decided] == 0).all() and not decided.all() == (on.nfe_B[row] < 6)
        # It stops at the first step after which the text through the end token is decided.
        moments = [
            s for s in range(6) if is_decided(np.where(off.reveal_step_BC[row] <= s, off.tokens_BC[row], MASK).tolist())
        ]
        assert on.nfe_B[row] == (moments[0] + 1 if moments else 6)


def is_decided(tokens):
    return END in tokens and MASK not in tokens[: tokens.index(END)]


def test_the_loop_ends_with_its_last_row(tiny):
    model, variables = tiny(seed=1)
    calls = []

    def counted(step_B, shape):
        jax.debug.callback(lambda step_B: calls.append(int(step_B[0])), step_B)
        return jnp.zeros(shape)

    config = dataclasses.replace(GREEDY, remasking="random")  # equal priorities: left to right
    rollout = denoise(
        model, towards_end(variables, 30.0), *random_prompts(0, 3, 3), Noise(None, None, counted),
        config=config, special=SPECIAL, temperature=0.0,
    )  # fmt: skip
    jax.effects_barrier()
    assert calls == [0] and rollout.nfe_B.tolist() == [1, 1, 1]
    assert (np.asarray(rollout.tokens_BC) == END).all() and rollout.length_B.tolist() == [1, 1, 1]
    assert np.asarray(rollout.reveal_step_BC).tolist() == [[0, 0, -1, -1, -1, -1, -1, -1]] * 3


@given(st.lists(st.lists(st.sampled_from([1, END, MASK]), min_size=5, max_size=5), min_size=1, max_size=4))
def test_text_is_decided_when_no_mask_stands_before_an_end_token(rows):
    decided_B = jax.jit(text_is_decided, static_argnums=1)(jnp.array(rows), SPECIAL)
    assert decided_B.tolist() == [is_decided(row) for row in rows]


# -- randomness --------------------------------------------------------------------------------------------------------


def test_noise_is_a_function_of_key_row_id_and_step():
    ids, shape = jnp.array([3, 9, 4]), (3, 2, 5)
    noise = keyed_noise(jax.random.key(0), ids)
    first = np.asarray(noise.gumbel(jnp.int32(0), shape))
    assert first.dtype == np.float32 and len(np.unique(first)) == first.size
    turned = keyed_noise(jax.random.key(0), ids[::-1])
    np.testing.assert_array_equal(turned.gumbel(jnp.int32(0), shape), first[::-1])
    assert (np.asarray(noise.gumbel(jnp.int32(1), shape)) != first).all()
    assert (np.asarray(keyed_noise(jax.random.key(1), ids).gumbel(jnp.int32(0), shape)) != first).all()
    uniform = np.asarray(noise.uniform(jnp.int32(0), shape[:2]))
    assert ((uniform >= 0) & (uniform < 1)).all() and len(np.unique(uniform)) == 6
    np.testing.assert_array_equal(turned.uniform(jnp.int32(0), shape[:2]), uniform[::-1])


def test_gumbel_noise_has_the_gumbel_law_and_a_long_tail():
    noise = keyed_noise(jax.random.key(1), jnp.arange(4))
    draws = np.asarray(noise.gumbel(jnp.int32(0), (4, 500, 1000)), np.float64).ravel()
    assert stats.kstest(draws[:: len(draws) // 50_000], "gumbel_r").pvalue > 1e-3
    # Two million draws exceed log(2e6) + 1 = 15.5 with probability 0.3; a single 23-bit uniform ends at 16.6.
    assert draws.max() > 12 and draws.min() > -4


@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
def test_a_rows_sample_does_not_depend_on_its_batch(tiny, remasking):
    draw = partial(decode_24, tiny, dataclasses.replace(GREEDY, remasking=remasking), 1.0)
    together = draw()
    shuffled, company = list(range(24))[::-1], [5, 5, 2] * 8
    for rows in (shuffled, company, [3]) if remasking == "low_confidence" else (shuffled, company):
        part = draw(rows=rows)
        for field in ("tokens_BC", "reveal_step_BC", "length_B", "nfe_B"):
            np.testing.assert_array_equal(getattr(part, field), getattr(together, field)[rows], err_msg=field)
    assert (draw(key=1).tokens_BC != together.tokens_BC).any(axis=1).mean() > 0.8


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_one_step_samples_follow_softmax_of_logits_over_temperature(tiny, oracle, temperature):
    """One position, five tokens of which the last is the mask, 20,000 rows: chi-square against the exact law."""
    model, variables = tiny(seed=3, layers=1, vocab_size=5)
    variables = {"params": {**variables["params"], "ff_out": variables["params"]["ff_out"] / 4}}
    special, rows = SpecialTokens(mask=4, end=3), 20_000
    rollout = sample(
        model, variables, jnp.full((rows, 1), 2), jnp.ones(rows, jnp.int32), jax.random.key(0), jnp.arange(rows),
        config=SamplerConfig(completion_length=1, block_length=1, steps=1), special=special, temperature=temperature,
    )  # fmt: skip
    _, z = oracle(model, variables)([2, 4])
    law = softmax(z[1, :4] / temperature)
    assert law.min() > 0.005, "every token is expected often enough"
    counts = np.bincount(np.asarray(rollout.tokens_BC)[:, 0], minlength=5)
    assert counts[4] == 0
    assert stats.chisquare(counts[:4], rows * law).pvalue > 1e-3
    other = softmax(z[1, :4] / (temperature + 0.1))
    assert stats.chisquare(counts[:4], rows * other).pvalue < 1e-6  # the test can tell a wrong temperature
    # The stored confidence is the model's own probability: no temperature, and the mask has its share.
    np.testing.assert_allclose(
        rollout.confidence_BC[:, 0], softmax(z[1])[np.asarray(rollout.tokens_BC)[:, 0]], atol=1e-5
    )


def test_random_remasking_reveals_every_position_first_equally_often(tiny):
    model, variables = tiny(seed=1, layers=1)
    prompts = jnp.zeros((2000, 1), jnp.int32), jnp.ones(2000, jnp.int32)
    rollout = sample(
        model, variables, *prompts, jax.random.key(0), jnp.arange(2000),
        config=SamplerConfig(completion_length=4, block_length=4, steps=4, remasking="random", early_exit=False),
        special=SPECIAL, temperature=0.0,
    )  # fmt: skip
    first = np.argmin(np.asarray(rollout.reveal_step_BC), axis=1)
    assert stats.chisquare(np.bincount(first, minlength=4)).pvalue > 1e-3


# -- devices and compilation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_eight_devices_decode_what_one_decodes(tiny, initialized, axes):
    model, host_variables = tiny(heads=4, kv_heads=2, vocab_size=14, qkv_bias=True)
    mesh = mesh_rules.make_mesh(MeshConfig(**axes))
    prompt_BP, length_B = random_prompts(5, 8, 3)
    host = (np.asarray(prompt_BP), np.asarray(length_B), np.arange(8, dtype=np.int32))

    def decode(variables, prompt_BP, length_B, row_ids_B):
        return sample(
            model, variables, prompt_BP, length_B, jax.random.key(0), row_ids_B,
            config=GREEDY, special=SPECIAL, temperature=0.0,
        )  # fmt: skip

    with jax.set_mesh(mesh):
        cut = jax.tree.map(lambda x: x.sharding, {"params": initialized["params"]})  # over fsdp and tensor
        variables = jax.device_put(host_variables, cut if "tensor" in axes else mesh_rules.replicated(mesh))
        placed = mesh_rules.place_rows(mesh, host)
        many = decode(variables, *placed)
    shards = mesh_rules.row_shards(mesh)
    assert placed[0].addressable_shards[0].data.shape == (8 // shards, 3)
    assert len(variables["params"]["ff_out"].sharding.device_set) == 8
    one = decode(host_variables, *map(jnp.asarray, host))
    assert len(one.tokens_BC.sharding.device_set) == 1
    for field in ("tokens_BC", "reveal_step_BC", "length_B", "nfe_B"):
        np.testing.assert_array_equal(getattr(many, field), getattr(one, field), err_msg=field)
    assert len(np.unique(one.tokens_BC)) > 3


def test_repeated_calls_compile_once(tiny):
    model, variables = tiny(seed=8, layers=1)
    before = sample._cache_size()

    def call(seed, config):
        prompt_BP, length_B = random_prompts(seed, 2, 3)
        sample(
            type(model)(dataclasses.replace(model.config)), towards_end(variables, float(seed)), prompt_BP, length_B,
            jax.random.key(seed), jnp.arange(2) + seed, config=dataclasses.replace(config),
            special=SpecialTokens(MASK, END, TURN_END), temperature=0.0,
        )  # fmt: skip

    for seed in range(4):
        call(seed, GREEDY)
    assert sample._cache_size() == before + 1
    call(0, dataclasses.replace(GREEDY, steps=4))
    assert sample._cache_size() == before + 2  # the count does see another program
