"""An evaluate stage: several samples of every row of the headline set, so that what RL changes can be seen.

RL raises maj@k where it makes right answers likelier, and pass@k only where it finds new ones (DeepSeekMath, arXiv 2402.03300, section
5.2.2).
Greedy accuracy at half of the denoising steps tells how far decoding has become parallel (DiffuCoder, arXiv 2506.20639).

R rows, S samples of each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from d1jax.config import Config
from d1jax.data.examples import Problems
from d1jax.diffusion.rollout import Rollout
from d1jax.evaluation.decode import decode, texts_of
from d1jax.evaluation.decoding_order import global_curve, local_curve
from d1jax.evaluation.grade import graded, score_texts
from d1jax.evaluation.statistics import over_k, wilson_interval
from d1jax.files import write_json, write_jsonl
from d1jax.models import processes
from d1jax.models.transformer import Variables
from d1jax.tasks.judging import offers
from d1jax.training.context import Context

Drawn = tuple[Rollout, list[str], list[dict[str, float]]]  # samples, their texts and grades
KEY = 7919  # of the samples, beside the key of the greedy evaluation


def run(context: Context, variables: Variables, stage: str, weights: str, out: Path) -> None:
    """Writes out.json (the numbers of a stage, `weights` being the stage whose weights these are) and out.jsonl (a sample a line).

    A stage that was stopped begins again and draws the same samples; a finished one is not done again.
    """
    record, lines = out.with_suffix(".json"), out.with_suffix(".jsonl")
    if processes.agreed(record.exists):
        return
    config = context.config.evaluate
    problems = first_rows(next(iter(context.eval_sets.values())), config.rows)
    repeated = _repeated(problems, config.samples)
    rollout, texts, grades = _drawn(context, variables, repeated, stage, config.temperature)
    right_RS = _right(grades, config.samples)
    named = offers(context.task, repeated.rows, texts)
    answers = (
        None if named is None else [named[at : at + config.samples] for at in range(0, len(named), config.samples)]
    )
    others = sorted(set(grades[0]) - {"solved"})
    write_jsonl(
        lines,
        (
            {"row": index // config.samples, "sample": index % config.samples, "completion": text, "grade": grade}
            for index, (text, grade) in enumerate(zip(texts, grades, strict=True))
        ),
    )
    write_json(
        record,
        {
            "weights": weights,
            "set": next(iter(context.eval_sets)),
            "rows": len(problems),
            "samples": config.samples,
            "temperature": config.temperature,
            **over_k(right_RS, answers, context.config.seed),
            "grades": {name: float(np.nanmean([grade[name] for grade in grades])) for name in others},
            "tokens": float(rollout.length_B.mean()),
            "temperatures": _temperatures(context, variables, repeated, stage, (rollout, texts, grades)),
            "steps": {str(steps): _at_steps(context, variables, problems, stage, steps) for steps in config.steps},
        },
    )


def _drawn(context: Context, variables: Variables, repeated: Problems, stage: str, temperature: float) -> Drawn:
    """(rollout, texts, grades) of samples at a temperature; the draws of a sample are the same numbers at every temperature."""
    drawing = _with(context, evaluation={"temperature": temperature})
    named = f"{stage}: samples at temperature {temperature:g}"
    rollout = decode(drawing, variables, repeated, named, jax.random.fold_in(context.key(stage), KEY))
    texts = texts_of(context, rollout)
    return rollout, texts, graded(context, repeated, texts)


def _right(grades: Sequence[Mapping[str, float]], samples: int) -> np.ndarray:
    """Which samples are right, [R, S]."""
    return np.array([grade["solved"] == 1.0 for grade in grades]).reshape(-1, samples)


def _temperatures(
    context: Context, variables: Variables, repeated: Problems, stage: str, drawn: Drawn
) -> dict[str, dict[str, Any]]:
    """{temperature: its numbers}: of the samples that were drawn, and of those at the other temperatures; {} where there are no others."""
    config = context.config.evaluate
    if not config.temperatures:
        return {}
    found = {config.temperature: drawn}
    found |= {one: _drawn(context, variables, repeated, stage, one) for one in config.temperatures}
    return {f"{one:g}": _at_temperature(drawn, config.samples, context.config.seed) for one, drawn in found.items()}


def _at_temperature(drawn: Drawn, samples: int, seed: int) -> dict[str, Any]:
    """{"avg", "pass", "local_ar", "global_ar", "tokens"}: what a temperature does to the answers, and to the order in which they are
    decoded (DiffuCoder, arXiv 2506.20639, section 4).
    """
    rollout, _, grades = drawn
    found = over_k(_right(grades, samples), None, seed)
    return {
        "avg": found["avg"],
        "pass": found["pass"],
        "local_ar": local_curve(rollout.unmask_step_BC).get(1),
        "global_ar": global_curve(rollout.unmask_step_BC).get(1),
        "tokens": float(rollout.length_B.mean()),
    }


def table(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The numbers of evaluate stages as lines of text: {stage: what `run` wrote}."""
    lines = []
    for stage, one in found.items():
        drawn = f"{one['rows']} rows of {one['set']} x {one['samples']} samples at temperature {one['temperature']:g}"
        lines += ["", f"{stage}, weights of {one['weights']}: {drawn}"]
        measures = [("avg", one["avg"])]
        measures += [(f"{kind}@{k}", value) for kind in ("pass", "maj") for k, value in one[kind].items()]
        measures += [
            (f"{kind}, T {temperature}", value)
            for temperature, other in one.get("temperatures", {}).items()
            for kind, value in {
                "avg": other["avg"],
                **{f"pass@{k}": v for k, v in list(other["pass"].items())[-1:]},
            }.items()
        ]
        measures += [(f"greedy, {steps} steps", value) for steps, value in one["steps"].items()]
        lines += [
            f"  {name:<18} {value['value']:>6.1%}  {value['ci95'][0]:.1%} .. {value['ci95'][1]:.1%}"
            for name, value in measures
        ]
    return lines


def _at_steps(context: Context, variables: Variables, problems: Problems, stage: str, steps: int) -> dict[str, Any]:
    """Greedy accuracy with this number of denoising steps."""
    greedy = _with(context, evaluation={"temperature": 0.0}, sampler={"steps": steps})
    rollout = decode(greedy, variables, problems, f"{stage}: {steps} steps")
    scores = score_texts(context, problems, texts_of(context, rollout))
    solved = scores["solved_rate"] * scores["n"]
    return {"value": scores["solved_rate"], "ci95": list(wilson_interval(solved, scores["n"]))}


def _with(context: Context, **changes: Mapping[str, Any]) -> Context:
    """The context under other settings of the named sections."""
    sections = {name: dataclasses.replace(getattr(context.config, name), **one) for name, one in changes.items()}
    config: Config = dataclasses.replace(context.config, **sections)
    return dataclasses.replace(context, config=config)


def first_rows(problems: Problems, count: int) -> Problems:
    """The first `count` rows (0: all)."""
    return problems.at(np.arange(min(count or len(problems), len(problems))))


def _repeated(problems: Problems, samples: int) -> Problems:
    """Every row `samples` times in a row."""
    return problems.at(np.repeat(np.arange(len(problems)), samples))
