"""Completions of prompts by a policy, at once or step by step.

R rows, P prompt columns, C completion columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import jax
import numpy as np

from d1jax.config import Config, SamplerConfig, UserError
from d1jax.config.check import check
from d1jax.config.no_effect import check_sampler, with_effect
from d1jax.data.tokenizers import Chat, pad_rows
from d1jax.diffusion.decoding import Decoding, Prompts
from d1jax.diffusion.noise import KeyedNoise
from d1jax.diffusion.rollout import Rollout, not_finite
from d1jax.diffusion.sampler import Sampler
from d1jax.inference.policy import Policy, check_ids, check_length, default_sampler
from d1jax.models import sharding

Prompt = str | Chat | Sequence[int]
T = TypeVar("T")
PROMPT_BUCKET = 32  # prompts are padded to multiples of it, so that few lengths are compiled


@dataclass(frozen=True)
class Completions:
    """What `sample` and `watch` return: R texts and how they came about. Arrays are numpy arrays on the host.

    A completion is its columns through the first token that ends a text (`length`); what stands behind is filled with end tokens and was
    perhaps never decoded.

        found = d1jax.sample(policy, ["2+2=?"])
        found.text[0], found.tokens[0, : found.length[0]], found.confidence[0]
    """

    text: list[str]  # R texts before the first token that ends them, without special tokens
    tokens: np.ndarray  # int [R, C] ids
    unmask_step: (
        np.ndarray
    )  # int [R, C] the step, from 0, that unmasked the token; -1: never, behind the end of the text
    confidence: np.ndarray  # fp32 [R, C] its probability then, in [0, 1]
    length: np.ndarray  # int [R] tokens through the first one that ends a text; C where there is none
    nfe: np.ndarray  # int [R] forward passes that the row took part in
    cached_nfe: np.ndarray  # int [R] those of them over a window, on a cache
    token_logp: np.ndarray  # fp32 [R, C] log-probability of drawing the token then, nats; 0 at temperature 0
    order_logp: np.ndarray  # fp32 [R, C] log-probability of taking the position then, given the predictions, nats


def sample(
    policy: Policy,
    prompts: Sequence[Prompt],
    config: SamplerConfig | None = None,
    *,
    seed: int = 0,
    temperature: float = 0.0,
    first_row: int = 0,
) -> Completions:
    """A completion of each of R prompts, as `Completions` of R rows and C = config.completion_length columns.

    prompts: a list; each is a text (a user's turn where the checkpoint has a chat template, else what is continued), a chat
    ([{"role": "user", "content": ...}, ...]), or token ids. All of them are one batch, so R is bounded by memory; it is filled up to one
    of few sizes (1, 2, 3, 4, 6, 8, 12, ...), so that few programs are compiled.
    config: how to decode (None: as the policy brings along, which is what its run was trained with, or 128 tokens in blocks
    of 32, two a step). temperature: 0 takes the likeliest token, above 0 draws. seed, first_row: row i draws from
    (seed, first_row + i) only, so a text does not depend on its batch. Raises UserError for impossible settings, a
    setting without an effect, an empty prompt, one that is too long or cannot be written, predictions that are not finite.

        found = d1jax.sample(policy, ["2+2=?"], d1jax.SamplerConfig(completion_length=64, block_length=32, steps=32), seed=1)
    """
    config, rows = settings_for(policy, config, temperature), _rows(policy, prompts)
    row_ids = filled_up(policy, range(first_row, first_row + len(rows)))
    rollout = hand_over(policy, filled_up(policy, rows), config, seed, temperature, row_ids)
    return completions_of(policy, rollout, len(rows))


def sample_ids(
    policy: Policy,
    rows: Sequence[Sequence[int]],
    config: SamplerConfig,
    seed: int,
    temperature: float,
    row_ids: Sequence[int],
) -> Completions:
    """`Completions` of prompts that are token ids; row i draws from (seed, row_ids[i]). Arguments and errors are those of `sample`."""
    return completions_of(policy, hand_over(policy, rows, config, seed, temperature, row_ids), len(rows))


def filled_up(policy: Policy, rows: Sequence[T]) -> list[T]:
    """The rows, and copies of the last one up to the next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ..., and on to a multiple of the parts that the
    devices cut a batch into: so few numbers of rows are compiled, and no device has all of them.

    A copy draws what its row draws and ends when it ends, so it costs memory and time of at most half of the rows, and changes no text.
    """
    power = 1 << max(len(rows) - 1, 0).bit_length()
    size = power * 3 // 4 if power >= 4 and len(rows) <= power * 3 // 4 else power
    shards = sharding.row_shards(policy.mesh)
    size = -(-size // shards) * shards
    return [*rows, *[rows[-1]] * (size - len(rows))]


def hand_over(
    policy: Policy,
    rows: Sequence[Sequence[int]],
    config: SamplerConfig,
    seed: int,
    temperature: float,
    row_ids: Sequence[int],
) -> Rollout:
    """What `sample_ids` decodes, handed over to the devices and perhaps not decoded yet: `completions_of` waits for it."""
    sampler = sampler_for(policy, config, temperature)
    check_draws(seed, temperature)
    prompts, noise = place(policy, rows, config, seed, row_ids)
    with jax.set_mesh(policy.mesh):
        return sampler.sample(policy.variables, prompts, noise)


def watch(
    policy: Policy,
    prompts: Sequence[Prompt],
    config: SamplerConfig | None = None,
    *,
    seed: int = 0,
    temperature: float = 0.0,
    first_row: int = 0,
) -> Iterator[Decoding | Completions]:
    """Denoises like `sample` and yields a `Decoding` after every step, then the `Completions`: for showing it to people.

    prompts, config, seed, temperature, first_row and errors are those of `sample`, and so is the result to the bit; it is
    slower, because every step comes back to the host. A state's `tokens_BC` is int [R, C], with the mask id where nothing is
    decided yet, and `unmask_step_BC` the step that unmasked each token, -1 where none has.

        for state in d1jax.watch(policy, ["2+2=?"]):
            if isinstance(state, d1jax.Completions):
                print(state.text)
    """
    config = settings_for(policy, config, temperature)
    rows = _rows(policy, prompts)
    sampler = sampler_for(policy, config, temperature)
    check_draws(seed, temperature)
    row_ids = range(first_row, first_row + len(rows))
    placed, noise = place(policy, filled_up(policy, rows), config, seed, filled_up(policy, row_ids))
    with jax.set_mesh(policy.mesh):
        for state in sampler.stream(policy.variables, placed, noise):
            if isinstance(state, Rollout):
                yield completions_of(policy, state, len(rows))
            else:
                yield jax.tree.map(lambda x: x[: len(rows)] if np.ndim(x) else x, jax.device_get(state))


def settings_for(policy: Policy, config: SamplerConfig | None, temperature: float) -> SamplerConfig:
    """The given settings, or else those that the policy brings along. Raises UserError for a given one without an effect."""
    if config is None:
        return with_effect(policy.sampler or default_sampler(policy.config), temperature)
    check_sampler(config, temperature)
    return config


def sampler_for(policy: Policy, config: SamplerConfig, temperature: float) -> Sampler:
    """The sampler of a policy under these settings. Raises UserError for impossible ones."""
    check(Config(sampler=config))
    return Sampler(policy.model, config, policy.tokenizer.special, temperature)


def _rows(policy: Policy, prompts: Sequence[Prompt]) -> list[list[int]]:
    if isinstance(prompts, str):
        raise UserError("sample: prompts is one text; write a list, [text]")
    if not len(prompts):
        raise UserError("sample: no prompts")
    rows = [prompt_ids(policy, prompt) for prompt in prompts]
    empty = next((index for index, row in enumerate(rows) if not row or not len(prompts[index])), None)
    if empty is not None:
        raise UserError(f"sample: prompt {empty} is empty")
    return rows


def place(
    policy: Policy,
    rows: Sequence[Sequence[int]],
    config: SamplerConfig,
    seed: int,
    row_ids: Sequence[int],
    prompt_before_RC: np.ndarray | None = None,
) -> tuple[Prompts, KeyedNoise]:
    """(prompts, noise) on the policy's devices, for prompts of token ids. Raises UserError before anything is compiled."""
    longest = max(map(len, rows))
    check_length(longest + config.completion_length, policy.config, f"sample: {config.completion_length} new tokens")
    prompt_RP, length_R = pad_rows(rows, -(-longest // PROMPT_BUCKET) * PROMPT_BUCKET, policy.tokenizer.special.end)
    check_ids(prompt_RP, policy.config, "sample")
    arrays = (prompt_RP, length_R, np.asarray(row_ids, np.int32))
    prompt_RP, length_R, ids_R = sharding.shard_batch(policy.mesh, arrays)
    if prompt_before_RC is not None:
        prompt_before_RC = sharding.shard_batch(policy.mesh, prompt_before_RC)
    return Prompts(prompt_RP, length_R, prompt_before_RC), KeyedNoise(jax.random.key(seed), ids_R)


def check_draws(seed: int, temperature: float) -> None:
    """Raises UserError for a temperature or a seed that cannot be drawn with."""
    if not 0 <= temperature < float("inf"):
        raise UserError(f"sample: temperature = {temperature} must be 0 or above")
    if not 0 <= seed < 2**32:
        raise UserError(f"sample: seed = {seed} must be between 0 and 2**32 - 1")


def prompt_ids(policy: Policy, prompt: Prompt) -> list[int]:
    if not isinstance(prompt, str) and len(prompt) and isinstance(prompt[0], int | np.integer):
        return [int(token) for token in prompt]
    try:
        return policy.tokenizer.prompt(prompt)
    except ValueError as error:
        raise UserError(f"sample: {error}") from None


def completions_of(policy: Policy, rollout: Rollout, rows: int | None = None) -> Completions:
    """The texts of the first rows of a rollout (None: of all) and how they came about, on the host. Raises UserError where predictions
    are not finite."""
    host = Rollout(*(np.asarray(x)[:rows] for x in jax.device_get(rollout)))
    problem = not_finite(host.confidence_BC)
    if problem:
        raise UserError(f"sample: {problem}")
    texts = [policy.tokenizer.decode(row) for row in host.tokens_BC.tolist()]
    return Completions(
        texts, host.tokens_BC, host.unmask_step_BC, host.confidence_BC, host.length_B, host.nfe_B, host.cached_nfe_B,
        host.token_logp_BC, host.order_logp_BC,
    )  # fmt: skip
