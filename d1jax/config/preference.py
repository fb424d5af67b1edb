"""The section of preference stages: PreferenceConfig, and its choice of loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from d1jax.config.estimator import AnyEstimator, Elbo
from d1jax.config.setting import Rule, choice, section, setting, with_fields
from d1jax.config.training import OptimizerConfig, RewardedConfig, TrainingConfig
from d1jax.config.values import WithChoices

UPPER_BOUND = {"upper_share": 0.0, "upper_exponent": 1.5}  # parameters of estimators that only RL can use


@dataclass(frozen=True)
class Dpo:
    """-log sigmoid of the margin between the chosen and the rejected text of a pair (DPO; VRPO with more samples)."""

    name: ClassVar[str] = "dpo"
    beta: float = setting(0.1, "scale of the margin between chosen and rejected", above=0)


@dataclass(frozen=True)
class Kto:
    """Each text by itself, wanted or not, against the mean gain of the batch (KTO; ELBO-KTO)."""

    name: ClassVar[str] = "kto"
    beta: float = setting(0.1, "scale of the gain over the batch's mean", above=0)
    desirable: float = setting(1.0, "weight of what is wanted", at_least=0)
    undesirable: float = setting(1.0, "weight of what is not", at_least=0)

    def rules(self) -> Iterator[Rule]:
        yield self.desirable == self.undesirable == 0, "loss: desirable and undesirable are both 0; give one a weight"


AnyLoss = Dpo | Kto


@with_fields
@dataclass(frozen=True)
class PreferenceConfig(WithChoices, RewardedConfig, TrainingConfig):
    """Preference learning: what is better of two texts, or which texts are wanted."""

    steps: int = setting(40, "batches of pairs, one update each", above=0)
    data: str = setting(
        "",
        "whose pairs: groups that are written on the way (''), the task's rows (task), what a generate stage has kept (its name)",
    )
    writer: Literal["reference", "policy"] = setting(
        "reference", "who writes the completions: the policy at the start (offline), or as it is now"
    )
    estimator: AnyEstimator = choice(Elbo(), "how the likelihood of a completion is estimated")
    loss: AnyLoss = choice(Dpo(), "what is minimised")
    optimizer: OptimizerConfig = section(lambda: OptimizerConfig(learning_rate=3e-4, clip_norm=0.2))

    def rules(self) -> Iterator[Rule]:
        yield from self.reward_rules("preference")
        yield from self.rollout_rules("preference")
        parts = self.grad_accumulation_steps
        yield (
            self.prompts_per_step % parts != 0,
            f"preference.grad_accumulation_steps = {parts} does not divide the {self.prompts_per_step} pairs of a step",
        )
        yield (
            any(getattr(self.estimator, name, default) != default for name, default in UPPER_BOUND.items()),
            "preference.estimator: upper_share and upper_exponent go by the sign of an advantage, and a pair has none; leave them out",
        )
        yield (
            bool(self.data) and (self.estimator.name == "trajectory" or self.estimator.needs_entropy),
            f"preference.estimator = {self.estimator.name} looks at how a text was decoded, which stored pairs do not tell; take elbo, "
            "coupled or another one",
        )
