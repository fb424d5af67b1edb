"""The report of a run: one self-contained HTML file, written from whatever the run directory holds.

Order of the page: verdict, results with intervals, learning curves, samples before and after, the denoising player, the
decoding order, where the time went, configuration, environment. The page is a pure function of the directory, asks the network for
nothing (its Content-Security-Policy forbids it), and opens from disk.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d1jax.files import write_beside
from d1jax.telemetry.charts import Chart, Series, interval_axis, interval_plot, line_chart
from d1jax.telemetry.decoding_order import figures_of
from d1jax.telemetry.markup import compact, esc, finite, percent
from d1jax.telemetry.page_assets import SCRIPT, STYLE
from d1jax.telemetry.run_data import (
    RunData,
    Score,
    by_sample,
    primary_set,
    primary_stages,
    read_run,
    scores,
    set_name,
    stage_name,
    verdict,
)
from d1jax.telemetry.samples_table import sample_card
from d1jax.telemetry.trajectory_viewer import viewer_html

SAMPLES_SHOWN, SAMPLES_FOLDED, SAMPLES_PLAYED = 8, 24, 32
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class Panel:
    """One panel of learning curves: the metrics of one stage that match `pattern`; a group in it names the series."""

    title: str
    stage: str
    pattern: str
    y_label: str
    smooth: bool = True


PANELS = (
    Panel("SFT loss", "sft", r"loss", "loss"),
    Panel("Solved, during SFT", "sft", r"eval/(.+)/solved", "fraction solved", smooth=False),
    Panel("Solved, during RL", "rl", r"eval/(.+)/solved", "fraction solved", smooth=False),
    Panel("Reward", "rl", r"reward", "mean reward"),
    Panel("Reward by part", "rl", r"rewards/(.+)/mean", "mean reward"),
    Panel("Reward spread within a group", "rl", r"reward_std", "standard deviation"),
    Panel("Groups without a signal", "rl", r"frac_reward_zero_std", "fraction of groups"),
    Panel("Distinct completions", "rl", r"completions/distinct_per_group", "per group"),
    Panel("Repeated tokens", "rl", r"completions/repeated_tokens", "share of tokens"),
    Panel("KL to the reference", "rl", r"kl", "nats per token"),
    Panel("Entropy", "rl", r"entropy", "nats per token"),
    Panel("Clipped tokens", "rl", r"clip_ratio/(low|high|region)_mean", "fraction"),
    Panel("Policy ratio", "rl", r"ratio/mean", "ratio"),
    Panel("Spread of the log ratio", "rl", r"ratio/log_rms", "rms"),
    Panel("Completion length", "rl", r"completions/mean_length", "tokens"),
    Panel("Left-to-right decoding (k = 1)", "rl", r"decoding/(local|global)_ar_1", "share of tokens"),
    Panel("RL loss", "rl", r"loss", "loss"),
    Panel("Gradient norm, SFT", "sft", r"grad_norm", "norm"),
    Panel("Gradient norm, RL", "rl", r"grad_norm", "norm"),
    Panel("Time per step, SFT", "sft", r"time/(.+)_s", "seconds", smooth=False),
    Panel("Time per phase, RL", "rl", r"time/(.+)_s", "seconds", smooth=False),
)


def write_report(run_dir: str | os.PathLike) -> Path:
    """Write `run_dir/report.html` (beside, then renamed) from the files that exist, and return its path."""
    run_dir = Path(run_dir)
    path = run_dir / "report.html"
    write_beside(path, report_html(read_run(run_dir)))
    return path


def report_html(run: RunData) -> str:
    sections = (
        _results(run),
        _curves(run),
        _samples(run),
        _player(run),
        _decoding_order(run),
        _time(run),
        _appendix(run),
    )
    body = "\n".join(section for section in sections if section)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<link rel="icon" href="data:,"><title>{esc(run.name)}: d1jax report</title><style>{STYLE}</style></head>\n'
        f"<body><main>{_header(run)}\n{body}\n</main><script>{SCRIPT}</script></body></html>\n"
    )


def _section(name: str, title: str, lead: str, body: str) -> str:
    lead = f'<p class="lead">{lead}</p>' if lead else ""
    return f'<section id="{name}" aria-labelledby="{name}-h"><h2 id="{name}-h">{title}</h2>{lead}{body}</section>'


def _header(run: RunData) -> str:
    task = run.summary.get("task")
    about = f"Post-training run, task {esc(task)}" if task else "Post-training run"
    stage_rows = primary_stages(run.summary)
    context = []
    if len(stage_rows) > 1:
        context.append(f"{esc(stage_rows[0].owner)} before the arrow, {esc(stage_rows[-1].owner)} after it.")
    decoding = run.summary.get("decoding")
    if isinstance(decoding, dict) and decoding:
        parts = ", ".join(f"{esc(k.replace('_', ' '))} {esc(v)}" for k, v in decoding.items())
        context.append(f"Decoding: {parts}.")
    notices = "".join(f"<li>{esc(text)}</li>" for text in run.notices)
    return (
        f'<header><h1>{esc(run.name)}</h1><p class="task">{about}</p><p class="verdict">{esc(verdict(run))}</p>'
        f'<p class="context">{" ".join(context)}</p></header>'
        + (f'<div class="notice" role="note"><ul>{notices}</ul></div>' if notices else "")
    )


def _results(run: RunData) -> str:
    table = scores(run.summary)
    if not table:
        return ""
    rows = [row for group in table.values() for row in group]
    extras = list(dict.fromkeys(key for row in rows for key in row.others))
    ends = [v for row in rows for v in (row.low, row.high, row.rate) if v is not None]
    span = (max(0.0, min(ends, default=0) - 0.03), min(1.0, max(ends, default=1) + 0.03))
    head = "".join(f'<th scope="col" class="num">{esc(key.replace("_", " "))}</th>' for key in extras)
    width = 4 + len(extras)
    body = []
    for key, group in table.items():
        stage_rows = [row for row in group if row.kind == "stage"]
        lines = [_result_row(row, extras, span, row is (stage_rows or [None])[-1]) for row in group]
        title = esc(set_name(key)) + (" (primary)" if key == primary_set(run.summary) and len(table) > 1 else "")
        body.append(
            f'<tbody class="set"><tr class="head"><th colspan="{width}" scope="rowgroup">{title}</th></tr>'
            f"{''.join(lines)}</tbody>"
        )
    rest = f'<td colspan="{len(extras)}"></td>' if extras else ""
    html = (
        '<div class="scroll" tabindex="0" role="region" aria-label="Results table"><table class="results"><thead><tr>'
        '<th scope="col">Evaluated on</th><th scope="col" class="num">n</th>'
        '<th scope="col" class="num">solved <span class="ci">[95\u202f% interval]</span></th>'
        f'<th scope="col" class="plot">solved, with its interval</th>{head}</tr></thead>{"".join(body)}'
        '<tfoot aria-hidden="true"><tr><td colspan="3"></td>'
        f'<td class="plot">{interval_axis(span)}</td>{rest}</tr></tfoot>'
        "</table></div>"
    )
    lead = "Hollow marks are baselines, which need no model; filled marks are the stages of this run."
    return _section("results", "Before and after", lead, html)


def _result_row(row: Score, extras: Sequence[str], span: tuple[float, float], last: bool) -> str:
    kind = "baseline" if row.kind == "baseline" else "last" if last else "first"
    known = None not in (row.low, row.high)
    interval = f'<span class="ci">[{100 * row.low:.1f}, {100 * row.high:.1f}]</span>' if known else ""
    plot = ""
    if row.rate is not None:
        low, high = (row.low, row.high) if known else (row.rate, row.rate)
        spoken = f"{row.owner}: {percent(row.rate)}, 95 % interval {percent(low)} to {percent(high)}"
        plot = interval_plot(low, row.rate, high, span, kind, spoken)
    prefix = "after " if row.kind == "stage" else '<span class="kind">baseline: </span>'
    others = "".join(f'<td class="num">{_measure(key, row.others.get(key))}</td>' for key in extras)
    return (
        f'<tr class="{row.kind} {kind}"><th scope="row">{prefix}{esc(row.owner)}</th>'
        f'<td class="num">{"–" if row.n is None else f"{row.n:,}"}</td>'
        f'<td class="num rate">{percent(row.rate)} {interval}</td><td class="plot">{plot}</td>{others}</tr>'
    )


def _measure(key: str, value: float | None) -> str:
    """Rates of known meaning as percentages; anything else as the number it is."""
    is_rate = key.endswith(("_rate", "_accuracy", "_frac")) or key in ("parsed", "numbers_used", "accuracy")
    return percent(value) if is_rate else compact(value)


def _curves(run: RunData) -> str:
    found = [(panel, _series(panel, run.metrics)) for panel in PANELS]
    curves = [s for panel, series in found if panel.pattern.startswith("eval/") for s in series]
    evaluated = [y for curve in curves for y in curve.y if finite(y) is not None]
    # The two panels of held-out accuracy share one axis: SFT and RL are to be compared by eye.
    shared = (0.0, max(evaluated) * 1.1 + 0.01) if evaluated else None
    lengths: dict[str, float] = {}
    for row in run.metrics:
        lengths[str(row.get("stage"))] = max(lengths.get(str(row.get("stage")), 1.0), float(row["step"]))
    figures = ""
    for panel, series in found:
        if series:
            chart = Chart(
                title=panel.title,
                x_label=f"{stage_name(panel.stage)} step",
                y_label=panel.y_label,
                series=series,
                smooth=panel.smooth,
                x_range=(0.0, lengths[panel.stage]),
                y_range=shared if panel.pattern.startswith("eval/") else None,
            )
            figures += line_chart(chart)
    if not figures:
        return ""
    lead = (
        "Thin lines are single steps, bold lines a centred moving mean over the number of steps beside the title. "
        "Point at a curve, or focus it and use the arrow keys, to read its values."
    )
    return _section("curves", "Learning curves", lead, f'<div class="panels">{figures}</div>')


def _series(panel: Panel, metrics: Sequence[Mapping[str, Any]]) -> tuple[Series, ...]:
    pattern = re.compile(panel.pattern)
    points: dict[str, list[tuple[float, float]]] = {}
    for row in metrics:
        if row.get("stage") != panel.stage:
            continue
        for key, value in row.items():
            if isinstance(value, int | float) and (match := pattern.fullmatch(key)):
                name = set_name(match.group(1)) if match.groups() else panel.y_label
                points.setdefault(name, []).append((float(row["step"]), float(value)))
    return tuple(
        Series(name, tuple(x for x, _ in sorted(p)), tuple(y for _, y in sorted(p))) for name, p in points.items()
    )


def _samples(run: RunData) -> str:
    groups = list(by_sample(run.samples).values())
    if not groups:
        return ""
    cards = [sample_card(group) for group in groups[: SAMPLES_SHOWN + SAMPLES_FOLDED]]
    css = "samples" if all(group[0].get("columns") for group in groups) else "samples texts"
    body = f'<div class="{css}">{"".join(cards[:SAMPLES_SHOWN])}</div>'
    if len(cards) > SAMPLES_SHOWN:
        rest = "".join(cards[SAMPLES_SHOWN:])
        folded = f"<summary>{len(cards) - SAMPLES_SHOWN} more</summary>"
        body += f'<details>{folded}<div class="{css}">{rest}</div></details>'
    left = f" {len(groups) - len(cards):,} more are in samples.jsonl." if len(groups) > len(cards) else ""
    lead = f"The first samples in file order, not chosen by outcome.{left}"
    if css == "samples":
        lead += " Given cells are bold, wrong cells tinted and underlined."
    return _section("samples", "Samples", lead, body)


def _player(run: RunData) -> str:
    if not run.samples:
        return ""
    lead = "How a completion came out of its masks, one denoising step at a time."
    return _section("player", "Denoising", lead, viewer_html(run.samples[:SAMPLES_PLAYED]))


def _decoding_order(run: RunData) -> str:
    figures = figures_of(run.summary)
    if not figures:
        return ""
    lead = (
        f"When each token of the {esc(set_name(primary_set(run.summary)))} completions was committed, and how much of that "
        "went from left to right. Local@k: the last k tokens were the k left neighbours, in order. Global@k: the token was "
        "among the k leftmost that were still masked. Left to right gives 1; tokens of one step count from left to right. "
        "All masked: what the model held likely before the first step."
    )
    return _section("order", "Decoding order", lead, f'<div class="panels">{figures}</div>')


def _time(run: RunData) -> str:
    wall = run.summary.get("wall_seconds")
    wall = {str(k): finite(v) for k, v in wall.items() if finite(v)} if isinstance(wall, dict) else {}
    phases: dict[str, dict[str, list[float]]] = {stage: {} for stage in wall}
    for row in run.metrics:
        for key, value in row.items():
            match = re.fullmatch(r"time/(.+)_s", key)
            if match and match.group(1) != "step" and finite(value) is not None:  # a step is all of its phases
                phases.setdefault(str(row.get("stage")), {}).setdefault(match.group(1), []).append(float(value))
    rows = []
    for stage, found in phases.items():
        measured = sum(sum(values) for values in found.values())
        total = wall.get(stage) or measured
        entries = [(name.replace("_", " "), sum(v), sum(v) / len(v)) for name, v in found.items()]
        if total - measured > 0.005 * total and stage in wall:
            entries.append(("everything else" if found else "whole stage", total - measured, None))
        rows += [_time_row(stage, *entry, total) for entry in entries]
    if not rows:
        return ""
    numbers = "".join(f'<th scope="col" class="num">{name}</th>' for name in ("total, s", "a step, s", "share"))
    body = (
        '<div class="scroll" tabindex="0" role="region" aria-label="Time table"><table><thead><tr>'
        f'<th scope="col">Stage</th><th scope="col">Phase</th>{numbers}<td></td></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
    spent = ", ".join(f"{esc(stage_name(k))} {v:,.1f}\u202fs" for k, v in wall.items())
    lead = f"Wall time: {spent}. Everything else is compilation, evaluation and saving." if spent else ""
    return _section("time", "Where the time went", lead, body)


def _time_row(stage: str, phase: str, seconds: float, mean: float | None, total: float) -> str:
    share = seconds / total if total else 0.0
    bar = (
        '<svg viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect width="{100 * min(1, share):.1f}" height="10"/></svg>'
    )
    return (
        f'<tr><th scope="row">{esc(stage_name(stage))}</th><td>{esc(phase)}</td><td class="num">{seconds:,.1f}</td>'
        f'<td class="num">{compact(mean)}</td><td class="num">{percent(share, 0)}</td><td class="share">{bar}</td></tr>'
    )


def _appendix(run: RunData) -> str:
    parts = []
    if run.config:
        parts.append(f"<details><summary>Resolved configuration</summary><pre>{esc(run.config)}</pre></details>")
    environment = run.summary.get("environment")
    if isinstance(environment, dict) and environment:
        rows = "".join(f'<tr><th scope="row">{esc(k)}</th><td>{esc(v)}</td></tr>' for k, v in environment.items())
        table = f'<div class="scroll"><table><tbody>{rows}</tbody></table></div>'
        parts.append(f"<details open><summary>Environment</summary>{table}</details>")
    return _section("setup", "Configuration and environment", "", "".join(parts)) if parts else ""
