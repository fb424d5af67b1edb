"""Every published likelihood estimator as a plan of masked views: which positions each view masks, and what each counts.

A completion is its L tokens through the first one that ends a text, and only they are scored. What stands behind them:
drawn mask samples mask all of it, so that a score is one of the text alone, whatever a sampler wrote behind it; `trajectory` shows
what the sampler had unmasked there by then, because its scores are of states that the sampler was in (docs/methods.md).

N views, B rows, C completion columns, P prompt columns, L tokens of a row's text, K samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from d1jax.config import AnyEstimator, SamplerConfig
from d1jax.data.tokenizers import SpecialTokens
from d1jax.diffusion.canvas import Canvas, row_uniforms, through_first_end
from d1jax.diffusion.likelihood import Views, masked_prompt


class Text(NamedTuple):
    """What a plan may look at."""

    key: Array
    row_ids_B: Array  # rows of one id draw the same numbers
    valid_BC: Array  # the text of each row
    unmask_step_BC: Array  # when the sampler unmasked each position
    entropy_BC: Array | None  # of the prediction that it was drawn from

    def uniforms(self, number: int, columns: int) -> Array:
        """[B, columns] in [0, 1), others for each number."""
        return row_uniforms(jax.random.fold_in(self.key, number), self.row_ids_B, columns)

    @property
    def length_B1(self) -> Array:
        return jnp.sum(self.valid_BC, axis=1, keepdims=True)

    @property
    def behind_BC(self) -> Array:
        """What stands behind the text."""
        return ~self.valid_BC


class MaskSample(NamedTuple):
    """One view of a plan."""

    masked_BC: Array  # what the model does not see, behind the text too
    weight_BC: Array
    head_group: int = 0  # mask samples of one head group score disjoint positions
    hides_all: bool = False  # the whole completion, whatever the row


def views_of(
    key: Array,
    canvas: Canvas,
    row_ids_B: Array,
    unmask_step_BC: Array,
    *,
    estimator: AnyEstimator,
    sampler: SamplerConfig,
    special: SpecialTokens,
    prompt_mask: float,
    entropy_BC: Array | None = None,
    rows_alike: int = 1,
) -> Views:
    """The views of `estimator`, each with every prompt token masked with probability `prompt_mask` (the same in all views).

    rows_alike: so many rows, one behind the other, have one prompt and one masking of it.
    entropy_BC is read by a `subset` of the autoregressive estimator only.
    """
    valid_BC = through_first_end(canvas.completion_BC, special.end_ids)
    text = Text(jax.random.fold_in(key, 1), row_ids_B, valid_BC, unmask_step_BC, entropy_BC)
    mask_samples = PLANS[estimator.name](text, estimator, sampler)
    prompt_BP = masked_prompt(key, canvas, row_ids_B, mask_id=special.mask, prompt_mask=prompt_mask)
    return Views(
        completion_NBC=jnp.stack(
            [jnp.where(one.masked_BC, special.mask, canvas.completion_BC) for one in mask_samples]
        ),
        prompt_NBP=jnp.broadcast_to(prompt_BP[None], (len(mask_samples), *prompt_BP.shape)),
        weight_NBC=jnp.stack([jnp.where(valid_BC, one.weight_BC, 0.0).astype(jnp.float32) for one in mask_samples]),
        head_group_N=tuple(one.head_group for one in mask_samples),
        sampled_by=special if estimator.name == "trajectory" else None,
        rows_alike=rows_alike,
        hides_all_N=tuple(one.hides_all for one in mask_samples),
    )


# -- plans -------------------------------------------------------------------------------------------------------------


def one_step(text: Text, estimator: AnyEstimator, sampler: SamplerConfig) -> list[MaskSample]:
    """score_k = log p(o_k | q', all of o masked). d1, arXiv 2504.12216, section 3.2. A mean-field score, no bound."""
    return [MaskSample(jnp.ones_like(text.valid_BC), jnp.ones(text.valid_BC.shape, jnp.float32), hides_all=True)]


def elbo(text: Text, estimator: AnyEstimator, sampler: SamplerConfig) -> list[MaskSample]:
    """K mask samples, their ratios spread evenly over (low, high); sum of scores, unbiased for the ELBO where (low, high) = (0, 1).

    counts "independent": each position with probability t, weight 1 / t. "exact": n = 1 + floor(t L) positions, weight L / n; the
    same expectation with less variance and no 1 / t without bound (LLaDA's likelihood; arXiv 2502.09992, eq. 6). weight
    "uniform": the mean over the views that mask the position (UniGRPO, arXiv 2505.15809; its mask samples are fresh in every inner
    update). full_mask: plus half of a view of all masks, on the scale of `coupled` with it (DiffuCoder's decoupled baseline).
    """
    draw_B1 = text.uniforms(0, 1)
    mask_samples = []
    for k in range(estimator.samples):
        ratio_B1 = _between(estimator, (draw_B1 + k) / estimator.samples)
        masked_BC, share_B1 = _mask(text, text.valid_BC, ratio_B1, k + 1, estimator.counts)
        mask_samples.append(
            MaskSample(masked_BC | text.behind_BC, masked_BC / share_B1 / estimator.samples, head_group=k)
        )
    if estimator.full_mask:
        mask_samples.append(_half_of_all_masked(text, head_group=estimator.samples))
    return _averaged(mask_samples) if estimator.weight == "uniform" else mask_samples


def coupled(text: Text, estimator: AnyEstimator, sampler: SamplerConfig) -> list[MaskSample]:
    """K pairs of a mask sample and its complement, so that each position is scored once a pair.

    With full_mask also a view of all masks (DiffuCoder, arXiv 2506.20639): (full + 1/t on z + 1/(1 - t) on its complement) / 2 with
    t in (low, high) = (0.2, 0.8) there. Without it and with counts "exact" (ESPO, arXiv 2512.03759): n ~ U{0..L}, weights (L + 1) / n
    and (L + 1) / (L - n), halved: unbiased for the ELBO.
    """
    draw_B1 = text.uniforms(0, 1)
    length_B1 = text.length_B1
    mask_samples = []
    for k in range(estimator.samples):
        ratio_B1 = _between(estimator, (draw_B1 + k) / estimator.samples)
        if estimator.counts == "exact":
            count_B1 = jnp.floor(ratio_B1 * (length_B1 + 1))
            masked_BC = _lowest(text, text.valid_BC, count_B1, k + 1)
            share_B1 = count_B1 / (length_B1 + 1)
            others_B1 = (length_B1 - count_B1) / (length_B1 + 1)
        else:
            masked_BC, share_B1 = _mask(text, text.valid_BC, ratio_B1, k + 1, "independent")
            others_B1 = 1 - share_B1
        for part_BC, part_B1 in ((masked_BC, share_B1), (text.valid_BC & ~masked_BC, others_B1)):
            weight_BC = part_BC / jnp.where(part_B1 > 0, part_B1, 1.0) / (2 * estimator.samples)
            mask_samples.append(MaskSample(part_BC | text.behind_BC, weight_BC, head_group=k))
    if estimator.full_mask:
        mask_samples.append(_half_of_all_masked(text, head_group=estimator.samples))
    return mask_samples


def quadrature(text: Text, estimator: AnyEstimator, sampler: SamplerConfig) -> list[MaskSample]:
    """Gauss and Legendre's K ratios on [0, 1] with one mask sample of floor(t L) positions each, weight w / t (GDPO, arXiv 2510.08554).

    Biased a little, because the ratios are fixed, but the same for policy and old policy; at least one position is masked.
    """
    nodes, weights = np.polynomial.legendre.leggauss(estimator.samples)
    mask_samples = []
    for k, (node, weight) in enumerate(zip(nodes, weights, strict=True)):
        ratio = (1 + node) / 2
        count_B1 = jnp.maximum(jnp.floor(ratio * text.length_B1), 1)
        masked_BC = _lowest(text, text.valid_BC, count_B1, k + 1)
        mask_samples.append(MaskSample(masked_BC | text.behind_BC, masked_BC * (weight / 2 / ratio), head_group=k))
    return mask_samples


def block(text: Text, estimator: AnyEstimator, sampler: SamplerConfig) -> list[MaskSample]:
    """K mask samples of one of the rollout's blocks, with all before it clean and all behind it masked (SPG, arXiv 2510.09541).

    These are states that a semi-autoregressive sampler visits. counts and weight as in `elbo`, of the block; with weight "inverse" the sum
    is unbiased for the sum over blocks of their ELBOs. The blocks are drawn without replacement, as in SPG's code: none comes twice before
    every block of the text has come once.
    """
    size = sampler.block_length
    place_C = jnp.arange(text.valid_BC.shape[1], dtype=jnp.int32)[None, :] // size
    most_blocks = -(-text.valid_BC.shape[1] // size)
    blocks_B1 = -(-text.length_B1 // size)
    draw_BN = text.uniforms(0, most_blocks + estimator.samples)
    real_BN = jnp.arange(most_blocks, dtype=jnp.int32)[None, :] < blocks_B1
    order_BN = jnp.argsort(jnp.where(real_BN, draw_BN[:, :most_blocks], jnp.inf), axis=1)
    mask_samples = []
    for k in range(estimator.samples):
        which_B1 = jnp.take_along_axis(order_BN, k % blocks_B1, axis=1)
        inside_BC = text.valid_BC & (place_C == which_B1)
        ratio_B1 = _between(estimator, draw_BN[:, most_blocks + k : most_blocks + k + 1])
        masked_BC, share_B1 = _mask(text, inside_BC, ratio_B1, k + 1, estimator.counts)
        weight_BC = masked_BC * (blocks_B1 / share_B1 / estimator.samples)
        unseen_BC = masked_BC | (place_C > which_B1) | text.behind_BC
        mask_samples.append(MaskSample(unseen_BC, weight_BC, head_group=k))
    return _averaged(mask_samples) if estimator.weight == "uniform" else mask_samples


def trajectory(text: Text, estimator: AnyEstimator, sampler: SamplerConfig) -> list[MaskSample]:
    """The rollout replayed in K segments: a position is scored in the state at the start of the segment that unmasked it.

    K segments of equal length (d2, arXiv 2509.21474), at most one a step, or segments of `shrink` steps (TraceRL, arXiv 2509.06949). With a
    segment a step: the log-probability of the tokens along the recorded order, exactly; one segment: `one_step`.

    A state masks what was masked then, behind the text too: the sampler may have unmasked tokens there before it was done with
    the text. What it never decoded stays masked. Probabilities are the sampler's: it never draws the mask or the padding of the
    embedding (published code has the softmax over all ids; of a trained model the two differ by log(1 - p(mask)), about 1e-3).
    """
    never_BC = text.unmask_step_BC < 0
    scored_BC = text.valid_BC & ~never_BC
    steps_B1 = jnp.max(jnp.where(scored_BC, text.unmask_step_BC, 0), axis=1, keepdims=True) + 1
    most = sampler.max_steps
    if estimator.shrink:
        segments = -(-most // estimator.shrink)
        segment_BC = text.unmask_step_BC // estimator.shrink
    else:
        segments = min(estimator.samples, most)
        segment_BC = ((text.unmask_step_BC + 1) * segments - 1) // steps_B1
    return [
        MaskSample((segment_BC >= one) | never_BC, (scored_BC & (segment_BC == one)).astype(jnp.float32))
        for one in range(segments)
    ]


def autoregressive(text: Text, estimator: AnyEstimator, sampler: SamplerConfig) -> list[MaskSample]:
    """One view a position: score_k = log p(o_k | q, o before k, masks from k on) (JustGRPO, arXiv 2601.15165).

    Exact for left-to-right decoding, one token a step. `subset` < 1: views for the ceil(subset C) positions of the text with the highest
    recorded entropy only (its fast variant: a quarter); the others have no score.
    """
    rows, columns = text.valid_BC.shape
    place_BC = jnp.broadcast_to(jnp.arange(columns, dtype=jnp.int32)[None, :], (rows, columns))
    if estimator.subset == 1:
        return [
            MaskSample((place_BC >= k) | text.behind_BC, (place_BC == k).astype(jnp.float32)) for k in range(columns)
        ]
    ranked_BC = jnp.argsort(
        jnp.where(text.valid_BC, -text.entropy_BC, jnp.inf), axis=1
    )  # behind the text: last, and no weight
    chosen = (ranked_BC[:, n : n + 1] for n in range(math.ceil(estimator.subset * columns)))
    return [MaskSample((place_BC >= k_B1) | text.behind_BC, (place_BC == k_B1).astype(jnp.float32)) for k_B1 in chosen]


def strata(text: Text, estimator: AnyEstimator, sampler: SamplerConfig) -> list[MaskSample]:
    """The positions of the text dealt to K strata, a view a stratum that masks it alone: score_k = log p(o_k | q, o without k's stratum).

    A pseudo-likelihood, no bound: K = 1 is `one_step`, and from K = L on each token is predicted from all others. Sizes differ by at
    most one.

    Source: DACA-GRPO, arXiv 2605.16342, the abstract on its stratified masking likelihood; the rest of the paper could not be read here.
    Ours, because the abstract does not say it: positions are dealt at random, anew in every inner update.
    """
    columns = text.valid_BC.shape[1]
    uniform_BC = jnp.where(text.valid_BC, text.uniforms(0, columns), jnp.inf)
    stratum_BC = jnp.argsort(jnp.argsort(uniform_BC, axis=1), axis=1) % estimator.samples
    strata_NBC = [text.valid_BC & (stratum_BC == one) for one in range(estimator.samples)]
    return [MaskSample(one_BC | text.behind_BC, one_BC.astype(jnp.float32)) for one_BC in strata_NBC]


Plan = Callable[[Text, AnyEstimator, SamplerConfig], list[MaskSample]]
PLANS: dict[str, Plan] = {
    "one_step": one_step,
    "elbo": elbo,
    "coupled": coupled,
    "quadrature": quadrature,
    "block": block,
    "trajectory": trajectory,
    "autoregressive": autoregressive,
    "strata": strata,
}


# -- mask samples ----------------------------------------------------------------------------------------------------------


def _between(estimator: AnyEstimator, uniform_B1: Array) -> Array:
    return estimator.low + (estimator.high - estimator.low) * uniform_B1


def _mask(text: Text, among_BC: Array, ratio_B1: Array, number: int, counts: str) -> tuple[Array, Array]:
    """(a mask sample of these positions, the share of them that its weight divides by)."""
    if counts == "exact":
        size_B1 = jnp.sum(among_BC, axis=1, keepdims=True)
        count_B1 = jnp.minimum(1 + jnp.floor(ratio_B1 * size_B1), size_B1)
        return _lowest(text, among_BC, count_B1, number), count_B1 / size_B1
    uniform_BC = text.uniforms(number, among_BC.shape[1])
    # A ratio of 0 masks nothing, and 0 / 0 is no weight.
    return among_BC & (uniform_BC < ratio_B1), jnp.maximum(ratio_B1, jnp.finfo(jnp.float32).tiny)


def _lowest(text: Text, among_BC: Array, count_B1: Array, number: int) -> Array:
    """`count` of these positions, drawn without replacement."""
    uniform_BC = jnp.where(among_BC, text.uniforms(number, among_BC.shape[1]), jnp.inf)
    rank_BC = jnp.argsort(jnp.argsort(uniform_BC, axis=1), axis=1)
    return among_BC & (rank_BC < count_B1)


def _half_of_all_masked(text: Text, head_group: int) -> MaskSample:
    every_BC = jnp.ones_like(text.valid_BC)
    return MaskSample(every_BC, every_BC / 2, head_group, hides_all=True)


def _averaged(mask_samples: list[MaskSample]) -> list[MaskSample]:
    """These mask samples with weights 1 / (number of views that score the position): a mean over those views."""
    scored = [one.weight_BC > 0 for one in mask_samples]
    often_BC = jnp.maximum(sum(one.astype(jnp.float32) for one in scored), 1.0)
    return [one._replace(weight_BC=hit_BC / often_BC) for one, hit_BC in zip(mask_samples, scored, strict=True)]
