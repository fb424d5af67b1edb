"""What a score is when the columns behind a text are hidden, shown, or hidden as often as the text: the figures of docs/methods.md.

    python benchmarks/behind_the_end.py --run runs/experiments/countdown --out benchmarks/results/behind_the_end.json

Rollouts of a run whose texts end early, at temperature 1. For each: the trajectory score of the text (a segment a step) against the
log-probabilities that the sampler recorded, in the sampler's states and with everything behind the end hidden; and the ELBO of the
text (LLaDA's law, 64 maskings) with the columns behind it hidden, shown as end tokens, and hidden with the probability of the text's.
"""

import argparse
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from d1jax.config import Elbo, Trajectory
from d1jax.diffusion.canvas import Canvas, row_uniforms, through_first_end
from d1jax.diffusion.decoding import Prompts
from d1jax.diffusion.estimators import views_of
from d1jax.diffusion.likelihood import score
from d1jax.diffusion.noise import KeyedNoise
from d1jax.evaluation import summary
from d1jax.files import write_json
from d1jax.training.context import build
from d1jax.weights.run import open_run
from d1jax.weights.variables import variables_at

MASKINGS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True)
    parser.add_argument("--stage", default="sft")
    parser.add_argument("--steps", type=int, default=6, help="denoising steps of the rollouts")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    run, config = open_run(arguments.run)
    config = dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, steps=arguments.steps))
    context = build(config, training=False, saved=run.source)
    special, problems = context.tokenizer.special, next(iter(context.eval_sets.values()))
    with jax.set_mesh(context.mesh):
        variables, step = variables_at(context, run, arguments.stage)
        rows_B = np.arange(arguments.rows) % len(problems)
        prompts = jnp.asarray(problems.prompt_RP[rows_B]), jnp.asarray(problems.prompt_length_R[rows_B])
        ids_B = jnp.arange(arguments.rows)
        noise = KeyedNoise(context.key("audit"), ids_B)
        rollout = context.sampler(temperature=1.0).sample(variables, Prompts(*prompts), noise)
        canvas = Canvas(rollout.tokens_BC, *prompts)
        text_BC = through_first_end(canvas.completion_BC, special.end_ids)
        found = trajectories(context, variables, canvas, rollout, text_BC) | bounds(context, variables, canvas, text_BC)
    length_B = np.asarray(text_BC.sum(axis=1))
    early_BC = (rollout.unmask_step_BC >= 0) & ~text_BC
    last_B1 = jnp.where(text_BC, rollout.unmask_step_BC, 0).max(axis=1, keepdims=True)
    result = {
        "run": run.path.name, "step": step, "denoising_steps": arguments.steps, "texts": arguments.rows,
        "mean_length": float(length_B.mean()), "columns": config.sampler.completion_length,
        "texts_with_ends_before_the_text_was_done": float(jnp.mean((early_BC & (rollout.unmask_step_BC < last_B1)).any(axis=1))),
        **found, "environment": summary.environment(),
    }  # fmt: skip
    write_json(Path(arguments.out), result)
    for name, value in result.items():
        print(f"{name}: {value}")


def trajectories(context, variables, canvas, rollout, text_BC):
    """How far trajectory scores of a text are from what the sampler recorded: root mean square over texts, nats."""
    special = context.tokenizer.special
    views = views_of(
        jax.random.key(0), canvas, jnp.arange(len(text_BC)), rollout.unmask_step_BC, estimator=Trajectory(shrink=1),
        sampler=context.config.sampler, special=special, prompt_mask=0.0,
    )  # fmt: skip
    masked = dataclasses.replace(views, completion_NBC=jnp.where(text_BC[None], views.completion_NBC, special.mask))
    recorded_BC = jnp.where(text_BC, rollout.token_logp_BC, 0.0)
    apart = {}
    for name, plan in (("in_the_states_of_the_sampler", views), ("with_all_behind_the_end_hidden", masked)):
        logp_BC = jax.jit(lambda plan: score(context.model, variables, canvas, plan).logp)(plan)
        apart[name] = float(jnp.sqrt(jnp.mean((logp_BC - recorded_BC).sum(axis=1) ** 2)))
    return {"trajectory_rms_nats": apart, "recorded_std_nats": float(recorded_BC.sum(axis=1).std())}


def bounds(context, variables, canvas, text_BC):
    """Mean over texts of the ELBO of the text, nats, by what stands behind it."""
    special = context.tokenizer.special
    ids_B = jnp.arange(len(text_BC))
    views = views_of(
        jax.random.key(1), canvas, ids_B, jnp.zeros_like(canvas.completion_BC),
        estimator=Elbo(samples=MASKINGS, counts="independent", low=1e-3), sampler=context.config.sampler,
        special=special, prompt_mask=0.0,
    )  # fmt: skip
    ratio_N11 = jnp.max(
        1 / jnp.where(views.weight_NBC > 0, views.weight_NBC * MASKINGS, jnp.inf), axis=2, keepdims=True
    )
    drawn_NBC = jnp.stack([row_uniforms(jax.random.key(n), ids_B, text_BC.shape[1]) for n in range(MASKINGS)])
    shown = {
        "hidden": views.completion_NBC,
        "shown": jnp.where(text_BC[None], views.completion_NBC, special.end),
        "as_the_text": jnp.where(
            text_BC[None], views.completion_NBC, jnp.where(drawn_NBC < ratio_N11, special.mask, special.end)
        ),
    }
    found = {}
    for name, completion_NBC in shown.items():
        plan = dataclasses.replace(views, completion_NBC=completion_NBC)
        logp_BC = jax.jit(lambda plan: score(context.model, variables, canvas, plan).logp)(plan)
        sums_B = np.asarray(logp_BC.sum(axis=1), np.float64)
        found[name] = {"mean": float(sums_B.mean()), "error": float(sums_B.std(ddof=1) / np.sqrt(len(sums_B)))}
    return {"elbo_nats": found}


if __name__ == "__main__":
    main()
