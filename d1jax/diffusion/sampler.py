"""The one place where text is generated: semi-autoregressive blocks, denoised from all masked to none.

A `Sampler` holds the settings. Its methods are the steps of a denoising run, each a pure function of (inputs, state): `sample` runs
them in one compiled loop, `stream` one at a time for people to watch.

B rows, C completion columns, P prompt columns, S columns of a block, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from d1jax.config import Klass, SamplerConfig, UserError
from d1jax.data.tokenizers import SpecialTokens
from d1jax.diffusion import unmasking
from d1jax.diffusion.canvas import Canvas, block_columns, completion_hidden
from d1jax.diffusion.decoding import Block, Decoding, Inputs, Prompts, all_masked, ended, is_done, pinned, with_history
from d1jax.diffusion.in_blocks import begin, completions, longer
from d1jax.diffusion.kv_cache import block_hidden
from d1jax.diffusion.masked_columns import apply_to_masked, column_chunk
from d1jax.diffusion.noise import Noise
from d1jax.diffusion.order import check_order
from d1jax.diffusion.predictions import Predictions, TokenSampler, inverse_cdf, predict
from d1jax.diffusion.rollout import Rollout
from d1jax.diffusion.schedule import StepSchedule, step_schedule
from d1jax.diffusion.unmasking import Selection, UnmaskingState
from d1jax.models.transformer import (
    KeyValues,
    Transformer,
    Variables,
    head_matrix,
    hidden_states,
    hidden_states_and_keys,
    project,
)  # fmt: skip


@dataclass(frozen=True)
class Sampler:
    """Denoises completions for right-padded prompts, or (prompt_before_BC) the holes of texts.

    Every step runs a forward pass over the canvas, or over a window of it on cached keys, predicts a token for each masked
    position of the active block and unmasks as many as the schedule says. The head sees the active block only. Guidance takes a
    second pass without the prompt: logits = without + (guidance + 1) (with - without). With early_exit a row stops as soon as
    its text through the first end token is decided; what it would have written behind is filled with end tokens, and nothing
    before can change, because unmasked tokens never do.

    Adaptive schedules: each row works on its own first block with a mask; with a cache, which all rows share, on the first block
    with a mask in any row, so a row may wait. Steps of a row are counted by its own passes either way, and its text is the same.

    All fields are static but a temperature above 0 and the thresholds of a schedule, which are arguments of the compiled program:
    samplers that are equal but for these share it.

        sampler = Sampler(model, config, special_tokens, temperature=1.0)
        rollout = sampler.sample(variables, Prompts(prompt_BP, prompt_length_B), KeyedNoise(key, row_ids_B))
    """

    model: Transformer
    config: SamplerConfig
    special: SpecialTokens
    temperature: float = 0.0
    record_entropy: bool = False  # keep the entropy of the prediction behind every token
    token_sampler: TokenSampler = inverse_cdf  # how a token is drawn at a temperature above 0
    chunk: int | None = None  # columns of a block whose logits are alive at once; None: by the sizes (`column_chunk`)

    def __post_init__(self) -> None:
        check_order(self.model.config, self.config)

    # -- the two loops -------------------------------------------------------------------------------------------------

    def sample(self, variables: Variables, prompts: Prompts, noise: Noise) -> Rollout:
        """The `Rollout` of all prompts, in one compiled loop without a way out to the host."""
        return self.program._compiled_run(self.inputs(variables, prompts, noise))

    def lower(self, variables: Variables, prompts: Prompts, noise: Noise) -> jax.stages.Lowered:
        """The program of `sample` for arrays, or for shapes of arrays, before it is compiled."""
        return Sampler._compiled_run.lower(self.program, self.inputs(variables, prompts, noise))

    @partial(jax.jit, static_argnums=0)
    def _compiled_run(self, inputs: Inputs) -> Rollout:
        if self.model.config.attention_mask != "block_causal":
            return self._run(inputs)
        prompts, length = inputs.prompts, self.config.completion_length
        whole_B, begun = begin(prompts.prompt_BP, prompts.prompt_length_B, length, self.config.block_length)
        aligned = inputs._replace(prompts=Prompts(prompts.prompt_BP, whole_B, begun=begun))
        run = dataclasses.replace(self, config=longer(self.config))._run(aligned)
        return completions(run, begun, length, self.special)

    def _run(self, inputs: Inputs) -> Rollout:
        """The loop of `sample`."""

        def until_refresh(state: Decoding) -> Decoding:
            state, cache = self.full_step(inputs, state)
            if cache is None:
                return state
            # The cache is a constant of this inner loop: what a loop carries is handed on, and perhaps copied, in every step.
            return jax.lax.while_loop(
                lambda state: self.is_running(state) & ~self.needs_refresh(state),
                lambda state: self.cached_step(inputs, state, cache),
                state,
            )

        return self.finish(jax.lax.while_loop(self.is_running, until_refresh, self.init(inputs)))

    def stream(self, variables: Variables, prompts: Prompts, noise: Noise) -> Iterator[Decoding | Rollout]:
        """Yields the `Decoding` after every step, then the `Rollout` that `sample` returns for these arguments, to the bit."""
        if self.model.config.attention_mask == "block_causal":
            raise UserError("a block-causal model is not shown step by step; take sample, or generate without --show")
        inputs, program = self.inputs(variables, prompts, noise), self.program
        state = program._compiled_init(inputs)
        cache, running = None, True
        while running:
            state, new_cache, running, refresh, rollout = program._compiled_step(inputs, state, cache)
            yield state
            cache = cache if new_cache is None else new_cache
            if refresh:
                cache = None
        yield rollout

    @partial(jax.jit, static_argnums=0)
    def _compiled_init(self, inputs: Inputs) -> Decoding:
        return pinned(self.init(inputs))

    @partial(jax.jit, static_argnums=0)
    def _compiled_step(
        self, inputs: Inputs, state: Decoding, cache: KeyValues | None
    ) -> tuple[Decoding, KeyValues | None, Array, Array, Rollout]:
        """(state, a new cache if one was made, is it running, does it need a refresh, the rollout so far)."""
        # The host learns all that it needs from this one call: two programs at most, with a cache and without.
        new_cache = None
        if cache is None:
            state, new_cache = self.full_step(inputs, state)
        else:
            state = self.cached_step(inputs, state, cache)
        return pinned(state), new_cache, self.is_running(state), self.needs_refresh(state), self.finish(state)

    # -- the steps -----------------------------------------------------------------------------------------------------

    def inputs(self, variables: Variables, prompts: Prompts, noise: Noise) -> Inputs:
        """What the steps read, with the numbers of this sampler: floats all, so that 1 is no other program than 1.0."""
        return Inputs(variables, prompts, noise, float(self.temperature), jax.tree.map(float, self.config.schedule))

    def init(self, inputs: Inputs) -> Decoding:
        """All masked, before the first step."""
        rows = inputs.prompts.prompt_BP.shape[0]
        state = all_masked(rows, self.config.completion_length, self.special.mask)
        if inputs.prompts.begun is not None:
            state = state._replace(tokens_BC=inputs.prompts.begun.written(state.tokens_BC))
        if self.rows_go_alone:
            state = state._replace(block_start=jnp.full(rows, state.block_start, jnp.int32))
        if isinstance(self.config.schedule, Klass):
            state = with_history(state, self.config.block_length, head_matrix(inputs.variables).shape[1])
        return state

    def is_running(self, state: Decoding) -> Array:
        """Whether another step is to come."""
        return (state.step < len(self.schedule.number_K)) & ~jnp.all(state.done_B)

    def block_start(self, state: Decoding) -> Array:
        """The first column of the block that the next step works on: one number, or one a row."""
        if not self.is_adaptive:
            return jnp.asarray(self.schedule.start_K, jnp.int32)[state.step]
        block = self.config.block_length
        start_B = jnp.argmax(state.tokens_BC == self.special.mask, axis=1) // block * block
        if self.rows_go_alone:
            return start_B
        # Rows that are done must not hold the others back.
        return jnp.min(jnp.where(state.done_B, self.config.completion_length - block, start_B))

    def needs_refresh(self, state: Decoding) -> Array:
        """Whether the next step must pass over the whole canvas: without a cache, in a new block, and where the cache is too old."""
        if not self.is_cached:
            return jnp.bool(True)
        is_too_old = (self.config.cache.refresh > 0) & (state.cache_age >= self.config.cache.refresh)
        return (self.block_start(state) != state.block_start) | is_too_old

    def full_step(self, inputs: Inputs, state: Decoding) -> tuple[Decoding, KeyValues | None]:
        """A step from a pass over the whole canvas: (the state after it, the new cache; None without one)."""
        start = self.block_start(state)
        canvas = inputs.prompts.canvas(state.tokens_BC)
        cache = None
        if self.is_cached:
            hidden_BTD, cache = hidden_states_and_keys(self.model, inputs.variables, *canvas.arrays)
        else:
            hidden_BTD = hidden_states(self.model, inputs.variables, *canvas.arrays)
        # From here on only the active block: logits of a whole completion [B, C, V] would be the largest array of a step.
        hidden_BSD = self._hidden_of_block(hidden_BTD, canvas, start)
        unprompted_BSD = None
        if self.config.guidance > 0:
            canvas = canvas.without_prompt(self.special.mask)
            unprompted_BTD = hidden_states(self.model, inputs.variables, *canvas.arrays)
            unprompted_BSD = self._hidden_of_block(unprompted_BTD, canvas, start)
        block = self.block(state, start, is_first_pass=start != state.block_start)
        state = self.unmask(inputs, state, block, hidden_BSD, unprompted_BSD)
        return state._replace(cache_age=jnp.int32(1)), cache

    def cached_step(self, inputs: Inputs, state: Decoding, cache: KeyValues) -> Decoding:
        """A step from a pass over a window of the canvas, on the keys and values of the last full step."""
        start = self.block_start(state)
        canvas = inputs.prompts.canvas(state.tokens_BC)
        hidden_BSD = block_hidden(self.model, inputs.variables, canvas, cache, start, self.config)
        block = self.block(state, start, is_first_pass=jnp.bool(False))
        after = self.unmask(inputs, state, block, hidden_BSD)
        took_part_B = after.nfe_B - state.nfe_B
        return after._replace(cache_age=state.cache_age + 1, cached_nfe_B=state.cached_nfe_B + took_part_B)

    def block(self, state: Decoding, start: Array, is_first_pass: Array) -> Block:
        """The `Block` of a step that starts at column `start`."""
        rows = state.tokens_BC.shape[0]
        columns_S = jnp.arange(self.config.block_length, dtype=jnp.int32)
        columns_BS = block_columns(start, rows, self.config.block_length)
        masked_BS = jnp.take_along_axis(state.tokens_BC, columns_BS, axis=1) == self.special.mask
        masked_BS &= ~state.done_B[:, None]
        # A shifted model on a cache cannot score the first column of a block from a window: the block's first pass unmasks it.
        forced_BS = jnp.zeros_like(masked_BS)
        if self.is_cached and self.config.cache.refresh != 1 and self.model.config.alignment == "shifted":
            forced_BS = masked_BS & (is_first_pass & (columns_S == 0))[None, :]
        step_B = jnp.broadcast_to(jnp.asarray(self.schedule.number_K, jnp.int32)[state.step], (rows,))
        if self.is_adaptive:  # a row that waited for others draws what it would have drawn alone
            step_B = state.nfe_B // self.passes
        return Block(start, columns_BS, masked_BS, forced_BS, step_B)

    def unmask(
        self, inputs: Inputs, state: Decoding, block: Block, hidden_BSD: Array, unprompted_BSD: Array | None = None
    ) -> Decoding:
        """Predicts every masked position of the block, selects some of them and writes them into the state."""
        predictions = self.predict(inputs, block, hidden_BSD, unprompted_BSD)
        stable_steps_BS = self.stable_steps(inputs, state, block, predictions)
        selection = self.select(inputs, state, block, predictions, stable_steps_BS)

        def write(whole_BC: Array, new_BS: Array) -> Array:
            old_BS = jnp.take_along_axis(whole_BC, block.columns_BS, axis=1)
            new_BS = jnp.where(selection.unmask_BS, new_BS, old_BS)
            return jnp.put_along_axis(whole_BC, block.columns_BS, new_BS, axis=1, inplace=False)

        rows_B = jnp.arange(state.tokens_BC.shape[0], dtype=jnp.int32)
        # Written by columns, because rows may be in different blocks. A row that is done has no masked column and keeps all.
        tokens_BC = write(state.tokens_BC, predictions.token_BS)
        step_BS = jnp.broadcast_to(block.step_B[:, None], block.columns_BS.shape)
        done_B = is_done(tokens_BC, inputs.prompts.begun, self.special, self.config.early_exit)
        # What stayed masked has a probability too (Bernoulli), so this one adds up over the steps of a position.
        order_logp_BC = state.order_logp_BC.at[rows_B[:, None], block.columns_BS].add(selection.order_logp_BS)
        entropy_BC = write(state.entropy_BC, predictions.entropy_BS) if self.record_entropy else state.entropy_BC
        return state._replace(
            step=state.step + 1,
            block_start=block.start,
            tokens_BC=tokens_BC,
            unmask_step_BC=write(state.unmask_step_BC, step_BS),
            confidence_BC=write(state.confidence_BC, predictions.confidence_BS),
            token_logp_BC=write(state.token_logp_BC, predictions.token_logp_BS),
            order_logp_BC=order_logp_BC,
            entropy_BC=entropy_BC,
            done_B=done_B,
            nfe_B=state.nfe_B + self.passes * jnp.any(block.masked_BS, axis=1),
            logp_BSV=predictions.logp_BSV,
            stable_steps_BS=stable_steps_BS,
        )

    def predict(self, inputs: Inputs, block: Block, hidden_BSD: Array, unprompted_BSD: Array | None) -> Predictions:
        """What every masked position of the block would become; zeros where nothing is masked."""
        rows, columns = block.columns_BS.shape
        head_DV = head_matrix(inputs.variables)
        # Greedy decoding draws nothing, so it may have no noise at all.
        draws_BS = inputs.noise.token(block.step_B, (rows, columns)) if self.is_drawn else None

        def of_columns(draws_BS: Array | None, hidden_BSD: Array, unprompted_BSD: Array | None) -> Predictions:
            logits_BSV = project(hidden_BSD, head_DV)
            if unprompted_BSD is not None:
                without_BSV = project(unprompted_BSD, head_DV)
                logits_BSV = without_BSV + (self.config.guidance + 1) * (logits_BSV - without_BSV)
            return predict(
                logits_BSV, draws_BS, self.token_sampler, temperature=inputs.temperature, special=self.special,
                config=self.config, record_entropy=self.record_entropy, keep_logp=isinstance(self.config.schedule, Klass),
            )  # fmt: skip

        chunk = self.chunk or column_chunk(rows, columns, head_DV.shape[1])
        return apply_to_masked(of_columns, chunk, block.masked_BS, draws_BS, hidden_BSD, unprompted_BSD)

    def stable_steps(self, inputs: Inputs, state: Decoding, block: Block, predictions: Predictions) -> Array | None:
        """Klass: for how many steps in a row the distributions of the block have hardly changed, [B, S]."""
        if not isinstance(inputs.schedule, Klass):
            return None
        # What the state holds is of another block where this one is new, and of nothing before the first step.
        is_known_B = jnp.broadcast_to(block.start == state.block_start, state.done_B.shape) & (state.step > 0)
        before = state.logp_BSV, state.stable_steps_BS, is_known_B
        return unmasking.stable_steps(inputs.schedule, predictions.logp_BSV, *before)

    def select(
        self, inputs: Inputs, state: Decoding, block: Block, predictions: Predictions, stable_steps_BS: Array | None
    ) -> Selection:
        """Which of the predictions this step unmasks: as many as the schedule fixes, or as its rule accepts."""
        masked_BS, forced_BS = block.masked_BS, block.forced_BS
        uniform_BS = inputs.noise.uniform(block.step_B, block.columns_BS.shape) if self.config.has_drawn_order else None
        if self.config.schedule.name == "chance":
            probability = jnp.asarray(self.schedule.probability_K, jnp.float32)[state.step]
            return unmasking.bernoulli(uniform_BS, masked_BS, forced_BS, probability)
        order = unmasking.in_order(predictions, uniform_BS, masked_BS, forced_BS, self.special, self.config)
        if not self.is_adaptive:
            return unmasking.top_k(order, masked_BS, jnp.asarray(self.schedule.count_K, jnp.int32)[state.step])
        evidence = UnmaskingState(predictions, order.rank_BS, masked_BS, forced_BS, stable_steps_BS)
        return unmasking.accepted(inputs.schedule, evidence)

    def finish(self, state: Decoding) -> Rollout:
        """The `Rollout` of a run: what is still masked, behind the end of a text, becomes end tokens."""
        return ended(state, self.special)

    # -- what follows from the fields ----------------------------------------------------------------------------------

    @property
    def schedule(self) -> StepSchedule:
        return step_schedule(self.config)

    @property
    def program(self) -> Sampler:
        """What is compiled: this sampler without the numbers that are arguments."""
        config = dataclasses.replace(self.config, schedule=type(self.config.schedule)())
        return dataclasses.replace(self, config=config, temperature=1.0 if self.is_drawn else 0.0)

    @property
    def is_drawn(self) -> bool:
        """Whether tokens are drawn, or the likeliest are taken."""
        return self.temperature > 0

    @property
    def is_adaptive(self) -> bool:
        return self.config.schedule.adaptive

    @property
    def is_cached(self) -> bool:
        return self.config.cache.name != "none"

    @property
    def rows_go_alone(self) -> bool:
        """Whether each row works on a block of its own: a window of a cache is one for all rows."""
        return self.is_adaptive and not self.is_cached

    @property
    def passes(self) -> int:
        """Forward passes of a full step."""
        return 2 if self.config.guidance > 0 else 1

    def _hidden_of_block(self, hidden_BTD: Array, canvas: Canvas, start: Array) -> Array:
        return completion_hidden(hidden_BTD, canvas, self.model.config.alignment, start, self.config.block_length)
