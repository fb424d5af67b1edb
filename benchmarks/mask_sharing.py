"""How much of the diffu-GRPO gradient is signal: agreement of gradients from disjoint problems, by how prompt masks are drawn.

    python benchmarks/mask_sharing.py --run runs/quickstart --stage sft --out benchmarks/results/mask_sharing.json

For each setting, `batches` gradients are taken at the same weights, each from its own 512 rollouts. The figure is the mean cosine
between pairs of them: 1 would be a gradient without noise, 0 nothing but noise.
"""

import argparse
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from d1jax.config import OneStep
from d1jax.diffusion.canvas import Canvas
from d1jax.diffusion.decoding import Prompts
from d1jax.diffusion.estimators import views_of
from d1jax.diffusion.likelihood import score
from d1jax.diffusion.noise import KeyedNoise
from d1jax.evaluation import decode, summary
from d1jax.files import write_json
from d1jax.rl.advantages import group_advantages
from d1jax.rollouts.rewards import reward_rows, total_rewards
from d1jax.training.context import build
from d1jax.weights.run import open_run
from d1jax.weights.variables import variables_at

ROWS = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True)
    parser.add_argument("--stage", default="sft")
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    run, config = open_run(arguments.run)
    context = build(config, saved=run.source)
    variables, step = variables_at(context, run, arguments.stage)
    model, special, problems = context.model, context.tokenizer.special, context.train

    @jax.jit
    def gradient(variables, canvas, advantage_B, key, mask_ids_B, prompt_mask):
        def loss(variables):
            views = views_of(
                key, canvas, mask_ids_B, jnp.zeros_like(canvas.completion_BC),
                estimator=OneStep(), sampler=config.sampler, special=special, prompt_mask=prompt_mask,
            )  # fmt: skip
            return -jnp.mean(advantage_B[:, None] * score(model, variables, canvas, views).logp)

        return jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(jax.grad(loss)(variables))])

    rows = []
    for group in (4, 8):
        batches = []
        for index in range(arguments.batches):
            order = np.random.default_rng(index).choice(len(problems), ROWS // group, replace=False)
            picked = np.repeat(order, group)
            prompts = jnp.asarray(problems.prompt_RP[picked]), jnp.asarray(problems.prompt_length_R[picked])
            noise = KeyedNoise(jax.random.key(index), jnp.arange(ROWS))
            rollout = context.sampler(config.rl.temperature).sample(variables, Prompts(*prompts), noise)
            texts = decode.texts_of(context, rollout)
            parts, _, _ = reward_rows(context.task, [problems.rows[i] for i in picked], texts, config.rl.reward_weights)
            rewards = total_rewards(parts, config.rl.reward_weights).reshape(-1, group)
            advantage = group_advantages(config.rl.advantage, rewards).reshape(-1)
            batches.append((Canvas(rollout.tokens_BC, *prompts), jnp.asarray(advantage)))
        for prompt_mask, sharing in ((0.0, "group"), (0.15, "row"), (0.15, "group"), (0.3, "row"), (0.3, "group")):
            ids = jnp.arange(ROWS) // (group if sharing == "group" else 1)
            vectors = [
                np.asarray(gradient(variables, canvas, advantage, jax.random.key(100 + i), ids, prompt_mask))
                for i, (canvas, advantage) in enumerate(batches)
            ]
            cosines = [
                float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in itertools.combinations(vectors, 2)
            ]
            row = {"group_size": group, "prompt_mask": prompt_mask, "mask_sharing": sharing}
            row |= {"mean_cosine": round(float(np.mean(cosines)), 3), "std": round(float(np.std(cosines)), 3)}
            rows.append(row)
            print(json.dumps(row), flush=True)
    setting = {
        "run": str(Path(arguments.run).name),
        "stage": arguments.stage,
        "step": step,
        "batches": arguments.batches,
    }
    write_json(Path(arguments.out), {"setting": setting, "environment": summary.environment(), "rows": rows})


if __name__ == "__main__":
    main()
