"""Autoregressive checkpoints: they write one token after the other, and nothing that needs both sides takes them."""

import jax
import numpy as np
import pytest

import d1jax
from d1jax.config import MeshConfig, SamplerConfig, UserError
from d1jax.config.sampler import LeftToRight, PrefixCache
from d1jax.data.tokenizers import CharacterTokenizer
from d1jax.inference.log_likelihood import Pair, are_greedy, elbos
from d1jax.inference.policy import AUTOREGRESSIVE_SAMPLER, Policy
from d1jax.models.sharding import make_mesh

LETTERS = CharacterTokenizer("abcdefghijk")


@pytest.fixture(scope="module")
def policy(tiny):
    model, variables = tiny(alignment="shifted", attention_mask="causal", qkv_bias=True)
    return Policy(model, variables, LETTERS, make_mesh(MeshConfig(), jax.devices()[:1]), None)


def by_hand(policy, prompt, count):
    """The likeliest next token, again and again, by the logits of the whole text so far."""
    ids = LETTERS.encode(prompt)
    for _ in range(count):
        logits = np.array(policy.logits([[*ids, 0]])[0, -1])  # row i scores token i, from those before it
        logits[LETTERS.special.mask] = -np.inf
        ids.append(int(logits.argmax()))
    return ids[len(LETTERS.encode(prompt)) :]


@pytest.mark.parametrize("prompts", [["abc"], ["a", "cdefgh", "kk"]], ids=len)
@pytest.mark.parametrize("block", [6, 2])
def test_sampling_from_left_to_right_is_greedy_decoding(policy, prompts, block):
    config = SamplerConfig(completion_length=6, block_length=block, steps=6, remasking=LeftToRight(), early_exit=False)
    found = d1jax.sample(policy, prompts, config)
    assert found.tokens.tolist() == [by_hand(policy, prompt, 6) for prompt in prompts]
    assert found.unmask_step.tolist() == [list(range(6))] * len(prompts)


def test_what_stands_behind_does_not_change_the_logits(policy):
    ids = LETTERS.encode("abcdefg")
    changed = [*ids[:4], 9, 9, 9]
    np.testing.assert_allclose(policy.logits([ids])[0, :4], policy.logits([changed])[0, :4], atol=1e-6)


def test_its_own_order_is_the_default(policy):
    assert AUTOREGRESSIVE_SAMPLER.remasking == LeftToRight() and AUTOREGRESSIVE_SAMPLER.steps == 128
    assert d1jax.sample(policy, ["ab"]).tokens.shape == (1, 128)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, "sampler.remasking = left_to_right (here: low_confidence)"),
        ({"remasking": LeftToRight(), "steps": 2}, "sampler.steps = 4 (here: 2)"),
        ({"remasking": LeftToRight(), "cache": PrefixCache()}, "sampler.cache = none (here: prefix)"),
    ],
)
def test_another_order_is_refused(policy, changes, message):
    settings = {"completion_length": 4, "block_length": 4, "steps": 4, **changes}
    with pytest.raises(UserError, match="this model is autoregressive") as caught:
        d1jax.sample(policy, ["ab"], SamplerConfig(**settings))
    assert message in str(caught.value)


def test_what_needs_both_sides_is_refused(policy):
    left = SamplerConfig(completion_length=2, block_length=2, steps=2, remasking=LeftToRight())
    with pytest.raises(UserError, match="infill: this model has attention_mask = causal"):
        d1jax.infill(policy, ["a{{mask:2}}b"], left)
    pair = [Pair((1, 2), (3,))]
    for measure in (lambda: elbos(policy, pair, samples=2, seed=0, batch=2), lambda: are_greedy(policy, pair, batch=2)):
        with pytest.raises(UserError, match="log-likelihood: this model has attention_mask = causal"):
            measure()
    with pytest.raises(UserError, match="work on models whose columns see all others"):
        d1jax.sft(policy, [("a", "b")] * 8)


def test_a_column_of_a_block_causal_model_sees_its_block_and_those_before(tiny):
    model, variables = tiny(attention_mask="block_causal", mask_block=3)
    policy = Policy(model, variables, LETTERS, make_mesh(MeshConfig(), jax.devices()[:1]), None)
    ids = [1, 2, 3, 4, 5, 6, 7]
    behind = [*ids[:6], 9]  # another third block
    np.testing.assert_allclose(policy.logits([ids])[0, :6], policy.logits([behind])[0, :6], atol=1e-6)
    within = [*ids[:2], 9, *ids[3:]]
    assert np.abs(policy.logits([ids])[0, 0] - policy.logits([within])[0, 0]).max() > 1e-3
