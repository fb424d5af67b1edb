"""The section of stages that sample a policy and keep what passes: GenerateConfig."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass

from d1jax.config.setting import Rule, setting, with_fields
from d1jax.config.training import RewardedConfig
from d1jax.config.yaml_text import shown

# name -> whether it has a number behind a colon
FILTERS = {
    "finished": False,
    "no_code": False,
    "tokens": True,
    "repetition": True,
    "language": True,
    "paragraph": True,
}


@with_fields
@dataclass(frozen=True)
class GenerateConfig(RewardedConfig):
    """Completions of a policy that are graded, filtered and written down, as rows for SFT and preference stages."""

    teacher: str = setting(
        "",
        "a checkpoint or run that writes the completions ('' = the weights of this run): distillation into this run's model",
    )
    prompts: int = setting(0, "training rows to sample for (0 = all)", at_least=0)
    accept: dict[str, float] = setting(
        lambda: {"solved": 1.0}, "reward -> the least that a completion must have earned ({} = whatever it earned)"
    )
    filters: tuple[str, ...] = setting(
        (),
        "what else a completion must be: finished, tokens:N, repetition:SHARE, language:SHARE, paragraph:N, no_code (docs/pipelines.md)",
    )
    keep_per_prompt: int = setting(
        1, "different completions of a problem that are kept at most, the first ones (0 = all)", at_least=0
    )

    def rules(self) -> Iterator[Rule]:
        yield from self.reward_rules("generate")
        yield from self.rollout_rules("generate")
        for written in self.filters:
            name, colon, number = written.partition(":")
            near = difflib.get_close_matches(name, FILTERS, n=1)
            suggestion = f" (did you mean {near[0]!r}?)" if near else ""
            yield (
                name not in FILTERS,
                f"generate.filters has {shown(written)}, which is not one of {', '.join(FILTERS)}{suggestion}",
            )
            if name not in FILTERS:
                continue
            form = f"{name}:NUMBER" if FILTERS[name] else f"{name}, without a number"
            yield bool(colon) != FILTERS[name], f"generate.filters: {shown(written)} is written {form}"
            yield (
                FILTERS[name] and bool(colon) and not _is_number(number),
                f"generate.filters: {shown(written)} has no positive number behind the colon",
            )


def _is_number(text: str) -> bool:
    try:
        return 0 <= float(text) < float("inf")
    except ValueError:
        return False
