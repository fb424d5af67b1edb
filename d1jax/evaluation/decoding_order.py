"""How far decoding goes from left to right: local and global autoregressiveness, the decode order, the entropy sink.

B rows, C completion columns, P prompt columns, T tokens of one row's order, N denoising steps, V vocabulary.

Source: DiffuCoder, arXiv 2506.20639, appendix A.2.
Differs from the paper, which unmasks one token a step: tokens of one step count as unmasked from left to right, in both
measures. Of all orders that fit the steps this is the most autoregressive one, so under parallel decoding the values are upper
bounds, and everything in one step gives 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from d1jax.diffusion.canvas import Canvas, completion_hidden
from d1jax.diffusion.rollout import Rollout
from d1jax.models.token_logprobs import LOGITS_PER_CHUNK
from d1jax.models.transformer import Transformer, Variables, head_matrix, hidden_states, project

LOCAL_K = tuple(range(1, 10))
GLOBAL_K = tuple(range(1, 5))
LOGGED_K = (1, 4)  # at every RL step
MAX_BINS = 32  # of a heat map, along either axis
DIGITS = 4

# -- the measures ------------------------------------------------------------------------------------------------------


def unmask_order(unmask_step_C: np.ndarray) -> np.ndarray:
    """The columns in the order of their unmasking, [T]: by step, within a step from left to right, never decoded ones left out."""
    unmask_step_C = np.asarray(unmask_step_C)
    order_C = np.argsort(unmask_step_C, kind="stable")
    return order_C[unmask_step_C[order_C] >= 0]


def local_ar(order_T: np.ndarray, ks: Sequence[int] = LOCAL_K) -> np.ndarray:
    """local@k = mean over t > k of 1[p_{t-i} = p_t - i for i = 1 .. k]: the last k unmasked are the k left neighbours, in order.

    t runs over the positions that have k predecessors, so a left-to-right order gives 1, and the value never rises with k.
    NaN where T <= k: there is no such position.
    """
    run_T = np.zeros(len(order_T), int)
    for t in range(1, len(order_T)):
        run_T[t] = run_T[t - 1] + 1 if order_T[t] == order_T[t - 1] + 1 else 0
    return np.array([(run_T[k:] >= k).mean() if len(run_T) > k else np.nan for k in ks])


def global_ar(order_T: np.ndarray, ks: Sequence[int] = GLOBAL_K) -> np.ndarray:
    """global@k = mean over t of 1[p_t is among the k leftmost columns that are still masked]; it never falls with k.

    Columns that are never decoded do not count as masked. NaN where the order is empty.
    """
    if not len(order_T):
        return np.full(len(ks), np.nan)
    time_T = np.argsort(order_T)  # of the decoded columns from left to right, when each was unmasked
    left_T = np.triu(time_T[:, None] > time_T[None, :], k=1).sum(axis=0)  # columns to its left that were still masked
    return np.array([(left_T < k).mean() for k in ks])


def local_curve(unmask_step_BC: np.ndarray, ks: Sequence[int] = LOCAL_K) -> dict[int, float]:
    """{k: mean of local@k over the rows that decoded more than k tokens}; a k without such a row is left out."""
    return _means([local_ar(unmask_order(row_C), ks) for row_C in unmask_step_BC], ks)


def global_curve(unmask_step_BC: np.ndarray, ks: Sequence[int] = GLOBAL_K) -> dict[int, float]:
    """{k: mean of global@k over the rows that decoded anything}; empty where no row did."""
    return _means([global_ar(unmask_order(row_C), ks) for row_C in unmask_step_BC], ks)


def _means(values_BK: Sequence[np.ndarray], ks: Sequence[int]) -> dict[int, float]:
    columns_KB = np.asarray(values_BK, float).reshape(-1, len(ks)).T
    known = {k: values_B[~np.isnan(values_B)] for k, values_B in zip(ks, columns_KB, strict=True)}
    return {k: float(values.mean()) for k, values in known.items() if values.size}


def metrics(rollout: Rollout, ks: Sequence[int] = LOGGED_K) -> dict[str, float]:
    """{"decoding/local_ar_1": ..., "decoding/global_ar_1": ..., ...} of a rollout on the host."""
    curves = {"local": local_curve(rollout.unmask_step_BC, ks), "global": global_curve(rollout.unmask_step_BC, ks)}
    return {f"decoding/{name}_ar_{k}": value for name, curve in curves.items() for k, value in curve.items()}


def heat_map(unmask_step_BC: np.ndarray, most: int = MAX_BINS) -> dict[str, Any]:
    """{"share": [step bins][column bins], "steps": N, "columns": C}: when each column is unmasked.

    share[n][c] = columns unmasked of bin c in step bin n / all unmasked of bin c, so every column that was ever decoded sums to
    one, however many rows ended before it. A bin is ceil(N / most) steps by ceil(C / most) columns.
    """
    unmask_step_BC = np.asarray(unmask_step_BC)
    columns = unmask_step_BC.shape[1]
    steps = int(unmask_step_BC.max(initial=-1)) + 1
    wide = -(-columns // most)
    tall = max(-(-steps // most), 1)
    rows, at = np.nonzero(unmask_step_BC >= 0)
    count_NC = np.zeros((-(-steps // tall), -(-columns // wide)))
    np.add.at(count_NC, (unmask_step_BC[rows, at] // tall, at // wide), 1)
    share_NC = count_NC / np.maximum(count_NC.sum(axis=0, keepdims=True), 1)
    return {"share": np.round(share_NC, DIGITS).tolist(), "steps": steps, "columns": columns}


# -- the entropy sink --------------------------------------------------------------------------------------------------


class FirstStep(NamedTuple):
    """What the model thinks of every completion column while all are masked; fp32."""

    entropy_BC: Array  # nats
    confidence_BC: Array  # probability of the likeliest token


@partial(jax.jit, static_argnames=("model", "completion_length", "mask_id"))
def first_step(
    model: Transformer,
    variables: Variables,
    prompt_BP: Array,
    prompt_length_B: Array,
    *,
    completion_length: int,
    mask_id: int,
) -> FirstStep:
    """One forward pass over right-padded prompts and masked completions. Never more than LOGITS_PER_CHUNK logits are alive.

    Differs from the sampler's confidence: every id of the vocabulary counts, the mask token and the temperature do not matter.
    """
    masked_BC = jnp.full((prompt_BP.shape[0], completion_length), mask_id, prompt_BP.dtype)
    canvas = Canvas(masked_BC, prompt_BP, prompt_length_B)
    hidden_BTD = hidden_states(model, variables, *canvas.arrays)
    hidden_BCD = completion_hidden(hidden_BTD, canvas, model.config.alignment)
    head_DV = head_matrix(variables)

    def measure(hidden_D: Array) -> FirstStep:
        logp_V = jax.nn.log_softmax(project(hidden_D, head_DV))
        p_V = jnp.exp(logp_V)
        return FirstStep(-jnp.sum(jnp.where(p_V > 0, p_V * logp_V, 0.0)), jnp.max(p_V))

    hidden_ND = hidden_BCD.reshape(-1, hidden_BCD.shape[-1])
    at_once = min(max(LOGITS_PER_CHUNK // head_DV.shape[1], 1), hidden_ND.shape[0])
    measures = jax.lax.map(measure, hidden_ND, batch_size=at_once)
    return FirstStep(*(values_N.reshape(masked_BC.shape) for values_N in measures))


def sink(seen: FirstStep) -> dict[str, Any]:
    """{"entropy": [C], "confidence": [C], "rows": B}: means over the rows. An entropy sink is low right of the prompt only."""
    entropy_BC, confidence_BC = np.asarray(seen.entropy_BC), np.asarray(seen.confidence_BC)
    return {
        "entropy": np.round(entropy_BC.mean(axis=0, dtype=float), DIGITS).tolist(),
        "confidence": np.round(confidence_BC.mean(axis=0, dtype=float), DIGITS).tolist(),
        "rows": len(entropy_BC),
    }


# -- what an evaluation keeps ------------------------------------------------------------------------------------------


def summary(rollout: Rollout, seen: FirstStep) -> dict[str, Any]:
    """{"local_ar": {"1": ...}, "global_ar": {"1": ...}, "heat_map": heat_map(), "first_step": sink()}, as JSON writes it."""

    def written(curve: dict[int, float]) -> dict[str, float]:
        return {str(k): round(value, DIGITS) for k, value in curve.items()}

    return {
        "local_ar": written(local_curve(rollout.unmask_step_BC)),
        "global_ar": written(global_curve(rollout.unmask_step_BC)),
        "heat_map": heat_map(rollout.unmask_step_BC),
        "first_step": sink(seen),
    }
