"""How the likelihood of a completion is estimated: which plan of masked views (diffusion/estimators.py has the formulas)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from d1jax.config.setting import Rule, setting

MAX_SAMPLES = 2**10


class Estimator:
    """What holds of an estimator unless it says otherwise."""

    name: ClassVar[str]
    draws_masks: ClassVar[bool] = False  # whether its maskings are drawn
    upper_share: float = 0.0
    full_mask: bool = False

    @property
    def scores_a_part(self) -> bool:
        """Whether some tokens of a text may be in no view, so that a mean must leave them out."""
        return False

    @property
    def needs_entropy(self) -> bool:
        """Whether it looks at the entropies that the sampler recorded."""
        return False

    @property
    def has_view_of_all_masked(self) -> bool:
        """Whether one of its views hides the whole completion."""
        return self.full_mask


@dataclass(frozen=True)
class OneStep(Estimator):
    """All masked, one view (d1, arXiv 2504.12216)."""

    name: ClassVar[str] = "one_step"

    @property
    def has_view_of_all_masked(self) -> bool:
        return True


@dataclass(frozen=True)
class _Masked(Estimator):
    """Random maskings of shares between `low` and `high`."""

    draws_masks: ClassVar[bool] = True
    samples: int = setting(1, "maskings; pairs of them (coupled)", above=0, at_most=MAX_SAMPLES)
    counts: Literal["exact", "independent"] = setting(
        "exact", "a masking hides a drawn number of tokens, or each token with a drawn probability"
    )
    low: float = setting(0.0, "smallest share that is masked", at_least=0.0, below=1.0)
    high: float = setting(1.0, "largest share that is masked", above=0.0, at_most=1.0)

    def rules(self) -> Iterator[Rule]:
        yield (
            self.low >= self.high,
            f"low = {self.low} and high = {self.high} must satisfy 0 <= low < high <= 1",
        )


@dataclass(frozen=True)
class _Weighted(_Masked):
    """Maskings whose scores are weighted, or averaged where a token is masked; with SPG's upper bound."""

    weight: Literal["inverse", "uniform"] = setting(
        "inverse", "by 1 / share that is masked, or the mean over the views that mask a token"
    )
    upper_share: float = setting(
        0.0,
        "where the advantage is negative, share of an upper bound in the score (SPG's omega; 0 = the lower bound alone)",
        at_least=0.0,
        at_most=1.0,
    )
    upper_exponent: float = setting(1.5, "of that bound (SPG's beta)", at_least=1.0)

    @property
    def scores_a_part(self) -> bool:
        return self.weight == "uniform"

    def rules(self) -> Iterator[Rule]:
        yield from super().rules()
        yield (
            self.full_mask and self.weight == "uniform",
            "full_mask adds to weights 1 / share; set weight = inverse",
        )
        yield (
            self.upper_share > 0 and (self.weight == "uniform" or self.full_mask),
            "upper_share > 0: the upper bound needs random maskings with weights 1 / share; set weight to inverse and "
            "full_mask to false",
        )


@dataclass(frozen=True)
class Elbo(_Weighted):
    """Random maskings of the completion (LLaDA, UniGRPO, VRPO)."""

    name: ClassVar[str] = "elbo"
    full_mask: bool = setting(False, "half of a score with all masked, too (DiffuCoder's decoupled baseline)")


@dataclass(frozen=True)
class Coupled(_Masked):
    """Complementary pairs of maskings (DiffuCoder, arXiv 2506.20639; ESPO, arXiv 2512.03759)."""

    name: ClassVar[str] = "coupled"
    full_mask: bool = setting(False, "half of a score with all masked, too (DiffuCoder)")


@dataclass(frozen=True)
class Block(_Weighted):
    """Random maskings inside one block of the rollout (SPG, arXiv 2510.09541)."""

    name: ClassVar[str] = "block"


@dataclass(frozen=True)
class Quadrature(Estimator):
    """Gauss and Legendre's fixed shares (GDPO, arXiv 2510.08554)."""

    name: ClassVar[str] = "quadrature"
    draws_masks: ClassVar[bool] = True
    samples: int = setting(1, "nodes", above=0, at_most=MAX_SAMPLES)


@dataclass(frozen=True)
class Trajectory(Estimator):
    """The recorded states of the sampler, in segments (d2, arXiv 2509.21474; TraceRL, arXiv 2509.06949)."""

    name: ClassVar[str] = "trajectory"
    samples: int = setting(1, "segments of equal length", above=0, at_most=MAX_SAMPLES)
    shrink: int = setting(0, "segments of so many steps instead (TraceRL)", at_least=0)

    def rules(self) -> Iterator[Rule]:
        yield (
            self.shrink > 0 and self.samples != 1,
            f"samples = {self.samples} with shrink = {self.shrink}: the number of segments follows from shrink; "
            "leave one of them out",
        )


@dataclass(frozen=True)
class Autoregressive(Estimator):
    """Left to right, a view a token (JustGRPO, arXiv 2601.15165)."""

    name: ClassVar[str] = "autoregressive"
    subset: float = setting(
        1.0,
        "score this share of the columns only, those of highest entropy (JustGRPO-Fast: 0.25)",
        above=0.0,
        at_most=1.0,
    )

    @property
    def scores_a_part(self) -> bool:
        return self.subset < 1

    @property
    def needs_entropy(self) -> bool:
        return self.subset < 1


@dataclass(frozen=True)
class Strata(Estimator):
    """Each of K parts of the text masked alone, so that a token sees nearly all of it (DACA-GRPO, arXiv 2605.16342)."""

    name: ClassVar[str] = "strata"
    draws_masks: ClassVar[bool] = True
    samples: int = setting(4, "strata that the positions of a text are dealt to", above=0, at_most=MAX_SAMPLES)


AnyEstimator = OneStep | Elbo | Coupled | Quadrature | Block | Trajectory | Autoregressive | Strata
