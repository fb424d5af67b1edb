"""docs/experiments.md from benchmarks/results/methods.json: tables, intervals over seeds, pictures."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
from denoising_report import denoising_section
from methods_charts import forest, lines
from methods_plan import INNER_UPDATES, PROMPT_MASKS, SHARED, TASKS, ablation_arms
from report_tables import mean_and_half, percent, points, table

from d1jax.files import atomic_write
from d1jax.telemetry.report.line_chart import Chart, Series

Row = dict[str, Any]
NAMES = {"sudoku": "Sudoku 4x4", "countdown": "Countdown, 3 numbers"}
OTHER_GRADES = {"sudoku": ("cell_accuracy",), "countdown": ("numbers_used", "parsed")}
PAIR = ("coupled_grpo", "coupled_decoupled")
DENOISING = Path(__file__).parent / "results" / "denoising_steps.json"
GSM8K = Path(__file__).parent / "results" / "gsm8k_cpu.md"  # written by hand
PIPELINES = Path(__file__).parent / "results" / "pipelines_cpu.md"  # written by hand
CONCLUSIONS = Path(__file__).parent / "results" / "methods_conclusions.md"
NO_CONCLUSIONS = "*None yet. They are written by hand in `benchmarks/results/methods_conclusions.md`.*"


def gain(row: Row, decoding: str = "shared") -> float:
    """In solved problems; "shared": greedy, under the sampler that all share; "sampled": at the temperature of RL."""
    return row["after"][decoding]["solved"] - row["before"][decoding]["solved"]


def by_arm(rows: Sequence[Row], task: str) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["task"] == task:
            found.setdefault(row["arm"], []).append(row)
    return found


# -- sections --------------------------------------------------------------------------------------------------------------


def setup_section(data: Row) -> str:
    rows = []
    for task, settings in data["settings"].items():
        runs = [row for row in data["runs"] if row["task"] == task]
        if not runs:
            continue
        model, rl, sampler = settings["model"], settings["rl"], settings["sampler"]
        optimizer = rl["optimizer"]
        rows.append([
            NAMES[task],
            f"width {model['width']}, {model['layers']} layers",
            f"{sampler['completion_length']} tokens in {sampler['steps']} steps",
            f"{settings['sft']['steps']} updates: {bases(runs)} solved",
            f"{rl['prompts_per_step']} x {rl.get('num_generations') or rl['group_size']}",  # as d1jax 0.1 called it
            f"{optimizer['learning_rate']:g}, {optimizer['schedule']}",
            ", ".join(f"{weight:g} {name}" for name, weight in rl["reward_weights"].items()),
            f"{runs[0]['budget']:,}",
        ])  # fmt: skip
    head = (
        "task",
        "model",
        "sampler",
        "base (SFT)",
        "prompts x group",
        "learning rate",
        "reward",
        "forward passes x rows",
    )
    return table(head, rows)


def usual_base(runs: Sequence[Row]) -> Row:
    """The scores before RL of the base that most runs started from."""
    counted = Counter(run["before"]["shared"]["solved"] for run in runs)
    most = counted.most_common(1)[0][0]
    return next(run["before"] for run in runs if run["before"]["shared"]["solved"] == most)


def bases(runs: Sequence[Row]) -> str:
    """What the base solves; several figures where it was trained again."""
    return " or ".join(percent([solved]) for solved in sorted({row["before"]["shared"]["solved"] for row in runs}))


def method_section(rows: Sequence[Row], task: str, ablations: set[str]) -> str:
    arms = {arm: runs for arm, runs in by_arm(rows, task).items() if arm not in ablations}
    grades = OTHER_GRADES[task]
    base = usual_base([run for runs in arms.values() for run in runs]) if arms else {"shared": {}, "sampled": {}}
    cells = []
    for arm, runs in sorted(arms.items(), key=lambda item: -np.mean([gain(run) for run in item[1]])):
        one = runs[0]
        cells.append([
            f"`{arm}`",
            points(gain(run) for run in runs),
            percent(run["after"]["shared"]["solved"] for run in runs),
            points(gain(run, "sampled") for run in runs),
            *(percent(run["after"]["shared"][grade] for run in runs) for grade in grades),
            f"{np.mean([run['train']['reward'] for run in runs]):.3f}",
            f"{one['passes_of_step']:,}",
            f"{one['steps']} x {one['inner_updates']}",
            f"{np.mean([run['seconds'] for run in runs]):.0f}",
            remarks(runs, base),
        ])  # fmt: skip
    before, sampled = base["shared"], base["sampled"]
    title = [f"{grade.replace('_', ' ')} (base {100 * before.get(grade, 0):.1f} %)" for grade in grades]
    head = (
        "method",
        "gain, greedy",
        "solved, greedy",
        f"gain, sampled (base {100 * sampled.get('solved', 0):.1f} %)",
        *title,
        "reward at the end",
        "passes x rows of a step",
        "steps x updates",
    )
    return table((*head, "seconds", "remarks"), cells)


def care_section(rows: Sequence[Row], ablations: set[str]) -> str:
    """What else than the method differs between the rows: how many updates each makes, and whether its clip ever acts."""
    lines_ = []
    for task in TASKS:
        arms = {arm: runs for arm, runs in by_arm(rows, task).items() if arm not in ablations}
        if len(arms) < 3:
            continue
        updates = [runs[0]["steps"] * runs[0]["inner_updates"] for runs in arms.values()]
        gains = [float(np.mean([gain(run) for run in runs])) for runs in arms.values()]
        rank = scipy.stats.spearmanr(updates, gains)
        lines_.append(
            f"- {NAMES[task]}: one learning rate serves methods of {min(updates)} to {max(updates)} updates. The rank correlation "
            f"between gain and number of updates over the {len(arms)} methods is {rank.statistic:.2f} (p = {rank.pvalue:.1g})."
        )
    clipped = {
        (row["task"], row["arm"]): row["train"].get("clip_ratio/region_mean") or 0.0
        for row in rows
        if row["arm"] not in ablations
    }
    acting = sorted({arm for (_, arm), share in clipped.items() if share > 0.001})
    lines_.append(
        "- Methods whose clip acted on more than 0.1 % of tokens in the last tenth of a run: "
        + (", ".join(f"`{arm}`" for arm in acting) or "none")
        + ". For all others clip ranges make no difference here."
    )
    return "\n".join(lines_)


def code_section(rows: Sequence[Row]) -> str:
    """How many rows are of which commit; of those that made few, which methods."""
    made: dict[str, list[str]] = {}
    for row in rows:
        made.setdefault(row["environment"].get("commit", "an unknown one"), []).append(row["arm"])
    lines_ = []
    for commit, arms in made.items():
        few = f" ({', '.join(f'`{arm}`' for arm in sorted(set(arms)))})" if 4 * len(arms) < len(rows) else ""
        lines_.append(f"- {len(arms)} rows of commit {commit}{few}")
    return "\n".join(lines_)


def remarks(runs: Sequence[Row], base: Row) -> str:
    notes = []
    if runs[0]["before"]["shared"]["solved"] != base["shared"]["solved"]:
        notes.append(f"from a base that was trained again: {percent([runs[0]['before']['shared']['solved']])}")
    if len(runs) < 3:
        notes.append(f"{len(runs)} seed{'s' if len(runs) > 1 else ''} only")
    diverged = sum(run["train"]["diverged"] for run in runs)
    if diverged:
        notes.append(f"diverged {diverged} of {len(runs)}")
    fell = sum(run["after"]["shared"]["solved"] < run["before"]["shared"]["solved"] / 2 for run in runs)
    if fell:
        notes.append(f"fell below half of the base {fell} of {len(runs)}")
    if "own" in runs[0]["after"]:
        own = [run["after"]["own"]["solved"] for run in runs]
        notes.append(f"under its own sampler {percent([runs[0]['before']['own']['solved']])} to {percent(own)}")
    return "; ".join(notes)


def pair_section(rows: Sequence[Row]) -> str:
    cells = []
    for task in TASKS:
        arms = by_arm(rows, task)
        if not all(arm in arms for arm in PAIR):
            continue
        first, second = ({run["seed"]: gain(run) for run in arms[arm]} for arm in PAIR)
        both = sorted(first.keys() & second.keys())
        difference = points(first[seed] - second[seed] for seed in both)
        cells.append([NAMES[task], points(first.values()), points(second.values()), difference])
    head = ("task", f"`{PAIR[0]}`, greedy", f"`{PAIR[1]}`, greedy", "difference, seed by seed")
    return table(head, cells)


def inner_updates_section(arms: dict[str, list[Row]]) -> str:
    cells = []
    for mu in INNER_UPDATES:
        fresh, fixed = arms.get(f"mu {mu}, fresh masks", []), arms.get(f"mu {mu}, fixed masks", [])
        runs = fresh or fixed
        if runs:
            cells.append([str(mu), str(runs[0]["steps"]), gain_of(fresh), gain_of(fixed) if mu > 1 else "the same"])
    return table(("inner updates", "RL steps", "fresh masks, gain", "one mask for all, gain"), cells)


def prompt_mask_section(arms: dict[str, list[Row]]) -> str:
    runs = {p: arms.get(f"p {p}", []) for p in PROMPT_MASKS}
    cells = [[f"{p:g}", gain_of(rows), reward_of(rows)] for p, rows in runs.items() if rows]
    return table(("p", "gain", "reward at the end"), cells)


def gain_of(runs: Sequence[Row]) -> str:
    return points(gain(run) for run in runs) if runs else "–"


def reward_of(runs: Sequence[Row]) -> str:
    return f"{np.mean([run['train']['reward'] for run in runs]):.3f}"


def overridden_section(rows: Sequence[Row]) -> str:
    """What the context changed in a method's file, by method; what is the same for both tasks stands once."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        for name, change in row["overridden"].items():
            if not name.startswith("rl.steps"):
                found.setdefault(row["arm"], {})[f"{name}: {change}"] = None
    return "\n".join(f"- `{arm}`: {'; '.join(changes)}" for arm, changes in sorted(found.items()))


# -- pictures --------------------------------------------------------------------------------------------------------------


def pictures(data: Row, ablations: set[str]) -> dict[str, str]:
    """File name -> SVG."""
    found = {}
    for task in TASKS:
        arms = {arm: runs for arm, runs in by_arm(data["runs"], task).items() if arm not in ablations}
        if arms:
            found[f"methods_{task}.svg"] = forest(f"{NAMES[task]}: gain in solved problems, mean and 95 %", bars(arms))
    arms = by_arm(data["runs"], "sudoku")
    mus = [
        Series(f"{kind} masks", *xy(arms, INNER_UPDATES, name))
        for kind, name in (
            ("fresh", lambda mu: f"mu {mu}, fresh masks"),
            ("fixed", lambda mu: f"mu {mu}, {'fixed' if mu > 1 else 'fresh'} masks"),
        )
    ]
    ps = Series("d1", *xy(arms, PROMPT_MASKS, lambda p: f"p {p}", scale=100))
    for file, title, label, series in (
        ("ablation_inner_updates.svg", "d1 on Sudoku: inner updates at equal cost", "inner updates", tuple(mus)),
        ("ablation_prompt_mask.svg", "d1 on Sudoku: prompt mask", "share of the prompt that is masked, %", (ps,)),
    ):
        picture = lines(Chart(title, label, "gain in points", tuple(s for s in series if s.x), smooth=False))
        if picture:
            found[file] = picture
    return found


def bars(arms: dict[str, list[Row]]) -> list[tuple[str, float, float, float]]:
    rows = []
    for arm, runs in arms.items():
        mean, half = mean_and_half([gain(run) for run in runs])
        half = 0.0 if math.isnan(half) else half
        rows.append((arm, mean - half, mean, mean + half))
    return sorted(rows, key=lambda row: -row[2])


def xy(
    arms: dict[str, list[Row]], values: Sequence[float], name: Callable[[Any], str], scale: float = 1.0
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    there = [value for value in values if arms.get(name(value))]
    means = [100 * float(np.mean([gain(run) for run in arms[name(value)]])) for value in there]
    return tuple(scale * value for value in there), tuple(means)


# -- the page --------------------------------------------------------------------------------------------------------------


def page(data: Row, conclusions: str) -> str:
    rows, ablations = data["runs"], set(ablation_arms())
    shown = [row for row in rows if row["arm"] not in ablations]
    problems = next(iter(data["settings"].values()))["task"]["eval_rows"]
    environments = sorted({" ".join(f"{k} {v}," for k, v in row["environment"].items()).rstrip(",") for row in rows})
    hours = sum({row["digest"]: row["seconds"] for row in rows}.values()) / 3600
    arms = by_arm(rows, "sudoku")
    seeds, shared = ", ".join(map(str, data["seeds"])), ", ".join(f"`{name}`" for name in SHARED)
    parts = [
        "# Experiments",
        "<!-- Written by `python benchmarks/methods.py --report`; edit benchmarks/results/methods_conclusions.md instead. -->",
        f"""Every method of [methods.md](methods.md) from the same partly trained model, at the same cost, over seeds {seeds}.
Cost is counted in forward passes of a row: the sampler's, and for every inner update and view three for the policy (a backward pass counts
as two), one for the reference where there is a KL term to it, and one for the old policy in all but the first inner update. A method that
takes fewer passes a step does more steps. Equal for all: {shared}; the rest is the method file's.
Gains are in points of solved problems on {problems} generated held-out ones, decoded greedily or sampled at temperature 1, as in RL;
intervals are 95 % by Student's t over the seeds, wide with three. The base is the same for all seeds, so they do not hold its luck.
The models are tiny: the order of methods here need not be theirs at 8B, and the number of updates alone explains much of it (see
"What differs beside the method").""",
        setup_section(data),
        "## Conclusions\n\n<!-- conclusions: begin (benchmarks/results/methods_conclusions.md) -->\n"
        + (conclusions.strip() or NO_CONCLUSIONS)
        + "\n<!-- conclusions: end -->",
    ]
    for task in TASKS:
        if any(row["task"] == task for row in shown):
            picture = f"![Gain of each method on {NAMES[task]}](images/methods_{task}.svg)"
            parts += [f"## {NAMES[task]}", method_section(rows, task, ablations), picture]
    if {*PAIR} <= {row["arm"] for row in rows}:
        parts += ["## Coupled against independent maskings", pair_section(rows)]
    if any(arm in arms for arm in ablations):
        parts += [
            "## d1's ablations, Sudoku",
            "How many inner updates a batch of rollouts bears, with a new prompt mask in each or one for all (figure 5 of the paper):",
            inner_updates_section(arms),
            "![Gain by inner updates](images/ablation_inner_updates.svg)",
            "How much of the prompt is masked, with 12 inner updates:",
            prompt_mask_section(arms),
            "![Gain by prompt mask](images/ablation_prompt_mask.svg)",
        ]
    parts += ["## What differs beside the method", care_section(rows, ablations)]
    if DENOISING.exists():
        steps = denoising_section(json.loads(DENOISING.read_text(encoding="utf-8")))
        parts += ["## More denoising steps", steps, "![Gain by denoising steps](images/denoising_steps.svg)"]
    if GSM8K.exists():
        parts += ["## GSM8K on a CPU, from nothing", GSM8K.read_text(encoding="utf-8").strip()]
    if PIPELINES.exists():
        parts += ["## Pipelines", PIPELINES.read_text(encoding="utf-8").strip()]
    parts += ["## Changed in the method files", overridden_section(shown)]
    if data["left_out"]:
        parts += ["## Left out", "\n".join(f"- {' '.join(line.split())}" for line in data["left_out"])]
    parts += [
        "## Again",
        f"`python benchmarks/methods.py`, stopped and continued at will; {hours:.1f} hours of one core."
        " Numbers: `benchmarks/results/methods.json`.",
        "\n".join(f"- {environment}" for environment in environments),
        code_section(rows),
    ]
    return "\n\n".join(parts) + "\n"


def write_report(data: Row, docs: Path) -> None:
    conclusions = CONCLUSIONS.read_text(encoding="utf-8") if CONCLUSIONS.exists() else ""
    atomic_write(docs / "experiments.md", page(data, conclusions))
    for name, svg in pictures(data, set(ablation_arms())).items():
        atomic_write(docs / "images" / name, svg)
    print(f"report: {docs / 'experiments.md'}")
