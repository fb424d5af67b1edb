"""python -m d1jax.train --config configs/quickstart.yaml: one config in, one run directory out.

The same command continues a run that was stopped, and prints the result of one that has finished.

--from STAGE   does this stage and all later ones again; what they have left is kept in redone/
--only STAGE   runs this stage alone; those before it are finished
--distributed  joins the other processes of a cluster, each of which runs this very command (docs/running_on_clusters.md)
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import jax

from d1jax.adapt import loop as adapt
from d1jax.config import Config, Stage, UserError
from d1jax.config.flags import asks_for_version, split_flags, split_switch, version_text
from d1jax.config.help import describe_origins, help_text
from d1jax.config.parse import parse_with_origins
from d1jax.config.stored import flat
from d1jax.config.values import plain
from d1jax.config.version import __version__
from d1jax.evaluation import grade, sampled, summary
from d1jax.files import write_json, write_jsonl
from d1jax.generation import stage as generation
from d1jax.generation.ready import ready
from d1jax.generation.teacher import check_teachers
from d1jax.inference.export import check_export, export
from d1jax.inference.policy import Policy
from d1jax.models import processes
from d1jax.models.transformer import Variables
from d1jax.preference import loop as preference
from d1jax.reward_model import loop as reward_model
from d1jax.rl import loop as rl
from d1jax.sft import loop as sft
from d1jax.telemetry.command_line import USER_MISTAKE, exit_code, exit_code_of_all, in_all_processes
from d1jax.telemetry.metrics import MetricsLog
from d1jax.telemetry.report.build import write_report
from d1jax.telemetry.terminal import printable
from d1jax.telemetry.trackers import Trackers, check_trackers
from d1jax.training.claim import check_data, check_shared, claim
from d1jax.training.context import Context, build, of_stages
from d1jax.training.longer import make_longer
from d1jax.training.redo import check_only, is_finished, later_stages
from d1jax.training.setup import began_autoregressive, keep_programs, save_source
from d1jax.training.stage_log import StageLog, check_in_place
from d1jax.training.stopping import StopRequest
from d1jax.weights.held import Held
from d1jax.weights.run import RunDirectory, read_record
from d1jax.weights.variables import mark_one_adapter

TRAIN = {"adapt": adapt.train, "sft": sft.train, "rl": rl.train, "preference": preference.train}


def main(argv: Sequence[str]) -> int:
    """The exit code: 0 done, 1 diverged or cannot save, 2 a mistake in the configuration or the data, 128 + n stopped by signal n."""
    if {"-h", "--help"} & set(argv):
        print(f"{__doc__}\n{help_text('python -m d1jax.train')}")
        return 0
    if asks_for_version(argv):
        print(version_text())
        return 0
    if not argv:
        print(help_text("python -m d1jax.train"))
        print("\nerror: nothing to train; begin with --config configs/quickstart.yaml", file=sys.stderr)
        return USER_MISTAKE
    distributed, argv = split_switch(argv, "distributed")
    return (exit_code_of_all if distributed else exit_code)(lambda: _train(argv), keeps=True)


def _train(argv: Sequence[str]) -> int:
    own, rest = split_flags(argv, ("from", "only"))
    config, origins = parse_with_origins(rest)
    for line in describe_origins(config, origins):
        print(f"config: {printable(line)}", file=sys.stderr)
    run(config, own.get("from", ""), own.get("only", ""))
    return 0


def run(config: Config, again_from: str = "", only: str = "") -> dict[str, Any]:
    """All stages of a configuration, each followed by its evaluation; returns the summary.

    again_from: the stage from which on all is done again. only: the one stage that is run ("": all of them). Where the caller has joined
    several processes (jax.distributed.initialize), all of them call this, and it is as with --distributed: the first one writes and
    speaks, and an exception in any of them ends all.
    """
    with in_all_processes():
        return _run(config, again_from, only)


def _run(config: Config, again_from: str, only: str) -> dict[str, Any]:
    with StopRequest() as stop:
        versions = {"the version of d1jax": __version__, "the version of JAX": jax.__version__}
        processes.check_equal({**flat(config), "--from": again_from, "--only": only, **versions})
        check_trackers(config.track)
        for name in filter(None, (again_from, only)):
            later_stages(config, name)  # names a stage
        context = build(config)
        config = context.config  # with the architecture of what it starts from
        keep_programs(config)
        contexts = of_stages(context)
        to_do = _stages_to_do(config, again_from)
        check_teachers(contexts, to_do)
        reward_model.check_rows(contexts, to_do)
        data = {name: found for one in (context, *contexts.values()) for name, found in one.data.items()}
        processes.check_equal({f"the data of {name}": found for name, found in data.items()})
        _check_exports(config)
        directory, lock = processes.first_only(lambda: claim(config, again_from)) or _claimed(config)
        check_shared(directory)
        trackers = Trackers(config.track if processes.is_first() else (), directory.path, plain(config))
        with lock, MetricsLog(directory.path, trackers) as metrics, jax.set_mesh(context.mesh):
            reported = bool(config.kinds - {"generate", "export"})
            line = processes.first_only(lambda: check_data(directory, data))
            if line:
                print(f"data: {line}", file=sys.stderr)
            save_source(context, directory)
            metrics.rewind(processes.agreed(lambda: directory.saved_steps(config.stage_names)))
            processes.first_only(lambda: mark_one_adapter(config, directory))
            for stage in config.stages:
                if stage.kind == "export":
                    section = contexts[stage.name].config
                    target = _out_and_record(stage.name, section, directory)
                    processes.first_only(partial(check_export, section.export, stage.name, *target))
            held = Held(context, directory)
            for line in processes.first_only(lambda: make_longer(directory, config)) or ():
                print(printable(line), file=sys.stderr)
            if only:
                processes.first_only(lambda: check_only(directory, config, only))
            for stage in config.stages:
                if only and stage.name != only:
                    held.skip(stage)
                    continue
                stop.check(f"before {stage.name}")  # where all processes meet: what the stage before has left is there
                if stage.kind == "reward_model" and _is_measured(stage, config, directory):
                    continue
                variables = held.before(stage)
                if stage.kind not in (*TRAIN, "reward_model"):
                    _use(stage, ready(stage, contexts, directory), held, directory, stop)
                    continue
                seen = ready(stage, contexts, directory)
                with (
                    StageLog(directory, metrics, stop, stage, config) as log,
                    _report_of_what_there_is(metrics, directory),
                ):
                    if stage.kind == "reward_model":
                        _, worth = reward_model.train(seen, variables, log)
                        write_json(directory.measured(stage.name), {"step": log.steps, **worth})
                        print(f"{stage.name}: {_worth(worth)}", file=sys.stderr)
                        continue
                    if stage.kind == "adapt":
                        _measure_text(stage, seen, variables, directory, before=True)
                    variables = TRAIN[stage.kind](seen, variables, log)
                    selected = log.selected()
                held.after(stage, variables)
                if stage.kind == "adapt":
                    _measure_text(stage, seen, variables, directory)
                    if not config.answers_task:
                        _report(context, directory)
                        continue
                if selected:
                    held.take(stage, selected["step"])
                    print(f"{stage.name}: {_chosen(selected)}", file=sys.stderr)
                _evaluate(stage.name, log.steps, selected, context, held.variables, directory, metrics)
                _report(context, directory)
            result = _report(context, directory, reported)  # stages behind the last one that trained are in it, too
    _print(result, config, directory, reported)
    return result


def _print(result: dict[str, Any], config: Config, directory: RunDirectory, reported: bool) -> None:
    """The tables of a finished run, and where its files are."""
    if config.answers_task:
        print(grade.table(result["stages"], result["baselines"]))
    for name, record in result["texts"].items():
        print(_bits(name, record))
    for line in sampled.table(result["sampled"]):
        print(line)
    for name, worth in result["reward_models"].items():
        print(f"\n{name}: {_worth(worth)}")
    report = f"report: {directory.path / 'report.html'}   " if reported else ""
    print(f"\n{report}numbers: {directory.summary}")


def _claimed(config: Config) -> tuple[RunDirectory, AbstractContextManager[None]]:
    """The run directory that the first process has claimed."""
    return RunDirectory(Path(config.run_dir)), nullcontext()


def _check_exports(config: Config) -> None:
    """Raises UserError where several processes could not write what an export stage asks for."""
    own_form = [
        stage.name for stage in config.stages if stage.kind == "export" and config.section_of(stage).form == "d1jax"
    ]
    if own_form and processes.count() > 1:
        raise UserError(
            f"stage {own_form[0]!r}: form = d1jax is not written by several processes; export to Hugging Face's form, and convert that, or "
            "continue the run with one process for this stage"
        )


def _report(context: Context, directory: RunDirectory, page: bool = True) -> dict[str, Any]:
    """Writes the summary, and the report where that is wanted; returns the summary."""
    processes.meet()  # what it is made of is there
    result = summary.write(context, directory)
    if page and processes.is_first():
        write_report(directory.path)
    return result


@contextmanager
def _report_of_what_there_is(metrics: MetricsLog, directory: RunDirectory) -> Iterator[None]:
    """Writes a report, if it can, where a stage ends early: stopped, diverged, a full disk."""
    try:
        yield
    except BaseException:
        if metrics.in_place() and processes.is_first():
            with suppress(OSError):
                write_report(directory.path)
        raise


def _stages_to_do(config: Config, again_from: str) -> tuple[Stage, ...]:
    """The stages that are not finished, and those that are done again."""
    directory = RunDirectory(Path(config.run_dir))
    again = later_stages(config, again_from) if again_from else ()
    finished = processes.agreed(lambda: [one.name for one in config.stages if is_finished(directory, config, one)])
    return tuple(stage for stage in config.stages if stage.name in again or stage.name not in finished)


def _is_measured(stage: Stage, config: Config, directory: RunDirectory) -> bool:
    """Whether a reward model was trained to its last step and measured then."""
    record, steps = directory.measured(stage.name), config.section_of(stage).steps
    return processes.agreed(lambda: record.exists() and read_record(record).get("step") == steps)


def _worth(worth: Mapping[str, float]) -> str:
    """What a reward model is worth, in words."""
    if "steps" in worth:
        ranked = "there are no pairs of a right and a wrong one"
        if worth["ranked"] is not None and not math.isnan(worth["ranked"]):  # None: as a JSON file has it
            ranked = f"{worth['ranked']:.1%} of the pairs of a right and a wrong one are ordered rightly"
        return (
            f"on {worth['steps']} held-out lines, of which {worth['right']:.1%} are right, {worth['accuracy']:.1%} are judged rightly; "
            f"{ranked}; calibration error {worth['calibration_error']:.3f}"
            + "".join(
                f"; of {one['pairs']} pairs of texts ({name}) {one['accuracy']:.1%} are ordered rightly"
                for name, one in worth.get("texts", {}).items()
            )
        )
    return (
        f"on {worth['pairs']} held-out pairs {worth['accuracy']:.1%} are ordered rightly, mean margin {worth['margin']:.2f}, "
        f"calibration error {worth['calibration_error']:.3f}"
    )


def _measure_text(
    stage: Stage, seen: Context, variables: Variables, directory: RunDirectory, before: bool = False
) -> None:
    """Writes down the bits per byte of held-out text, before a stage begins and after its last step, unless that was done.

    Before a stage that works with the autoregressive model that the run starts from they are those of that model, exactly.
    """
    path, which = directory.text_measured(stage.name), "before" if before else "after"
    record = processes.agreed(lambda: read_record(path) if path.exists() else {})
    if which in record:
        return
    causal = before and seen.config.works_on_start(stage) and began_autoregressive(seen)
    found = adapt.measured(seen, variables, causal)
    kind = "next tokens" if causal or seen.config.model.attention_mask == "causal" else "ELBO"
    write_json(path, {**record, "step": seen.config.adapt.steps, which: {"by": kind, "sets": found}})


def _bits(name: str, record: Mapping[str, Any]) -> str:
    """Bits per byte before and after a stage on plain text, a line a set."""
    lines = [
        f"{name}, {when}: {value['bits_per_byte']:.3f} ± {value['error']:.3f} bits per byte of {which} ({record[when]['by']})"
        for when in ("before", "after")
        for which, value in record.get(when, {}).get("sets", {}).items()
    ]
    return "\n".join(lines)


def _use(stage: Stage, seen: Context, held: Held, directory: RunDirectory, stop: StopRequest) -> None:
    """A stage that trains nothing: it samples, evaluates or exports the weights that there are."""
    name = stage.name
    if stage.kind == "generate":
        generation.run(seen, held.variables, name, directory.kept(name), stop)
    elif stage.kind == "evaluate":
        sampled.run(seen, held.variables, name, held.name, directory.sampled(name))
    else:
        sampler = None if seen.model.config.attention_mask == "causal" else seen.config.sampler
        policy = Policy(seen.model, held.variables, seen.tokenizer, seen.mesh, directory.source, sampler)
        export(policy, seen.config.export, held.name, *_out_and_record(name, seen.config, directory))


def _out_and_record(stage: str, config: Config, directory: RunDirectory) -> tuple[Path, Path]:
    """Where an export stage writes, and what says that it has."""
    here = directory.exported(stage)
    return Path(config.export.out or here), here.with_suffix(".json")


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
    left = directory.evaluation(name), directory.evaluation_samples(name)
    if processes.agreed(lambda: all(path.exists() for path in left)):
        return
    scores, samples = grade.evaluate(context, variables)
    check_in_place(metrics, f"evaluation of {name}")
    write_jsonl(directory.evaluation_samples(name), [{"stage": name, **sample} for sample in samples])
    record = {"step": selected["step"], "selected": selected} if selected else {"step": steps}
    write_json(directory.evaluation(name), {**record, "sets": scores})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
