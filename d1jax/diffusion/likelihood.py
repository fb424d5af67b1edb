"""What a likelihood estimator shows to the model, and the one scorer of all estimators.

An estimator is a plan of views (estimators.py); `score` runs one forward pass a view and sums the weighted log-probabilities.
The policy, the old policy and the reference always see the same plan, because it is a pure function of its key.

N views, S head groups of disjoint views, B rows, Q sets of G rows that are shown the same, C completion columns, P prompt columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from d1jax.data.tokenizers import SpecialTokens
from d1jax.diffusion.canvas import Alignment, Canvas, completion_hidden, row_uniforms
from d1jax.models.token_logprobs import TokenScores, token_logprobs
from d1jax.models.transformer import Transformer, Variables, head_matrix, hidden_states


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["completion_NBC", "prompt_NBP", "weight_NBC"],
    meta_fields=["head_group_N", "sampled_by", "rows_alike", "hides_all_N"],
)
@dataclass(frozen=True)
class Views:
    """What the model sees in each forward pass, and how much each position of it counts in the score."""

    completion_NBC: Array
    prompt_NBP: Array
    weight_NBC: Array
    # Views of one head group score disjoint positions, so that the vocabulary head runs once for all of them. () : a group a view.
    head_group_N: tuple[int, ...] = ()
    # Scores are under the distribution of a sampler with these special tokens, which never draws the mask; None: over all rows of the head.
    sampled_by: SpecialTokens | None = None
    # So many rows, one behind the other, have one prompt and one mask of it, so that one pass serves all of them in the views that hide the
    # whole completion.
    rows_alike: int = 1
    hides_all_N: tuple[bool, ...] = ()  # which these are; (): none


class Scores(NamedTuple):
    """Of every completion position, [B, C] fp32."""

    logp: Array  # sum over views of weight x log p
    entropy: Array  # sum over views of weight x entropy of the prediction
    upper: Array | None  # with an upper_exponent: log of a weighted power mean of p over views


def masked_prompt(key: Array, canvas: Canvas, row_ids_B: Array, *, mask_id: int, prompt_mask: float) -> Array:
    """The prompt with each of its tokens masked with probability `prompt_mask`: special tokens too, padding never.

    Source: d1, arXiv 2504.12216, section 3.2 (p = 0.15).
    Differs from the released code: draws are keyed by (key, row, position), not by a 12-bit global seed.
    """
    masked_BP = (row_uniforms(key, row_ids_B, canvas.prompt_BP.shape[1]) < prompt_mask) & canvas.prompt_mask_BP
    return jnp.where(masked_BP, mask_id, canvas.prompt_BP)


def score(
    model: Transformer, variables: Variables, canvas: Canvas, views: Views, upper_exponent: float | None = None
) -> Scores:
    """One forward pass a view, one pass of the vocabulary head a group; see Scores. Of rows that are shown the same one is passed.

    upper: (1 / b) log(sum over views of weight x p^b) with b = upper_exponent >= 1, and 0 where no view scores the token. With weights
    (1 / share masked) / views it is SPG's evidence upper bound of a token (arXiv 2510.09541, section 3.2).
    Differs from the released code: fp32 and logarithms throughout (there: probabilities from a softmax in the model's dtype).
    """
    alike = [n for n, hides_all in enumerate(views.hides_all_N) if hides_all and views.rows_alike > 1]
    others = [n for n in range(views.weight_NBC.shape[0]) if n not in alike]
    if not alike or views.weight_NBC.shape[0] == 1:
        scores_SBC, weight_SBC = _scores(model, variables, canvas, views, views.rows_alike if alike else 1)
    else:
        # As in the loop over views, what a pass computes is computed again on the way back.
        found = [_scores(model, variables, canvas, _some(views, others), 1)] if others else []
        for n in alike:
            of_view = lambda variables, view: _scores(model, variables, canvas, view, view.rows_alike)  # noqa: E731
            found.append(jax.checkpoint(of_view)(variables, _some(views, [n])))
        scores_SBC, weight_SBC = jax.tree.map(lambda *parts: jnp.concatenate(parts), *found)
    upper_BC = None if upper_exponent is None else _upper(scores_SBC.logp, weight_SBC, upper_exponent)
    return Scores(*((weight_SBC * value).sum(0) for value in scores_SBC), upper_BC)


def _some(views: Views, kept: list[int]) -> Views:
    """The views of these numbers; their head groups are numbered anew, from 0 on."""
    arrays = (jnp.stack([x[n] for n in kept]) for x in (views.completion_NBC, views.prompt_NBP, views.weight_NBC))
    groups = [views.head_group_N[n] if views.head_group_N else n for n in kept]
    numbered = tuple(sorted(set(groups)).index(group) for group in groups)
    return Views(*arrays, numbered, views.sampled_by, views.rows_alike)


def _scores(
    model: Transformer, variables: Variables, canvas: Canvas, views: Views, rows_alike: int
) -> tuple[TokenScores, Array]:
    """(the scores of each head group, their weights [S, B, C]); of a single view by one pass for every `rows_alike` rows."""
    views_N = views.weight_NBC.shape[0]
    head_group_N = views.head_group_N or tuple(range(views_N))
    alignment: Alignment = model.config.alignment

    def hidden_of(completion_BC: Array, prompt_BP: Array) -> Array:
        shown = canvas._replace(completion_BC=completion_BC, prompt_BP=prompt_BP)
        shown = jax.tree.map(lambda x: _each(x, rows_alike)[:, 0], shown)
        hidden_QTD = hidden_states(model, variables, *shown.arrays)
        return completion_hidden(hidden_QTD, shown, alignment)

    def scores_of(hidden_QCD: Array) -> TokenScores:
        targets_QCG = _each(canvas.completion_BC, rows_alike).swapaxes(1, 2)
        scores = token_logprobs(hidden_QCD, head_matrix(variables), targets_QCG, sampled_by=views.sampled_by)
        return jax.tree.map(lambda x_QCG: x_QCG.swapaxes(1, 2).reshape(canvas.completion_BC.shape), scores)

    if views_N == 1:
        scores_SBC = jax.tree.map(lambda x: x[None], scores_of(hidden_of(views.completion_NBC[0], views.prompt_NBP[0])))
        weight_SBC = views.weight_NBC
    else:
        width = head_matrix(variables).shape[0]
        groups = max(head_group_N) + 1
        empty_SBCD = jnp.zeros((groups, *canvas.completion_BC.shape, width), jnp.dtype(model.config.dtype))

        def add(hidden_SBCD: Array, view: tuple[Array, Array, Array, Array]) -> tuple[Array, None]:
            completion_BC, prompt_BP, weight_BC, group = view
            hidden_BCD = jax.checkpoint(hidden_of)(completion_BC, prompt_BP)
            # A sum of disjoint parts: its gradient needs nothing of the carry, so no copy of it is kept for the way back.
            return hidden_SBCD.at[group].add(jnp.where(weight_BC[:, :, None] != 0, hidden_BCD, 0)), None

        xs = (views.completion_NBC, views.prompt_NBP, views.weight_NBC, jnp.array(head_group_N, jnp.int32))
        hidden_SBCD, _ = jax.lax.scan(add, empty_SBCD, xs)
        scores_SBC = jax.lax.map(jax.checkpoint(scores_of), hidden_SBCD)
        weight_SBC = (
            jnp.zeros((groups, *canvas.completion_BC.shape), jnp.float32)
            .at[jnp.array(head_group_N, jnp.int32)]
            .add(views.weight_NBC)
        )
    return scores_SBC, weight_SBC


def _each(x: Array, rows_alike: int) -> Array:
    """[B, ...] as [Q, G, ...], with G = rows_alike."""
    return x.reshape(x.shape[0] // rows_alike, rows_alike, *x.shape[1:])


def _upper(logp_SBC: Array, weight_SBC: Array, exponent: float) -> Array:
    scored_BC = jnp.any(weight_SBC > 0, axis=0)
    weight_SBC = jnp.where(
        scored_BC[None], weight_SBC, 1.0
    )  # log 0 would make the gradient NaN, also where it is not read
    return jnp.where(scored_BC, jax.nn.logsumexp(exponent * logp_SBC, b=weight_SBC, axis=0) / exponent, 0.0)
