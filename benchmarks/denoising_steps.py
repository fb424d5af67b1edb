"""What RL gains by each likelihood estimator as the sampler takes more denoising steps: Sudoku, one base, equal rollouts and updates.

    python benchmarks/denoising_steps.py            # does the runs that have no result yet, then writes the JSON and the figure
    python benchmarks/denoising_steps.py --report   # only the figure

A one-step score looks at a completion that is all masked, which is the sampler's own law with one step only; the more steps it takes, the
further the two are apart. Every arm starts from the base of benchmarks/methods.py and makes as many rollouts and updates: one update a
rollout batch, so that the ratio is 1 and the arms differ in the score that is differentiated, and in its cost, only.

The learning rate of each estimator is chosen at 8 steps on problems of the training split with a seed of its own; the figure is of the
held-out problems.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from denoising_report import denoising_chart, denoising_section
from methods_charts import lines
from methods_plan import row_passes
from methods_runner import Notebook, commit, in_workers, prepared, scores, train_base

from d1jax.config import Config, Coupled, Elbo, NoKl, OneStep, OptimizerConfig, Trajectory
from d1jax.data.examples import Problems
from d1jax.evaluation import summary
from d1jax.files import atomic_write, write_json
from d1jax.rl import loop

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "denoising_steps.json"
FIGURE = ROOT / "docs" / "images" / "denoising_steps.svg"
TASK = "sudoku"
ESTIMATORS = {
    "one_step": OneStep(),
    "coupled": Coupled(counts="independent", low=0.2, high=0.8, full_mask=True),
    "elbo": Elbo(samples=2),
    "trajectory": Trajectory(shrink=1),
}
STEPS = (2, 4, 8, 16)
SEEDS = (1, 2, 3)
RATES = (5e-5, 1.5e-4, 5e-4, 1.5e-3)
CHOSEN_AT, CHOSEN_WITH = 8, 100  # denoising steps and seed of the runs that choose the learning rate
VALIDATION_ROWS = 1024
RL_STEPS = 60


@dataclass(frozen=True)
class Arm:
    estimator: str
    steps: int
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.estimator}-{self.steps}-{self.learning_rate:g}-{self.seed}"


def config_of(arm: Arm, base: Config) -> Config:
    rl = dataclasses.replace(
        base.rl, steps=RL_STEPS, num_iterations=1, prompt_mask=0.0, kl=NoKl(), estimator=ESTIMATORS[arm.estimator],
        optimizer=OptimizerConfig(learning_rate=arm.learning_rate, schedule="linear", clip_norm=base.rl.optimizer.clip_norm),
    )  # fmt: skip
    sampler = dataclasses.replace(base.sampler, steps=arm.steps)
    return dataclasses.replace(base, seed=arm.seed, sampler=sampler, rl=rl)


@functools.cache
def before(steps: int, validation: bool, temperature: float) -> dict[str, float]:
    """The base under a sampler of so many steps."""
    context, variables = prepared(TASK, ())
    sampler = dataclasses.replace(context.config.sampler, steps=steps)
    config = dataclasses.replace(context.config, sampler=sampler)
    return scores(graded_on(context, validation), variables, config, temperature)


def graded_on(context: Any, validation: bool) -> Any:
    """The context with the last rows of the training split in place of the held-out ones, where a setting is chosen."""
    if not validation:
        return context
    train = context.train
    last = slice(len(train) - VALIDATION_ROWS, len(train))
    fields = {field.name: getattr(train, field.name)[last] for field in dataclasses.fields(Problems)}
    return dataclasses.replace(context, eval_sets={"validation": Problems(**fields)})


def execute(arm: Arm, validation: bool) -> dict[str, Any]:
    context, base = prepared(TASK, ())
    config, notebook = config_of(arm, context.config), Notebook()
    with jax.set_mesh(context.mesh):
        graded = graded_on(context, validation)
        variables = loop.train(dataclasses.replace(context, config=config), base, notebook)
        found = {
            f"{when}_{name}": value["solved"]
            for name, temperature in (("greedy", 0.0), ("sampled", 1.0))
            for when, value in (
                ("before", before(arm.steps, validation, temperature)),
                ("after", scores(graded, variables, config, temperature)),
            )
        }
    rewards = [values["reward"] for values in notebook.values]
    jax.clear_caches()
    return {
        **dataclasses.asdict(arm), **found, "reward_first": round(float(np.mean(rewards[:5])), 4),
        "reward_last": round(float(np.mean(rewards[-5:])), 4), "forward_passes": RL_STEPS * row_passes(config), "commit": commit(),
        "seconds": round(sum(values["time/rollout_s"] + values["time/update_s"] for values in notebook.values), 1),
    }  # fmt: skip


def carry_out(pool: Any, arms: Sequence[Arm], validation: bool, folder: Path) -> list[dict[str, Any]]:
    """The results of all arms, those that were there already included; each is kept as it comes."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = "validation-" if validation else ""
    files = {arm: folder / f"{kind}{arm.name}.json" for arm in arms}
    futures = {pool.submit(execute, arm, validation): arm for arm in arms if not files[arm].exists()}
    for number, future in enumerate(as_completed(futures), start=1):
        arm, row = futures[future], future.result()
        write_json(files[arm], row)
        gain = 100 * (row["after_greedy"] - row["before_greedy"])
        print(f"[{number}/{len(futures)}] {kind}{arm.name}: {gain:+.1f} points, {row['seconds']:.0f} s", flush=True)
    return [json.loads(file.read_text(encoding="utf-8")) for file in files.values()]


def chosen_rates(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of each estimator the learning rate with the most solved validation problems, greedy and sampled together."""
    best = {}
    for name in ESTIMATORS:
        mine = [row for row in rows if row["estimator"] == name]
        best[name] = max(mine, key=lambda row: row["after_greedy"] + row["after_sampled"])["learning_rate"]
    return best


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only write the figure")
    parser.add_argument("--work", default=str(ROOT / "runs" / "denoising_steps"), help="single results and programs")
    arguments = parser.parse_args()
    if not arguments.report:
        os.chdir(ROOT)  # run_dir of the context's file is relative
        work = Path(arguments.work)
        with in_workers(sorted(os.sched_getaffinity(0)), work / "programs", ()) as pool:
            print(pool.submit(train_base, TASK, ()).result(), flush=True)
            trials = [Arm(name, CHOSEN_AT, rate, CHOSEN_WITH) for name in ESTIMATORS for rate in RATES]
            choosing = carry_out(pool, trials, True, work)
            rates = chosen_rates(choosing)
            print(f"learning rates: {rates}", flush=True)
            arms = [Arm(name, steps, rates[name], seed) for seed in SEEDS for steps in STEPS for name in ESTIMATORS]
            runs = carry_out(pool, arms, False, work)
        about = {"rl_steps": RL_STEPS, "chosen_at": CHOSEN_AT, "chosen_with": CHOSEN_WITH, "rates": rates}
        write_json(RESULTS, {**about, "choosing": choosing, "runs": runs, "environment": summary.environment()})
    data = json.loads(RESULTS.read_text(encoding="utf-8"))
    atomic_write(FIGURE, lines(denoising_chart(data)))
    print(denoising_section(data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
