"""What the compiler says of a program: its memory on each device, and the collectives in its text."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import numpy as np

from d1jax.config import UserError
from d1jax.fit.programs import Program
from d1jax.training.optimizer import HOST

GIB = 2**30
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
OUT_OF_MEMORY = re.compile(r"([\d.]+)([KMGT])\)? (?:exceeds|of [\d.]+[KMGT] hbm)")
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    held: Mapping[str, int]  # arguments by what they are, each array once
    beside: int  # of arrays that are no arguments
    temporaries: int  # activations, gradients, gathered weights; results that are no donated arguments; code
    refused: bool = False  # by the compiler: then the peak is what it names in its refusal


@dataclass(frozen=True)
class Collective:
    """How often a device takes part in collectives of a kind in one call of a program, and the bytes of their results."""

    kind: str
    count: int
    bytes: int


@dataclass(frozen=True)
class Compiled:
    """A program and what its compiler says of it."""

    program: Program
    memory: Memory
    collectives: tuple[Collective, ...]
    open_loops: int  # loops whose number of turns only the device knows: what is in them is counted once
    text: str
    seconds: float  # of compilation


def device_bytes(tree: Any) -> int:
    """Bytes of the arrays of a tree on one device; what waits in the memory of the host is not on it."""
    return sum(_bytes_of(leaf) for leaf in jax.tree.leaves(tree) if leaf.sharding.memory_kind != HOST)


def _bytes_of(leaf: jax.ShapeDtypeStruct) -> int:
    size = 8 if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * size


def compile_program(program: Program) -> Compiled:
    """Lowers and compiles. A program that the compiler refuses for its memory is a result, too: `memory.refused`."""
    held = {name: device_bytes(tree) for name, tree in program.held.items()}
    beside = device_bytes(program.beside)
    start = time.perf_counter()
    lowered = program.lower()
    try:
        made = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        seconds = time.perf_counter() - start
        needed = max(_named_bytes(str(error)) - sum(held.values()), 0)
        return Compiled(program, Memory(held, beside, needed, True), (), 0, "", seconds)
    found, text = made.memory_analysis(), made.as_text()
    seconds = time.perf_counter() - start
    if found is None or text is None:
        raise UserError(f"{program.title}: this backend's compiler does not tell the memory of a program")
    arguments = found.argument_size_in_bytes - device_bytes(program.twice)
    fresh = found.output_size_in_bytes - found.alias_size_in_bytes
    rounding = arguments - sum(held.values())  # alignment, and keys that nothing reads are left out
    temporaries = found.temp_size_in_bytes + fresh + found.generated_code_size_in_bytes + max(rounding, 0)
    # Where the compiler says what the peak is, it may see more than the sum of the parts that it names.
    temporaries = max(temporaries, found.peak_memory_in_bytes - found.argument_size_in_bytes)
    collectives, open_loops = collectives_of(text)
    return Compiled(program, Memory(held, beside, temporaries), collectives, open_loops, text, seconds)


def _named_bytes(message: str) -> int:
    """What a compiler that refuses says the program would need; 0 where it gives no number.

    The TPU compiler calls it temporaries, and means everything: of an update of 8B float32 weights on one chip it names exactly five
    times the weights, which are masters, two moments, gradient and change.
    """
    match = OUT_OF_MEMORY.search(message)
    return round(float(match[1]) * UNITS[match[2]]) if match else 0


# -- the compiled text -------------------------------------------------------------------------------------------------

HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
OPERATION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
SHAPE = re.compile(r"\b([a-z]+\d+|pred)\[([\d,]*)\]")
CALLED = re.compile(r"(?:calls|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
LOOP = re.compile(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)")
TURNS = re.compile(r"known_trip_count\D*(\d+)")
BOUND = re.compile(r"[su]32\[\][^ ]* constant\((\d+)\)")


@dataclass(frozen=True)
class _Part:
    """A computation of the text."""

    own: dict[tuple[str, ...], int]  # {(channel, kind, type): bytes}: pieces of one collective share all three
    called: tuple[str, ...]
    loops: tuple[tuple[str, int | None], ...]  # (body, turns)


def collectives_of(text: str) -> tuple[tuple[Collective, ...], int]:
    """(collectives of one call, how many loops have an unknown number of turns) of a compiled program.

    What is in a loop counts as often as the loop turns. Of a branch that is not always taken, both sides count.
    """
    entry, lines = _computations(text)
    parts = {name: _part(body, lines) for name, body in lines.items()}

    @cache
    def inlined(name: str) -> tuple[dict[tuple[str, ...], int], tuple[tuple[str, int | None], ...]]:
        own, loops = dict(parts[name].own), parts[name].loops
        for called in parts[name].called:
            more, inner = inlined(called) if called in parts else ({}, ())
            own |= more
            loops += inner
        return own, loops

    counts, sizes, unknown = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0), 0
    queue = [(entry, 1)]
    while queue:
        name, times = queue.pop()
        own, loops = inlined(name)
        for (_, kind, _), size in own.items():
            counts[kind] += times
            sizes[kind] += times * size
        for body, turns in dict.fromkeys(loops):
            unknown += turns is None
            queue.append((body, times * (turns or 1)))
    return tuple(Collective(kind, counts[kind], sizes[kind]) for kind in KINDS if counts[kind]), unknown


def _computations(text: str) -> tuple[str, dict[str, list[str]]]:
    """(the name of the entry, {name: its lines})."""
    found: dict[str, list[str]] = {}
    entry, current = "", None
    for line in text.splitlines():
        head = HEAD.match(line)
        if head:
            current = found.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            current.append(line)
    return entry, found


def _part(body: list[str], lines: Mapping[str, list[str]]) -> _Part:
    own: dict[tuple[str, ...], int] = {}
    called: list[str] = []
    loops: list[tuple[str, int | None]] = []
    for line in body:
        match = OPERATION.match(line)
        if match is None:
            continue
        result, operation, rest = match.groups()
        kind = operation.removesuffix("-start")
        if kind in KINDS:
            sizes = list(_sizes(result))
            channel = re.search(r"channel_id=(\d+)", rest)
            key = (channel[1] if channel else line, kind, re.sub(r"\{[^}]*\}", "", result))
            own[key] = max(sizes) if operation.endswith("-start") else sum(sizes)
        elif operation == "while":
            loop = LOOP.search(rest)
            if loop:
                loops.append((loop[2], _turns(rest, lines.get(loop[1], []))))
        else:
            called += CALLED.findall(rest)
            for names in BRANCHES.findall(rest):
                called += [name.strip().lstrip("%") for name in names.split(",")]
    return _Part(own, tuple(called), tuple(loops))


def _sizes(result: str) -> Iterator[int]:
    """Bytes of every array of a result."""
    for dtype, shape in SHAPE.findall(result):
        bits = int(re.sub(r"\D", "", dtype) or 8)
        yield math.prod(int(size) for size in shape.split(",") if size) * max(bits // 8, 1)


def _turns(rest: str, condition: list[str]) -> int | None:
    """How often a loop turns: as the compiler notes it, or the one number that its condition compares its counter with."""
    known = TURNS.search(rest)
    if known:
        return int(known[1])
    text = "\n".join(condition)
    bounds = set(BOUND.findall(text))
    return int(bounds.pop()) if len(bounds) == 1 and " and(" not in text else None


# -- what a program must not hold --------------------------------------------------------------------------------------


def positions_with_logits(compiled: Compiled) -> int:
    """For how many positions, at most, an array of logits exists on a device: the largest [..., V] that is no weight.

    A tensor axis cuts the vocabulary. What is [D, V], or a part of it, is the head.
    """
    program = compiled.program
    width, shape = program.config.model.width, program.mesh.shape
    vocabularies = {program.vocabulary, program.vocabulary // shape["tensor"]}
    weights = {width // cut for cut in range(1, program.mesh.size + 1) if width % cut == 0}
    largest = 0
    for _, sizes in SHAPE.findall(compiled.text):
        axes = [int(size) for size in sizes.split(",") if size]
        if vocabularies & set(axes):
            positions = math.prod(axes) // max(vocabularies & set(axes))
            largest = max(largest, positions if positions not in weights else 0)
    return largest


def whole_parameters(program: Program, above: int = 2**20) -> list[str]:
    """The weights above so many bytes of which every device has a whole copy, although it is one of several of an fsdp or tensor axis."""
    shape = program.mesh.shape
    if shape["fsdp"] * shape["tensor"] == 1:
        return []
    flat, _ = jax.tree_util.tree_flatten_with_path((program.held["weights"], program.held.get("optimizer", ())))
    return [
        jax.tree_util.keystr(path)
        for path, leaf in flat
        if leaf.sharding.is_fully_replicated and int(np.prod(leaf.shape)) * leaf.dtype.itemsize > above
    ]
