"""The cheapest change that makes a configuration fit, checked by compiling it.

Changes are tried from the cheapest to the dearest: smaller micro-batches and fewer rows decoded at a time change no number that is
learnt; recomputing costs a third of the time; another mesh costs communication; adapters are another experiment; more devices cost money.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from d1jax.config import Stage, UserError
from d1jax.config.values import plain
from d1jax.files import to_json
from d1jax.fit.compiled import device_bytes
from d1jax.fit.cost import estimated_temporaries
from d1jax.fit.plan import Plan, Verdict, judge, make_plan, predicted_peak, read_config
from d1jax.fit.programs import Program
from d1jax.fit.topology import Topology
from d1jax.models.sharding import row_shards

CHECKED = 5  # suggestions that are compiled at most
RANK = 128  # of adapters that are suggested, as in d1's recipes
Settings = dict[str, str]  # full names, as flags have them; of a stage's own setting OF_STAGE.NAME.KEY
OF_STAGE = "stages"


@dataclass(frozen=True)
class Change:
    """Settings and devices that differ from what was asked about."""

    settings: tuple[tuple[str, str], ...]
    topology: Topology

    def flags(self, stages: Sequence[Stage]) -> list[str]:
        """The flags, of a run with these stages: what a stage sets for itself is changed there, which no flag of its section does."""
        own: dict[str, dict[str, Any]] = {}
        flags = []
        for name, value in self.settings:
            if name.startswith(f"{OF_STAGE}."):
                _, stage, key = name.split(".")
                own.setdefault(stage, {})[key] = int(value)
            else:
                flags += [f"--{name}", value]
        if own:
            changed = [plain(stage) | own[stage.name] if stage.name in own else plain(stage) for stage in stages]
            flags += [f"--{OF_STAGE}", to_json(changed)]
        return flags

    def with_(self, option: Settings | Topology) -> Change:
        """This change and one more."""
        if isinstance(option, Topology):
            return dataclasses.replace(self, topology=option)
        return dataclasses.replace(self, settings=tuple({**dict(self.settings), **option}.items()))


@dataclass(frozen=True)
class Suggestion:
    """A change that makes everything fit, and the proof."""

    change: Change
    verdicts: tuple[Verdict, ...]


def suggest(
    argv: Sequence[str], plan: Plan, verdicts: Sequence[Verdict], log: Callable[[str], None]
) -> Suggestion | None:
    """The first change of the ladder under which every program fits; None where none of those that were compiled did."""
    known = {verdict.program.title: verdict for verdict in verdicts}
    nothing = Change((), plan.topology)
    kept, least, checked = nothing, _overflow(plan, known), 0
    for rung in _ladder(plan, verdicts):
        best = kept
        # Each change alone, then on top of those of the rungs below that have helped.
        for before in dict.fromkeys((nothing, kept)):
            for option in rung:
                change = before.with_(option)
                changed = _plan([*argv, *change.flags(plan.config.stages)], change.topology, plan.prompt_columns)
                if changed is None:
                    continue
                overflow = _overflow(changed, known)
                if before == kept and overflow < least:
                    best, least = change, overflow
                if overflow:
                    continue
                log(f"compiling with {shown(change, plan)} ...")
                checked += 1
                found = _all_fit(changed, known)
                if found is not None:
                    return Suggestion(change, found)
                if checked == CHECKED:
                    return None
        kept = best
    return None


def _overflow(plan: Plan, known: Mapping[str, Verdict]) -> float:
    """Bytes by which programs are predicted to be too large."""
    usable = plan.topology.part.usable
    return sum(max(predicted_peak(program, known[program.title]) - usable, 0.0) for program in plan.programs)


def shown(change: Change, plan: Plan) -> str:
    """The flags of a change, to be added to the command."""
    devices = ["--topology", change.topology.text] if change.topology != plan.topology else []
    return shlex.join([*change.flags(plan.config.stages), *devices])


def _plan(argv: Sequence[str], topology: Topology, prompt_columns: int) -> Plan | None:
    """None for a change that the configuration or the devices do not allow."""
    try:
        return make_plan(read_config(argv), topology, prompt_columns)
    except UserError:
        return None


def _all_fit(plan: Plan, known: Mapping[str, Verdict]) -> tuple[Verdict, ...] | None:
    """The verdicts where every program fits. What did not fit before is compiled first; what has not changed is not compiled again."""
    found: dict[str, Verdict] = {}
    for program in sorted(plan.programs, key=lambda program: known[program.title].fits):
        before = known[program.title]
        same = _sizes(before) == _sizes(dataclasses.replace(before, program=program))
        verdict = before if same else judge(program, plan.topology)
        if not verdict.fits:
            return None
        found[program.title] = verdict
    return tuple(found[program.title] for program in plan.programs)


def _sizes(verdict: Verdict) -> tuple[object, ...]:
    program = verdict.program
    held = tuple(device_bytes(tree) for tree in program.held.values())
    return held, device_bytes(program.beside), estimated_temporaries(program), dict(program.mesh.shape)


def _ladder(plan: Plan, verdicts: Sequence[Verdict]) -> Iterator[list[Settings | Topology]]:
    """Rungs from the cheapest to the dearest; the options of a rung from the smallest change to the largest."""
    config, mesh = plan.config, plan.mesh
    failing = [verdict.program for verdict in verdicts if not verdict.fits]
    stages = {stage.name: stage for stage in config.stages}
    shards = row_shards(mesh)
    updating = [program for program in failing if program.name == "update"]
    for name, programs in _by_setting(updating, stages, "grad_accumulation_steps").items():
        yield _micro_batches(name, programs, stages, shards)
    sampling = [program for program in failing if program.name == "sampler"]
    if sampling and mesh.shape["fsdp"] > 1 and config.mesh.rollout_weights != "as_trained":
        yield [{"mesh.rollout_weights": "as_trained"}]
    for name, programs in _by_setting(sampling, stages, "rollout_batch_size").items():
        yield _fewer_rows(name, programs, stages, shards)
    if config.model.remat != "full" and updating:
        yield [{"model.remat": "full"}]
    if mesh.size > 1:
        yield _meshes(plan)
    if config.lora.rank == 0:
        yield [{"lora.rank": str(RANK)}]
    doubled: list[Settings | Topology] = []
    topology = plan.topology.doubled
    while topology is not None and len(doubled) < 3:
        doubled.append(topology)
        topology = topology.doubled
    yield doubled


def _by_setting(programs: Sequence[Program], stages: Mapping[str, Stage], key: str) -> dict[str, list[Program]]:
    """{full name of the setting `key` that a program goes by: its programs}: its stage's own, or that of the section of the kind, which
    stages without one of their own share."""
    found: dict[str, list[Program]] = {}
    for program in programs:
        stage = stages[program.stage]
        name = f"{OF_STAGE}.{stage.name}.{key}" if key in stage.changes else f"{stage.kind}.{key}"
        found.setdefault(name, []).append(program)
    return found


def _sections(programs: Sequence[Program], stages: Mapping[str, Stage]) -> list[Any]:
    """What the stages of the programs work with, their own changes in it."""
    return [getattr(program.config, stages[program.stage].kind) for program in programs]


def _micro_batches(
    name: str, programs: Sequence[Program], stages: Mapping[str, Stage], shards: int
) -> list[Settings | Topology]:
    """More parts of a batch, as many as divide the rows of all of these stages."""
    kind = stages[programs[0].stage].kind
    rows = {"rl": "rollout_rows", "preference": "prompts_per_step"}.get(kind, "batch_size")
    count = math.gcd(*(getattr(section, rows) for section in _sections(programs, stages)))
    parts = max(program.parts for program in programs)
    sizes = [size for size in range(parts + 1, count + 1) if count % size == 0 and (count // size) % shards == 0]
    return [{name: str(size)} for size in sizes]


def _fewer_rows(
    name: str, programs: Sequence[Program], stages: Mapping[str, Stage], shards: int
) -> list[Settings | Topology]:
    """Fewer rows at a time, which divide those of a batch of all of these stages into whole groups."""
    sections = _sections(programs, stages)
    unit = math.lcm(shards, *(section.num_generations for section in sections))
    rows = math.gcd(*(section.rollout_rows for section in sections))
    largest = min(max(section.rows_at_a_time for section in sections) - 1, rows)
    return [{name: str(n)} for n in range(largest, 0, -1) if n % unit == 0 and rows % n == 0]


def _meshes(plan: Plan) -> list[Settings | Topology]:
    shape, found = dict(plan.mesh.shape), []
    for tensor in (1, 2, 4, 8):
        fsdp = plan.mesh.size // tensor
        if plan.mesh.size % tensor == 0 and (shape["fsdp"], shape["tensor"]) != (fsdp, tensor):
            found.append({"mesh.data": "1", "mesh.fsdp": "-1", "mesh.tensor": str(tensor)})
    return found
