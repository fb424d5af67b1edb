"""python -m d1jax.audit --run runs/quickstart: how good each likelihood estimator is on the run's own rollouts.

--run DIR                     a run; by default its last stage that has a checkpoint
--stage sft --step 240        another checkpoint of it
--rows 128                    rollouts that are scored, sampled from the headline evaluation set at rl.temperature
--samples 32                  draws of each estimator (even)
--truth_samples 512           maskings of the ELBO that they are compared with (a multiple of 16)
--gradient_samples 0          draws of the gradient, too (0 = none)
--methods configs/methods     also the estimators of these files
--only "elbo exact"           only estimators whose name contains this
--out DIR                     write audit.json and audit.html
--section.key VALUE           a setting of the run that the audit reads, e.g. --sampler.steps 16 or --rl.temperature 0.5
--version                     the version of d1jax
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from d1jax.config import Config, UserError
from d1jax.config.flags import asks_for_version, split_flags, version_text
from d1jax.config.parse import parse
from d1jax.config.values import plain
from d1jax.diffusion.canvas import Canvas
from d1jax.diffusion.decoding import Prompts
from d1jax.diffusion.noise import KeyedNoise
from d1jax.evaluation import estimator_stats as audit
from d1jax.evaluation import summary
from d1jax.evaluation.estimators import STRATA, Bench, Candidate, RolloutBatch, candidates, large_sample_elbo
from d1jax.files import atomic_write, write_json
from d1jax.inference.policy import check_sees_both_sides
from d1jax.models import sharding
from d1jax.models.transformer import Variables
from d1jax.telemetry.command_line import check_writable, exit_code
from d1jax.telemetry.report.audit_page import audit_html
from d1jax.training.context import Context, build
from d1jax.weights.source import run_source
from d1jax.weights.variables import check_same_model, variables_at

NAMES = ("run", "stage", "step", "methods", "only", "out")
READS = ("task", "model", "lora", "sampler", "evaluation.batch_size", "rl.temperature", "mesh", "seed")
COUNTS = {
    "rows": (128, 2, 1),
    "samples": (32, 4, 2),
    "truth_samples": (512, 2 * STRATA, STRATA),
    "gradient_samples": (0, 2, 1),
}


def main(argv: Sequence[str]) -> int:
    """The exit code: 0 done, 1 out of memory or a full disk, 2 a mistake in the arguments, 130 interrupted."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    if asks_for_version(argv):
        print(version_text())
        return 0
    return exit_code(lambda: _audit(argv))


def _audit(argv: Sequence[str]) -> int:
    own, overrides = split_flags(argv, (*NAMES, *COUNTS))
    counts = {name: _count(own, name) for name in COUNTS}
    out = _writable(Path(own["out"])) if "out" in own else None
    result = run(own, counts, overrides)
    if out:
        write_json(out / "audit.json", result)
        atomic_write(out / "audit.html", audit_html(result))
    print(audit.table(result["estimators"]))
    print("\n" + "\n".join(result["findings"]))
    if out:
        print(f"\npage: {out / 'audit.html'}   numbers: {out / 'audit.json'}")
    return 0


def run(own: dict[str, str], counts: dict[str, int], overrides: Sequence[str]) -> dict[str, Any]:
    """{"setting", "environment", "truth", "estimators", "pairs", "findings"} of the checkpoint that `own` names."""
    if "run" not in own:
        raise UserError("name a run with --run DIR")
    stage = own.get("stage")
    step = own.get("step")
    if step is not None and (stage is None or not step.isdigit()):
        raise UserError(f"--step {step} needs --stage, and must be a number")
    source = run_source(own["run"], stage)
    check_sees_both_sides(source.model, "audit")
    directory = source.run
    # As its stage saw it: a stage may sample at a temperature of its own.
    seen = source.last_stage in source.config.stage_names
    base = source.config.for_stage(source.last_stage) if seen else source.config
    config = parse(overrides, base, "audit", READS)
    context = build(config, training=False, saved=directory.source)
    config = context.config
    check_same_model(context, source)
    chosen = candidates(config.sampler.completion_length)
    if "methods" in own:
        chosen += _of_files(Path(own["methods"]), config, chosen)
    names = [one.name for one in chosen]
    chosen = [one for one in chosen if own.get("only", "") in one.name]
    if not chosen:
        raise UserError(f"--only {own['only']!r} is part of no estimator's name; there are {', '.join(names)}")
    stage = source.last_stage
    with jax.set_mesh(context.mesh):
        variables, at = variables_at(context, directory, stage, None if step is None else int(step))
        result = audit_estimators(context, variables, chosen, counts)
    setting = {"run": directory.path.name, "stage": stage, "step": at, **counts, "seed": config.seed}
    setting |= {"temperature": config.rl.temperature, "problems": next(iter(context.eval_sets))}
    setting["sampler"] = plain(config.sampler)
    return {"setting": setting, "environment": summary.environment(), **result}


def audit_estimators(
    context: Context, variables: Variables, chosen: Sequence[Candidate], counts: dict[str, int]
) -> dict[str, Any]:
    """{"truth", "estimators", "pairs", "findings"}; a function of the weights, the settings and the seed."""
    root = context.key("audit")
    bench = Bench(
        context.model, variables, context.config.sampler, context.tokenizer.special,
        rollouts(context, variables, counts["rows"], jax.random.fold_in(root, 0)),
    )  # fmt: skip
    truth_B, error_B = large_sample_elbo(bench, jax.random.fold_in(root, 1), counts["truth_samples"])
    rows = []
    for candidate in chosen:
        key = jax.random.fold_in(root, 2)
        rows.append(
            audit.measure(bench, candidate, truth_B, error_B, key, counts["samples"], counts["gradient_samples"])
        )
        print(f"measured {candidate.name}", file=sys.stderr, flush=True)
    pairs = audit.coupled_against_decoupled(rows)
    truth = {
        "mean": float(truth_B.mean()),
        "std_over_rows": float(truth_B.std(ddof=1)),
        "error_of_a_row": float(np.sqrt(np.mean(error_B**2))),
        "error_of_the_mean": float(np.sqrt(np.sum(error_B**2)) / len(error_B)),
        "tokens": float(bench.valid_BC.sum(axis=1).mean()),
    }
    return {"truth": truth, "estimators": rows, "pairs": pairs, "findings": audit.findings(rows, pairs)}


def rollouts(context: Context, variables: Variables, rows: int, key: jax.Array) -> tuple[RolloutBatch, ...]:
    """Completions of the headline set's problems, again from its start where there are fewer; every row draws its own numbers."""
    config = context.config
    problems = next(iter(context.eval_sets.values()))
    sampler = context.sampler(config.rl.temperature)
    shards = sharding.row_shards(context.mesh)
    size = min(config.evaluation.batch_size, -(-rows // shards) * shards)
    batches = []
    for start in range(0, rows, size):
        ids_B = np.arange(start, start + size)
        at_B = ids_B % len(problems)
        inputs = (problems.prompt_RP[at_B], problems.prompt_length_R[at_B], ids_B.astype(np.int32))
        prompt_BP, length_B, row_ids_B = sharding.shard_batch(context.mesh, inputs)
        rollout = sampler.sample(variables, Prompts(prompt_BP, length_B), KeyedNoise(key, row_ids_B))
        canvas = Canvas(rollout.tokens_BC, prompt_BP, length_B)
        batches.append(RolloutBatch(canvas, row_ids_B, rollout.unmask_step_BC, min(size, rows - start)))
    return tuple(batches)


def _of_files(folder: Path, config: Config, known: Sequence[Candidate]) -> list[Candidate]:
    """The estimators of the method files in `folder` that are not in the table already."""
    files = sorted(folder.glob("*.yaml"))
    if not files:
        raise UserError(f"--methods {str(folder)!r} holds no .yaml files; name a folder like configs/methods")
    seen, found = {(one.estimator, one.prompt_mask) for one in known}, []
    for file in files:
        rl = parse(["--rl", str(file)], config, "audit").rl
        # The audit knows no advantages: of SPG it takes the lower bound.
        estimator = dataclasses.replace(rl.estimator, upper_share=0.0) if rl.estimator.upper_share else rl.estimator
        if (estimator, rl.prompt_mask) not in seen and not estimator.needs_entropy:
            seen.add((estimator, rl.prompt_mask))
            found.append(Candidate(file.stem, estimator, rl.prompt_mask))
    return found


def _count(own: dict[str, str], name: str) -> int:
    default, least, multiple = COUNTS[name]
    text = own.get(name, str(default))
    value = int(text) if text.isdecimal() and text.isascii() else -1
    if value != default and (value < least or value % multiple):
        rule = f"a multiple of {multiple}, " if multiple > 1 else ""
        raise UserError(f"--{name} {text} must be a whole number, {rule}at least {least}; the default is {default}")
    return value


def _writable(out: Path) -> Path:
    """Known before the minutes that the audit takes."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {str(out)!r} cannot be made a directory: {error.strerror}") from None
    check_writable("--out", out)
    return out


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
