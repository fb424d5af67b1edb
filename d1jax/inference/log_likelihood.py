"""How likely a policy finds a text behind another one: the evidence lower bound, and whether greedy denoising would write it.

Of a pair's tokens, [context | continuation], the last C are the completion of a canvas and the rest is its prompt. C is the length of
the continuation rounded up, so that few shapes are compiled, and what it holds of the context is never masked: the model sees the
two texts and nothing else. A pass is one pair under one mask.

B rows of a batch, C completion columns, L tokens of a continuation, K passes of a pair, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from d1jax.config import SamplerConfig
from d1jax.data.tokenizers import SpecialTokens, pad_rows
from d1jax.diffusion.canvas import Canvas, completion_hidden
from d1jax.diffusion.likelihood import Views, score
from d1jax.diffusion.masked_columns import apply_to_masked, column_chunk
from d1jax.diffusion.predictions import Predictions, inverse_cdf, predict
from d1jax.inference.policy import Policy, check_length, check_sees_both_sides
from d1jax.models import sharding
from d1jax.models.transformer import Transformer, Variables, head_matrix, hidden_states, project

FEWEST_COLUMNS = 8
CONTEXT_BUCKET = 32
GREEDY = SamplerConfig()  # of its settings only the order counts here: the likeliest position first


class Pair(NamedTuple):
    """Token ids: what is given, and what is scored behind it."""

    context: Sequence[int]
    continuation: Sequence[int]

    @property
    def tokens(self) -> list[int]:
        return [*self.context, *self.continuation]

    @property
    def shape(self) -> tuple[int, int]:
        """(completion columns, prompt columns) of its canvas: a function of the pair alone, so results do not depend on a batch."""
        total, length = len(self.context) + len(self.continuation), len(self.continuation)
        columns = min(max(FEWEST_COLUMNS, 1 << max(length - 1, 0).bit_length()), total)
        return columns, -(-(total - columns) // CONTEXT_BUCKET) * CONTEXT_BUCKET


class Pass(NamedTuple):
    """One forward pass: a pair and which tokens of its continuation are hidden."""

    number: int  # of the pair
    pair: Pair
    masked_L: np.ndarray
    weight: float = 0.0


def row_id(tokens: Sequence[int]) -> int:
    """A number below 2**31 that depends on these ids alone: what the draws for a text are keyed by."""
    return zlib.crc32(np.asarray(tokens, np.int64).tobytes()) & 0x7FFFFFFF


def masks(length: int, samples: int, seed: int, row: int) -> tuple[np.ndarray, np.ndarray]:
    """(masked [K, L], weight [K]) of an estimate: sum over passes of weight x (sum over masked tokens of log p).

    ELBO = E over n ~ U{1..L} and sets S of n tokens of [ L / n x sum over S of log p(token | context, all outside S) ].

    Where all 2^L - 1 sets are no more than `samples` (128: up to 7 tokens) each has its probability as weight, K = 2^L - 1, and the
    sum is the ELBO itself. Else K = samples, the numbers n spread evenly over 1..L, and the sum is unbiased for it: the `elbo` estimator
    of training with counts "exact" (diffusion/estimators.py). Draws depend on (seed, row) alone.

    Source: LLaDA, arXiv 2502.09992, eq. 6 and its get_loglikelihood (128 samples).
    Differs: the numbers n are spread evenly from one random start for all samples, there over each batch of samples; short texts exactly.
    """
    if length <= samples.bit_length() and 2**length - 1 <= samples:
        masked_KL = np.array(list(itertools.product((False, True), repeat=length))[1:], bool).reshape(-1, length)
        weight_K = np.array([1 / (n * math.comb(length, n)) for n in masked_KL.sum(axis=1).tolist()])
        return masked_KL, weight_K
    draw = np.random.default_rng((seed, row))
    share_K = (draw.random() + np.arange(samples)) / samples
    count_K = np.minimum(1 + np.floor(share_K * length), length)
    rank_KL = np.argsort(np.argsort(draw.random((samples, length)), axis=1), axis=1)
    return rank_KL < count_K[:, None], length / count_K / samples


def elbos(policy: Policy, pairs: Sequence[Pair], *, samples: int, seed: int, batch: int) -> list[float]:
    """The ELBO of each continuation given its context, nats, estimated with at most `samples` passes (see `masks`).

    Pairs of one context meet equal masks where their continuations are equally long, which takes noise out of their comparison.
    The probability is the softmax over all rows of the head. `batch` passes run at once. Raises UserError for a pair that
    is longer than the model's positions.
    """
    check_sees_both_sides(policy.config, "log-likelihood")
    totals = np.zeros(len(pairs))

    def passes() -> Iterator[Pass]:
        for number, pair in _by_shape(policy, pairs):
            if not pair.continuation:
                continue
            drawn = masks(len(pair.continuation), samples, seed, row_id(pair.context))
            for masked_L, weight in zip(*drawn, strict=True):
                yield Pass(number, pair, masked_L, float(weight))

    for shape, part in _batches(passes(), batch):
        canvas, masked_BC = _canvas(policy, part, shape, batch)
        with jax.set_mesh(policy.mesh):
            logp_BC = _masked_logps(policy.model, policy.variables, canvas, masked_BC, policy.tokenizer.special.mask)
        logp_B = np.asarray(logp_BC, np.float64).sum(axis=1)
        for one, logp in zip(part, logp_B, strict=False):  # what fills the last batch up is dropped
            totals[one.number] += one.weight * logp
    return totals.tolist()


def are_greedy(policy: Policy, pairs: Sequence[Pair], *, batch: int) -> list[bool]:
    """Whether greedy denoising of as many masks as the continuation has tokens, the likeliest one a step, writes just it.

    A pair is left at its first wrong token, so most take one pass.
    """
    check_sees_both_sides(policy.config, "log-likelihood")
    length = [len(pair.continuation) for pair in pairs]
    greedy = [True] * len(pairs)
    begun = (Pass(number, pair, np.ones(length[number], bool)) for number, pair in _by_shape(policy, pairs))
    alive = [one for one in begun if length[one.number]]
    while alive:
        following: list[Pass] = []
        for shape, part in _batches(iter(alive), batch):
            canvas, masked_BC = _canvas(policy, part, shape, batch)
            with jax.set_mesh(policy.mesh):
                found = _likeliest(policy.model, policy.variables, canvas, masked_BC, policy.tokenizer.special)
            for one, column, token in zip(part, *map(np.asarray, found), strict=False):
                place = int(column) - (shape[0] - length[one.number])
                greedy[one.number] = bool(one.pair.continuation[place] == token)
                left_L = one.masked_L & (np.arange(length[one.number]) != place)
                if greedy[one.number] and left_L.any():
                    following.append(one._replace(masked_L=left_L))
        alive = following
    return greedy


def _by_shape(policy: Policy, pairs: Sequence[Pair]) -> list[tuple[int, Pair]]:
    for pair in pairs:
        check_length(len(pair.tokens), policy.config, "log-likelihood: context and continuation")
    return sorted(enumerate(pairs), key=lambda one: one[1].shape)


def _batches(passes: Iterator[Pass], batch: int) -> Iterator[tuple[tuple[int, int], list[Pass]]]:
    """Passes of one shape, at most `batch` at a time."""
    for shape, same in itertools.groupby(passes, key=lambda one: one.pair.shape):
        while part := list(itertools.islice(same, batch)):
            yield shape, part


def _canvas(policy: Policy, part: list[Pass], shape: tuple[int, int], batch: int) -> tuple[Canvas, Array]:
    """The canvas and masked [B, C], on the policy's devices; the last pass fills the batch up."""
    columns, width = shape
    filled = part + part[-1:] * (batch - len(part))
    completion_BC = np.array([one.pair.tokens[-columns:] for one in filled], np.int32)
    prompt_BP, length_B = pad_rows([one.pair.tokens[:-columns] for one in filled], width, policy.tokenizer.special.end)
    masked_BC = np.array([np.pad(one.masked_L, (columns - len(one.masked_L), 0)) for one in filled])
    completion_BC, prompt_BP, length_B, masked_BC = sharding.shard_batch(
        policy.mesh, (completion_BC, prompt_BP, length_B, masked_BC)
    )
    return Canvas(completion_BC, prompt_BP, length_B), masked_BC


@partial(jax.jit, static_argnames=("model", "mask_id"))
def _masked_logps(model: Transformer, variables: Variables, canvas: Canvas, masked_BC: Array, mask_id: int) -> Array:
    """log p of the masked tokens, 0 elsewhere."""
    shown_BC = jnp.where(masked_BC, mask_id, canvas.completion_BC)
    views = Views(shown_BC[None], canvas.prompt_BP[None], masked_BC[None].astype(jnp.float32))
    return score(model, variables, canvas, views).logp


@partial(jax.jit, static_argnames=("model", "special"))
def _likeliest(
    model: Transformer, variables: Variables, canvas: Canvas, masked_BC: Array, special: SpecialTokens
) -> tuple[Array, Array]:
    """(column, token) that greedy decoding would write next in each row."""
    shown = canvas._replace(completion_BC=jnp.where(masked_BC, special.mask, canvas.completion_BC))
    hidden_BTD = hidden_states(model, variables, *shown.arrays)
    hidden_BCD = completion_hidden(hidden_BTD, shown, model.config.alignment)
    head_DV = head_matrix(variables)

    def predictions(hidden_BnD: Array) -> Predictions:
        logits_BnV = project(hidden_BnD, head_DV)
        return predict(logits_BnV, None, inverse_cdf, special=special, config=GREEDY)

    chunk = column_chunk(*masked_BC.shape, head_DV.shape[1])
    found = apply_to_masked(predictions, chunk, masked_BC, hidden_BCD)
    column_B = jnp.argmax(jnp.where(masked_BC, found.confidence_BS, -1.0), axis=1)
    return column_B, jnp.take_along_axis(found.token_BS, column_B[:, None], axis=1)[:, 0]
