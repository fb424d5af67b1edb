"""A configuration on a topology: its programs compiled, and whether each fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jax.sharding import Mesh

from d1jax.config import Config, UserError
from d1jax.config.parse import parse
from d1jax.data.examples import tokenise
from d1jax.fit.compiled import Compiled, compile_program, device_bytes
from d1jax.fit.cost import Time, Work, estimated_temporaries, time_of, work_of
from d1jax.fit.programs import Program, Shapes, programs_of
from d1jax.fit.topology import Part, Topology, devices_of
from d1jax.models import sharding
from d1jax.tasks import read_source
from d1jax.training.context import check_rows_divide
from d1jax.training.setup import Setup, make_task, set_up

ANYTHING = "shapes alone"  # init_from of a plan without weights
PROMPT = 256  # columns, where nothing says how many
ROWS_LOOKED_AT = 512


@dataclass(frozen=True)
class Plan:
    """The programs of a configuration on a topology, before any is compiled."""

    config: Config
    topology: Topology
    mesh: Mesh
    programs: tuple[Program, ...]
    prompt_columns: int
    prompt_from: str  # where that number comes from


@dataclass(frozen=True)
class Verdict:
    """One program, compiled, against the memory of a part."""

    program: Program
    compiled: Compiled
    temporaries: int
    is_estimate: bool  # of the temporaries
    peak: int  # on each device
    part: Part
    work: Work
    time: Time | None

    @property
    def fits(self) -> bool:
        return self.peak <= self.part.usable and not self.compiled.memory.refused


def read_config(argv: Sequence[str]) -> Config:
    """The configuration; no weights need be named."""
    config = parse(argv, base=Config(init_from=ANYTHING))
    return dataclasses.replace(config, init_from="") if config.init_from == ANYTHING else config


def make_plan(config: Config, topology: Topology, prompt_columns: int = 0) -> Plan:
    """Raises UserError for a mesh that does not divide the devices, and for rows that do not divide over them."""
    mesh = sharding.make_mesh(config.mesh, devices_of(topology))
    setup = set_up(config, mesh=mesh, runs=False)
    config = setup.config
    check_rows_divide(config, mesh, training=True)
    found, source = (prompt_columns, "--prompt_length") if prompt_columns else prompt_length(setup)
    shapes = Shapes(setup.model, mesh, setup.tokenizer.special, found, topology.platform)
    return Plan(config, topology, mesh, programs_of(config, shapes), found, source)


def prompt_length(setup: Setup) -> tuple[int, str]:
    """(columns of the longest prompt, where that comes from), as far as it is cheap to know."""
    task_config = setup.config.task
    generated, file = task_config.train == "generated", Path(task_config.train).is_file()
    if setup.config.model.vocab_size and not setup.config.init_from:
        return PROMPT, "assumed: the tokenizer comes with weights; give --prompt_length N, or --init_from"
    if not generated and not file:
        return PROMPT, f"assumed: the rows of {task_config.train} are not read; give --prompt_length N"
    task = make_task(task_config)
    count = min(task_config.train_rows or ROWS_LOOKED_AT, ROWS_LOOKED_AT)
    rows = (
        task.generate("train", count, task_config.seed) if generated else read_source(task_config.train, task)[:count]
    )
    longest = tokenise(task, setup.tokenizer, rows, targets=False).longest_prompt
    return longest, f"the longest of {len(rows)} training rows"


def judge(program: Program, topology: Topology, seen: Callable[[Compiled], None] = lambda _: None) -> Verdict:
    """Compiles one program and compares it with the memory of a device."""
    compiled = compile_program(program)
    seen(compiled)
    memory = compiled.memory
    estimate = not topology.has_compiler
    temporaries = estimated_temporaries(program) if estimate else memory.temporaries
    work = work_of(program)
    moved = sum(found.bytes for found in compiled.collectives)
    time = time_of(work, program, topology.part, moved)
    peak = sum(memory.held.values()) + memory.beside + temporaries
    return Verdict(program, compiled, temporaries, estimate, peak, topology.part, work, time)


def predicted_peak(program: Program, like: Verdict) -> float:
    """The peak of a program that is a small change of one that was compiled: its arguments are exact, its temporaries scaled."""
    held = sum(device_bytes(tree) for tree in program.held.values()) + device_bytes(program.beside)
    return held + like.temporaries * estimated_temporaries(program) / max(estimated_temporaries(like.program), 1)


def check_stages(plan: Plan) -> None:
    """Raises UserError where nothing is compiled."""
    if not plan.programs:
        raise UserError(f"config: stages {list(plan.config.stage_names)} compile no program that samples or updates")
