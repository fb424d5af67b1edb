"""Neither the time of a step nor the memory of the process grows over thousands of steps.

    python benchmarks/long_run.py --out benchmarks/results/long_run.json

One process trains a small model, SFT and then RL, and notes after every window of steps the median time of its steps and what the process
holds in memory (VmRSS). What is reported is each window, and the growth from the second one (the first compiles) to the last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from d1jax import train
from d1jax.config.parse import parse
from d1jax.files import write_json
from d1jax.telemetry.metrics import read_metrics
from d1jax.training.stage_log import StageLog

WINDOWS = 8
SETTINGS = {
    "task.name": "sudoku", "task.train_rows": 512, "task.eval_rows": 32, "model.width": 32, "model.layers": 2, "model.heads": 4,
    "model.kv_heads": 4, "model.mlp_width": 64, "model.rope_theta": 100, "sampler.completion_length": 20, "sampler.block_length": 20,
    "sampler.steps": 2, "sft.batch_size": 32, "rl.prompts_per_step": 8, "rl.num_generations": 4, "rl.num_iterations": 1,
    "rl.reward_weights": "{clues: 1, cells: 1}", "rl.collapse": "ignore", "evaluation.batch_size": 32, "keep_last": 2,
}  # fmt: skip


def resident_megabytes() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sft_steps", type=int, default=4000)
    parser.add_argument("--rl_steps", type=int, default=1600)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    steps = {"sft": given.sft_steps, "rl": given.rl_steps}
    memory: dict[str, dict[int, float]] = {"sft": {}, "rl": {}}
    log_metrics = StageLog.log_metrics

    def noting(self: StageLog, step: int, values: Any, watch: Any) -> None:
        log_metrics(self, step, values, watch)
        if step % (self.steps // WINDOWS) == 0:
            memory[self.stage][step] = round(resident_megabytes(), 1)

    StageLog.log_metrics = noting
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        settings = {
            **SETTINGS,
            "run_dir": run,
            "sft.steps": steps["sft"],
            "rl.steps": steps["rl"],
            "checkpoint_every": 200,
        }
        train.run(parse([f"--{name}={value}" for name, value in settings.items()]))
        rows = read_metrics(run / "metrics.jsonl")
    result: dict[str, Any] = {"jax": version("jax"), "settings": SETTINGS}
    for stage, count in steps.items():
        size = count // WINDOWS
        seconds = [row["time/step_s"] for row in rows if row["stage"] == stage]
        medians = [round(statistics.median(seconds[at : at + size]) * 1e3, 2) for at in range(0, size * WINDOWS, size)]
        held = list(memory[stage].values())
        result[stage] = {
            "steps": count, "milliseconds": medians, "megabytes": held,
            "time_growth": round(medians[-1] / medians[1] - 1, 3), "memory_growth_megabytes": round(held[-1] - held[1], 1),
        }  # fmt: skip
    print(json.dumps({stage: result[stage] for stage in steps}, indent=1))
    if given.out:
        write_json(given.out, result)


if __name__ == "__main__":
    main()
