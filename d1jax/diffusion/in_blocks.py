"""Sampling from a block-causal model, whose blocks are counted from the beginning of the prompt.

A prompt rarely ends where a block does. So what it has of its last block goes to the front of the completion, as tokens that are decided,
and the sampler's blocks are the model's. What was decided so far sees no later block, so keys that were kept of it never change: here a
cache is exact.

Source: SDAR, arXiv 2510.06303, and LLaDA2.0, arXiv 2512.15745: block after block, each denoised by itself.

B rows, C completion columns, P prompt columns, S columns of a block.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from d1jax.config import SamplerConfig
from d1jax.data.tokenizers import SpecialTokens
from d1jax.diffusion.canvas import through_first_end
from d1jax.diffusion.rollout import Rollout

NOTHING = -1  # an id that no token has


class Begun(NamedTuple):
    """The tokens of prompts that stand in the first block of the completion."""

    token_BC: Array  # NOTHING where the column is still to be decided
    count_B: Array  # how many: the first columns of a row
    wanted_B: Array  # columns through the last one that is asked for

    def written(self, tokens_BC: Array) -> Array:
        """The tokens with those of the prompt in their places."""
        return jnp.where(self.token_BC == NOTHING, tokens_BC, self.token_BC)

    def own(self, tokens_BC: Array) -> Array:
        """The tokens without those of the prompt, none of which ends the text or is a mask."""
        return jnp.where(self.token_BC == NOTHING, tokens_BC, NOTHING)

    def is_missing(self, tokens_BC: Array, mask_id: int) -> Array:
        """Whether a column that is asked for is not decided, [B]."""
        columns_1C = jnp.arange(tokens_BC.shape[1], dtype=jnp.int32)[None, :]
        return jnp.any((tokens_BC == mask_id) & (columns_1C < self.wanted_B[:, None]), axis=1)


def begin(prompt_BP: Array, prompt_length_B: Array, length: int, size: int) -> tuple[Array, Begun]:
    """(the length of each prompt up to its last whole block, what it has of the next one), for completions of `length` columns, which
    get one block more.
    """
    count_B = prompt_length_B % size
    columns_1C = jnp.arange(length + size, dtype=jnp.int32)[None, :]
    place_BC = jnp.minimum((prompt_length_B - count_B)[:, None] + columns_1C, prompt_BP.shape[1] - 1)
    token_BC = jnp.take_along_axis(prompt_BP, place_BC, axis=1)
    token_BC = jnp.where(columns_1C < count_B[:, None], token_BC, NOTHING)
    return prompt_length_B - count_B, Begun(token_BC, count_B, count_B + length)


def longer(config: SamplerConfig) -> SamplerConfig:
    """The settings with one block more, and as many steps a block."""
    blocks = config.completion_length // config.block_length
    steps = config.steps if config.schedule.adaptive else config.steps // blocks * (blocks + 1)
    return dataclasses.replace(config, completion_length=config.completion_length + config.block_length, steps=steps)


def completions(rollout: Rollout, begun: Begun, length: int, special: SpecialTokens) -> Rollout:
    """The columns that were asked for, without the tokens of the prompts before them."""
    columns_BC = begun.count_B[:, None] + jnp.arange(length, dtype=jnp.int32)[None, :]
    cut = {
        name: jnp.take_along_axis(value, columns_BC, axis=1) if value.ndim == 2 else value
        for name, value in rollout._asdict().items()
    }
    length_B = jnp.sum(through_first_end(cut["tokens_BC"], special.end_ids), axis=1)
    return Rollout(**{**cut, "length_B": length_B})
