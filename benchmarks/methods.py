"""Every method of configs/methods and configs/preferences against each other at equal cost, on two small tasks, and d1's two ablations.

    python benchmarks/methods.py            # does the runs that have no result yet, then writes the report
    python benchmarks/methods.py --report   # writes docs/experiments.md from benchmarks/results/methods.json
    python benchmarks/methods.py --plan     # lists the runs and what each may spend

The base of each task is trained once by SFT and stopped at partial skill. From there each method gets the same number of
forward passes x rows (methods_plan.row_passes), on the same problems, with the same optimizer. Stop it at any time: the same command
goes on with the run that it was at. One worker a core.

Other flags are laid over both context files, for pilots, which belong in their own --out and --work:
    python benchmarks/methods.py --methods d1,espo --seeds 100 --no_ablations --work pilot --out pilot.json \\
        --rl.optimizer.learning_rate 1e-3
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

from methods_plan import SEEDS, TASKS, base_config, method_file, plan_runs, settings_of, stage_of
from methods_report import write_report
from methods_runner import carried_out, collected, finish_all, in_workers, train_base

from d1jax.files import write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "methods.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only write the report")
    parser.add_argument("--plan", action="store_true", help="only list the runs")
    parser.add_argument("--methods", default="", help="names of files, with commas (all)")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--no_ablations", action="store_true")
    parser.add_argument("--work", default=str(ROOT / "runs" / "experiments"), help="bases, single results, programs")
    parser.add_argument("--out", default=str(RESULTS))
    arguments, extra = parser.parse_known_args()
    out, work = Path(arguments.out), Path(arguments.work)
    if arguments.report:
        write_report(json.loads(out.read_text(encoding="utf-8")), ROOT / "docs")
        return 0
    tasks, seeds = tuple(arguments.tasks.split(",")), tuple(map(int, arguments.seeds.split(",")))
    files = [method_file(name) for name in arguments.methods.split(",")] if arguments.methods else None
    runs, skipped = plan_runs(tasks, seeds, files, not arguments.no_ablations, tuple(extra))
    for line in skipped:
        print(f"left out: {line}")
    if arguments.plan:
        print_plan(runs, seeds[0])
        return 0
    os.chdir(ROOT)  # run_dir of the context files is relative
    began = time.perf_counter()
    with in_workers(sorted(os.sched_getaffinity(0)), work / "programs", tuple(extra)) as pool:
        for line in pool.map(train_base, tasks, [tuple(extra)] * len(tasks)):
            print(line, flush=True)
        failures = finish_all(runs, work / "results", lambda todo: carried_out(pool, todo, tuple(extra)))
    rows = collected(runs, work / "results")
    settings = {task: settings_of(base_config(task, tuple(extra))) for task in tasks}
    write_json(out, {"seeds": seeds, "settings": settings, "left_out": skipped, "runs": rows})
    print(f"{len(rows)} of {len(runs)} rows have results; {time.perf_counter() - began:.0f} s; {out}")
    if out == RESULTS:
        write_report(json.loads(out.read_text(encoding="utf-8")), ROOT / "docs")
    return 1 if failures else 0


def print_plan(runs, seed):
    print(f"{'task':<11}{'arm':<24}{'passes':>8}{'steps':>7}{'updates':>9}{'of budget':>11}")
    for run in (run for run in runs if run.seed == seed):
        stage = stage_of(run.config)
        print(
            f"{run.task:<11}{run.arm:<24}{run.passes_of_step:>8}{stage.steps:>7}{stage.steps * stage.updates_per_step:>9}"
            f"{run.spends / run.budget:>11.3f}  {run.digest}"
        )
    print(f"{len(runs)} rows, {len({run.digest for run in runs})} runs")


if __name__ == "__main__":
    sys.exit(main())
