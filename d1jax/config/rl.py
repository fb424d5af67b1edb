"""The section of an RL stage: a method is a row of names, one an axis."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from d1jax.config.advantage import Advantage, Center, Outcome, Supervision
from d1jax.config.estimator import AnyEstimator, OneStep
from d1jax.config.objective import Collapse, FixedReference, Kl, NoKl, PolicyLoss, Ppo, Reference, StopOnCollapse
from d1jax.config.reward_model import MODEL
from d1jax.config.setting import Rule, choice, section, setting, with_fields
from d1jax.config.training import OptimizerConfig, RewardedConfig, TrainingConfig
from d1jax.config.values import WithChoices


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
        """What has no meaning together; the rules that look at other sections are in run_rules.py."""
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
