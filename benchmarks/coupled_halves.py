"""When a masking and its complement help: the correlation of the two halves of a coupled score, on right and on wrong texts.

    python benchmarks/coupled_halves.py --run runs/quickstart --out benchmarks/results/coupled_halves.json

A pair is half of each masking's own score. Its variance is that of two free maskings times 1 + correlation: below zero the pair
wins, above zero it loses. S draws, B rows.
"""

import argparse
import json
from pathlib import Path

import jax
import numpy as np

from d1jax.audit import rollouts
from d1jax.config import Coupled
from d1jax.config.parse import parse
from d1jax.diffusion.estimators import views_of
from d1jax.diffusion.likelihood import Views, score
from d1jax.evaluation import summary
from d1jax.files import write_json
from d1jax.training.context import build
from d1jax.training.setup import variables_at
from d1jax.weights.run import open_run

PAIR = Coupled(counts="independent", low=0.2, high=0.8)
SAMPLERS = {"the run's": [], "20 steps, temperature 0.3": ["--sampler.steps", "20", "--rl.temperature", "0.3"]}
ROWS, DRAWS = 128, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True)
    parser.add_argument("--stage", default="sft")
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    run, trained = open_run(arguments.run)
    rows = []
    for name, flags in SAMPLERS.items():
        context = build(parse(flags, trained, "audit"), training=False, saved=run.source)
        with jax.set_mesh(context.mesh):
            variables, step = variables_at(context, run, arguments.stage)
            half_S2B, solved_B = halves(context, variables)
        for texts, chosen_B in (("all", solved_B | True), ("right", solved_B), ("wrong", ~solved_B)):
            row = {"sampler": name, "texts": texts, "rows": int(chosen_B.sum()), **spread(half_S2B[:, :, chosen_B])}
            rows.append(row)
            print(json.dumps(row), flush=True)
    setting = {"run": Path(arguments.run).name, "stage": arguments.stage, "step": step, "draws": DRAWS}
    write_json(Path(arguments.out), {"setting": setting, "environment": summary.environment(), "rows": rows})


def halves(context, variables):
    """(the scores of a masking's tokens and of its complement's, [S, 2, B]; which texts solve their problem, [B])."""
    key = context.key("audit")
    (batch,) = rollouts(context, variables, ROWS, jax.random.fold_in(key, 0))
    problems = next(iter(context.eval_sets.values()))
    texts = [context.tokenizer.decode(row) for row in np.asarray(batch.canvas.completion_BC).tolist()]
    solved_B = np.array(
        [context.task.grade(problems.rows[i % len(problems)], text)["solved"] > 0 for i, text in enumerate(texts)]
    )

    @jax.jit
    def draw(key, variables):
        views = views_of(
            key, batch.canvas, batch.mask_ids_B, batch.unmask_step_BC, estimator=PAIR, sampler=context.config.sampler,
            special=context.tokenizer.special, prompt_mask=0.0,
        )  # fmt: skip
        arrays = views.completion_NBC, views.prompt_NBP, views.weight_NBC
        parts = [Views(*(x[k : k + 1] for x in arrays)) for k in (0, 1)]
        return [score(context.model, variables, batch.canvas, part).logp.sum(axis=1) for part in parts]

    keys = [jax.random.fold_in(jax.random.fold_in(key, 2), s) for s in range(DRAWS)]
    return np.array([draw(one, variables) for one in keys], np.float64), solved_B


def spread(half_S2B):
    """{"correlation", "variance" of the pair, "free": of two maskings without a tie}, means over rows."""
    off_S2B = half_S2B - half_S2B.mean(axis=0)
    covariance = np.mean(off_S2B[:, 0] * off_S2B[:, 1])
    of_parts = np.mean(off_S2B**2, axis=(0, 2))
    values = {"correlation": covariance / np.sqrt(of_parts.prod()), "variance": of_parts.sum() + 2 * covariance}
    return {name: round(float(value), 3) for name, value in {**values, "free": of_parts.sum()}.items()}


if __name__ == "__main__":
    main()
