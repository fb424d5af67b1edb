"""python -m d1jax.evaluate --model DIR --tasks gsm8k,math500: benchmarks put to any checkpoint, adapter or run.

--model DIR                   a checkpoint (Hugging Face or d1jax), a run, or RUN/checkpoints/STAGE/STEP
--adapter DIR                 a PEFT adapter on top of it
--tasks gsm8k,humaneval       gsm8k math500 humaneval humaneval_plus mbpp mbpp_plus countdown countdown4 arithmetic sudoku, or
                              my/file.py:Mine
--protocol d1                 published settings, a file of configs/evaluations; the flags below go before them
--lengths 128,256,512         new tokens, each a row of the table
--steps_per_token 0.5,0.25    denoising steps for each new token
--temperature 0.2,0.6         0 is greedy
--samples 8                   completions of a row: pass@k, maj@k, avg@k
--limit 100                   rows; --few_shot 4 worked examples; --seed 0
--data gsm8k=FILE.jsonl       other rows than those of the hub; --shots gsm8k=FILE.jsonl for worked examples
--base DIR                    beside it: another model on the same rows, with McNemar's test (none; what the model was made from)
--out DIR                     samples as they come, summary.json and a page to browse them; the same command continues [evaluations/NAME]
--batch 32                    rows at a time; --dtype bfloat16, --mesh 1,-1,1, --tokenizer DIR
--chat false, --style bare, --system TEXT, --template TEXT, --prefill TEXT, --sampler.top_p 0.9   any other setting

python -m d1jax.evaluate --regrade FILE --task gsm8k: stored generations graded again, without a model.
--style bare: a program needs no fence, an answer of countdown or sudoku no tags.

python -m d1jax.evaluate --run runs/quickstart: the table of a run again, on its own evaluation sets, without training.

--run DIR                     every stage of a run that has a checkpoint
--run DIR --stage rl --step 20
--checkpoint DIR/checkpoints/rl/20
--out FILE.json               also write the table for programs
--distributed                 joins the other processes of a cluster, each of which runs this very command (docs/running_on_clusters.md)
--section.key VALUE           a setting of the run that evaluation reads, e.g. --sampler.steps 16 or --task.eval_rows 4096
--version                     the version of d1jax
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from d1jax.config import Config, UserError
from d1jax.config.flags import asks_for_version, split_flags, split_switch, version_text
from d1jax.config.parse import parse
from d1jax.config.stored import flat
from d1jax.evaluation import grade, summary
from d1jax.evaluation.benchmark_command import put_benchmarks
from d1jax.evaluation.regrade import regrade
from d1jax.files import to_json, write_json
from d1jax.inference.policy import check_sees_both_sides
from d1jax.models import processes
from d1jax.telemetry.command_line import exit_code, exit_code_of_all, output_file
from d1jax.telemetry.terminal import printable
from d1jax.training.callable_module import make_callable
from d1jax.training.claim import changed_rows
from d1jax.training.context import build
from d1jax.weights.run import run_and_step
from d1jax.weights.source import run_source
from d1jax.weights.variables import check_same_model, variables_at

if __name__ != "__main__":
    make_callable(__name__)  # d1jax.evaluate(policy, ...) is d1jax.notebook.stages.evaluate
NAMES = ("run", "stage", "step", "checkpoint", "out")
READS = ("task", "model", "lora", "sampler", "evaluation", "mesh", "seed")


def main(argv: Sequence[str]) -> int:
    """The exit code: 0 done, 1 the model's predictions are not finite, 2 a mistake in the arguments, 130 interrupted."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    if asks_for_version(argv):
        print(version_text())
        return 0
    if any(argument.partition("=")[0] == "--regrade" for argument in argv):
        return exit_code(lambda: _regrade(argv))
    if any(argument.partition("=")[0] in ("--model", "--tasks") for argument in argv):
        return exit_code(lambda: put_benchmarks(argv))
    distributed, argv = split_switch(argv, "distributed")
    return (exit_code_of_all if distributed else exit_code)(lambda: _evaluate(argv))


def _regrade(argv: Sequence[str]) -> int:
    own, rest = split_flags(argv, ("regrade", "task", "style"))
    if rest:
        raise UserError(f"--regrade does not read {rest[0]}; write --regrade FILE --task NAME")
    if "task" not in own:
        raise UserError(
            "--regrade needs the task that grades: --task gsm8k, math, countdown, sudoku, code, or my/file.py:Mine"
        )
    for result in regrade(own["regrade"], own["task"], own.get("style", "instruct")):
        print(to_json(result))
    return 0


def _evaluate(argv: Sequence[str]) -> int:
    own, overrides = split_flags(argv, NAMES)
    out = output_file("--out", own["out"]) if "out" in own else None
    result = evaluate(own, overrides)
    if out:
        write_json(out, result)
    print(grade.table(result["stages"], result["baselines"]))
    return 0


def evaluate(own: dict[str, str], overrides: Sequence[str]) -> dict[str, Any]:
    """{"stages", "baselines", "environment"} as in summary.json, for the checkpoints that `own` names."""
    stage, asked, path = own.get("stage"), own.get("step"), own.get("run")
    if asked is not None and (stage is None or not asked.isdigit()):
        raise UserError(f"--step {asked} needs --stage, and must be a number")
    step = None if asked is None else int(asked)
    if "checkpoint" in own:
        beside = sorted({"run", "stage", "step"} & set(own))
        if beside:
            raise UserError(f"--checkpoint names run, stage and step; leave --{', --'.join(beside)} out")
        path, stage, step = run_and_step(Path(own["checkpoint"]))
        if step is None:
            raise UserError(f"--checkpoint {own['checkpoint']!r} is not of the form RUN/checkpoints/STAGE/STEP")
    if path is None:
        raise UserError("name a run with --run DIR, or a checkpoint with --checkpoint DIR/checkpoints/STAGE/STEP")
    source = run_source(path, stage, step)
    check_sees_both_sides(source.model, "evaluate")
    run = source.run
    config = parse(overrides, source.config, "evaluate", READS)
    processes.check_equal({**own, **flat(config)})
    context = build(config, training=False, saved=run.source)
    check_same_model(context, source)
    if config.task == source.config.task:  # else other rows were asked for
        for line in changed_rows(run, context.data):
            print(f"note: {printable(line)}", file=sys.stderr)
    with jax.set_mesh(context.mesh):
        wanted = [stage] if stage else processes.agreed(lambda: list(source.saved()))
        stages = []
        for name in wanted:
            began = time.perf_counter()
            variables, at = variables_at(context, run, name, step)
            rows = ", ".join(f"{len(problems)} rows of {key}" for key, problems in context.eval_sets.items())
            what = f"{run.checkpoints(name) / str(at)}: stage {name}, step {at}, {rows}, {_decoding(config)}"
            print(f"evaluating {what}", file=sys.stderr, flush=True)
            scores, _ = grade.evaluate(context, variables, progress=True)
            print(f"evaluated {what}, {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
            stages.append(summary.stage_entry(name, {"step": at, "sets": scores}))
    baselines = {name: grade.baseline_scores(context, problems) for name, problems in context.eval_sets.items()}
    return {"stages": stages, "baselines": baselines, "environment": summary.environment()}


def _decoding(config: Config) -> str:
    """How it is decoded, in words."""
    sampler = config.sampler
    steps = f"schedule {sampler.schedule.name}" if sampler.schedule.adaptive else f"{sampler.steps} denoising steps"
    draws = f"temperature {config.evaluation.temperature:g}" if config.evaluation.temperature else "greedy"
    return f"{sampler.completion_length} tokens in {steps}, {draws}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
