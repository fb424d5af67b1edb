"""The learning curves: which metrics of metrics.jsonl share a panel, and in which order the panels stand."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from d1jax.telemetry.report.line_chart import Chart, LineDrawing, Series, line_chart
from d1jax.telemetry.report.run_data import RunData, Stage
from d1jax.telemetry.report.wording import finite, set_name, stage_name

TRAINED = ("adapt", "sft", "rl", "preference")
SAMPLED = ("rl", "preference")


@dataclass(frozen=True)
class Panel:
    """One panel for each stage of `kinds` that has metrics matching `pattern`; a group in the pattern names the series.

    `{stage}` in a title is the stage. A title without it gets the stage only where several have such a panel.
    """

    title: str
    kinds: Sequence[str]
    pattern: str
    y_label: str
    smooth: bool = True
    only_above_zero: bool = False  # left out of a stage where it is 0 at every step


PANELS = (
    Panel("Bits per byte, during {stage}", ("adapt",), r"validation/(.+)/bits_per_byte", "bits per byte", smooth=False),
    Panel("{stage} loss", ("adapt", "sft"), r"loss", "loss"),
    Panel(
        "Left-to-right decoding of text, {stage}", ("adapt",), r"validation/(.+)_ar_1", "share of tokens", smooth=False
    ),
    Panel("Open part of the causal mask, {stage}", ("adapt",), r"mask/opened", "share", smooth=False),
    Panel("Solved, during {stage}", TRAINED, r"eval/(.+)/solved", "fraction solved", smooth=False),
    Panel("Reward", SAMPLED, r"reward", "mean reward"),
    Panel("Reward by part", SAMPLED, r"rewards/(.+)/mean", "mean reward"),
    Panel("Reward model against the verifier", SAMPLED, r"rewards/agreement/(.+)", "share of pairs"),
    Panel("Reward spread within a group", SAMPLED, r"reward_std", "standard deviation"),
    Panel("Groups without a signal", SAMPLED, r"frac_reward_zero_std", "fraction of groups"),
    Panel("Distinct completions", SAMPLED, r"completions/distinct_per_group", "per group"),
    Panel("Repeated tokens", SAMPLED, r"completions/repeated_tokens", "share of tokens"),
    Panel("KL to the reference", ("rl",), r"kl", "nats per token"),
    Panel("Entropy", ("rl",), r"entropy", "nats per token"),
    Panel("Clipped tokens", ("rl",), r"clip_ratio/(low|high|region)_mean", "fraction"),
    Panel("Policy ratio", ("rl",), r"ratio/mean", "ratio"),
    Panel("Spread of the log ratio", ("rl",), r"ratio/log_rms", "rms"),
    Panel("Value model: explained variance", ("rl",), r"value/explained_variance", "share of the variance"),
    Panel("Value model: loss", ("rl",), r"value/loss", "loss"),
    Panel("Completion length", SAMPLED, r"completions/mean_length", "tokens"),
    Panel("Reflection words", SAMPLED, r"completions/reflection_words", "per completion", only_above_zero=True),
    Panel("Left-to-right decoding (k = 1)", SAMPLED, r"decoding/(local|global)_ar_1", "share of tokens"),
    Panel("Margin of the chosen", ("preference",), r"rewards/margins", "implicit reward"),
    Panel("Chosen above rejected", ("preference",), r"rewards/accuracies", "share of pairs"),
    Panel("Reward model: margin", ("reward_model",), r"rewards/margins", "score"),
    Panel("Reward model: judged rightly", ("reward_model",), r"rewards/accuracies", "share"),
    Panel("Pairs without a difference", ("preference",), r"pairs/tied", "share of pairs"),
    Panel("{stage} loss", (*SAMPLED, "reward_model"), r"loss", "loss"),
    Panel("Gradient norm, {stage}", (*TRAINED, "reward_model"), r"grad_norm", "norm"),
    Panel("Time per step, {stage}", ("adapt", "sft"), r"time/(.+)_s", "seconds", smooth=False),
    Panel("Time per phase, {stage}", SAMPLED, r"time/(.+)_s", "seconds", smooth=False),
)


def curves(run: RunData) -> list[LineDrawing]:
    """A drawing for each panel of each stage that has the metrics for it."""
    found = [
        (
            panel,
            [
                (stage, series)
                for stage in run.stages
                if stage.kind in panel.kinds and (series := _series(panel, run, stage))
            ],
        )
        for panel in PANELS
    ]
    evaluated = [
        y for panel, stages in found if _is_shared(panel) for _, series in stages for one in series for y in one.y
    ]
    evaluated = [y for y in evaluated if finite(y) is not None]
    # The panels of held-out accuracy share one axis: stages are to be compared by eye.
    shared = (0.0, max(evaluated) * 1.1 + 0.01) if evaluated else None
    drawings = []
    for panel, stages in found:
        for stage, series in stages:
            title = panel.title if len(stages) == 1 or "{stage}" in panel.title else f"{panel.title}, {{stage}}"
            chart = Chart(
                title=title.replace("{stage}", stage_name(stage.name)),
                x_label=f"{stage_name(stage.name)} step",
                y_label=panel.y_label,
                series=series,
                smooth=panel.smooth,
                x_range=(0.0, max(1.0, *(float(row["step"]) for row in run.metrics_of(stage.name)))),
                y_range=shared if _is_shared(panel) else None,
            )
            drawings.append(line_chart(chart))
    return [drawing for drawing in drawings if drawing]


def _is_shared(panel: Panel) -> bool:
    return panel.pattern.startswith("eval/")


def _series(panel: Panel, run: RunData, stage: Stage) -> tuple[Series, ...]:
    pattern = re.compile(panel.pattern)
    points: dict[str, dict[float, float]] = {}
    for row in run.metrics_of(stage.name):
        for name, value in _matching(panel, pattern, row):
            points.setdefault(name, {})[float(row["step"])] = value
    if panel.only_above_zero and not any(value for found in points.values() for value in found.values()):
        return ()
    ordered = {name: sorted(found.items()) for name, found in points.items()}
    return tuple(Series(name, *map(tuple, zip(*found, strict=True))) for name, found in ordered.items())


def _matching(panel: Panel, pattern: re.Pattern[str], row: Mapping[str, Any]) -> list[tuple[str, float]]:
    """(name of the series, value) of what a row holds for a panel."""
    found = []
    for key, value in row.items():
        match = pattern.fullmatch(key)
        if match and isinstance(value, int | float):
            found.append((set_name(match[1]) if match.groups() else panel.y_label, float(value)))
    return found
