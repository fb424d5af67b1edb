"""Seconds of one compiled RL update and one rollout batch, by the number of micro-batches.

    python benchmarks/update.py --config configs/quickstart.yaml --out benchmarks/results/update.json

Speed depends on shapes only, so the weights are random. Settings alternate, and the median of `repeats` is reported.
"""

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from d1jax.analysis import summary
from d1jax.config_file import parse
from d1jax.diffusion.canvas import Canvas
from d1jax.diffusion.sampler import sample
from d1jax.experiment import build
from d1jax.files import write_json
from d1jax.models.transformer import initialize
from d1jax.rl.update import Batch, make_update
from d1jax.runtime.optimizer import make_optimizer, new_state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--micro_batches", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    config = parse(["--config", arguments.config])
    experiment = build(config)
    variables = initialize(experiment.model, experiment.key("weights"), experiment.mesh)
    special = experiment.tokenizer.special
    rows = config.rl.prompts_per_step * config.rl.group_size
    picked = np.repeat(np.arange(config.rl.prompts_per_step), config.rl.group_size)
    prompts = jnp.asarray(experiment.train.prompt_RP[picked]), jnp.asarray(experiment.train.prompt_length_R[picked])

    def rollout():
        return sample(
            experiment.model, variables, *prompts, jax.random.key(0), jnp.arange(rows),
            config=config.sampler, special=special, temperature=config.rl.temperature,
        )  # fmt: skip

    advantage = jnp.asarray(np.random.default_rng(0).standard_normal(rows), jnp.float32)
    made = rollout()
    groups_B = jnp.arange(rows) // config.rl.group_size
    batch = Batch(Canvas(made.tokens_BC, *prompts), groups_B, made.reveal_step_BC, advantage)
    states, updates = {}, {}
    for parts in arguments.micro_batches:
        settings = dataclasses.replace(config.rl, micro_batches=parts)
        optimizer = make_optimizer(settings.optimizer, 1000)
        state = new_state(optimizer, variables, experiment.mesh)
        updates[parts] = make_update(experiment.model, optimizer, settings, config.sampler, special, state)
        states[parts], _ = jax.block_until_ready(updates[parts](state, {}, {}, batch, jax.random.key(0)))

    seconds: dict[str, list[float]] = {"rollout": []} | {f"update, {parts} micro-batches": [] for parts in updates}
    for _ in range(arguments.repeats):
        began = time.perf_counter()
        jax.block_until_ready(rollout())
        seconds["rollout"].append(time.perf_counter() - began)
        for parts, update in updates.items():
            began = time.perf_counter()
            states[parts], _ = jax.block_until_ready(update(states[parts], {}, {}, batch, jax.random.key(0)))
            seconds[f"update, {parts} micro-batches"].append(time.perf_counter() - began)
    medians = {name: round(statistics.median(values), 3) for name, values in seconds.items()}
    print(json.dumps(medians, indent=2))
    setting = {
        "config": arguments.config,
        "rows": rows,
        "inner_updates": config.rl.inner_updates,
        "repeats": arguments.repeats,
    }
    write_json(
        Path(arguments.out), {"setting": setting, "environment": summary.environment(), "median_seconds": medians}
    )


if __name__ == "__main__":
    main()
