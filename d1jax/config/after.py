"""The sections of stages that train nothing: EvaluateConfig (samples of the evaluation set), ExportConfig (a checkpoint for others)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from d1jax.config.setting import Rule, setting, with_fields


@with_fields
@dataclass(frozen=True)
class EvaluateConfig:
    """Several samples of every row of the headline evaluation set: pass@k and maj@k over k, at several temperatures; greedy accuracy at
    other numbers of steps.
    """

    samples: int = setting(8, "completions of a row", above=0, at_most=2**12)
    temperature: float = setting(1.0, "of the samples", above=0)
    temperatures: tuple[float, ...] = setting(
        (),
        "others at which as many samples are drawn, for pass@k and the order of decoding over temperature, e.g. [0.2, 0.6, 1.4]",
    )
    rows: int = setting(0, "rows of the set, the first ones (0 = all)", at_least=0)
    steps: tuple[int, ...] = setting(
        (), "numbers of denoising steps at which greedy accuracy is measured, too, e.g. the sampler's and half of it"
    )

    def rules(self) -> Iterator[Rule]:
        yield (
            any(steps <= 0 for steps in self.steps) or len(set(self.steps)) < len(self.steps),
            f"evaluate.steps = {list(self.steps)} must be different numbers above 0",
        )
        others = (self.temperature, *self.temperatures)
        yield (
            not all(0 < one < float("inf") for one in others) or len(set(others)) < len(others),
            f"evaluate.temperatures = {list(self.temperatures)} must be different numbers above 0, and none evaluate.temperature = "
            f"{self.temperature}",
        )


@with_fields
@dataclass(frozen=True)
class ExportConfig:
    """The weights as a checkpoint: an adapter merged, in Hugging Face's form or d1jax's own."""

    out: str = setting("", "a new directory ('' = exports/NAME in the run directory)")
    form: Literal["huggingface", "d1jax"] = setting("huggingface", "what others load, or Orbax arrays")
    weights_dtype: Literal["", "float32", "bfloat16"] = setting("", "of the stored weights ('' = as the model's)")
