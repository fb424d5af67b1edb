"""How a benchmark is put to a model: the settings that two numbers must share to be compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from d1jax.config.sampler import MAX_TOKENS, SamplerConfig
from d1jax.config.setting import Rule, section, setting, with_fields

SIZES = ("completion_length", "block_length", "steps")


@with_fields
@dataclass(frozen=True)
class BenchmarkConfig:
    """One benchmark at one length, one number of steps and one temperature."""

    length: int = setting(256, "new tokens", above=0, at_most=MAX_TOKENS)
    block: int = setting(32, "tokens of a block (0 = the whole completion)", at_least=0)
    steps_per_token: float = setting(0.5, "denoising steps for each new token (d1: a half)", above=0, at_most=1)
    temperature: float = setting(0.0, "0 = greedy", at_least=0)
    samples: int = setting(1, "completions of each row", above=0, at_most=10_000)
    limit: int = setting(0, "rows, from the first (0 = all)", at_least=0)
    seed: int = setting(0, "of what is drawn, and of the choice of worked examples", at_least=0, at_most=2**32 - 1)
    few_shot: int = setting(0, "worked examples before the question, from the training split", at_least=0, at_most=1000)
    chat: bool = setting(True, "as turns of a chat where the checkpoint has a template; false: continue a text")
    style: Literal["bare", "instruct"] = setting("instruct", "the question alone, or with instructions")
    system: str = setting("", "a system message before the question")
    template: str = setting(
        "", "what is asked, with {prompt} where the task's own prompt goes, or {question} and other fields of a row"
    )
    prefill: str = setting("", "what the answer begins with, e.g. <reasoning> and a line break (d1)")
    options: dict[str, Any] = setting(dict, "fields of the task itself, e.g. {judge: number} of jsonl")
    sampler: SamplerConfig = section(SamplerConfig)

    @property
    def steps(self) -> int:
        """Denoising steps: steps_per_token x length, in whole steps for every block."""
        blocks = self.length // self.block_length
        return max(round(self.length * self.steps_per_token / blocks), 1) * blocks

    @property
    def block_length(self) -> int:
        return self.block or self.length

    def at(self, length: int) -> BenchmarkConfig:
        """The same with another length; a block that is longer becomes the whole completion."""
        return dataclasses.replace(self, length=length, block=min(self.block, length))

    @property
    def decoding(self) -> SamplerConfig:
        """The sampler with its sizes."""
        sizes = {"completion_length": self.length, "block_length": self.block_length}
        if not self.sampler.schedule.adaptive:
            sizes["steps"] = self.steps
        return dataclasses.replace(self.sampler, **sizes)

    def rules(self) -> Iterator[Rule]:
        default = SamplerConfig()
        for name, ours in zip(SIZES, ("length", "block", "steps_per_token"), strict=True):
            yield getattr(self.sampler, name) != getattr(default, name), f"sampler.{name} is set by {ours}; give that"
        yield (
            self.length % self.block_length != 0,
            f"block = {self.block} does not divide length = {self.length}; 0 takes the whole completion as one block",
        )
        yield (
            self.samples > 1 and self.temperature == 0 and not self.sampler.has_drawn_order,
            f"samples = {self.samples} at temperature 0 are all the same; set a temperature",
        )
        yield (
            bool(self.system) and not self.chat,
            "system: a message needs chat = true; put it into template instead",
        )
