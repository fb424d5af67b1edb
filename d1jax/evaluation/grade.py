"""What completions are worth: grades of a task, how sure their means are, and the table of them.

C completion columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from d1jax.data.examples import Problems
from d1jax.diffusion.rollout import Rollout
from d1jax.evaluation import decoding_order
from d1jax.evaluation.decode import decode, look_ahead, texts_of
from d1jax.evaluation.statistics import wilson_interval
from d1jax.models import processes
from d1jax.models.transformer import Variables
from d1jax.tasks.judging import grade_all
from d1jax.tasks.task import DataError
from d1jax.training.context import Context

NOT_GRADES = ("n", "solved_rate", "solved_rate_ci95", "nfe", "decoding_order", "texts")


def score_texts(context: Context, problems: Problems, texts: Sequence[str]) -> dict[str, Any]:
    """{"n", "solved_rate", "solved_rate_ci95", and the mean of every other grade of the task}."""
    grades = graded(context, problems, texts)
    n = len(grades)
    names = grades[0].keys()
    wrong = next((index for index, grade in enumerate(grades) if grade.keys() != names), None)
    if wrong is not None or names & set(NOT_GRADES):
        told = f"row 0 {sorted(names)}" + ("" if wrong is None else f", row {wrong} {sorted(grades[wrong])}")
        raise DataError(
            f"task {context.task.name!r}: grades are {told}; every row has the same names, none of them {', '.join(NOT_GRADES)}"
        )
    means = {name: _mean([grade[name] for grade in grades]) for name in grades[0]}
    solved = means.pop("solved")
    return {"n": n, "solved_rate": solved, "solved_rate_ci95": list(wilson_interval(solved * n, n)), **means}


def graded(context: Context, problems: Problems, texts: Sequence[str]) -> list[dict[str, float]]:
    """What the task says of every text, of which each of several processes judges its own part."""

    def of_rows(some: slice) -> list[dict[str, float]]:
        return grade_all(context.task, problems.rows[some], texts[some])

    return processes.divided(of_rows, len(texts))


def _mean(values: Sequence[float]) -> float:
    """Over those that are numbers: a grade of one of several tasks is NaN for the rows of the others. 0 where none is."""
    known = [value for value in values if value == value]
    return float(np.mean(known)) if known else 0.0


def baseline_scores(context: Context, problems: Problems) -> dict[str, dict[str, Any]]:
    """The task's answers that need no model, graded like a model's."""
    answers = [context.task.baselines(row) for row in problems.rows]
    return {name: score_texts(context, problems, [answer[name] for answer in answers]) for name in answers[0]}


def evaluate(
    context: Context, variables: Variables, progress: bool = False
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(scores, samples): the scores of every evaluation set under its name, and the first rows of each for people to read.

    Beside the grades a score has "nfe" and "decoding_order", which is `decoding_order.summary`.
    """
    scores = {}
    samples = []
    for name, problems in context.eval_sets.items():
        rollout = decode(context, variables, problems, f"evaluating {name}" if progress else "")
        texts = texts_of(context, rollout)
        order = decoding_order.summary(rollout, look_ahead(context, variables, problems))
        measures = {"nfe": float(rollout.nfe_B.mean()), "decoding_order": order}
        scores[name] = score_texts(context, problems, texts) | measures
        kept = range(min(context.config.evaluation.samples, len(problems)))
        samples += [_sample(context, problems, rollout, texts, name, index) for index in kept]
    return scores, samples


def watch(context: Context, variables: Variables) -> dict[str, float]:
    """The scores of the set that is looked at during training as metrics, for learning curves and for `evaluation.select`."""
    context = context.evaluated
    name = context.config.watched_set
    problems = context.eval_sets[name]
    scores = score_texts(context, problems, texts_of(context, decode(context, variables, problems)))
    scores["solved"] = scores.pop("solved_rate")
    return {f"eval/{name}/{grade}": value for grade, value in scores.items() if isinstance(value, float)}


def _sample(
    context: Context, problems: Problems, rollout: Rollout, texts: list[str], name: str, index: int
) -> dict[str, Any]:
    task = context.task
    row = problems.rows[index]
    pieces = context.tokenizer.pieces(rollout.tokens_BC[index].tolist())
    # A grid is shown by its cells: the line breaks that lay it out as text are left out.
    shown = [i for i, piece in enumerate(pieces) if task.columns is None or piece != "\n"]
    return {
        "set": name,
        "index": index,
        "prompt": task.prompt(row),  # to the letter: typed into `generate` it is the same problem
        "text": texts[index],
        "reference": task.target(row),
        "grade": task.grade(row, texts[index]),
        "pieces": [pieces[i] for i in shown],
        "reveal_step": rollout.unmask_step_BC[index][shown].tolist(),
        "confidence": [round(float(p), 4) for p in rollout.confidence_BC[index][shown]],
        "columns": task.columns,
    }


def table(stages: Sequence[Mapping[str, Any]], baselines: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The before/after table as text: one block a set, one line a stage or baseline."""
    lines = []
    for name in stages[0]["sets"] if stages else baselines:
        rows = [(stage["name"], stage["sets"][name]) for stage in stages] + list(baselines.get(name, {}).items())
        grades = [key for key in rows[0][1] if key not in NOT_GRADES]
        header = f"{name:<22}{'n':>6}  {'solved':>7}  {'95 % interval':>16}" + "".join(
            f"  {grade:>20}" for grade in grades
        )
        lines += ["", header]
        for label, score in rows:
            low, high = score["solved_rate_ci95"]
            cells = f"{label:<22}{score['n']:>6}  {score['solved_rate']:>7.1%}  {f'{low:.1%} .. {high:.1%}':>16}"
            lines.append(cells + "".join(f"  {score[grade]:>20.1%}" for grade in grades))
    return "\n".join(lines[1:])
