"""What an update minimises and what it stays close to: the choices of an RL stage about its loss, KL, reference and collapse."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from d1jax.config.setting import Rule, setting

Level = Literal["token", "sequence_mean", "sequence_sum"]
LEVEL_HELP = "the new and the old likelihood are compared on a token, on the mean or on the sum over a text"


# -- policy losses -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ppo:
    """-min(r A, clip(r) A) (DeepSeekMath, arXiv 2402.03300, eq. 3)."""

    name: ClassVar[str] = "ppo"
    level: Level = setting("token", LEVEL_HELP)
    clip_low: float = setting(0.2, "the ratio r is clipped below 1 - clip_low", at_least=0, at_most=1)
    clip_high: float = setting(0.2, "and above 1 + clip_high", at_least=0)


@dataclass(frozen=True)
class Cispo:
    """-sg(min(r, 1 + clip_high)) A log p: a clipped token keeps its gradient (MiniMax-M1, arXiv 2506.13585)."""

    name: ClassVar[str] = "cispo"
    level: Level = setting("token", LEVEL_HELP)
    clip_high: float = setting(0.2, "the ratio r is clipped above 1 + clip_high", at_least=0)


@dataclass(frozen=True)
class PolicyGradient:
    """-A log p, without old scores (REINFORCE; wd1, SPG, RFT)."""

    name: ClassVar[str] = "policy_gradient"
    level: ClassVar[str] = "token"


@dataclass(frozen=True)
class Regression:
    """(clip(log r) / L - scale A)^2 of a text, r = p / p_old: its score moves by its advantage (GDSD, arXiv 2605.29398)."""

    name: ClassVar[str] = "regression"
    level: ClassVar[str] = "sequence_sum"
    scale: float = setting(1.0, "psi, nats a token that a score moves by where the advantage is 1", above=0)
    clip_low: float = setting(0.0004, "no gradient where r is below 1 - clip_low", above=0, below=1)
    clip_high: float = setting(0.0004, "nor above 1 + clip_high", above=0)


@dataclass(frozen=True)
class SelfNormalized:
    """-sg(w) A log p, w = min(r, 1 + clip_high) of a text over its mean in the group (StableDRL, arXiv 2603.06743)."""

    name: ClassVar[str] = "self_normalized"
    level: ClassVar[str] = "sequence_mean"
    clip_high: float = setting(4.0, "the ratio r is clipped above 1 + clip_high, whatever the advantage", at_least=0)


PolicyLoss = Ppo | Cispo | PolicyGradient | Regression | SelfNormalized


# -- KL ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NoKl:
    """No KL term."""

    name: ClassVar[str] = "none"
    coefficient: ClassVar[float] = 0.0


@dataclass(frozen=True)
class KlInLoss:
    """A term of the loss (GRPO). k1 is not offered: as a loss its expected gradient is zero."""

    name: ClassVar[str] = "loss"
    coefficient: float = setting(0.04, "beta", above=0)
    estimator: Literal["k2", "k3"] = setting("k3", "k2: squared difference / 2; k3: exp(d) - d - 1")
    level: Literal["token", "sequence", "relative"] = setting(
        "token", "of each token; of their sum / L; or of their mean, less that of the group (RSPO, arXiv 2605.10218)"
    )
    to: Literal["reference", "old"] = setting("reference", "the policy at the start, or that of the rollouts (TraceRL)")

    def rules(self) -> Iterator[Rule]:
        yield (
            self.estimator == "k3" and self.level == "sequence",
            "estimator = k3 on sequences: exp of a sum over tokens has no bound; set it to k2, or level = token",
        )
        yield (
            self.level == "relative" and (self.estimator, self.to) != ("k2", "reference"),
            f"level = relative with estimator = {self.estimator} and to = {self.to}: it is half the square of a change since the "
            "reference; set estimator = k2 and to = reference",
        )


@dataclass(frozen=True)
class KlInReward:
    """Taken off the reward: the sum over the tokens of log p / p_reference (PPO)."""

    name: ClassVar[str] = "reward"
    coefficient: float = setting(0.04, "beta", above=0)


Kl = NoKl | KlInLoss | KlInReward


# -- reference, collapse -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FixedReference:
    """The policy at the start of the stage."""

    name: ClassVar[str] = "fixed"


@dataclass(frozen=True)
class MovingReference:
    """Moved towards the policy every so many steps (full fine-tuning only)."""

    name: ClassVar[str] = "moving"
    every: int = setting(64, "steps between moves", above=0)
    mix: float = setting(1.0, "share of the policy in such a move (DiffuCoder: 0.6; 1 = a copy)", above=0, at_most=1)


Reference = FixedReference | MovingReference


@dataclass(frozen=True)
class StopOnCollapse:
    """A run has collapsed when any of these holds for `patience` steps in a row (rl/diagnostics.py); it then stops."""

    name: ClassVar[str] = "stop"
    patience: int = setting(5, "steps in a row", above=0, at_most=100)
    repeated_tokens: float = setting(
        0.8, "share of tokens that equal the one before them is above this (0 = not watched)", at_least=0
    )
    distinct: float = setting(
        0.0, "distinct completions / completions of a group are at or below this (0 = not watched)", at_least=0
    )
    entropy: float = setting(0.0, "mean entropy of a prediction, in nats, is below this (0 = not watched)", at_least=0)
    log_ratio: float = setting(5.0, "rms of the log ratio is above this (0 = not watched)", at_least=0)
    kl: float = setting(0.0, "mean KL is above this (0 = not watched)", at_least=0)


@dataclass(frozen=True)
class IgnoreCollapse:
    """Nothing is watched."""

    name: ClassVar[str] = "ignore"
    patience: ClassVar[int] = 0


Collapse = StopOnCollapse | IgnoreCollapse
