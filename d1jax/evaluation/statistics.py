"""How sure a number is: intervals, pass@k, maj@k, and whether two checkpoints differ.

R rows, S samples of each.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

Z95 = 1.959963984540054
DRAWS = 2000  # of a bootstrap
SUBSETS = 32  # of the samples of a row, for maj@k below the number of samples


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a rate: inside [0, 1] and honest near its ends (E. B. Wilson, 1927)."""
    if n == 0:
        return 0.0, 1.0
    rate = successes / n
    z2 = Z95**2
    middle = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def pass_at_k(right: int, samples: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the unbiased chance that one of k samples is right, c of n being so (arXiv 2107.03374, eq. 1).

    Raises ValueError for k above n.
    """
    if not 0 < k <= samples:
        raise ValueError(f"pass@{k} needs at least {k} samples of a row, not {samples}")
    if samples - right < k:
        return 1.0
    return 1.0 - math.prod((samples - right - i) / (samples - i) for i in range(k))


def powers_of_two(samples: int) -> list[int]:
    """1, 2, 4, ... and the number of samples itself."""
    powers = [2**power for power in range(samples.bit_length()) if 2**power < samples]
    return [*powers, samples]


def bootstrap_interval(values_R: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of rates over rows, rows drawn with replacement; (0, 1) for no rows.

    Rows that are all alike say nothing of how rows differ (none right in 48 is no proof of 0): then it is Wilson's over the rows.
    """
    if not len(values_R) or values_R.min() == values_R.max():
        return wilson_interval(float(values_R.sum()), len(values_R))
    rng = np.random.default_rng(seed)
    means = [values_R[rng.integers(0, len(values_R), len(values_R))].mean() for _ in range(DRAWS)]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def majority_is_right(answers: Sequence[str | None], right: Sequence[bool]) -> float:
    """1 where the answer that most samples offer is right; among several with as many votes, the share of them that is.

    A sample without an answer has no vote; 0 where none has one. An answer that was judged in two ways (a comparison may run out
    of time) counts by the share of its samples that are right.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    leaders = [answer for answer, count in votes.items() if count == most]
    won = Counter(answer for answer, is_right in zip(answers, right, strict=True) if is_right)
    return sum(won[answer] for answer in leaders) / most / len(leaders)


def majority_at_k(answers: Sequence[str | None], right: Sequence[bool], k: int, seed: int = 0) -> float:
    """The expected `majority_is_right` of k of the samples, drawn without replacement: the mean of SUBSETS draws, exact for k = S."""
    if k == len(answers):
        return majority_is_right(answers, right)
    rng = np.random.default_rng(seed)
    drawn = [rng.permutation(len(answers))[:k] for _ in range(SUBSETS)]
    return float(np.mean([majority_is_right([answers[i] for i in some], [right[i] for i in some]) for some in drawn]))


def over_k(right_RS: np.ndarray, answers_RS: Sequence[Sequence[str | None]] | None, seed: int = 0) -> dict[str, Any]:
    """{"avg": {"value", "ci95"}, "pass": {k: {"value", "ci95"}}, "maj": ...} for k = 1, 2, 4 ... S, rows being what is drawn again.

    "maj" is {} where the task names no answers.
    """
    samples = right_RS.shape[1]
    found: dict[str, Any] = {"avg": _with_interval(right_RS.mean(axis=1), seed), "pass": {}, "maj": {}}
    for k in powers_of_two(samples):
        passed_R = np.array([pass_at_k(int(row.sum()), samples, k) for row in right_RS])
        found["pass"][str(k)] = _with_interval(passed_R, seed)
        if answers_RS is not None:
            pairs = zip(answers_RS, right_RS.tolist(), strict=True)
            voted_R = np.array(
                [majority_at_k(answers, right, k, seed + row) for row, (answers, right) in enumerate(pairs)]
            )
            found["maj"][str(k)] = _with_interval(voted_R, seed)
    return found


def _with_interval(values_R: np.ndarray, seed: int) -> dict[str, Any]:
    """The mean over rows and its interval."""
    return {"value": float(values_R.mean()), "ci95": list(bootstrap_interval(values_R, seed))}


def of_samples(
    right_RS: np.ndarray, answers_RS: Sequence[Sequence[str | None]] | None, seed: int = 0
) -> dict[str, Any]:
    """{"avg@S", "pass@k" for k = 1, 2, 4 ... S, "maj@S"}, each {"value", "ci95"}, rows being what is drawn again.

    `answers_RS` are the answers offered, for the majority (None: the task names none, and there is no maj@S).
    """
    samples = right_RS.shape[1]
    columns = {f"avg@{samples}": right_RS.mean(axis=1)}
    for k in powers_of_two(samples):
        columns[f"pass@{k}"] = np.array([pass_at_k(int(row.sum()), samples, k) for row in right_RS])
    if answers_RS is not None:
        pairs = zip(answers_RS, right_RS.tolist(), strict=True)
        columns[f"maj@{samples}"] = np.array([majority_is_right(answers, right) for answers, right in pairs])
    return {name: _with_interval(values_R, seed) for name, values_R in columns.items()}


def mcnemar(first_R: Sequence[bool], second_R: Sequence[bool]) -> dict[str, Any]:
    """{"only_first", "only_second", "p"}: McNemar's exact test of two checkpoints on the same rows (two-sided binomial, 1/2).

    Only rows that one of them solves count. p is 1 where there are none.
    """
    import scipy.stats  # half a second, for those who compare

    only_first = sum(a and not b for a, b in zip(first_R, second_R, strict=True))
    only_second = sum(b and not a for a, b in zip(first_R, second_R, strict=True))
    n = only_first + only_second
    p = float(scipy.stats.binomtest(only_first, n, 0.5).pvalue) if n else 1.0
    return {"only_first": only_first, "only_second": only_second, "p": p}
