"""The compiled sampler: semi-autoregressive blocks, denoised from all masked to none, in one jitted loop.

B rows, C completion columns, P prompt columns, S columns of a block, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from d1jax.config import ADAPTIVE, SamplerConfig
from d1jax.data.tokenizers import SpecialTokens
from d1jax.diffusion.canvas import Canvas, block_columns, completion_hidden, is_any_of, through_first_end
from d1jax.diffusion.kv_cache import block_hidden
from d1jax.diffusion.masked_columns import columns_at_a_time, of_open_columns
from d1jax.diffusion.noise import Noise, keyed_noise
from d1jax.diffusion.predictions import Candidates, candidates
from d1jax.diffusion.schedule import plan
from d1jax.diffusion.unmasking import Evidence, accepted, by_chance, change, first_ones, in_order, is_drawn
from d1jax.models.transformer import (
    KeyValues,
    Transformer,
    Variables,
    head_matrix,
    hidden_states,
    hidden_states_and_keys,
    project,
)

NEVER_DECODED = -1
STATIC = ("model", "config", "special", "temperature")


class Rollout(NamedTuple):
    """What a sampler returns."""

    tokens_BC: Array
    # The step that committed the position; NEVER_DECODED behind the end of the text of a row that stopped early.
    reveal_step_BC: Array
    confidence_BC: Array  # the model's probability of the token when it was committed
    # Log-probabilities of drawing the token then, at the sampler's temperature and filters, and of taking the position when it
    # was taken, given the candidates (0 where the order is not drawn).
    token_logp_BC: Array
    order_logp_BC: Array
    length_B: Array  # through the first token that ends a text
    nfe_B: Array  # forward passes that the row took part in
    cached_nfe_B: Array  # those of them over a window only
    entropy_BC: Array  # of the prediction that the token was drawn from, in nats; 0 unless config.record_entropy


def given(tokens_BC: Any, end_ids: tuple[int, ...]) -> Rollout:
    """Texts that nobody decoded, as host arrays: no order, no confidence, no passes."""
    tokens_BC = np.asarray(tokens_BC, np.int32)
    ended_BC = np.isin(tokens_BC, end_ids)
    length_B = np.where(ended_BC.any(axis=1), ended_BC.argmax(axis=1) + 1, tokens_BC.shape[1]).astype(np.int32)
    none_BC, none_B = np.zeros(tokens_BC.shape, np.float32), np.zeros(len(tokens_BC), np.int32)
    never_BC = np.full_like(tokens_BC, NEVER_DECODED)
    return Rollout(tokens_BC, never_BC, none_BC, none_BC, none_BC, length_B, none_B, none_B, none_BC)


class Decoding(NamedTuple):
    step: Array
    first: Array  # where the block of the last pass starts; with an adaptive schedule and no cache one a row
    age: Array  # passes since the cache was made, that one included
    tokens_BC: Array
    reveal_step_BC: Array
    confidence_BC: Array
    token_logp_BC: Array
    order_logp_BC: Array
    entropy_BC: Array
    finished_B: Array
    nfe_B: Array
    cached_nfe_B: Array
    logp_BSV: Array | None  # klass: the distributions of the last pass,
    stable_BS: Array | None  # and for how many steps they have hardly changed


class Loop(NamedTuple):
    """One denoising run, as the functions that the compiled loop and the step-by-step one share."""

    start: Decoding
    running: Callable[[Decoding], Array]
    stale: Callable[[Decoding], Array]  # whether the next step must pass over the whole canvas
    full_step: Callable[[Decoding], tuple[Decoding, KeyValues | None]]
    cached_step: Callable[[Decoding, KeyValues], Decoding]
    finish: Callable[[Decoding], Rollout]


def denoising(
    model: Transformer,
    variables: Variables,
    prompt_BP: Array,
    prompt_length_B: Array,
    noise: Noise,
    prompt_before_BC: Array | None = None,
    *,
    config: SamplerConfig,
    special: SpecialTokens,
    temperature: float,
) -> Loop:
    """Denoises completions for right-padded prompts, or (prompt_before_BC) the holes of texts. The head sees the active block only.

    Every step runs a forward pass over the canvas, or over a window of it on cached keys, proposes a token for each masked
    position of the active block and commits as many as the schedule says. Guidance takes a second pass without the prompt:
    logits = without + (guidance + 1) (with - without). With early_exit a row stops as soon as its text through the first end
    token is decided; what it would have written behind is filled with end tokens, and nothing before can change, because
    committed tokens never do.

    Adaptive schedules: each row works on its own first open block; with a cache, which all rows share, on the first block that
    is open in any row, so a row may wait. Steps of a row are counted by its own passes either way, and its text is the same.
    """
    rows, length, block = prompt_BP.shape[0], config.completion_length, config.block_length
    steps = plan(config)
    adaptive, cached, klass = config.schedule in ADAPTIVE, config.cache != "none", config.schedule == "klass"
    head_DV = head_matrix(variables)
    passes = 2 if config.guidance > 0 else 1
    group = columns_at_a_time(rows, block, head_DV.shape[1])

    def canvas_of(tokens_BC: Array, prompt_BP: Array = prompt_BP) -> Canvas:
        return Canvas(tokens_BC, prompt_BP, prompt_length_B, prompt_before_BC)

    zeros_BC, zeros_B = jnp.zeros((rows, length), jnp.float32), jnp.zeros(rows, jnp.int32)
    start = Decoding(
        step=jnp.int32(0),
        first=jnp.full(rows, -1, jnp.int32) if adaptive and not cached else jnp.int32(-1),
        age=jnp.int32(0),
        tokens_BC=jnp.full((rows, length), special.mask, jnp.int32),
        reveal_step_BC=jnp.full((rows, length), NEVER_DECODED, jnp.int32),
        confidence_BC=zeros_BC,
        token_logp_BC=zeros_BC,
        order_logp_BC=zeros_BC,
        entropy_BC=zeros_BC,
        finished_B=jnp.zeros(rows, bool),
        nfe_B=zeros_B,
        cached_nfe_B=zeros_B,
        logp_BSV=jnp.zeros((rows, block, head_DV.shape[1]), jnp.float32) if klass else None,
        stable_BS=jnp.zeros((rows, block), jnp.int32) if klass else None,
    )

    def running(state: Decoding) -> Array:
        return (state.step < len(steps.number_K)) & ~jnp.all(state.finished_B)

    def first_column(state: Decoding) -> Array:
        if not adaptive:
            return jnp.asarray(steps.start_K, jnp.int32)[state.step]
        first_B = jnp.argmax(state.tokens_BC == special.mask, axis=1) // block * block
        return jnp.min(jnp.where(state.finished_B, length - block, first_B)) if cached else first_B

    def stale(state: Decoding) -> Array:
        if not cached:
            return jnp.bool(True)
        aged = (state.age >= config.cache_refresh) if config.cache_refresh else jnp.bool(False)
        return aged | (first_column(state) != state.first)

    def full_step(state: Decoding) -> tuple[Decoding, KeyValues | None]:
        first, canvas, keys = first_column(state), canvas_of(state.tokens_BC), None
        inputs = (model, variables, canvas.tokens_BT, canvas.positions_BT, canvas.length_B)
        if cached:
            hidden_BTD, keys = hidden_states_and_keys(*inputs)
        else:
            hidden_BTD = hidden_states(*inputs)
        hidden = [completion_hidden(hidden_BTD, canvas, model.config.alignment, first, block)]
        if config.guidance > 0:
            hidden_prompt_BP = jnp.where(canvas.prompt_mask_BP, special.mask, prompt_BP)
            canvas = canvas_of(state.tokens_BC, hidden_prompt_BP)
            hidden_BTD = hidden_states(model, variables, canvas.tokens_BT, canvas.positions_BT, canvas.length_B)
            hidden.append(completion_hidden(hidden_BTD, canvas, model.config.alignment, first, block))
        state = commit(state, first, hidden, first_pass=first != state.first)
        return state._replace(age=jnp.int32(1)), keys

    def cached_step(state: Decoding, keys: KeyValues) -> Decoding:
        first = first_column(state)
        hidden_BSD = block_hidden(model, variables, canvas_of(state.tokens_BC), keys, first, config)
        after = commit(state, first, [hidden_BSD], first_pass=jnp.bool(False))
        took_part_B = after.nfe_B - state.nfe_B
        return after._replace(age=state.age + 1, cached_nfe_B=state.cached_nfe_B + took_part_B)

    def propose(draws_BS: Array | None, *hidden: Array) -> Candidates:
        logits_BSV = project(hidden[0], head_DV)
        if config.guidance > 0:
            without_BSV = project(hidden[1], head_DV)
            logits_BSV = without_BSV + (config.guidance + 1) * (logits_BSV - without_BSV)
        settings = {"temperature": temperature, "special": special, "config": config}
        return candidates(logits_BSV, draws_BS, noise.pick, **settings)

    def commit(state: Decoding, first: Array, hidden: list[Array], first_pass: Array) -> Decoding:
        number, _, count, chance = (jnp.asarray(array, array.dtype)[state.step] for array in steps)
        columns_BS = block_columns(first, rows, block)
        open_BS = jnp.take_along_axis(state.tokens_BC, columns_BS, axis=1) == special.mask
        open_BS &= ~state.finished_B[:, None]
        step_B = state.nfe_B // passes if adaptive else jnp.broadcast_to(number, (rows,))
        draws_BS = noise.token(step_B, (rows, block)) if temperature > 0 else None
        uniform_BS = noise.uniform(step_B, (rows, block)) if is_drawn(config) else None
        proposal = of_open_columns(propose, group, open_BS, draws_BS, *hidden)

        stable_BS = None
        if klass:
            moved_BS = change(proposal.logp_BSV, state.logp_BSV)
            known_B = jnp.broadcast_to(first == state.first, (rows,)) & (state.step > 0)
            still_BS = (moved_BS < config.kl_threshold) & known_B[:, None]
            stable_BS = jnp.where(still_BS, state.stable_BS + 1, 0)

        # A shifted model on a cache cannot score the first column of a block from a window: the block's first pass commits it.
        forced_BS = jnp.zeros_like(open_BS)
        if cached and config.cache_refresh != 1 and model.config.alignment == "shifted":
            forced_BS = open_BS & (first_pass & (jnp.arange(block, dtype=jnp.int32) == 0))[None, :]
        order = in_order(proposal, uniform_BS, open_BS, forced_BS, special, config)
        if config.schedule == "chance":
            choice = by_chance(uniform_BS, open_BS, forced_BS, chance)
        elif adaptive:
            choice = accepted(Evidence(proposal, order.rank_BS, open_BS, forced_BS, stable_BS), config)
        else:
            choice = first_ones(order, open_BS, count)

        def write(whole_BC: Array, new_BS: Array) -> Array:
            old_BS = jnp.take_along_axis(whole_BC, columns_BS, axis=1)
            new_BS = jnp.where(choice.commit_BS, new_BS, old_BS)
            return jnp.put_along_axis(whole_BC, columns_BS, new_BS, axis=1, inplace=False)

        tokens_BC = write(state.tokens_BC, proposal.token_BS)
        full_B = ~jnp.any(tokens_BC == special.mask, axis=1)
        return state._replace(
            step=state.step + 1,
            first=first,
            tokens_BC=tokens_BC,
            reveal_step_BC=write(state.reveal_step_BC, jnp.broadcast_to(step_B[:, None], (rows, block))),
            confidence_BC=write(state.confidence_BC, proposal.confidence_BS),
            token_logp_BC=write(state.token_logp_BC, proposal.token_logp_BS),
            order_logp_BC=state.order_logp_BC.at[jnp.arange(rows, dtype=jnp.int32)[:, None], columns_BS].add(
                choice.order_logp_BS
            ),
            entropy_BC=write(state.entropy_BC, proposal.entropy_BS) if config.record_entropy else state.entropy_BC,
            finished_B=full_B | text_is_decided(tokens_BC, special) if config.early_exit else full_B,
            nfe_B=state.nfe_B + passes * jnp.any(open_BS, axis=1),
            logp_BSV=proposal.logp_BSV,
            stable_BS=stable_BS,
        )

    def finish(state: Decoding) -> Rollout:
        tokens_BC = jnp.where(state.tokens_BC == special.mask, special.end, state.tokens_BC)
        return Rollout(
            tokens_BC, state.reveal_step_BC, state.confidence_BC, state.token_logp_BC, state.order_logp_BC,
            jnp.sum(through_first_end(tokens_BC, special.end_ids), axis=1), state.nfe_B, state.cached_nfe_B,
            state.entropy_BC,
        )  # fmt: skip

    return Loop(start, running, stale, full_step, cached_step, finish)


def denoise(*args: Any, config: SamplerConfig, **settings: Any) -> Rollout:
    """All of `denoising` in one loop, without a way out to the host."""
    loop = denoising(*args, config=config, **settings)

    def until_stale(state: Decoding) -> Decoding:
        state, keys = loop.full_step(state)
        if keys is None:
            return state
        # The cache is no part of what this loop carries, so it is not handed on from step to step.
        return jax.lax.while_loop(
            lambda state: loop.running(state) & ~loop.stale(state), lambda state: loop.cached_step(state, keys), state
        )

    return loop.finish(jax.lax.while_loop(loop.running, until_stale, loop.start))


def text_is_decided(tokens_BC: Array, special: SpecialTokens) -> Array:
    """True for rows that hold a token that ends a text, with no mask before it."""
    text_BC = through_first_end(tokens_BC, special.end_ids)
    ended_B = jnp.any(is_any_of(tokens_BC, special.end_ids), axis=1)
    return ended_B & ~jnp.any(text_BC & (tokens_BC == special.mask), axis=1)


@partial(jax.jit, static_argnames=STATIC)
def sample(
    model: Transformer,
    variables: Variables,
    prompt_BP: Array,
    prompt_length_B: Array,
    key: Array,
    row_ids_B: Array,
    prompt_before_BC: Array | None = None,
    *,
    config: SamplerConfig,
    special: SpecialTokens,
    temperature: float,
) -> Rollout:
    """`denoise` under noise keyed by global row id."""
    noise = keyed_noise(key, row_ids_B)
    settings: dict[str, Any] = {"config": config, "special": special, "temperature": temperature}
    return denoise(model, variables, prompt_BP, prompt_length_B, noise, prompt_before_BC, **settings)


def sample_stepwise(*arguments: Any, **settings: Any) -> Iterator[Decoding | Rollout]:
    """What `sample` does with the same arguments, one step at a time: every state on the way, then the same rollout."""
    state, keys, running, stale = None, None, True, True
    while running:
        state, keys, running, stale, rollout = _one_step(
            *arguments, state=state, keys=None if stale else keys, **settings
        )
        yield state
    yield rollout


@partial(jax.jit, static_argnames=STATIC)
def _one_step(
    model: Transformer,
    variables: Variables,
    prompt_BP: Array,
    prompt_length_B: Array,
    key: Array,
    row_ids_B: Array,
    prompt_before_BC: Array | None = None,
    *,
    state: Decoding | None,
    keys: KeyValues | None,
    **settings: Any,
) -> tuple[Decoding, KeyValues | None, Array, Array, Rollout]:
    noise = keyed_noise(key, row_ids_B)
    loop = denoising(model, variables, prompt_BP, prompt_length_B, noise, prompt_before_BC, **settings)
    state = loop.start if state is None else state
    if keys is None:
        state, keys = loop.full_step(state)
    else:
        state = loop.cached_step(state, keys)
    return state, keys, loop.running(state), loop.stale(state), loop.finish(state)
