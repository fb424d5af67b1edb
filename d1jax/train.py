"""python -m d1jax.train --config configs/quickstart.yaml: one config in, one run directory out.

The same command continues a run that was stopped, and prints the result of one that has finished.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import jax

from d1jax.config import Config
from d1jax.config.parse import asks_for_version, describe_origins, help_text, parse_with_origins, version_text
from d1jax.evaluation import accuracy, summary
from d1jax.files import write_json, write_jsonl
from d1jax.rl import loop as rl
from d1jax.sft import loop as sft
from d1jax.telemetry.command_line import USER_MISTAKE, exit_code
from d1jax.telemetry.metrics import MetricsLog
from d1jax.telemetry.report import write_report
from d1jax.telemetry.terminal import printable
from d1jax.training.claim import check_data, claim
from d1jax.training.context import build
from d1jax.training.longer import make_longer
from d1jax.training.setup import mark_one_adapter, save_source, start_variables
from d1jax.training.stage_log import Journal, check_in_place
from d1jax.training.stopping import StopRequest

STAGES = {"sft": (sft.train, lambda config: config.sft.steps), "rl": (rl.train, lambda config: config.rl.steps)}


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
        experiment = build(config)
        config = experiment.config  # with the architecture of what it starts from
        directory, lock = claim(config)
        with lock, MetricsLog(directory.path) as metrics, jax.set_mesh(experiment.mesh):
            line = check_data(directory, experiment.data)
            if line:
                print(f"data: {line}", file=sys.stderr)
            save_source(experiment, directory)
            metrics.rewind(directory.saved_steps(config.stages))
            mark_one_adapter(config, directory)
            variables = start_variables(experiment, directory)
            for line in make_longer(directory, config):
                print(printable(line), file=sys.stderr)
            for stage in config.stages:
                stop.check(f"before {stage}")
                train, steps = STAGES[stage]
                with Journal(directory, metrics, stop, stage, steps(config), config) as journal:
                    try:
                        variables = train(experiment, variables, journal)
                    except (
                        BaseException
                    ):  # stopped, diverged, a full disk: a report of what there is, if it can be written
                        if metrics.in_place():
                            with suppress(OSError):
                                write_report(directory.path)
                        raise
                if not (directory.evaluation(stage).exists() and directory.evaluation_samples(stage).exists()):
                    scores, samples = accuracy.evaluate(experiment, variables)
                    check_in_place(metrics, f"evaluation of {stage}")
                    write_jsonl(directory.evaluation_samples(stage), [{"stage": stage, **sample} for sample in samples])
                    write_json(directory.evaluation(stage), {"step": steps(config), "sets": scores})
                result = summary.write(experiment, directory)
                write_report(directory.path)
    print(accuracy.table(result["stages"], result["baselines"]))
    print(f"\nreport: {directory.path / 'report.html'}   numbers: {directory.summary}")
    return result


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
