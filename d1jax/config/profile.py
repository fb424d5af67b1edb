"""The section of profiles: which steps of a stage are recorded for a look with xprof or Perfetto."""

from __future__ import annotations

from dataclasses import dataclass

from d1jax.config.setting import setting, with_fields


@with_fields
@dataclass(frozen=True)
class ProfileConfig:
    """A window of steps of every stage that trains, recorded by JAX's profiler into RUN/profiles/STAGE."""

    start: int = setting(10, "steps before the window: the first ones compile", at_least=0)
    steps: int = setting(0, "steps of the window (0 = nothing is recorded)", at_least=0)
