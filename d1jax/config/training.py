"""The sections of the training stages that are not RL: what all stages share, and SFT."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from d1jax.config.setting import Rule, section, setting, with_fields

MAX_ROWS = 2**20


@with_fields
@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with clipping."""

    learning_rate: float = setting(1e-3, "peak", above=0)
    schedule: Literal["constant", "linear", "cosine"] = setting(
        "constant", "after the warm-up: constant, or down to `final` of the peak"
    )
    final: float = setting(0.0, "share of the peak that linear and cosine end at", at_least=0, below=1)
    warmup_steps: int = setting(0, "optimizer updates from 0 to the peak", at_least=0)
    beta1: float = setting(0.9, "decay of the mean of gradients (the first moment)", at_least=0, below=1)
    beta2: float = setting(0.99, "decay of the mean of their squares (the second moment)", at_least=0, below=1)
    weight_decay: float = setting(0.0, "on matrices; not on norms, biases and embeddings", at_least=0)
    first_moment: Literal["float32", "bfloat16"] = setting(
        "float32", "dtype of the first moment; the second one, which has small numbers, is kept in float32"
    )
    offload: bool = setting(False, "the moments wait in the memory of the host while nothing is updated")
    clip_norm: float = setting(1.0, "global gradient norm (0 = no clipping)", at_least=0)


@dataclass(frozen=True)
class TrainingConfig:
    """What every stage that updates weights has."""

    steps: int = setting(100, "steps of the stage", above=0)
    grad_accumulation_steps: int = setting(1, "gradient accumulation: parts of a batch", above=0)
    optimizer: OptimizerConfig = section(OptimizerConfig)

    @property
    def updates_per_step(self) -> int:
        return 1


@dataclass(frozen=True)
class SamplingConfig:
    """What every stage that samples completions in groups has."""

    prompts_per_step: int = setting(64, "problems of a rollout batch", above=0, at_most=MAX_ROWS)
    num_generations: int = setting(8, "completions of a problem, G", at_least=2, at_most=2**16)
    temperature: float = setting(1.0, "of the rollouts", above=0)
    rollout_batch_size: int = setting(
        0,
        "rows of a rollout batch that are decoded at a time; they are graded while the next are decoded (0 = all)",
        at_least=0,
    )

    @property
    def rollout_rows(self) -> int:
        """Rows of a rollout batch."""
        return self.prompts_per_step * self.num_generations

    @property
    def rows_at_a_time(self) -> int:
        """Rows that are decoded together."""
        return self.rollout_batch_size or self.rollout_rows

    def rollout_rules(self, where: str) -> Iterator[Rule]:
        """A part of a rollout batch holds whole groups: what compares the completions of a problem sees all of them."""
        size, group = self.rows_at_a_time, self.num_generations
        yield (
            size % group != 0 or self.rollout_rows % size != 0,
            f"{where}.rollout_batch_size = {size} must be a multiple of the {group} completions of a problem and divide the "
            f"{self.rollout_rows} rows of a step",
        )


@dataclass(frozen=True)
class RewardedConfig(SamplingConfig):
    """What every stage that compares completions by rewards has."""

    reward_weights: dict[str, float] = setting(
        lambda: {"solved": 1.0}, "reward = sum of weight x the task's reward of that name"
    )

    def reward_rules(self, where: str) -> Iterator[Rule]:
        weights = self.reward_weights
        yield not weights, f"{where}.reward_weights is empty; write e.g. {{solved: 1.0}}"
        yield (
            not all(map(math.isfinite, weights.values())),
            f"{where}.reward_weights = {weights} must be finite numbers",
        )


@with_fields
@dataclass(frozen=True)
class SftConfig(TrainingConfig):
    """Masked supervised fine-tuning (LLaDA's law)."""

    data: tuple[str, ...] = setting(
        ("task",),
        "what is learnt, all of it together: the task's own training rows (task), the rows that generate stages have kept",
    )
    completion_length: int = setting(0, "columns of a target (0 = sampler.completion_length)", at_least=0)
    batch_size: int = setting(128, "rows of an update", above=0, at_most=MAX_ROWS)
    eps: float = setting(1e-3, "mask probability is (1 - eps) t + eps", above=0, below=1)
    score_padding: bool = setting(True, "end tokens behind the text are targets too (LLaDA, d1), or only what ends it")
    normalizer: Literal["per_row", "batch_token"] = setting(
        "per_row",
        "per_row: mean of row means (LLaDA); batch_token: mean over tokens (d1); equal when padding is scored",
    )
    optimizer: OptimizerConfig = section(
        lambda: OptimizerConfig(learning_rate=3e-3, schedule="cosine", warmup_steps=10)
    )

    def rules(self) -> Iterator[Rule]:
        parts = self.grad_accumulation_steps
        yield (
            len(set(self.data)) != len(self.data) or not self.data,
            f"sft.data = {list(self.data)} must name something, and nothing twice; write [task], [NAME] or both",
        )
        yield (
            self.batch_size % parts != 0,
            f"sft.grad_accumulation_steps = {parts} does not divide sft.batch_size = {self.batch_size}",
        )
