"""What a likelihood estimator is worth, measured: bias, variance, correlation, cost, and the ratio it shows before any learning.

The texts are held fixed, and an estimator's maskings are drawn again and again (estimators.py). All statistics are over
those draws, with the texts given; only the correlations run over the texts.

S draws (keys), B rows (texts), C completion columns, N pairs of draws.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from scipy import stats

from d1jax.evaluation.estimators import Bench, Candidate, draws, gradient_noise, passes_of, scores

CLIPS = (0.2, 0.5)  # PPO's usual range and d1's

# -- statistics --------------------------------------------------------------------------------------------------------


def bias(score_SB: np.ndarray, truth_B: np.ndarray, truth_error_B: np.ndarray) -> tuple[float, float]:
    """(mean over rows of E[score] - ELBO, its standard error) in nats a sequence, with the rows given.

    error^2 = sum_b (var_b / S + truth_error_b^2) / B^2: rows draw independently of each other.
    """
    samples, rows = score_SB.shape
    error2_B = score_SB.var(axis=0, ddof=1) / samples + truth_error_B**2
    return float(np.mean(score_SB.mean(axis=0) - truth_B)), float(math.sqrt(error2_B.sum()) / rows)


def variance(score_SB: np.ndarray) -> tuple[float, float]:
    """(mean over rows of the variance over draws, its standard error over draws), nats^2."""
    samples = len(score_SB)
    squared_S = np.mean((score_SB - score_SB.mean(axis=0)) ** 2, axis=1) * samples / (samples - 1)
    return float(squared_S.mean()), float(squared_S.std(ddof=1) / math.sqrt(samples))


def mean_correlation(of: Callable[..., Any], score_SB: np.ndarray, truth_B: np.ndarray) -> float:
    """Mean over draws of scipy's `of` (pearsonr, spearmanr): what one draw knows of the order of the rows.

    NaN where the truth, or a draw, is the same for all rows.
    """
    if np.ptp(truth_B) == 0 or (np.ptp(score_SB, axis=1) == 0).any():
        return math.nan
    return float(np.mean([of(score_B, truth_B).statistic for score_B in score_SB]))


def log_ratio(new_NBC: np.ndarray, old_NBC: np.ndarray, valid_BC: np.ndarray) -> dict[str, float]:
    """{"std", "rms", "largest", "outside_0.2", "outside_0.5"} of new - old over the tokens of all texts.

    outside_c: share of tokens with exp(new - old) outside 1 - c .. 1 + c, compared as logarithms, which cannot overflow.
    """
    values = (new_NBC - old_NBC)[:, valid_BC]
    outside = {f"outside_{c}": np.mean((values > math.log1p(c)) | (values < math.log1p(-c))) for c in CLIPS}
    measures = {"std": values.std(), "rms": math.sqrt(np.mean(values**2)), "largest": np.abs(values).max(), **outside}
    return {name: float(value) for name, value in measures.items()}


# -- the audit ---------------------------------------------------------------------------------------------------------


def measure(
    bench: Bench,
    candidate: Candidate,
    truth_B: np.ndarray,
    truth_error_B: np.ndarray,
    key: Array,
    samples: int,
    gradient_samples: int = 0,
) -> dict[str, Any]:
    """One row of the audit. An estimator that draws nothing is scored twice, which must give the same twice.

    unshared: new and old score from two draws; shared: both computed from one key. The weights are the same, so every ratio
    should be 1.
    """
    valid_BC = bench.valid_BC
    score_SBC = draws(bench, candidate, key, samples if candidate.drawn else 2)
    again_BC = scores(bench, candidate, jax.random.fold_in(key, 0))
    score_SB = score_SBC.sum(axis=2)
    paired = len(score_SBC) // 2 * 2
    off, off_error = bias(score_SB, truth_B, truth_error_B)
    spread, spread_error = variance(score_SB)
    row = {
        "name": candidate.name,
        "estimator": dataclasses.asdict(candidate.estimator),
        "prompt_mask": candidate.prompt_mask,
        "decoupled": candidate.decoupled,
        "passes": passes_of(bench, candidate),
        "bias": off,
        "bias_error": off_error,
        "variance": spread,
        "variance_error": spread_error,
        "token_variance": float(score_SBC.var(axis=0, ddof=1)[valid_BC].mean()),
        "pearson": mean_correlation(stats.pearsonr, score_SB, truth_B),
        "spearman": mean_correlation(stats.spearmanr, score_SB, truth_B),
        "unshared": log_ratio(score_SBC[0:paired:2], score_SBC[1:paired:2], valid_BC),
        "shared": log_ratio(score_SBC[:1], again_BC[None], valid_BC),
    }
    if gradient_samples:
        row["gradient_noise"] = gradient_noise(bench, candidate, key, gradient_samples) if candidate.drawn else 0.0
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}


def coupled_against_decoupled(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Coupled variance / decoupled variance at equal passes, of the row's sum, of a token, and (where measured) of the gradient.

    "spread": the maskings of `elbo`, whose shares are spread evenly over the range. "free": as many maskings without any tie,
    whose variance is that of one masking / passes.
    The error of a ratio of variances is that of two independent estimates: ratio x sqrt((e1 / v1)^2 + (e2 / v2)^2).
    """
    by_name = {row["name"]: row for row in rows}
    pairs = []
    for row in rows:
        other = by_name.get(row["decoupled"])
        if other is None:
            continue
        single = next((one for one in rows if one["estimator"] == {**other["estimator"], "samples": 1}), None)
        pair = {"coupled": row["name"], "decoupled": other["name"], "passes": row["passes"]}
        pair["spread"] = _ratios(row, other, 1)
        pair["free"] = _ratios(row, single, row["passes"]) if single else None
        pairs.append(pair)
    return pairs


def _ratios(row: dict[str, Any], other: dict[str, Any], parts: int) -> dict[str, float | None]:
    """row / (other / parts) for every measure of spread; None where one of the two is zero or unknown."""
    measures = {"variance": "variance", "token_variance": "token_variance", "gradient": "gradient_noise"}
    pairs = {name: (row.get(key), other.get(key)) for name, key in measures.items()}
    ratios = {name: mine / (theirs / parts) if mine and theirs else None for name, (mine, theirs) in pairs.items()}
    errors = [one["variance_error"] / one["variance"] for one in (row, other) if one["variance"]]
    ratios["variance_error"] = ratios["variance"] * math.hypot(*errors) if ratios["variance"] else None
    return ratios


# -- in words ----------------------------------------------------------------------------------------------------------


def findings(rows: Sequence[dict[str, Any]], pairs: Sequence[dict[str, Any]]) -> list[str]:
    """Sentences about the numbers, computed from them."""
    lines = []
    apart = sorted((row for row in rows if row["unshared"]["rms"] > 0), key=lambda row: row["unshared"]["outside_0.2"])
    if apart:
        low, high = apart[0], apart[-1]
        lines.append(
            f"Before any learning, new and old scores under masks of their own put {low['unshared']['outside_0.2']:.1%} "
            f"({low['name']}) to {high['unshared']['outside_0.2']:.1%} ({high['name']}) of the tokens outside the clip range "
            f"1 ± 0.2, and {min(row['unshared']['outside_0.5'] for row in apart):.1%} to "
            f"{max(row['unshared']['outside_0.5'] for row in apart):.1%} outside 1 ± 0.5."
        )
    largest = max(row["shared"]["largest"] for row in rows)
    share = max(row["shared"]["outside_0.2"] for row in rows)
    lines.append(
        f"Under shared masks it is {share:.0%} for every estimator: all ratios are exactly 1."
        if largest == 0
        else f"Under shared masks up to {share:.1%} of the tokens are outside 1 ± 0.2 (largest |log ratio| {largest:.2g}): "
        "the score is not a function of its key on this device."
    )
    for pair in pairs:
        told = [_told(pair["spread"], pair["decoupled"])] if pair["spread"]["variance"] else []
        if pair["free"] and pair["free"]["variance"]:
            told.append(_told(pair["free"], f"{pair['passes']} maskings drawn freely"))
        if told:
            lines.append(f"{pair['coupled']}, {pair['passes']} passes: {', and '.join(told)}.")
    known = [row for row in rows if row["spearman"] is not None]
    if known:
        best, worst = (pick(known, key=lambda row: row["spearman"]) for pick in (max, min))
        lines.append(
            f"One draw ranks the texts as the ELBO does with a correlation of {worst['spearman']:.2f} ({worst['name']}) to "
            f"{best['spearman']:.2f} ({best['name']})."
        )
    return lines


def _told(ratios: dict[str, float | None], other: str) -> str:
    """`0.61 ± 0.05 of the variance of elbo exact K=2 (0.70 of it a token, 0.80 of the gradient's noise)`."""
    more = f"{ratios['token_variance']:.2f} of it a token"
    more += "" if ratios["gradient"] is None else f", {ratios['gradient']:.2f} of the gradient's noise"
    return f"{ratios['variance']:.2f} ± {ratios['variance_error']:.2f} of the variance of {other} ({more})"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line an estimator, as text."""
    noise = any("gradient_noise" in row for row in rows)
    width = max(len(row["name"]) for row in rows)
    lines = [
        f"{'estimator':<{width}}  passes  {'bias, nats':>16}  {'variance':>9}  {'a token':>8}  pearson  spearman  "
        f"{'rms log ratio':>13}  {'±0.2':>6}  {'±0.5':>6}  shared" + ("  gradient noise" if noise else "")
    ]
    for row in rows:
        apart = row["unshared"]
        line = (
            f"{row['name']:<{width}}  {row['passes']:>6}  {row['bias']:>+8.3f} ± {row['bias_error']:5.3f}  "
            f"{row['variance']:>9.4g}  {row['token_variance']:>8.3g}  {_number(row['pearson']):>7}  "
            f"{_number(row['spearman']):>8}  {apart['rms']:>13.3f}  {apart['outside_0.2']:>6.1%}  {apart['outside_0.5']:>6.1%}  "
            f"{row['shared']['outside_0.2']:>6.1%}"
        )
        lines.append(line + (f"  {_number(row.get('gradient_noise')):>14}" if noise else ""))
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
