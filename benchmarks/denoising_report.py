"""The table and the figure of docs/experiments.md on denoising steps, from benchmarks/results/denoising_steps.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from report_tables import mean_and_half, points, table

from d1jax.telemetry.report.line_chart import Chart, Series

Row = dict[str, Any]


def gains(runs: Sequence[Row], estimator: str, steps: int, decoding: str) -> list[float]:
    """After less before of each seed, as fractions of all problems."""
    mine = [row for row in runs if row["estimator"] == estimator and row["steps"] == steps]
    return [row[f"after_{decoding}"] - row[f"before_{decoding}"] for row in mine]


def steps_of(data: Row) -> list[int]:
    return sorted({row["steps"] for row in data["runs"]})


def denoising_chart(data: Row) -> Chart:
    steps = tuple(steps_of(data))
    series = tuple(
        Series(name, steps, tuple(100 * mean_and_half(gains(data["runs"], name, one, "sampled"))[0] for one in steps))
        for name in data["rates"]
    )
    return Chart(
        "Gain of RL by denoising steps, Sudoku", "denoising steps", "gain in points, sampled", series, smooth=False
    )


def denoising_section(data: Row) -> str:
    """What was done, the gains decoded greedily and sampled, and what the runs cost."""
    runs, names = data["runs"], list(data["rates"])
    rows = []
    for decoding in ("greedy", "sampled"):
        for steps in steps_of(data):
            base = next(row for row in runs if row["steps"] == steps)[f"before_{decoding}"]
            rows.append(
                [
                    decoding,
                    str(steps),
                    f"{100 * base:.1f} %",
                    *(points(gains(runs, name, steps, decoding)) for name in names),
                ]
            )
    passes = []
    for steps in steps_of(data):
        costs = [
            next(r for r in runs if (r["estimator"], r["steps"]) == (name, steps))["forward_passes"] for name in names
        ]
        passes.append(["passes x rows", str(steps), "", *(f"{cost:,}" for cost in costs)])
    seeds = sorted({row["seed"] for row in runs})
    rates = ", ".join(f"`{name}` {rate:g}" for name, rate in data["rates"].items())
    tried = sorted({row["learning_rate"] for row in data["choosing"]})
    shown = {"steps": ", ".join(map(str, steps_of(data))), "seeds": ", ".join(map(str, seeds))}
    lines = [
        "`python benchmarks/denoising_steps.py`: "
        f"the Sudoku base under samplers of {shown['steps']} steps, then {data['rl_steps']} RL steps of "
        "16 x 6 rollouts with one update each, ratio 1, no KL, no prompt mask: the arms differ in "
        f"the score that is differentiated and in what it costs, not in rollouts or updates. "
        f"Gains in points over seeds {shown['seeds']}, 95 % by Student's t.",
        table(["decoding", "steps", "base", *(f"`{name}`" for name in names)], rows + passes),
        f"Learning rates, one an estimator, chosen of {', '.join(f'{rate:g}' for rate in tried)} at {data['chosen_at']} steps on "
        f"problems of the training split with a seed of its own ({data['chosen_with']}): {rates}. They are not chosen anew for other "
        "numbers of steps.",
    ]
    return "\n\n".join(lines)
