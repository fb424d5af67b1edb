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

from d1jax.config import DualCache, EntropyBound, Factor, Klass, PrefixCache, Threshold
from d1jax.config.check import check
from d1jax.diffusion.kv_cache import window_sizes
from d1jax.evaluation import decode, statistics, summary
from d1jax.files import write_json
from d1jax.training.context import build
from d1jax.weights.run import open_run
from d1jax.weights.variables import variables_at

PARALLEL = {
    "half the steps": {"share": 2},
    "a quarter of the steps": {"share": 4},
    "an eighth of the steps": {"share": 8},
    "threshold 0.95": {"schedule": Threshold(0.95)},
    "threshold 0.9": {"schedule": Threshold(0.9)},
    "threshold 0.7": {"schedule": Threshold(0.7)},
    "factor 0.5": {"schedule": Factor(0.5)},
    "factor 1": {"schedule": Factor(1.0)},
    "entropy bound 0.1": {"schedule": EntropyBound(0.1), "remasking": "entropy"},
    "entropy bound 0.35": {"schedule": EntropyBound(0.35), "remasking": "entropy"},
    "klass 0.6, 0.015": {"schedule": Klass(0.6, 0.015)},
    "klass 0.9, 0.01": {"schedule": Klass(0.9, 0.01)},
}
CACHED = {
    "prefix cache": {"cache": PrefixCache()},
    "dual cache": {"cache": DualCache()},
    "dual cache, made anew every 2 steps": {"cache": DualCache(refresh=2)},
    "dual cache, threshold 0.9": {"cache": DualCache(), "schedule": Threshold(0.9)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="append", required=True)
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    tables = {Path(run).name: table_of(Path(run)) for run in arguments.run}
    write_json(Path(arguments.out), {"environment": summary.environment(), "runs": tables})


def table_of(path: Path) -> dict:
    run, config = open_run(path)
    context = build(config, training=False, saved=run.source)
    name, problems = next(iter(context.eval_sets.items()))
    stage = [stage for stage, saved in run.saved_steps(config.stage_names).items() if saved][-1]
    length = config.sampler.completion_length
    with jax.set_mesh(context.mesh):
        variables, step = variables_at(context, run, stage, None)
        rows = []
        for block in (length, length // 4):
            exact = dataclasses.replace(config.sampler, block_length=block, steps=length, early_exit=False)
            base, passes = solved_by(context, variables, problems, exact)
            rows.append(row_of("exact", block, base, base, passes, passes))
            for label, changes in (PARALLEL if block == length else CACHED).items():
                changes = dict(changes)
                steps = length // changes.pop("share", 1)
                sampler = dataclasses.replace(exact, steps=steps, **changes)
                solved, passes, computed = measured(context, variables, problems, sampler)
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


def solved_by(context, variables, problems, sampler):
    solved, passes, _ = measured(context, variables, problems, sampler)
    return solved, passes


def measured(context, variables, problems, sampler):
    """(solved or not of every problem, forward passes, the same in passes over the whole canvas)."""
    config = dataclasses.replace(context.config, sampler=sampler)
    check(config)
    chosen = dataclasses.replace(context, config=config)
    rollout = decode.decode(chosen, variables, problems)
    texts = decode.texts_of(chosen, rollout)
    solved = np.array([context.task.grade(row, text)["solved"] for row, text in zip(problems.rows, texts, strict=True)])
    passes, cached = float(rollout.nfe_B.mean()), float(rollout.cached_nfe_B.mean())
    columns = sampler.completion_length + problems.prompt_RP.shape[1]
    window = sampler.block_length
    if (
        sampler.cache.name == "prefix"
    ):  # the narrowest compiled window that holds what is to be computed, over the blocks
        needed = range(sampler.completion_length, 0, -sampler.block_length)
        window = np.mean([min(size for size in window_sizes(sampler) if size >= columns) for columns in needed])
    return solved, passes, passes - cached + cached * float(window) / columns


def row_of(label, block, base, solved, passes, computed):
    difference = solved.astype(float) - base
    half = statistics.Z95 * difference.std(ddof=1) / len(difference) ** 0.5
    low, high = statistics.wilson_interval(solved.sum(), len(solved))
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
