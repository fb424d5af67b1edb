"""The one layout of prompt and completion.

Attention is bidirectional and positions are explicit, so the storage order of columns is free. A canvas is stored as

    [ completion: C columns | prompt: P columns, right-padded ]        T = C + P

with position n + j for completion column j and position i for prompt column i (n = prompt length of the row). Completion
columns are the same static slice in every row, the current block is a static-size slice, and padding is always at the end,
so a row's attention is described by one number, its length. Only this file knows the order.

The completion need not stand behind the prompt: `prompt_before_BC` says how many prompt tokens come before each completion
column, so a text with holes (infilling) is the same canvas with other positions.

B rows, C completion columns, P prompt columns, T = C + P, D width.
"""

from __future__ import annotations

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from d1jax.config import Alignment


class Canvas(NamedTuple):
    completion_BC: Array
    prompt_BP: Array
    prompt_length_B: Array
    prompt_before_BC: Array | None = None  # never falls from left to right; None: all of the prompt comes first

    @property
    def tokens_BT(self) -> Array:
        return jnp.concatenate([self.completion_BC, self.prompt_BP], axis=1)

    @property
    def positions_BT(self) -> Array:
        rows, completion_length = self.completion_BC.shape
        columns_C = jnp.arange(completion_length, dtype=jnp.int32)
        columns_P = jnp.arange(self.prompt_BP.shape[1], dtype=jnp.int32)
        if self.prompt_before_BC is None:
            completion_BC = self.prompt_length_B[:, None] + columns_C[None, :]
            prompt_BP = jnp.broadcast_to(columns_P[None, :], self.prompt_BP.shape)
        else:
            completion_BC = self.prompt_before_BC + columns_C[None, :]
            before_BPC = self.prompt_before_BC[:, None, :] <= columns_P[None, :, None]
            prompt_BP = columns_P[None, :] + jnp.sum(before_BPC, axis=2)
        return jnp.concatenate([completion_BC, prompt_BP], axis=1)

    @property
    def length_B(self) -> Array:
        """Columns that hold something: keys beyond are padding."""
        return self.completion_BC.shape[1] + self.prompt_length_B

    @property
    def prompt_mask_BP(self) -> Array:
        """True for the real tokens of the prompt."""
        return jnp.arange(self.prompt_BP.shape[1], dtype=jnp.int32)[None, :] < self.prompt_length_B[:, None]

    @property
    def arrays(self) -> tuple[Array, Array, Array]:
        """(tokens [B, T], positions [B, T], length [B]): what the transformer takes."""
        return self.tokens_BT, self.positions_BT, self.length_B

    def without_prompt(self, mask_id: int) -> Canvas:
        """The canvas with every token of the prompt masked."""
        return self._replace(prompt_BP=jnp.where(self.prompt_mask_BP, mask_id, self.prompt_BP))


def block_columns(start: Array | int, rows: int, size: int) -> Array:
    """The completion columns start .. start + size of each row, [B, size]; `start` is one number or one a row."""
    start_B = jnp.broadcast_to(jnp.asarray(start, jnp.int32), (rows,))
    return start_B[:, None] + jnp.arange(size, dtype=jnp.int32)[None, :]


def completion_hidden(
    hidden_BTD: Array, canvas: Canvas, alignment: Alignment, start: Array | int = 0, size: int | None = None
) -> Array:
    """The hidden states that score completion columns start .. start + size, [B, size, D]; `start` may differ from row to row.

    same_position (LLaDA): the state at the column itself. shifted (Dream): the state of the position before it, which for the
    first completion column is the last token of the prompt; a row without a prompt uses its own first state, as Dream does.
    """
    completion_length = canvas.completion_BC.shape[1]
    size = completion_length if size is None else size
    if alignment == "same_position":
        return window_hidden(hidden_BTD, start, size)
    columns_BS = block_columns(start, canvas.completion_BC.shape[0], size)
    return jnp.take_along_axis(
        hidden_BTD, jnp.take_along_axis(_column_before(canvas), columns_BS, axis=1)[:, :, None], axis=1
    )


def window_hidden(hidden_BWD: Array, start: Array | int, size: int) -> Array:
    """The columns start .. start + size of what was computed for a run of columns; `start` may differ from row to row."""
    if jnp.ndim(start) == 0:
        return jax.lax.dynamic_slice_in_dim(hidden_BWD, start, size, axis=1)
    columns_BS = block_columns(start, hidden_BWD.shape[0], size)
    return jnp.take_along_axis(hidden_BWD, columns_BS[:, :, None], axis=1)


def _column_before(canvas: Canvas) -> Array:
    """The canvas column of the position before each completion column; of position 0: its own, [B, C]."""
    rows, completion_length = canvas.completion_BC.shape
    before_BC = canvas.prompt_before_BC
    if before_BC is None:
        before_BC = jnp.broadcast_to(canvas.prompt_length_B[:, None], (rows, completion_length))
    columns_BC = jnp.broadcast_to(jnp.arange(completion_length, dtype=jnp.int32)[None, :], (rows, completion_length))
    follows_BC = jnp.pad(
        before_BC[:, 1:] == before_BC[:, :-1], ((0, 0), (1, 0))
    )  # on the completion column to its left
    prompt_BC = jnp.where(before_BC > 0, completion_length + before_BC - 1, columns_BC)
    return jnp.where(follows_BC, columns_BC - 1, prompt_BC)


def through_first_end(completion_BC: Array, end_ids: tuple[int, ...]) -> Array:
    """True up to and including the first token of `end_ids`, and everywhere in a row that has none: the text of a completion.

    Differs from d1's completion mask, which ends at <|endoftext|> only: where a turn is closed by another token, what stands
    between the two is no text, is not judged and so is not scored.
    """
    is_end_BC = is_any_of(completion_BC, end_ids)
    ends_before_BC = jnp.cumsum(is_end_BC, axis=1) - is_end_BC
    return ends_before_BC == 0


def is_any_of(tokens: Array, ids: tuple[int, ...]) -> Array:
    """True where a token is one of a few ids."""
    return functools.reduce(operator.or_, (tokens == one for one in ids), jnp.zeros(jnp.shape(tokens), bool))


def row_keys(key: Array, row_ids_B: Array) -> Array:
    """One key a row. Rows are keyed by their global id, so results do not depend on batch, accumulation or devices."""
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(row_ids_B)


def row_uniforms(key: Array, row_ids_B: Array, columns: int) -> Array:
    """[B, columns] numbers in [0, 1), each a function of (key, row id, column)."""
    return jax.vmap(lambda k: jax.random.uniform(k, (columns,), jnp.float32))(row_keys(key, row_ids_B))
