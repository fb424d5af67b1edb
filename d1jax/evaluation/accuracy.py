"""Decode a set of problems, grade the texts, and say how sure the numbers are.

B rows at a time, C completion columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from d1jax.config.errors import Diverged
from d1jax.diffusion.finite import not_finite
from d1jax.diffusion.sampler import Rollout, sample
from d1jax.evaluation import decoding_order
from d1jax.evaluation.decoding_order import FirstStep
from d1jax.models import sharding
from d1jax.models.transformer import Variables
from d1jax.tasks.task import DataError
from d1jax.training.context import Experiment, Problems

Z95 = 1.959963984540054
NOT_GRADES = ("n", "solved_rate", "solved_rate_ci95", "nfe", "decoding_order", "texts")


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a rate: inside [0, 1] and honest near its ends (E. B. Wilson, 1927)."""
    if n == 0:
        return 0.0, 1.0
    rate, z2 = successes / n, Z95**2
    middle = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def score_texts(experiment: Experiment, problems: Problems, texts: Sequence[str]) -> dict[str, Any]:
    """{"n", "solved_rate", "solved_rate_ci95", and the mean of every other grade of the task}."""
    grades = [experiment.task.grade(row, text) for row, text in zip(problems.rows, texts, strict=True)]
    n, names = len(grades), grades[0].keys()
    wrong = next((index for index, grade in enumerate(grades) if grade.keys() != names), None)
    if wrong is not None or names & set(NOT_GRADES):
        told = f"row 0 {sorted(names)}" + ("" if wrong is None else f", row {wrong} {sorted(grades[wrong])}")
        raise DataError(
            f"task {experiment.task.name!r}: grades are {told}; every row has the same names, none of them {', '.join(NOT_GRADES)}"
        )
    means = {name: float(np.mean([grade[name] for grade in grades])) for name in grades[0]}
    solved = means.pop("solved")
    return {"n": n, "solved_rate": solved, "solved_rate_ci95": list(wilson_interval(solved * n, n)), **means}


def baseline_scores(experiment: Experiment, problems: Problems) -> dict[str, dict[str, Any]]:
    """The task's answers that need no model, graded like a model's."""
    answers = [experiment.task.baselines(row) for row in problems.rows]
    return {name: score_texts(experiment, problems, [answer[name] for answer in answers]) for name in answers[0]}


def decode(experiment: Experiment, variables: Variables, problems: Problems, progress: str = "") -> Rollout:
    """Completions of all problems, as host arrays. The last batch repeats its last row, so one program serves all batches.

    progress: what a bar on a terminal is called ("": there is none). Raises Diverged where the predictions are not finite: a score of
    such texts would be one of token 0.
    """
    config, size = experiment.config, experiment.config.evaluation.batch_size
    key, parts = experiment.key("evaluation"), []
    starts = range(0, len(problems), size)
    for start in tqdm(starts, desc=progress, unit="batch", leave=False, disable=None if progress else True):
        rows_B = np.minimum(np.arange(start, start + size), len(problems) - 1)
        inputs = (problems.prompt_RP[rows_B], problems.prompt_length_R[rows_B], rows_B.astype(np.int32))
        prompt_BP, prompt_length_B, row_ids_B = sharding.place_rows(experiment.mesh, inputs)
        rollout = sample(
            experiment.model, variables, prompt_BP, prompt_length_B, key, row_ids_B,
            config=config.sampler, special=experiment.tokenizer.special, temperature=config.evaluation.temperature,
        )  # fmt: skip
        parts.append(jax.device_get(rollout))
        problem = not_finite(parts[-1].confidence_BC)
        if problem:
            raise Diverged(f"evaluation, batch from row {start}: {problem}")
    return Rollout(*(np.concatenate(arrays)[: len(problems)] for arrays in zip(*parts, strict=True)))


def look_ahead(experiment: Experiment, variables: Variables, problems: Problems) -> FirstStep:
    """What the model knows before anything is decoded, of the first batch of problems, as host arrays."""
    config = experiment.config
    rows_B = np.minimum(np.arange(config.evaluation.batch_size), len(problems) - 1)
    prompts = sharding.place_rows(experiment.mesh, (problems.prompt_RP[rows_B], problems.prompt_length_R[rows_B]))
    seen = decoding_order.first_step(
        experiment.model, variables, *prompts,
        completion_length=config.sampler.completion_length, mask_id=experiment.tokenizer.special.mask,
    )  # fmt: skip
    return FirstStep(*(values_BC[: len(problems)] for values_BC in jax.device_get(seen)))


def texts_of(experiment: Experiment, rollout: Rollout) -> list[str]:
    return [experiment.tokenizer.decode(row) for row in np.asarray(rollout.tokens_BC).tolist()]


def evaluate(
    experiment: Experiment, variables: Variables, progress: bool = False
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(scores, samples): the scores of every evaluation set under its name, and the first rows of each for people to read.

    Beside the grades a score has "nfe" and "decoding_order", which is `decoding_order.summary`.
    """
    scores, samples = {}, []
    for name, problems in experiment.eval_sets.items():
        rollout = decode(experiment, variables, problems, f"evaluating {name}" if progress else "")
        texts = texts_of(experiment, rollout)
        order = decoding_order.summary(rollout, look_ahead(experiment, variables, problems))
        measures = {"nfe": float(rollout.nfe_B.mean()), "decoding_order": order}
        scores[name] = score_texts(experiment, problems, texts) | measures
        kept = range(min(experiment.config.evaluation.samples, len(problems)))
        samples += [_sample(experiment, problems, rollout, texts, name, index) for index in kept]
    return scores, samples


def headline(experiment: Experiment, variables: Variables) -> dict[str, float]:
    """The first evaluation set's scores as metrics, for learning curves."""
    name, problems = next(iter(experiment.eval_sets.items()))
    scores = score_texts(experiment, problems, texts_of(experiment, decode(experiment, variables, problems)))
    scores["solved"] = scores.pop("solved_rate")
    return {f"eval/{name}/{grade}": value for grade, value in scores.items() if isinstance(value, float)}


def _sample(
    experiment: Experiment, problems: Problems, rollout: Rollout, texts: list[str], name: str, index: int
) -> dict[str, Any]:
    task, row, columns = experiment.task, problems.rows[index], experiment.task.columns
    pieces = experiment.tokenizer.pieces(rollout.tokens_BC[index].tolist())
    # A grid is shown by its cells: the line breaks that lay it out as text are left out.
    shown = [i for i, piece in enumerate(pieces) if columns is None or piece != "\n"]
    return {
        "set": name,
        "index": index,
        "prompt": task.prompt(row),  # to the letter: typed into `generate` it is the same problem
        "text": texts[index],
        "reference": task.target(row),
        "grade": task.grade(row, texts[index]),
        "pieces": [pieces[i] for i in shown],
        "reveal_step": rollout.reveal_step_BC[index][shown].tolist(),
        "confidence": [round(float(p), 4) for p in rollout.confidence_BC[index][shown]],
        "columns": columns,
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
