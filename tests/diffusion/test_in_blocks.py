"""Sampling from block-causal models against a plain loop over the model's own blocks, as SDAR and LLaDA2.0 write."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d1jax.config import MeshConfig, ModelConfig, SamplerConfig, UserError
from d1jax.config.sampler import Chance, DualCache, Even, NoCache, PrefixCache, Threshold
from d1jax.data.tokenizers import SpecialTokens
from d1jax.diffusion.decoding import Prompts
from d1jax.diffusion.noise import KeyedNoise
from d1jax.diffusion.order import check_blocks
from d1jax.diffusion.sampler import Sampler
from d1jax.models.sharding import make_mesh
from d1jax.models.transformer import head_matrix, hidden_states, project

MASK, END, SIZE = 12, 11, 4
SPECIAL = SpecialTokens(mask=MASK, end=END, vocab_size=13)
LENGTHS = (3, 4, 6, 1, 9)


@pytest.fixture(scope="module")
def model(tiny):
    return tiny(attention_mask="block_causal", mask_block=SIZE, kv_heads=1)


@pytest.fixture(scope="module")
def shifted(tiny):
    return tiny(attention_mask="block_causal", mask_block=SIZE, alignment="shifted")


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(4)
    return [rng.integers(0, 11, length).tolist() for length in LENGTHS]


def sampled(built, prompts, config):
    model, variables = built
    width = max(map(len, prompts)) + 2
    padded = np.array([[*prompt, *[END] * (width - len(prompt))] for prompt in prompts], np.int32)
    lengths = np.array(list(map(len, prompts)), np.int32)
    sampler = Sampler(model, config, SPECIAL)
    noise = KeyedNoise(jax.random.key(0), jnp.arange(len(prompts), dtype=jnp.int32))
    return jax.device_get(sampler.sample(variables, Prompts(jnp.array(padded), jnp.array(lengths)), noise))


def by_hand(built, prompt, length, a_step):
    """(tokens, passes): the blocks of the text one after the other, the surest `a_step` masks of a block at a time."""
    model, variables = built
    total = -(-(len(prompt) + length) // SIZE) * SIZE
    tokens = [*prompt, *[MASK] * (total - len(prompt))]
    forward = jax.jit(
        lambda tokens_1T: project(
            hidden_states(model, variables, tokens_1T, jnp.arange(total, dtype=jnp.int32)[None], jnp.array([total])),
            head_matrix(variables),
        )[0]
    )
    passes = 0
    for start in range(len(prompt) // SIZE * SIZE, total, SIZE):
        while masked := [place for place in range(start, start + SIZE) if tokens[place] == MASK]:
            logits = np.array(forward(jnp.array([tokens])), float)
            passes += 1
            found = []
            for place in masked:
                row = logits[place - (model.config.alignment == "shifted")]
                p = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
                allowed = np.where(np.arange(13) == MASK, -1, p)
                found.append((-allowed.max(), place, int(allowed.argmax())))
            for _, place, token in sorted(found)[:a_step]:
                tokens[place] = token
    return tokens[len(prompt) : len(prompt) + length], passes


def settings(**changes):
    given = {"completion_length": 8, "block_length": SIZE, "steps": 8, "early_exit": False}
    return SamplerConfig(**{**given, **changes})


@pytest.mark.parametrize("a_step", [1, 2])
@pytest.mark.parametrize("cache", [NoCache(), DualCache()], ids=["no cache", "dual cache"])
def test_tokens_are_those_of_the_plain_loop(model, prompts, a_step, cache):
    found = sampled(model, prompts, settings(steps=8 // a_step, cache=cache))
    for prompt, tokens in zip(prompts, found.tokens_BC.tolist(), strict=True):
        assert tokens == by_hand(model, prompt, 8, a_step)[0]
    assert np.all(found.unmask_step_BC >= 0)


def test_shifted_logits_too(shifted, prompts):
    found = sampled(shifted, prompts, settings())
    for prompt, tokens in zip(prompts, found.tokens_BC.tolist(), strict=True):
        assert tokens == by_hand(shifted, prompt, 8, 1)[0]


def test_a_text_is_the_same_alone_and_in_a_batch(model, prompts):
    together = sampled(model, prompts, settings())
    for row, prompt in enumerate(prompts):
        np.testing.assert_array_equal(sampled(model, [prompt], settings()).tokens_BC[0], together.tokens_BC[row])


def test_the_cache_is_exact_with_an_adaptive_schedule(model, prompts):
    plain, cached = (
        sampled(model, prompts, settings(schedule=Threshold(0.3), cache=cache)) for cache in (NoCache(), DualCache())
    )
    np.testing.assert_array_equal(plain.tokens_BC, cached.tokens_BC)
    assert cached.cached_nfe_B.sum() > 0


def test_an_end_token_of_the_prompt_ends_nothing(model, prompts):
    ended = [[*prompt[:-1], END] for prompt in prompts]  # where the rest of a prompt stands in the first block
    whole = sampled(model, ended, settings())
    early = sampled(model, ended, settings(early_exit=True))
    for row in range(len(ended)):
        length = int(whole.length_B[row])
        assert early.length_B[row] == length
        np.testing.assert_array_equal(early.tokens_BC[row, :length], whole.tokens_BC[row, :length])


def test_eight_devices_write_what_one_writes(model, prompts):
    one = sampled(model, prompts[:4] * 2, settings())
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        np.testing.assert_array_equal(sampled(model, prompts[:4] * 2, settings()).tokens_BC, one.tokens_BC)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"block_length": 8}, "in blocks of 4 positions; set sampler.block_length = 4 (here: 8)"),
        ({"guidance": 1.0}, "sampler.guidance masks the prompt"),
        ({"schedule": Chance()}, "sampler.schedule = chance is of one block"),
        ({"cache": PrefixCache()}, "sampler.cache = prefix is not exact for this block-causal model; set it to dual"),
    ],
)
def test_what_is_not_its_own_way_is_refused(changes, message):
    model = ModelConfig(attention_mask="block_causal", mask_block=SIZE)
    with pytest.raises(UserError) as caught:
        check_blocks(model, settings(**changes))
    assert message in str(caught.value)
    check_blocks(model, settings(schedule=Even(), cache=DualCache()))
    with pytest.raises(UserError, match="cache = dual is not exact for this block-causal model; set it to none"):
        check_blocks(dataclasses.replace(model, alignment="shifted"), settings(cache=DualCache()))
