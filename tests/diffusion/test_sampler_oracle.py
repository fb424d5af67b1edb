"""The compiled sampler against a plain Python loop, one row at a time, over all rules, caches and schedules."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d1jax.config import Config, NoCache, SamplerConfig
from d1jax.config.check import check
from d1jax.config.sampler import Cache, Remasking, Schedule
from d1jax.config.values import alternatives
from d1jax.data.tokenizers import SpecialTokens
from d1jax.diffusion.decoding import Prompts
from d1jax.diffusion.predictions import CONFIDENCE_SCORES
from d1jax.diffusion.sampler import Sampler
from d1jax.diffusion.unmasking import RULES

END, TURN_END, MASK = 10, 11, 12
SPECIAL = SpecialTokens(mask=MASK, end=END, turn_end=TURN_END)


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


def softmax(values):
    weights = np.exp(values - np.max(values))
    return weights / weights.sum()


def plain_counts(config):
    """[(step, first column, positions to unmask or -1, chance)] in the words of the two samplers."""
    length, block, steps = config.completion_length, config.block_length, config.steps
    if config.schedule.name == "even":
        per_block = steps // (length // block)
        shares = [block // per_block + (step % per_block < block % per_block) for step in range(steps)]
        return [(step, step // per_block * block, shares[step], 0.0) for step in range(steps)]
    if config.schedule.adaptive:
        return [(step, None, 1, 0.0) for step in range(length)]
    time = np.linspace(1, 1e-3, steps + 1)
    rows, left = [], length
    for step in range(steps):
        chance = 1.0 if step == steps - 1 else 1 - time[step + 1] / time[step]
        share = -1 if config.schedule.name == "chance" else int(left * chance)
        left -= max(share, 0)
        rows += [(step, 0, share, chance)] * (share != 0)
    return rows


class Option:
    """A masked position of the block, what it would become, and how it ranks."""

    def __init__(self, place, token, token_logp, p, weight, drawn, still):
        self.place, self.token, self.token_logp, self.p = place, token, token_logp, p
        self.confidence, self.weight, self.drawn, self.still = p[token], weight, drawn, still

    @property
    def entropy(self):
        return -float(np.sum(self.p * np.log(self.p + 1e-10))) if self.drawn > -np.inf else np.inf


def plain_accepted(config, options):
    """The options that go together; the first of the order comes first."""
    taken = options[:1]
    for n, option in enumerate(options[1:], start=2):
        if config.schedule.name == "threshold":
            if option.confidence >= config.schedule.threshold:
                taken.append(option)
        elif config.schedule.name == "klass":
            if option.confidence > config.schedule.threshold and option.still >= 2:
                taken.append(option)
        elif config.schedule.name == "factor":
            last = n == len(options)
            if option.confidence < 1 - config.schedule.factor / (n + 1) and not last:
                break
            taken.append(option)
        else:
            if sum(one.entropy for one in taken) > config.schedule.bound:
                break
            taken.append(option)
    return taken


def plain_weight(config, p, token, column):
    best = sorted(p, reverse=True)
    weight = {
        "low_confidence": p[token],
        "topk_margin": best[0] - best[1],
        "entropy": float(np.sum(p * np.log(p + 1e-10))),
        "random": 0.0,
        "left_to_right": -column,
    }[config.remasking.name]
    return weight / (config.remasking.temperature or 1.0)


def decode_row(row_alone, alignment, prompt, config, temperature, gumbel, uniform):
    """One row alone in natural order; gumbel[step][column][token]."""
    length, block = config.completion_length, config.block_length
    tokens, steps, confidences, calls, cached_calls = [MASK] * length, [-1] * length, [0.0] * length, 0, 0
    token_logps, order_logps = [0.0] * length, [0.0] * length
    cache, cache_age, block_now, before, still = None, 0, None, {}, {}

    def score(prompt, **cache):
        _, z = row_alone(prompt + tokens, **cache)
        return np.concatenate([z[:1], z[:-1]]) if alignment == "shifted" else z

    for step, start, share, chance in plain_counts(config):
        if MASK not in tokens:
            break
        if config.schedule.adaptive:
            start = tokens.index(MASK) // block * block
        opens = start != block_now
        if opens:
            before, still = {}, {}
        block_now = start
        if config.cache.name == "none" or opens or (config.cache.refresh and cache_age >= config.cache.refresh):
            cache, cache_age = [], 0
            z = score(prompt, keep=cache)
        else:
            place = np.arange(len(prompt) + length)
            stale = place < len(prompt) + start
            if config.cache.name == "dual":
                stale |= place >= len(prompt) + start + block
            z = score(prompt, past=cache, stale=stale)
            cached_calls += 1
        cache_age += 1
        if config.guidance:
            unprompted = score([MASK] * len(prompt))
            z = unprompted + (config.guidance + 1) * (z - unprompted)
        calls += 2 if config.guidance else 1
        options = []
        for column in range(block):
            place = start + column
            logits = z[len(prompt) + place].copy()
            if config.end_token == "forbidden":
                logits[END] = -np.inf
            sampled = logits / temperature if temperature else logits.copy()
            if config.top_k:
                kept = np.where(sampled < np.sort(sampled)[-config.top_k], -np.inf, sampled)
                sampled = kept if np.isfinite(np.delete(kept, MASK)).any() else sampled
            allowed = sampled.copy()
            allowed[MASK] = -np.inf
            token = int((allowed + gumbel[step][column] if temperature else allowed).argmax())
            token_logp = float(np.log(softmax(allowed)[token])) if temperature else 0.0
            scored = sampled.copy() if config.remasking.confidence_of == "sampling" else logits
            if config.end_token == "last":
                scored[[END, TURN_END]] = -np.inf
            p = softmax(scored) if np.isfinite(scored).any() else np.zeros(len(scored))
            if column in before and config.schedule.name == "klass":
                seen = p > 0
                with np.errstate(divide="ignore"):
                    moved = np.sum(p[seen] * np.log(p[seen] / before[column][seen]))
                still[column] = still.get(column, 0) + 1 if moved < config.schedule.kl_threshold else 0
            before[column] = p
            if tokens[place] != MASK:
                continue
            weight = drawn = plain_weight(config, p, token, column)
            if config.remasking.name == "random":
                drawn = uniform[step][column]
            elif config.remasking.temperature:
                drawn = weight - np.log(-np.log(uniform[step][column]))
            if config.end_token == "last" and token in (END, TURN_END):
                drawn = -np.inf
            options.append(Option(place, token, token_logp, p, weight, drawn, still.get(column, 0)))
        forced = config.cache.name != "none" and config.cache.refresh != 1 and alignment == "shifted" and opens
        options.sort(key=lambda option: (-option.drawn, option.place))
        if forced:
            options.sort(key=lambda option: option.place != start)
        if forced and config.schedule.adaptive:
            taken = options[:1]
        elif config.schedule.adaptive:
            taken = plain_accepted(config, options)
        elif config.schedule.name == "chance":
            certain = options[:forced]
            taken = certain + [one for one in options[forced:] if uniform[step][one.place - start] < chance]
            for option in options[forced:]:
                order_logps[option.place] += np.log(chance if option in taken else 1 - chance)
        else:
            taken = options[:share]
            if config.remasking.name == "random" or config.remasking.temperature:
                for rank, option in enumerate(taken):
                    if option.drawn > -np.inf and rank >= forced:
                        left = [other.weight for other in options[rank:] if other.drawn > -np.inf]
                        order_logps[option.place] = option.weight - np.log(np.sum(np.exp(left)))
        for option in taken:
            tokens[option.place], steps[option.place], confidences[option.place] = option.token, step, option.confidence
            token_logps[option.place] = option.token_logp
        if config.early_exit and {END, TURN_END} & set(tokens) and MASK not in tokens[: through_end(tokens)]:
            break
    tokens = [END if token == MASK else token for token in tokens]
    return tokens, steps, confidences, token_logps, order_logps, calls, cached_calls


SCHEDULES, CACHES, ORDERS = alternatives(Schedule), alternatives(Cache), alternatives(Remasking)
ADAPTIVE = {name for name, cls in SCHEDULES.items() if cls.adaptive}
NUMBERS = {
    "threshold": {"threshold": [0.2, 0.5]},
    "factor": {"factor": [0.8, 2.0]},
    "entropy_bound": {"bound": [0.5, 2.0]},
    "klass": {"threshold": [0.2, 0.5], "kl_threshold": [0.05, 0.5]},
}


@st.composite
def decodings(draw, schedule, cache):
    whole = schedule in ("time", "chance")
    blocks, block = draw(st.sampled_from([(1, 5), (1, 8)] if whole else [(1, 5), (2, 3), (2, 4), (3, 2)]))
    surest = ["low_confidence", "topk_margin", "entropy", "left_to_right"]
    orders = {"chance": ["random"], "entropy_bound": ["entropy"]} | dict.fromkeys(
        ("threshold", "factor", "klass"), surest
    )
    remasking = draw(st.sampled_from(orders.get(schedule, [*surest, "random"])))
    order = {}
    if remasking != "random":
        order["confidence_of"] = draw(st.sampled_from(["model", "sampling"]))
    if schedule in ("even", "time") and remasking not in ("random", "left_to_right"):
        order["temperature"] = draw(st.sampled_from([0.0, 0.4]))
    config = SamplerConfig(
        completion_length=blocks * block,
        block_length=block,
        steps=blocks * draw(st.integers(1, block)),
        remasking=ORDERS[remasking](**order),
        schedule=SCHEDULES[schedule](
            **{name: draw(st.sampled_from(values)) for name, values in NUMBERS.get(schedule, {}).items()}
        ),
        top_k=draw(st.sampled_from([0, 4])) if schedule != "klass" else 0,
        guidance=draw(st.sampled_from([0.0, 0.0, 0.8])) if cache == "none" else 0.0,
        end_token=draw(st.sampled_from(["allowed", "forbidden", "last"])),
        early_exit=draw(st.booleans()),
        cache=NoCache() if cache == "none" else CACHES[cache](draw(st.sampled_from([0, 2, 1]))),
    )
    check(Config(sampler=config))
    return config, draw(st.sampled_from([0.0, 0.7])), draw(st.sampled_from(["same_position", "shifted"]))


def test_the_strategy_covers_every_rule_that_there_is():
    assert set(NUMBERS) == ADAPTIVE == set(RULES)
    assert {"even", "time", "chance"} == set(SCHEDULES) - ADAPTIVE
    assert set(CONFIDENCE_SCORES) == {"topk_margin", "entropy"}


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
@settings(max_examples=2)
@given(st.data())
def test_the_compiled_sampler_equals_a_python_loop_token_for_token_and_step_for_step(
    tiny, oracle, random_prompts, towards_end, schedule, cache, data
):
    config, temperature, alignment = data.draw(decodings(schedule, cache))
    # The head on all columns of a block at once, or on one masked column of each row at a time.
    chunk = data.draw(st.sampled_from([config.block_length, 1]))
    check_decoding(tiny, oracle, random_prompts, towards_end, config, temperature, alignment, chunk)


def check_decoding(tiny, oracle, random_prompts, towards_end, config, temperature, alignment, chunk):
    model, variables = tiny(seed=1, layers=2 if config.cache.name != "none" else 1, alignment=alignment)
    rows, width, block = 3, 3, config.block_length
    draws = np.random.default_rng(0)
    gumbel = draws.gumbel(size=(config.completion_length, rows, block, 13)).astype(np.float32)
    uniform = draws.random((config.completion_length, rows, block), np.float32)
    noise = RecordedNoise(gumbel, uniform)
    sampler = Sampler(model, config, SPECIAL, temperature, token_sampler=gumbel_max, chunk=chunk)
    for seed, strength in ((0, 0.0), (1, 1.5)):
        prompt_BP, length_B = random_prompts(seed, rows, width)
        model_with_ends = towards_end(variables, strength)
        rollout = sampler.sample(model_with_ends, Prompts(prompt_BP, length_B), noise)
        row_alone = oracle(model, model_with_ends)
        for row, n in enumerate(np.asarray(length_B)):
            prompt = np.asarray(prompt_BP)[row, :n].tolist()
            tokens, steps, confidences, token_logps, order_logps, calls, cached_calls = decode_row(
                row_alone, alignment, prompt, config, temperature, gumbel[:, row], uniform[:, row]
            )
            assert np.asarray(rollout.tokens_BC)[row].tolist() == tokens
            assert np.asarray(rollout.unmask_step_BC)[row].tolist() == steps
            np.testing.assert_allclose(rollout.confidence_BC[row], confidences, atol=1e-4)
            np.testing.assert_allclose(rollout.token_logp_BC[row], token_logps, atol=1e-3)
            np.testing.assert_allclose(rollout.order_logp_BC[row], order_logps, atol=1e-3)
            assert (rollout.nfe_B[row], rollout.cached_nfe_B[row]) == (calls, cached_calls)
            assert rollout.length_B[row] == through_end(tokens)


def through_end(tokens):
    """How many tokens the text has: through the first one that ends it."""
    return next((place + 1 for place, token in enumerate(tokens) if token in (END, TURN_END)), len(tokens))
