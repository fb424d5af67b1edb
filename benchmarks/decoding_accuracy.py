"""What each approximate way of decoding costs in accuracy, on the held-out problems of trained runs.

    python benchmarks/decoding_accuracy.py --run runs/quickstart --run runs/countdown_cpu --out benchmarks/results/decoding_accuracy.json

Every option is compared with exact decoding in the same blocks, one token a step, problem by problem: the interval is of the
paired difference (normal, 95 %). Passes are forward passes of a completion; "of canvas" counts what they compute, in passes
over the whole canvas.
"""

import argparse
import dataclasses
from pathlib import Path

import jax
import numpy as np

from d1jax.config.parse import parse
from d1jax.config.rules import check
from d1jax.diffusion.kv_cache import window_sizes
from d1jax.evaluation import accuracy, summary
from d1jax.files import write_json
from d1jax.training.context import build
from d1jax.training.setup import variables_at
from d1jax.weights.run import open_run

PARALLEL = {
    "half the steps": {"schedule": "even", "share": 2},
    "a quarter of the steps": {"schedule": "even", "share": 4},
    "an eighth of the steps": {"schedule": "even", "share": 8},
    "threshold 0.95": {"schedule": "threshold", "threshold": 0.95},
    "threshold 0.9": {"schedule": "threshold", "threshold": 0.9},
    "threshold 0.7": {"schedule": "threshold", "threshold": 0.7},
    "factor 0.5": {"schedule": "factor", "factor": 0.5},
    "factor 1": {"schedule": "factor", "factor": 1.0},
    "entropy bound 0.1": {"schedule": "entropy_bound", "remasking": "entropy", "entropy_bound": 0.1},
    "entropy bound 0.35": {"schedule": "entropy_bound", "remasking": "entropy", "entropy_bound": 0.35},
    "klass 0.6, 0.015": {"schedule": "klass", "threshold": 0.6, "kl_threshold": 0.015},
    "klass 0.9, 0.01": {"schedule": "klass", "threshold": 0.9, "kl_threshold": 0.01},
}
CACHED = {
    "prefix cache": {"cache": "prefix"},
    "dual cache": {"cache": "dual"},
    "dual cache, made anew every 2 steps": {"cache": "dual", "cache_refresh": 2},
    "dual cache, threshold 0.9": {"cache": "dual", "schedule": "threshold", "threshold": 0.9},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="append", required=True)
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    tables = {Path(run).name: table_of(Path(run)) for run in arguments.run}
    write_json(Path(arguments.out), {"environment": summary.environment(), "runs": tables})


def table_of(path: Path) -> dict:
    run, _ = open_run(path)
    config = parse(["--config", str(run.config)])
    experiment = build(config, training=False, saved=run.source)
    name, problems = next(iter(experiment.eval_sets.items()))
    stage = [stage for stage, saved in run.saved_steps(config.stages).items() if saved][-1]
    length = config.sampler.completion_length
    with jax.set_mesh(experiment.mesh):
        variables, step = variables_at(experiment, run, stage, None)
        rows = []
        for block in (length, length // 4):
            exact = dataclasses.replace(config.sampler, block_length=block, steps=length, early_exit=False)
            base, passes = solved_by(experiment, variables, problems, exact)
            rows.append(row_of("exact", block, base, base, passes, passes))
            for label, changes in (PARALLEL if block == length else CACHED).items():
                changes = dict(changes)
                steps = length // changes.pop("share", 1)
                sampler = dataclasses.replace(exact, steps=steps, **changes)
                solved, passes, computed = measured(experiment, variables, problems, sampler)
                rows.append(row_of(label, block, base, solved, passes, computed))
            print_rows(path.name, rows)
    return {
        "set": name,
        "problems": len(problems),
        "stage": stage,
        "step": step,
        "completion_length": length,
        "rows": rows,
    }


def solved_by(experiment, variables, problems, sampler):
    solved, passes, _ = measured(experiment, variables, problems, sampler)
    return solved, passes


def measured(experiment, variables, problems, sampler):
    """(solved or not of every problem, forward passes, the same in passes over the whole canvas)."""
    config = dataclasses.replace(experiment.config, sampler=sampler)
    check(config)
    chosen = dataclasses.replace(experiment, config=config)
    rollout = accuracy.decode(chosen, variables, problems)
    texts = accuracy.texts_of(chosen, rollout)
    solved = np.array(
        [experiment.task.grade(row, text)["solved"] for row, text in zip(problems.rows, texts, strict=True)]
    )
    passes, cached = float(rollout.nfe_B.mean()), float(rollout.cached_nfe_B.mean())
    columns = sampler.completion_length + problems.prompt_RP.shape[1]
    window = sampler.block_length
    if sampler.cache == "prefix":  # the narrowest compiled window that holds what is to be computed, over the blocks
        needed = range(sampler.completion_length, 0, -sampler.block_length)
        window = np.mean([min(size for size in window_sizes(sampler) if size >= columns) for columns in needed])
    return solved, passes, passes - cached + cached * float(window) / columns


def row_of(label, block, base, solved, passes, computed):
    difference = solved.astype(float) - base
    half = accuracy.Z95 * difference.std(ddof=1) / len(difference) ** 0.5
    low, high = accuracy.wilson_interval(solved.sum(), len(solved))
    return {
        "option": label, "block": block, "solved": round(float(solved.mean()), 4), "interval": [round(low, 4), round(high, 4)],
        "difference": round(float(difference.mean()), 4), "half_interval": round(float(half), 4),
        "passes": round(passes, 2), "of_canvas": round(computed, 2),
    }  # fmt: skip


def print_rows(name, rows):
    print(f"\n{name:<38}{'block':>6}{'solved':>8}{'difference':>18}{'passes':>8}{'of canvas':>10}")
    for row in rows:
        change = f"{100 * row['difference']:+.1f} +- {100 * row['half_interval']:.1f}"
        print(
            f"{row['option']:<38}{row['block']:>6}{100 * row['solved']:>7.1f}%{change:>18}{row['passes']:>8.1f}{row['of_canvas']:>10.1f}"
        )


if __name__ == "__main__":
    main()
