"""The section of an RL stage: a method is a row of names, one an axis."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from d1jax.config.estimator import AnyEstimator, OneStep
from d1jax.config.reward_model import MODEL
from d1jax.config.setting import Rule, choice, section, setting, with_fields
from d1jax.config.training import OptimizerConfig, RewardedConfig, TrainingConfig
from d1jax.config.values import WithChoices

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


# -- advantages --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Center:
    """r - mean of the group (d1, Dr. GRPO)."""

    name: ClassVar[str] = "center"


@dataclass(frozen=True)
class Zscore:
    """(r - mean) / std of the group (GRPO)."""

    name: ClassVar[str] = "zscore"


@dataclass(frozen=True)
class Rloo:
    """r - mean of the others of the group (RLOO; DiffuCoder)."""

    name: ClassVar[str] = "rloo"


@dataclass(frozen=True)
class Softmax:
    """Weights of good minus those of bad completions (wd1, arXiv 2507.08838)."""

    name: ClassVar[str] = "softmax"
    scale: float = setting(1.0, "psi, the scale of the centred rewards", above=0)


@dataclass(frozen=True)
class Reward:
    """The reward itself, without a baseline (online RFT where it is 0 or 1)."""

    name: ClassVar[str] = "reward"


@dataclass(frozen=True)
class Decoupled:
    """Each reward normalised inside its group, then weighted, summed, and normalised over the batch (GDPO, arXiv 2601.05242)."""

    name: ClassVar[str] = "decoupled"


@dataclass(frozen=True)
class Gae:
    """Generalised advantage estimation over denoising steps with a learnt value model (PPO; TraceRL, arXiv 2509.06949)."""

    name: ClassVar[str] = "gae"
    discount: float = setting(1.0, "gamma, of what later steps earn", at_least=0, at_most=1)
    trace: float = setting(1.0, "lambda: 1 = the whole return, 0 = the value of the next step", at_least=0, at_most=1)
    shrink: int = setting(1, "denoising steps that count as one", above=0)
    value_learning_rate: float = setting(5e-6, "peak, of the value model", above=0)
    value_clip: float = setting(0.2, "an update moves a value by at most this from what it was at the rollout", above=0)


Advantage = Center | Zscore | Rloo | Softmax | Reward | Decoupled | Gae


# -- supervision -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """One reward a completion."""

    name: ClassVar[str] = "outcome"


@dataclass(frozen=True)
class TextSteps:
    """The gain of each line (process supervision, DeepSeekMath, section 4.1.3)."""

    name: ClassVar[str] = "text_steps"
    against: ClassVar[str] = "all"


@dataclass(frozen=True)
class CommitSteps:
    """The gain of each part of the decoding."""

    name: ClassVar[str] = "commit_steps"
    against: ClassVar[str] = "all"
    parts: int = setting(4, "parts of equal length that the decoding is cut into", above=0, at_most=2**16)


@dataclass(frozen=True)
class ModelSteps:
    """The chance that each line is right, by a process reward model; the reward of the text is added to its last line."""

    name: ClassVar[str] = "model_steps"
    model: str = setting("", "the reward_model stage (loss: stepwise) that is asked")
    against: Literal["all", "place"] = setting(
        "all",
        "what a reward is centred on: all lines of the group (DeepSeekMath), or the lines at its place in the text",
    )

    def rules(self) -> Iterator[Rule]:
        yield not self.model, "model is empty; name a reward_model stage whose loss is stepwise"


Supervision = Outcome | TextSteps | CommitSteps | ModelSteps


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


@with_fields
@dataclass(frozen=True)
class RlConfig(WithChoices, RewardedConfig, TrainingConfig):
    """One method: diffu-GRPO (d1) by default; configs/methods has the others."""

    steps: int = setting(40, "rollout batches", above=0)
    num_iterations: int = setting(
        4, "optimizer updates on a rollout batch, mu, each under its own prompt masks", above=0, at_most=2**12
    )
    estimator: AnyEstimator = choice(
        OneStep(), "how the likelihood of a completion is estimated: which plan of masked views"
    )
    prompt_mask: float = setting(0.15, "probability p that the likelihood masks a prompt token", at_least=0, below=1)
    mask_sharing: Literal["group", "row"] = setting(
        "group", "completions of a group meet one prompt mask, or (d1) each its own"
    )
    fresh_masks: bool = setting(
        True, "a new prompt mask in every inner update (false: d1's ablation, one mask for all)"
    )
    policy_loss: PolicyLoss = choice(
        Ppo(), "what advantages become: all but policy_gradient compare with the old likelihood"
    )
    advantage: Advantage = choice(
        Center(), "how rewards become advantages: against the group, or (gae) against learnt values"
    )
    supervision: Supervision = choice(
        Outcome(),
        "one reward a completion, the gain of each line or of each part of the decoding, or a model's reward of each line (DeepSeekMath)",
    )
    kl: Kl = choice(NoKl(), "a KL penalty: none, in the loss, or (PPO) taken off the reward")
    reference: Reference = choice(FixedReference(), "the policy that the KL is measured to")
    loss_aggregation: Literal["bnpo", "group_bnpo", "grpo", "dr_grpo", "row_sum"] = setting(
        "bnpo",
        "bnpo: mean over tokens (DAPO's too); group_bnpo: mean over groups of the mean over a group's tokens (d1's code); grpo: "
        "mean of row means, which is the mean over sequences at their level (d1's eq. 4); dr_grpo: sum / (rows x C); row_sum: "
        "mean of row sums",
    )
    collapse: Collapse = choice(StopOnCollapse(), "what is done about a policy that has collapsed")
    negative_control: Literal["none", "shuffled_rewards", "zero_advantages"] = setting("none", "must teach nothing")
    optimizer: OptimizerConfig = section(lambda: OptimizerConfig(learning_rate=3e-4, clip_norm=0.2))

    @property
    def updates_per_step(self) -> int:
        return self.num_iterations

    @property
    def needs_reference(self) -> bool:
        """Whether the method looks at a policy that the updates do not move."""
        return self.kl.name == "reward" or (self.kl.name == "loss" and self.kl.to == "reference")

    def rules(self) -> Iterator[Rule]:
        """What has no meaning together; the rules that look at other sections are in schema.py."""
        yield from self.reward_rules("rl")
        yield from self.rollout_rules("rl")
        yield (
            self.supervision.name in ("text_steps", "commit_steps")
            and any(name.startswith(MODEL) for name in self.reward_weights),
            f"rl.supervision = {self.supervision.name} rewards unfinished texts by the task's rules, and a reward model judges whole ones; "
            "set it to outcome",
        )
        rows, parts, control = self.rollout_rows, self.grad_accumulation_steps, self.negative_control
        yield rows % parts != 0, f"rl.grad_accumulation_steps = {parts} does not divide the {rows} rows of a step"
        yield (
            bool(self.reward_weights)
            and not any(self.reward_weights.values())
            and self.kl.name != "reward"
            and self.supervision.name != "model_steps",
            f"rl.reward_weights = {self.reward_weights} are all 0, so every reward is 0; give one a weight",
        )
        yield (
            self.reference.name == "moving" and not self.needs_reference,
            "rl.reference = moving but nothing looks at a reference (no KL to it); leave it out",
        )
        by_steps, steps = self.supervision.name != "outcome", f"rl.supervision = {self.supervision.name}"
        by_values = self.advantage.name == "gae"
        yield (
            by_values and self.policy_loss.level != "token",
            f"rl.policy_loss.level = {self.policy_loss.level} with rl.advantage = gae: a ratio of many tokens has one advantage, and here "
            "each step has its own; set rl.policy_loss to ppo, whose level is token",
        )
        yield (
            by_values and control == "shuffled_rewards",
            "rl.negative_control = shuffled_rewards with rl.advantage = gae: the value model would learn the rewards as they are; set "
            "rl.advantage to center",
        )
        yield (
            by_steps and self.policy_loss.level != "token",
            f"rl.policy_loss.level = {self.policy_loss.level} with {steps}: a ratio of many tokens has one advantage, steps have "
            "several; set rl.policy_loss to ppo, whose level is token",
        )
        yield (
            by_steps and self.advantage.name not in ("center", "zscore"),
            f"rl.advantage = {self.advantage.name} with {steps}: rewards of steps are centred or standardised; set it to center or zscore",
        )
        yield (
            by_steps and self.kl.name == "reward",
            f"rl.kl = reward with {steps}: the penalty is of a completion, not of a step; set it to loss",
        )
        yield (
            self.advantage.name == "decoupled" and self.kl.name == "reward",
            "rl.kl = reward with rl.advantage = decoupled, which normalises the rewards of reward_weights and knows no other; "
            "set rl.kl = loss",
        )
        yield (
            by_steps and control == "shuffled_rewards",
            f"rl.negative_control = shuffled_rewards with {steps}: steps of one text are not those of another; set "
            "rl.supervision = outcome",
        )
