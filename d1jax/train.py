"""python -m d1jax.train --config configs/quickstart.yaml: one config in, one run directory out.

The same command continues a run that was stopped, and prints the result of one that has finished.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import jax

from d1jax.config import Config, Stage
from d1jax.config.flags import asks_for_version, version_text
from d1jax.config.help import describe_origins, help_text
from d1jax.config.parse import parse_with_origins
from d1jax.config.values import plain
from d1jax.data.examples import joined
from d1jax.evaluation import grade, summary
from d1jax.files import write_json, write_jsonl
from d1jax.generation import rows as kept_rows
from d1jax.generation import stage as generation
from d1jax.models.transformer import Variables
from d1jax.preference import loop as preference
from d1jax.rl import loop as rl
from d1jax.sft import loop as sft
from d1jax.telemetry.command_line import USER_MISTAKE, exit_code
from d1jax.telemetry.metrics import MetricsLog
from d1jax.telemetry.report.build import write_report
from d1jax.telemetry.terminal import printable
from d1jax.telemetry.trackers import Trackers, check_trackers
from d1jax.training.claim import check_data, claim
from d1jax.training.context import Context, build
from d1jax.training.longer import make_longer
from d1jax.training.setup import save_source
from d1jax.training.stage_log import StageLog, check_in_place
from d1jax.training.stopping import StopRequest
from d1jax.weights.run import RunDirectory
from d1jax.weights.variables import mark_one_adapter, start_variables, variables_at

TRAIN = {"sft": sft.train, "rl": rl.train, "preference": preference.train}


def main(argv: Sequence[str]) -> int:
    """The exit code: 0 done, 1 diverged or cannot save, 2 a mistake in the configuration or the data, 128 + n stopped by signal n."""
    if {"-h", "--help"} & set(argv):
        print(help_text("python -m d1jax.train"))
        return 0
    if asks_for_version(argv):
        print(version_text())
        return 0
    if not argv:
        print(help_text("python -m d1jax.train"))
        print("\nerror: nothing to train; begin with --config configs/quickstart.yaml", file=sys.stderr)
        return USER_MISTAKE
    return exit_code(lambda: _train(argv), keeps=True)


def _train(argv: Sequence[str]) -> int:
    config, origins = parse_with_origins(argv)
    for line in describe_origins(config, origins):
        print(f"config: {printable(line)}", file=sys.stderr)
    run(config)
    return 0


def run(config: Config) -> dict[str, Any]:
    """All stages of a configuration, each followed by its evaluation; returns the summary."""
    with StopRequest() as stop:
        check_trackers(config.track)
        context = build(config)
        config = context.config  # with the architecture of what it starts from
        directory, lock = claim(config)
        trackers = Trackers(config.track, directory.path, plain(config))
        with lock, MetricsLog(directory.path, trackers) as metrics, jax.set_mesh(context.mesh):
            line = check_data(directory, context.data)
            if line:
                print(f"data: {line}", file=sys.stderr)
            save_source(context, directory)
            metrics.rewind(directory.saved_steps(config.stage_names))
            mark_one_adapter(config, directory)
            variables = start_variables(context, directory)
            for line in make_longer(directory, config):
                print(printable(line), file=sys.stderr)
            result: dict[str, Any] | None = None
            for stage in config.stages:
                stop.check(f"before {stage.name}")
                seen = _as_seen_by(stage, context, directory)
                if stage.kind == "generate":
                    generation.run(seen, variables, stage.name, directory.kept(stage.name), stop)
                    continue
                with StageLog(directory, metrics, stop, stage, config) as log:
                    try:
                        variables = TRAIN[stage.kind](seen, variables, log)
                    except BaseException:
                        # Stopped, diverged, a full disk: a report of what there is, if it can be written.
                        if metrics.in_place():
                            with suppress(OSError):
                                write_report(directory.path)
                        raise
                    selected = log.selected()
                if selected and selected["step"] != log.steps:
                    variables, _ = variables_at(context, directory, stage.name, selected["step"])
                if selected:
                    print(f"{stage.name}: {_chosen(selected)}", file=sys.stderr)
                _evaluate(stage.name, log.steps, selected, context, variables, directory, metrics)
                result = summary.write(context, directory)
                write_report(directory.path)
            if result is None:  # no stage trained anything
                result = summary.write(context, directory)
    print(grade.table(result["stages"], result["baselines"]))
    report = f"report: {directory.path / 'report.html'}   " if config.trained_stages else ""
    print(f"\n{report}numbers: {directory.summary}")
    return result


def _as_seen_by(stage: Stage, context: Context, directory: RunDirectory) -> Context:
    """The context of a stage: its own settings, and for SFT the rows that it learns from."""
    seen = dataclasses.replace(context, config=context.config.for_stage(stage.name))
    if stage.kind != "sft":
        return seen
    columns = seen.config.sft.completion_length or seen.config.sampler.completion_length
    parts = [
        seen.train if name == "task" else kept_rows.as_problems(seen, directory.kept(name), columns)
        for name in seen.config.sft.data
    ]
    return dataclasses.replace(seen, train=joined(parts, context.tokenizer.special.end))


def _chosen(selected: Mapping[str, Any]) -> str:
    """What `evaluation.select` has done, in words."""
    return (
        f"step {selected['step']} goes on, the best of {len(selected['candidates'])} checkpoints on {selected['set']} "
        f"({selected['solved']:.1%} solved)"
    )


def _evaluate(
    name: str,
    steps: int,
    selected: Mapping[str, Any] | None,
    context: Context,
    variables: Variables,
    directory: RunDirectory,
    metrics: MetricsLog,
) -> None:
    """Evaluates the weights that a stage hands on, unless that was done."""
    if directory.evaluation(name).exists() and directory.evaluation_samples(name).exists():
        return
    scores, samples = grade.evaluate(context, variables)
    check_in_place(metrics, f"evaluation of {name}")
    write_jsonl(directory.evaluation_samples(name), [{"stage": name, **sample} for sample in samples])
    record = {"step": selected["step"], "selected": selected} if selected else {"step": steps}
    write_json(directory.evaluation(name), {**record, "sets": scores})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
