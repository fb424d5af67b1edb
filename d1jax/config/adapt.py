"""The section of stages that learn from plain text: AdaptConfig."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from d1jax.config.setting import Rule, choice, section, setting, with_fields
from d1jax.config.training import MAX_ROWS, OptimizerConfig, TrainingConfig

HUB = "hub:"  # in front of the name of a data set on the hub
MAX_LENGTH = 2**20


@dataclass(frozen=True)
class InverseWeighting:
    """A masked token counts 1 / t, where t is the probability that it was masked: the ELBO (LLaDA, DiffuLLaMA)."""

    name: ClassVar[str] = "inverse"


@dataclass(frozen=True)
class CartWeighting:
    """A masked token counts more, the nearer the tokens that it can be read from (Dream, arXiv 2508.15487)."""

    name: ClassVar[str] = "cart"
    p: float = setting(0.1, "a clean token at distance d adds p (1 - p)^(d - 1) / 2", above=0, below=1)


Weighting = InverseWeighting | CartWeighting


@with_fields
@dataclass(frozen=True)
class AdaptConfig(TrainingConfig):
    """Masked diffusion on packed text, which turns an autoregressive model into a diffusion one; next tokens where the mask is causal."""

    data: dict[str, float] = setting(
        dict,
        "{source: share of the windows}; a source is FILE.jsonl (key text), a text file, a folder, a pattern, hub:NAME",
    )
    validation: dict[str, str] = setting(
        dict, "{name: source} for bits per byte; {} = the first windows of every source, which are then not learnt from"
    )
    streaming: bool = setting(False, "read as it goes, in the order of the files, by the datasets library")
    length: int = setting(256, "tokens of a window", at_least=2, at_most=MAX_LENGTH)
    batch_size: int = setting(32, "windows of an update", above=0, at_most=MAX_ROWS)
    anneal_steps: int = setting(
        0,
        "updates over which later columns are opened to a model that was causal (0 = all at once, as Dream)",
        at_least=0,
    )
    weighting: Weighting = choice(InverseWeighting(), "how much a masked token counts")
    normalizer: Literal["tokens", "masked"] = setting(
        "tokens", "divides the sum over a batch: its tokens (LLaDA), or those that are masked (DiffuLLaMA)"
    )
    low: float = setting(1e-3, "smallest share of a window that is masked", above=0, below=1)
    high: float = setting(1.0, "largest share of a window that is masked", above=0, at_most=1)
    clean_prefix: float = setting(
        0.0, "share of the windows with a beginning of random length that is never masked", at_least=0, at_most=1
    )
    truncated: float = setting(0.0, "share of the windows that end at a random length", at_least=0, at_most=1)
    validation_windows: int = setting(64, "windows of a validation set", above=0, at_most=MAX_ROWS)
    validation_samples: int = setting(8, "maskings of a window in validation", above=0, at_most=2**10)
    order_windows: int = setting(
        16, "windows of a validation set whose second half is decoded, for the order of decoding (0 = none)", at_least=0
    )
    optimizer: OptimizerConfig = section(
        lambda: OptimizerConfig(learning_rate=3e-4, schedule="cosine", warmup_steps=10)
    )

    @property
    def tokens(self) -> int:
        """The tokens that the stage sees."""
        return self.steps * self.batch_size * self.length

    def rules(self) -> Iterator[Rule]:
        shares, parts = list(self.data.values()), self.grad_accumulation_steps
        yield (
            not all(math.isfinite(share) and share > 0 for share in shares),
            f"adapt.data = {self.data} needs shares above 0; leave out what is not to be seen",
        )
        yield self.low >= self.high, f"adapt.low = {self.low} must be below adapt.high = {self.high}"
        yield (
            self.batch_size % parts != 0,
            f"adapt.grad_accumulation_steps = {parts} does not divide adapt.batch_size = {self.batch_size}",
        )
        yield (
            self.anneal_steps > self.steps,
            f"adapt.anneal_steps = {self.anneal_steps} is more than adapt.steps = {self.steps}: the model would be left half causal",
        )
        hub = [source for source in (*self.data, *self.validation.values()) if source.startswith(HUB)]
        yield (
            bool(hub) and not self.streaming,
            f"adapt.data names {hub[:1]}, which is read as it goes; set adapt.streaming = true",
        )
        yield (
            self.streaming and bool(self.data) and not self.validation,
            "adapt.streaming = true has no first windows to hold out; name a file in adapt.validation, e.g. {held_out: FILE.jsonl}",
        )
