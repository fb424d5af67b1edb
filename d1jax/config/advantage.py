"""How rewards become advantages, and which parts of a completion have a reward of their own: the choices of an RL stage about rewards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from d1jax.config.setting import Rule, setting

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
