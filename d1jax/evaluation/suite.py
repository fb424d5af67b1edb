"""Benchmarks x lengths x steps x temperatures for a checkpoint, and beside it the one that it was made from."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d1jax.config import UserError
from d1jax.config.benchmark import BenchmarkConfig
from d1jax.config.no_effect import no_effect, unread_of_sampler
from d1jax.config.setting import value_at
from d1jax.data.rows import identity_of_rows
from d1jax.evaluation import statistics
from d1jax.evaluation.benchmark import Cell, run_cell, summarise
from d1jax.evaluation.prompting import choose_shots
from d1jax.evaluation.protocol import Protocol, check_settings
from d1jax.inference.policy import Policy
from d1jax.tasks import TASKS, make, read_source
from d1jax.tasks.benchmarks import GENERATED, GENERATED_ROWS, Benchmark, benchmark
from d1jax.tasks.hub import HUB
from d1jax.tasks.task import DataError, Row, Task

OF_THE_HARNESS = {
    "style": "the style is --style",
    "split_seed": "rows that are generated are always those of split seed 0, so that two numbers are of the same rows",
}
"""Fields of every task that are not among a benchmark's options, and why."""


@dataclass(frozen=True)
class Asked:
    """What one evaluation is asked to do."""

    benchmarks: tuple[str, ...]
    protocol: Protocol
    given: Mapping[str, Any]  # settings, laid over those of the protocol
    lengths: tuple[int, ...] = ()
    steps_per_token: tuple[float, ...] = ()
    temperatures: tuple[float, ...] = ()
    data: Mapping[str, str] = dataclasses.field(default_factory=dict)  # benchmark -> source of its rows
    shots: Mapping[str, str] = dataclasses.field(default_factory=dict)  # benchmark -> source of worked examples

    def variants(self, name: str) -> list[BenchmarkConfig]:
        """The settings of a benchmark, one for every length, number of steps and temperature. Raises UserError."""
        base = self.protocol.settings(name, self.given)
        lengths = self.lengths or (() if "length" in self.given else self.protocol.lengths) or (base.length,)
        made = []
        for length in lengths:
            for per_token in self.steps_per_token or (base.steps_per_token,):
                for temperature in self.temperatures or (base.temperature,):
                    changes = {"steps_per_token": per_token, "temperature": temperature}
                    one = dataclasses.replace(base.at(length), **changes)
                    made.append(check_settings(one, f"{name} at length {length}"))
        return made


def plan(asked: Asked) -> list[Cell]:
    """The cells of an evaluation, their rows read. Raises UserError and DataError before any model is loaded."""
    unknown = sorted((asked.data.keys() | asked.shots.keys()) - set(asked.benchmarks))
    if unknown:
        raise UserError(
            f"--data or --shots names {unknown[0]!r}, which is not among --tasks {', '.join(asked.benchmarks)}"
        )
    known_as = {name: _known(name) for name in asked.benchmarks}
    variants_of = {name: asked.variants(name) for name in asked.benchmarks}
    for name in asked.shots:
        if not variants_of[name][0].few_shot:
            raise UserError(no_effect(f"command line: --shots {name}={asked.shots[name]}", "few_shot above 0"))
    _check_has_effect(asked, [one for variants in variants_of.values() for one in variants])
    cells = []
    for name in asked.benchmarks:
        known, variants = known_as[name], variants_of[name]
        task = _task(known, variants[0])
        source = asked.data.get(name, known.source)
        if not source:
            raise UserError(f"--tasks {name}: where are its rows? give --data {name}=FILE.jsonl, or hub:NAME")
        rows = _rows(task, source, "test", variants[0].limit, f"--data {name}=FILE.jsonl")
        shots = _shots(task, asked.shots.get(name, known.shots), variants[0], name)
        identity = identity_of_rows(source, rows)
        prompter = choose_shots(task, variants[0], shots, rows)
        for row in rows:
            prompter.asked(row)  # a field that the template names and a row lacks is told now
        cells += [Cell(name, one, dataclasses.replace(prompter, config=one), rows, identity) for one in variants]
    labels = [cell.label for cell in cells]
    if len(set(labels)) != len(labels):
        raise UserError(f"two of the settings are one: {', '.join(sorted({x for x in labels if labels.count(x) > 1}))}")
    return cells


def _known(name: str) -> Benchmark:
    try:
        return benchmark(name, TASKS)
    except ValueError as error:
        raise UserError(str(error)) from None


def _check_has_effect(asked: Asked, settings: Sequence[BenchmarkConfig]) -> None:
    """Raises UserError for a sampler setting of the command line that no cell reads. A protocol may have one: it serves other cells."""
    unread = [unread_of_sampler(one.sampler, one.temperature) for one in settings]
    for name, where in unread[0].items():
        if all(name in one for one in unread) and _is_given(asked.given.get("sampler"), name):
            flag = f"command line: --sampler.{name} {value_at(settings[0].sampler, name)}"
            raise UserError(no_effect(flag, where))
    steps = asked.steps_per_token or asked.given.get("steps_per_token")
    if steps and all(one.sampler.schedule.adaptive for one in settings):
        raise UserError(no_effect("command line: --steps_per_token", "sampler.schedule = even, time or chance"))


def _is_given(given: Any, name: str) -> bool:
    """Whether nested mappings hold a name such as remasking.confidence_of."""
    for key in name.split("."):
        if not isinstance(given, Mapping) or key not in given:
            return False
        given = given[key]
    return True


def _task(known: Benchmark, config: BenchmarkConfig) -> Task:
    own = sorted(OF_THE_HARNESS.keys() & config.options.keys())
    if own:
        raise UserError(f"options.{own[0]} = {config.options[own[0]]!r:.60}: {OF_THE_HARNESS[own[0]]}; leave it out")
    try:
        return make(known.task, style=config.style, split_seed=0, **{**known.options, **config.options})
    except DataError:
        raise
    except ValueError as error:
        raise UserError(str(error).replace("task.name =", "--tasks", 1)) from None


def _rows(task: Task, source: str, split: str, limit: int, instead: str) -> list[Row]:
    if source == GENERATED:
        return task.generate(split, limit or GENERATED_ROWS, 0)
    rows = [row for row in _read(source, task, instead) if task.has_reference(row)]
    if not rows:
        raise UserError(f"{source}: no row has a reference answer, so nothing could be right")
    return rows[:limit] if limit else rows


def _read(source: str, task: Task, instead: str) -> list[Row]:
    """The rows of a source; `instead` is the flag that names another one, told where the hub cannot be reached."""
    try:
        return read_source(source, task)
    except DataError as error:
        raise (DataError(f"{error}: give {instead}") if source.startswith(HUB) else error) from None


def _shots(task: Task, source: str, config: BenchmarkConfig, name: str) -> list[Row]:
    if not config.few_shot:
        return []
    if not source:
        raise UserError(
            f"--few_shot {config.few_shot}: no training rows of {name} are known; give --shots {name}=SOURCE"
        )
    if source == GENERATED:
        return task.generate("train", max(2 * config.few_shot, 200), 0)
    return _read(source, task, f"--shots {name}=FILE.jsonl")


def run(
    policy: Policy, cells: Sequence[Cell], folder: Path, model: Mapping[str, Any], batch: int
) -> list[tuple[Cell, list[dict[str, Any]]]]:
    """The samples of every cell, written under `folder` as they come; `model` tells these weights from others."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for cell in {cell.name: cell for cell in cells}.values():
        _self_test(cell)
    for cell in cells:
        print(f"evaluating {cell.label}: {len(cell.rows)} rows x {cell.config.samples}", file=sys.stderr, flush=True)
        found.append((cell, run_cell(policy, cell, folder, model, batch)))
    return found


def _self_test(cell: Cell) -> None:
    """Says which rows' own solutions do not pass here, so that no answer can; raises UserError where that is most of them."""
    test = getattr(cell.prompter.task, "self_test", None)
    broken = test(cell.rows) if test else []
    if not broken:
        return
    names = "; ".join(f"row {place}, {what}" for place, what in broken[:3])
    told = f"{cell.name}: the published solutions of {len(broken)} of {len(cell.rows)} rows do not pass their tests here ({names[:300]})"
    if len(broken) * 2 > len(cell.rows):
        raise UserError(f"{told}; docs/graders.md says what the sandbox needs")
    print(f"note: {told}; no answer can", file=sys.stderr)


def compared(
    first: Sequence[tuple[Cell, list[dict[str, Any]]]], second: Sequence[tuple[Cell, list[dict[str, Any]]]]
) -> list[dict[str, Any]]:
    """McNemar's test of two checkpoints, cell by cell, on the first sample of every row: {"cell", "only_first", "only_second", "p"}."""

    def right(found: list[dict[str, Any]]) -> list[bool]:
        return [one["grade"]["solved"] == 1.0 for one in found if one["sample"] == 0]

    return [
        {"cell": cell.label, **statistics.mcnemar(right(one), right(other))}
        for (cell, one), (_, other) in zip(first, second, strict=True)
    ]


def summaries(found: Sequence[tuple[Cell, list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    return [summarise(cell, samples) for cell, samples in found]


def table(by_model: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The numbers as text: one line a cell and model, models of a cell below each other."""
    lines = [
        f"{'benchmark':<16}{'length':>7}{'steps':>7}{'temp':>6}  {'model':<20}{'n':>6}  {'accuracy':>8}  {'95 % interval':>16}"
        f"  {'format':>7}  {'tokens':>7}  {'passes':>7}  {'tok/s':>7}  {'AR@1':>6}"
    ]
    names = list(by_model)
    for place in range(len(by_model[names[0]])):
        for name in names:
            one = by_model[name][place]
            low, high = one["accuracy_ci95"]
            form = next(
                (one["grades"][key] for key in ("format", "code_format", "answered") if key in one["grades"]), None
            )
            lines.append(
                f"{one['benchmark']:<16}{one['length']:>7}{one['steps']:>7}{one['temperature']:>6g}  {name:<20.20}{one['n']:>6}"
                f"  {one['accuracy']:>8.1%}  {f'{low:.1%} .. {high:.1%}':>16}  {'-' if form is None else f'{form:.1%}':>7}"
                f"  {one['effective_tokens']:>7.1f}  {one['nfe']:>7.1f}  {_number(one['tokens_per_second'], '.1f'):>7}"
                f"  {_number(one['global_ar'], '.2f'):>6}"
            )
            several = {key: value for key, value in one.items() if key.startswith(("pass@", "maj@", "avg@"))}
            if several:
                told = [f"{k} {v['value']:.1%} [{v['ci95'][0]:.1%}, {v['ci95'][1]:.1%}]" for k, v in several.items()]
                lines.append(" " * 38 + "  ".join(told))
    return "\n".join(lines)


def _number(value: float | None, how: str) -> str:
    return "-" if value is None else format(value, how)
