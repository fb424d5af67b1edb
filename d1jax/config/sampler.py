"""How a completion is denoised."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from d1jax.config.setting import Rule, choice, setting, with_fields
from d1jax.config.values import WithChoices

MAX_TOKENS = 1_000_000  # schedules are arrays of this length


# -- schedules: how many tokens a step commits ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Even:
    """As many tokens in each step of a block (LLaDA, arXiv 2502.09992)."""

    name: ClassVar[str] = "even"
    adaptive: ClassVar[bool] = False


@dataclass(frozen=True)
class Time:
    """By Dream's time: the integer part of masks left x (1 - s/t), on the whole completion (arXiv 2508.15487)."""

    name: ClassVar[str] = "time"
    adaptive: ClassVar[bool] = False


@dataclass(frozen=True)
class Chance:
    """Each token by its chance of 1 - s/t (Dream's "origin"), on the whole completion."""

    name: ClassVar[str] = "chance"
    adaptive: ClassVar[bool] = False


@dataclass(frozen=True)
class Threshold:
    """All that are confident enough, at least one (Fast-dLLM, arXiv 2505.22618)."""

    name: ClassVar[str] = "threshold"
    adaptive: ClassVar[bool] = True
    threshold: float = setting(0.9, "confidence of what is committed, at least", above=0.0, at_most=1.0)


@dataclass(frozen=True)
class Factor:
    """The n most confident, while the n-th has at least 1 - factor / (n + 1) (Fast-dLLM, arXiv 2505.22618)."""

    name: ClassVar[str] = "factor"
    adaptive: ClassVar[bool] = True
    factor: float = setting(1.0, "the larger, the more are committed", at_least=0)


@dataclass(frozen=True)
class EntropyBound:
    """The surest, while the others' entropies sum to no more (EB-Sampler, arXiv 2505.24857)."""

    name: ClassVar[str] = "entropy_bound"
    adaptive: ClassVar[bool] = True
    bound: float = setting(0.35, "sum of the others' entropies, nats", at_least=0)


@dataclass(frozen=True)
class Klass:
    """All that are confident and whose distribution hardly moved in each of the last two steps (KLASS, arXiv 2511.05664)."""

    name: ClassVar[str] = "klass"
    adaptive: ClassVar[bool] = True
    threshold: float = setting(0.9, "confidence of what is committed, more than", above=0.0, at_most=1.0)
    kl_threshold: float = setting(0.01, "KL between two steps, below, nats", at_least=0)


Schedule = Even | Time | Chance | Threshold | Factor | EntropyBound | Klass


# -- remasking: in which order positions are committed -------------------------------------------------------------------

TEMPERATURE_HELP = "Dream's alg_temp: the order is drawn by priority / this (0 = the highest first)"
CONFIDENCE_HELP = "confidence under the model (LLaDA), or under what is sampled from: tempered and filtered (Dream)"


@dataclass(frozen=True)
class LowConfidence:
    """The likeliest token first; what is least sure stays masked (LLaDA's name, arXiv 2502.09992; Dream's maskgit_plus)."""

    name: ClassVar[str] = "low_confidence"
    temperature: float = setting(0.0, TEMPERATURE_HELP, at_least=0)
    confidence_of: Literal["model", "sampling"] = setting("model", CONFIDENCE_HELP)


@dataclass(frozen=True)
class TopkMargin:
    """The position first whose likeliest token is furthest ahead of the second (Dream, arXiv 2508.15487)."""

    name: ClassVar[str] = "topk_margin"
    temperature: float = setting(0.0, TEMPERATURE_HELP, at_least=0)
    confidence_of: Literal["model", "sampling"] = setting("model", CONFIDENCE_HELP)


@dataclass(frozen=True)
class LowEntropy:
    """The position of least entropy first (Dream)."""

    name: ClassVar[str] = "entropy"
    temperature: float = setting(0.0, TEMPERATURE_HELP, at_least=0)
    confidence_of: Literal["model", "sampling"] = setting("model", CONFIDENCE_HELP)


@dataclass(frozen=True)
class RandomOrder:
    """Any position, each as likely."""

    name: ClassVar[str] = "random"
    temperature: ClassVar[float] = 0.0
    confidence_of: ClassVar[str] = "model"


@dataclass(frozen=True)
class LeftToRight:
    """The left of a block first."""

    name: ClassVar[str] = "left_to_right"
    temperature: ClassVar[float] = 0.0
    confidence_of: Literal["model", "sampling"] = setting("model", CONFIDENCE_HELP)


Remasking = LowConfidence | TopkMargin | LowEntropy | RandomOrder | LeftToRight


# -- caches: which keys and values are kept within a block (Fast-dLLM; approximate) -------------------------------------------


@dataclass(frozen=True)
class NoCache:
    """Every step passes over the whole canvas."""

    name: ClassVar[str] = "none"
    refresh: ClassVar[int] = 0


@dataclass(frozen=True)
class PrefixCache:
    """Of the text before the block."""

    name: ClassVar[str] = "prefix"
    refresh: int = setting(0, "steps after which it is made anew within a block (0 = only at its start)", at_least=0)


@dataclass(frozen=True)
class DualCache:
    """Of all but the block."""

    name: ClassVar[str] = "dual"
    refresh: int = setting(0, "steps after which it is made anew within a block (0 = only at its start)", at_least=0)


Cache = NoCache | PrefixCache | DualCache


@with_fields
@dataclass(frozen=True)
class SamplerConfig(WithChoices):
    """How a completion is denoised: its length, its blocks, how many tokens a step commits, and which.

    `d1jax.SamplerConfig(completion_length=64, block_length=32, steps=32)` decodes 64 tokens in two blocks from left to right,
    two tokens a step; `schedule=d1jax.config.Threshold(0.8)` commits all that is confident enough. The temperature is no part of it
    (`sample(..., temperature=0.8)`). UserError where settings contradict each other, or one has no effect, comes when it is used.
    """

    completion_length: int = setting(20, "new tokens C", above=0, at_most=MAX_TOKENS)  # a 4x4 grid and its line breaks
    block_length: int = setting(20, "tokens of a block; divides completion_length", above=0)
    steps: int = setting(4, "denoising steps over all blocks; a multiple of the number of blocks", above=0)
    remasking: Remasking = choice(
        LowConfidence(),
        "committed first: the likeliest, those furthest ahead of the second, of least entropy, any, the left",
    )
    schedule: Schedule = choice(
        Even(),
        "tokens of a step: even in a block (LLaDA), by Dream's time, each by its chance (Dream's origin); or all that a rule "
        "allows, at least one, until the block is full (approximate; sampler.steps does not count then)",
    )
    top_k: int = setting(0, "sample from the k likeliest tokens (0 = all)", at_least=0)
    top_p: float = setting(1.0, "sample from the likeliest tokens that together reach p (1 = all)", above=0, at_most=1)
    guidance: float = setting(
        0.0, "classifier-free guidance against a masked prompt; a second forward pass (0 = none)", at_least=0
    )
    end_token: Literal["allowed", "forbidden", "all_forbidden", "last"] = setting(
        "allowed",
        "forbidden: never sampled (all_forbidden: nor what closes a turn); last: committed only when nothing else is left",
    )
    early_exit: bool = setting(True, "stop a row once its text, through the first token that ends it, is decided")
    cache: Cache = choice(
        NoCache(),
        "keys and values kept within a block (approximate, Fast-dLLM): of the text before it, or of all but the block",
    )

    @property
    def max_steps(self) -> int:
        """How many steps a completion can take: one a token under an adaptive schedule."""
        return self.completion_length if self.schedule.adaptive else self.steps

    @property
    def has_drawn_order(self) -> bool:
        """Whether the order in which positions are committed is random."""
        return self.remasking.name == "random" or self.remasking.temperature > 0

    def rules(self) -> Iterator[Rule]:
        """What has no meaning together; for numbers that are within their bounds."""
        length, block, steps = self.completion_length, self.block_length, self.steps
        blocks = max(length // block, 1)
        fits, counted = length % block == 0, not self.schedule.adaptive
        schedule, order = self.schedule.name, self.remasking.name
        yield (
            not fits,
            f"sampler.block_length = {block} does not divide sampler.completion_length = {length}; try {nearest_divisor(length, block)}",
        )
        yield (
            fits and counted and steps < blocks,
            f"sampler.steps = {steps} is fewer than the {blocks} blocks; every block needs a step",
        )
        yield (
            counted and steps > length,
            f"sampler.steps = {steps} is more than the {length} tokens of sampler.completion_length",
        )
        yield (
            fits and counted and steps >= blocks and steps % blocks != 0,
            f"sampler.steps = {steps} is not a multiple of the {blocks} blocks; try {max(steps // blocks, 1) * blocks}",
        )
        yield (
            schedule in ("time", "chance") and block != length,
            f"sampler.schedule = {schedule} works on the whole completion; set sampler.block_length = {length}",
        )
        yield (
            schedule == "entropy_bound" and order != "entropy",
            f"sampler.schedule = entropy_bound takes the surest first; set sampler.remasking = entropy (here: {order})",
        )
        yield (
            self.schedule.adaptive and self.has_drawn_order,
            f"sampler.schedule = {schedule} takes the surest together; set sampler.remasking to an order that is not "
            f"drawn (here: {order}) and sampler.remasking.temperature = 0",
        )
        yield (
            self.cache.name != "none" and self.guidance > 0,
            f"sampler.cache = {self.cache.name} with guidance: its second pass would need a cache of its own; set one to none or 0",
        )
        yield (
            schedule == "chance" and order != "random",
            f"sampler.schedule = chance commits whatever the draw says; set sampler.remasking = random (here: {order})",
        )


def nearest_divisor(length: int, wanted: int) -> int:
    """The divisor of `length` that is nearest to `wanted`."""
    wanted = min(wanted, length)
    near = (size for away in range(wanted) for size in (wanted - away, wanted + away))
    return next(size for size in near if length % size == 0)
