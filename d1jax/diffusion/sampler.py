"""The compiled sampler: semi-autoregressive blocks, denoised from all masked to none, in one jitted loop.

B rows, C completion columns, P prompt columns, S columns of a block, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from d1jax.config import SamplerConfig
from d1jax.data.tokenizers import SpecialTokens
from d1jax.diffusion.canvas import Canvas, block_columns, completion_hidden, row_keys, through_first_end
from d1jax.diffusion.reveal import Draws, accept, choose, propose
from d1jax.diffusion.schedule import ADAPTIVE, plan
from d1jax.models.transformer import Transformer, Variables, head_matrix, hidden_states, project

NEVER_DECODED = -1
STATIC = ("model", "config", "special", "temperature")


class Rollout(NamedTuple):
    """What a sampler returns."""

    tokens_BC: Array
    reveal_step_BC: (
        Array  # the step that committed the position; NEVER_DECODED behind the end token of a row that stopped early
    )
    confidence_BC: Array  # the model's probability of the token when it was committed
    length_B: Array  # through the first end token
    nfe_B: Array  # forward passes that the row took part in


class Decoding(NamedTuple):
    step: Array
    tokens_BC: Array
    reveal_step_BC: Array
    confidence_BC: Array
    finished_B: Array
    nfe_B: Array


class Noise(NamedTuple):
    """Where randomness comes from; tests put recorded draws here."""

    gumbel: Callable[[Array, tuple[int, ...]], Array]  # (step, [B, S, V]) -> standard Gumbel, fp32
    uniform: Callable[[Array, tuple[int, ...]], Array]  # (step, [B, S]) -> [0, 1)


def keyed_noise(key: Array, row_ids_B: Array) -> Noise:
    """Draws that are functions of (key, row id, step): a row's text does not depend on the rest of its batch."""
    keys_B = row_keys(key, row_ids_B)

    def draw(step: Array, shape: tuple[int, ...], sample: Callable[[Array, tuple[int, ...]], Array]) -> Array:
        return jax.vmap(lambda k: sample(jax.random.fold_in(k, step), shape[1:]))(keys_B)

    # mode="high": the default draws one 23-bit uniform, which cuts the tail of the noise off at 16 nats.
    return Noise(
        gumbel=lambda step, shape: draw(step, shape, partial(jax.random.gumbel, mode="high")),
        uniform=lambda step, shape: draw(step, shape, jax.random.uniform),
    )


class Loop(NamedTuple):
    """One denoising run, as the functions that the compiled loop and the step-by-step one share."""

    start: Decoding
    running: Callable[[Decoding], Array]
    step: Callable[[Decoding], Decoding]
    finish: Callable[[Decoding], Rollout]


def denoising(
    model: Transformer,
    variables: Variables,
    prompt_BP: Array,
    prompt_length_B: Array,
    noise: Noise,
    *,
    config: SamplerConfig,
    special: SpecialTokens,
    temperature: float,
) -> Loop:
    """Denoises completions for right-padded prompts. The head runs on the active block only.

    Every step runs one forward pass over the canvas (two under guidance: logits = without + (guidance + 1) (with - without) the
    prompt), proposes a token for each masked position of the active block and commits as many as `schedule.plan` says. With
    early_exit a row stops as soon as its text through the first end token is decided; what it would have written behind is
    filled with end tokens, and nothing before can change, because committed tokens never do.
    """
    rows, length, block = prompt_BP.shape[0], config.completion_length, config.block_length
    steps = plan(config)
    head_DV = head_matrix(variables)
    by_order = config.remasking == "random" or config.remasking_temperature > 0 or config.schedule == "chance"
    passes = 2 if config.guidance > 0 else 1

    def logits_of(tokens_BC: Array, prompt_BP: Array, first: Array) -> Array:
        canvas = Canvas(tokens_BC, prompt_BP, prompt_length_B)
        hidden_BTD = hidden_states(model, variables, canvas.tokens_BT, canvas.positions_BT, canvas.length_B)
        return project(completion_hidden(hidden_BTD, canvas, model.config.alignment, first, block), head_DV)

    start = Decoding(
        step=jnp.int32(0),
        tokens_BC=jnp.full((rows, length), special.mask, jnp.int32),
        reveal_step_BC=jnp.full((rows, length), NEVER_DECODED, jnp.int32),
        confidence_BC=jnp.zeros((rows, length), jnp.float32),
        finished_B=jnp.zeros(rows, bool),
        nfe_B=jnp.zeros(rows, jnp.int32),
    )

    def running(state: Decoding) -> Array:
        return (state.step < len(steps.number_K)) & ~jnp.all(state.finished_B)

    def is_finished(tokens_BC: Array) -> Array:
        full_B = ~jnp.any(tokens_BC == special.mask, axis=1)
        return full_B | text_is_decided(tokens_BC, special) if config.early_exit else full_B

    def step(state: Decoding) -> Decoding:
        number, first, count, chance = (jnp.asarray(array)[state.step] for array in steps)
        if config.schedule in ADAPTIVE:
            first = jnp.argmax(state.tokens_BC == special.mask, axis=1) // block * block
        logits_BSV = logits_of(state.tokens_BC, prompt_BP, first)
        if config.guidance > 0:
            hidden_prompt_BP = jnp.where(
                jnp.arange(prompt_BP.shape[1])[None, :] < prompt_length_B[:, None], special.mask, prompt_BP
            )
            without_BSV = logits_of(state.tokens_BC, hidden_prompt_BP, first)
            logits_BSV = without_BSV + (config.guidance + 1) * (logits_BSV - without_BSV)
        draws = Draws(
            noise.gumbel(number, logits_BSV.shape) if temperature > 0 else None,
            noise.uniform(number, logits_BSV.shape[:2]) if by_order else None,
        )
        proposal = propose(logits_BSV, draws, temperature, special, config)

        columns_BS = block_columns(first, rows, block)
        tokens_BS, revealed_BS, confidence_BS = (
            jnp.take_along_axis(x, columns_BS, axis=1)
            for x in (state.tokens_BC, state.reveal_step_BC, state.confidence_BC)
        )
        open_BS = (tokens_BS == special.mask) & ~state.finished_B[:, None]
        if config.schedule in ADAPTIVE:
            commit_BS = accept(proposal, open_BS, config)
        elif config.schedule == "chance":
            commit_BS = open_BS & (draws.uniform_BS < chance)
        else:
            commit_BS = choose(proposal.priority_BS, open_BS, count)

        def write(whole_BC: Array, old_BS: Array, new_BS: Array | int) -> Array:
            return jnp.put_along_axis(whole_BC, columns_BS, jnp.where(commit_BS, new_BS, old_BS), axis=1, inplace=False)

        tokens_BC = write(state.tokens_BC, tokens_BS, proposal.token_BS)
        return Decoding(
            step=state.step + 1,
            tokens_BC=tokens_BC,
            reveal_step_BC=write(state.reveal_step_BC, revealed_BS, number),
            confidence_BC=write(state.confidence_BC, confidence_BS, proposal.confidence_BS),
            finished_B=is_finished(tokens_BC),
            nfe_B=state.nfe_B + passes * ~state.finished_B,
        )

    def finish(state: Decoding) -> Rollout:
        tokens_BC = jnp.where(state.tokens_BC == special.mask, special.end, state.tokens_BC)
        length_B = jnp.sum(through_first_end(tokens_BC, special.end), axis=1)
        return Rollout(tokens_BC, state.reveal_step_BC, state.confidence_BC, length_B, state.nfe_B)

    return Loop(start, running, step, finish)


def denoise(*args: Any, **settings: Any) -> Rollout:
    """All of `denoising` in one loop, without a way out to the host."""
    loop = denoising(*args, **settings)
    return loop.finish(jax.lax.while_loop(loop.running, loop.step, loop.start))


def text_is_decided(tokens_BC: Array, special: SpecialTokens) -> Array:
    """True for rows that hold an end token with no mask before it."""
    text_BC = through_first_end(tokens_BC, special.end)
    return jnp.any(tokens_BC == special.end, axis=1) & ~jnp.any(text_BC & (tokens_BC == special.mask), axis=1)


@partial(jax.jit, static_argnames=STATIC)
def sample(
    model: Transformer,
    variables: Variables,
    prompt_BP: Array,
    prompt_length_B: Array,
    key: Array,
    row_ids_B: Array,
    *,
    config: SamplerConfig,
    special: SpecialTokens,
    temperature: float,
) -> Rollout:
    """`denoise` under noise keyed by global row id."""
    noise = keyed_noise(key, row_ids_B)
    return denoise(
        model, variables, prompt_BP, prompt_length_B, noise, config=config, special=special, temperature=temperature
    )


def sample_stepwise(*arguments: Any, **settings: Any) -> Iterator[Decoding | Rollout]:
    """What `sample` does with the same arguments, one step at a time: every state on the way, then the same rollout."""
    state, running = None, True
    while running:
        state, running, rollout = _one_step(*arguments, state, **settings)
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
    state: Decoding | None,
    **settings: Any,
) -> tuple[Decoding, Array, Rollout]:
    loop = denoising(model, variables, prompt_BP, prompt_length_B, keyed_noise(key, row_ids_B), **settings)
    state = loop.step(loop.start if state is None else state)
    return state, loop.running(state), loop.finish(state)
