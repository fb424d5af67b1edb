"""What a denoising run reads, and what it carries from step to step.

B rows, C completion columns, P prompt columns, S columns of a block, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array

from d1jax.config.sampler import Schedule
from d1jax.data.tokenizers import SpecialTokens
from d1jax.diffusion.canvas import Canvas, is_any_of, through_first_end
from d1jax.diffusion.in_blocks import Begun
from d1jax.diffusion.noise import Noise
from d1jax.diffusion.rollout import NEVER_DECODED, Rollout
from d1jax.models import sharding
from d1jax.models.transformer import Variables

for _kind in get_args(Schedule):
    jax.tree_util.register_dataclass(_kind)  # its thresholds are the leaves


class Prompts(NamedTuple):
    """Right-padded prompts; see `Canvas` for completions that stand between the tokens of a prompt."""

    prompt_BP: Array
    prompt_length_B: Array
    prompt_before_BC: Array | None = None
    begun: Begun | None = None  # tokens of the prompts that stand in the completion (block-causal models)

    def canvas(self, completion_BC: Array) -> Canvas:
        return Canvas(completion_BC, self.prompt_BP, self.prompt_length_B, self.prompt_before_BC)


class Inputs(NamedTuple):
    """What a denoising run reads and never changes; all of it is traced."""

    variables: Variables
    prompts: Prompts
    noise: Noise
    temperature: Array | float  # not read by greedy decoding
    schedule: Schedule  # its thresholds are read here, and not where they would be compiled into the program


class Decoding(NamedTuple):
    """What a denoising run carries from step to step."""

    step: Array
    block_start: Array  # first column of the last pass's block; with an adaptive schedule and no cache one a row
    cache_age: Array  # passes since the cache was made, that one included
    tokens_BC: Array  # the mask id where nothing is decided yet
    unmask_step_BC: Array
    confidence_BC: Array
    token_logp_BC: Array
    order_logp_BC: Array
    entropy_BC: Array
    done_B: Array
    nfe_B: Array
    cached_nfe_B: Array
    logp_BSV: Array | None  # Klass: the distributions of the last pass,
    stable_steps_BS: Array | None  # and for how many steps they have hardly changed


class Block(NamedTuple):
    """The columns that one step works on."""

    start: Array  # the first of them: one number, or one a row
    columns_BS: Array
    masked_BS: Array  # where something can be unmasked
    forced_BS: Array  # what this step must unmask
    step_B: Array  # the number of this step in each row: what its draws are keyed by, and what is recorded


def text_is_decided(tokens_BC: Array, special: SpecialTokens) -> Array:
    """True for rows that hold a token that ends a text, with no mask before it: [B]."""
    text_BC = through_first_end(tokens_BC, special.end_ids)
    ended_B = jnp.any(is_any_of(tokens_BC, special.end_ids), axis=1)
    return ended_B & ~jnp.any(text_BC & (tokens_BC == special.mask), axis=1)


def is_done(tokens_BC: Array, begun: Begun | None, special: SpecialTokens, early_exit: bool) -> Array:
    """True for rows in which nothing is left to decode, or, with early_exit, nothing that its text could hold: [B]."""
    done_B = ~jnp.any(tokens_BC == special.mask, axis=1)
    if begun is not None:
        done_B = ~begun.is_missing(tokens_BC, special.mask)
    if early_exit:
        done_B |= text_is_decided(tokens_BC if begun is None else begun.own(tokens_BC), special)
    return done_B


def all_masked(rows: int, length: int, mask_id: int) -> Decoding:
    """The `Decoding` before the first step, of B = rows and C = length."""
    zeros_BC = jnp.zeros((rows, length), jnp.float32)
    zeros_B = jnp.zeros(rows, jnp.int32)
    return Decoding(
        step=jnp.int32(0),
        block_start=jnp.int32(-1),  # no block, so the first pass of a run is the first one of its block
        cache_age=jnp.int32(0),
        tokens_BC=jnp.full((rows, length), mask_id, jnp.int32),
        unmask_step_BC=jnp.full((rows, length), NEVER_DECODED, jnp.int32),
        confidence_BC=zeros_BC,
        token_logp_BC=zeros_BC,
        order_logp_BC=zeros_BC,
        entropy_BC=zeros_BC,
        done_B=jnp.zeros(rows, bool),
        nfe_B=zeros_B,
        cached_nfe_B=zeros_B,
        logp_BSV=None,
        stable_steps_BS=None,
    )


def with_history(state: Decoding, block_length: int, vocabulary: int) -> Decoding:
    """The `Decoding` with what a schedule that compares steps remembers, before the first step."""
    shape_BS = (state.done_B.shape[0], block_length)
    logp_BSV = jnp.zeros((*shape_BS, vocabulary), jnp.float32)
    return state._replace(logp_BSV=logp_BSV, stable_steps_BS=jnp.zeros(shape_BS, jnp.int32))


def ended(state: Decoding, special: SpecialTokens) -> Rollout:
    """The `Rollout` of a run: what is still masked, behind the end of a text, becomes end tokens."""
    tokens_BC = jnp.where(state.tokens_BC == special.mask, special.end, state.tokens_BC)
    length_B = jnp.sum(through_first_end(tokens_BC, special.end_ids), axis=1)
    fields = state._replace(tokens_BC=tokens_BC)._asdict() | {"length_B": length_B}
    return Rollout(**{name: fields[name] for name in Rollout._fields})


def pinned(state: Decoding) -> Decoding:
    """The state with each array where its rows live: left to the compiler, it could come back elsewhere, and compile a step again."""
    return jax.tree.map(lambda x: sharding.constrain(x, *("batch", None, None)[: x.ndim]), state)
