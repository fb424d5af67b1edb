"""The section of stages that train a reward model: RewardModelConfig."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from d1jax.config.setting import Rule, section, setting, with_fields
from d1jax.config.training import MAX_ROWS, OptimizerConfig, TrainingConfig

MODEL = "model:"  # in front of the name of a reward model, where rewards are named


@with_fields
@dataclass(frozen=True)
class RewardModelConfig(TrainingConfig):
    """A reward model: the policy's backbone with a scalar head, trained on pairs or labelled lines. Later stages ask it as model:NAME."""

    data: tuple[str, ...] = setting(
        ("task",),
        "pairs or labelled steps: the task's rows (task) or what generate stages have kept; all but the first are replayed",
    )
    pairs_per_prompt: int = setting(
        1,
        "pairs of a problem at most: best and worst of what was kept, second best and second worst, ... (0 = all)",
        at_least=0,
    )
    replay: float = setting(
        0.1, "share of a batch that is replayed, where data names more than one", at_least=0, below=1
    )
    batch_size: int = setting(32, "pairs (stepwise: texts) of an update", above=0, at_most=MAX_ROWS)
    held_out: float = setting(
        0.1, "share of the problems whose texts are held out for accuracy and calibration", above=0, below=1
    )
    loss: Literal["pairwise", "pointwise", "stepwise"] = setting(
        "pairwise",
        "pairwise: log sigmoid of the difference of a pair; pointwise: each text as good or bad; stepwise: each line of a text as right or "
        "wrong",
    )
    optimizer: OptimizerConfig = section(lambda: OptimizerConfig(learning_rate=3e-4, warmup_steps=5))

    def rules(self) -> Iterator[Rule]:
        parts = self.grad_accumulation_steps
        yield (
            len(set(self.data)) != len(self.data) or not self.data,
            f"reward_model.data = {list(self.data)} must name something, and nothing twice; write [task] or [NAME]",
        )
        yield (
            self.batch_size % parts != 0,
            f"reward_model.grad_accumulation_steps = {parts} does not divide the {self.batch_size} pairs of an update",
        )
        yield (
            len(self.data) > 1 and round(self.replay * self.batch_size) < len(self.data) - 1,
            f"reward_model.replay = {self.replay} of {self.batch_size} pairs is less than one of each of {list(self.data[1:])}; raise it",
        )

    def counts(self) -> tuple[int, ...]:
        """How many pairs of an update come from each of `data`: the first has what the replayed ones leave."""
        old = len(self.data) - 1
        replayed = round(self.replay * self.batch_size) if old else 0
        shares = [replayed // old + (place < replayed % old) for place in range(old)]
        return (self.batch_size - replayed, *shares)
