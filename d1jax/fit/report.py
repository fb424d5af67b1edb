"""What `d1jax.fit` prints: a table of memory, the work and the time of each program, and notes on how far to trust them."""

from __future__ import annotations

from collections.abc import Sequence

from d1jax.fit.cost import LINKS, REACHED
from d1jax.fit.plan import Plan, Verdict
from d1jax.fit.topology import GIB

COLUMNS = ("weights", "optimizer", "reference", "rows")
DEFAULT_GPU_SHARE = 0.75  # of a GPU's memory, which JAX takes unless told otherwise


def header(plan: Plan) -> str:
    shape, part = plan.mesh.shape, plan.topology.part
    limits = f", {part.flops / 1e12:.0f} TFLOP/s" if part.flops else ""
    limits += f", {part.bandwidth / 1e9:.0f} GB/s" if part.bandwidth else ""
    return (
        f"{plan.topology.text}: {plan.topology.count} x {part.name}, {part.memory / GIB:.4g} GiB each{limits}; "
        f"mesh data {shape['data']} x fsdp {shape['fsdp']} x tensor {shape['tensor']}\n"
        f"prompts: {plan.prompt_columns} columns ({plan.prompt_from})"
    )


def memory_table(verdicts: Sequence[Verdict]) -> str:
    """GiB on each device."""
    mark = "temporaries" + (" (estimate)" if any(verdict.is_estimate for verdict in verdicts) else "")
    rows = [("GiB on each device", *COLUMNS, "beside", mark, "peak", "of", "")]
    for verdict in verdicts:
        held = verdict.compiled.memory.held
        sizes = [held.get(name, 0) for name in COLUMNS]
        numbers = (*sizes, verdict.compiled.memory.beside, verdict.temporaries, verdict.peak, verdict.part.memory)
        answer = "fits" if verdict.fits else "DOES NOT FIT"
        rows.append((verdict.program.title, *(_gib(number) for number in numbers), answer))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells, row[-1]]).rstrip())
    return "\n".join(lines)


def work_lines(verdict: Verdict) -> list[str]:
    """FLOPs, bytes, collectives and time of one program."""
    program, work, time = verdict.program, verdict.work, verdict.time
    most = "at most " if work.at_most else ""
    calls = f", {program.calls} calls a step" if program.calls > 1 else ""
    lines = [
        f"{program.title}: {most}{_counted(work.flops, 'FLOP')} a call over all devices{calls}; "
        f"{most}{_counted(work.bytes, 'B')} to and from the memory of a device; compiled in {verdict.compiled.seconds:.0f} s"
    ]
    found = verdict.compiled.collectives
    if found:
        told = ", ".join(f"{one.count:,} {one.kind} ({_counted(one.bytes, 'B')})" for one in found)
        loops = verdict.compiled.open_loops
        step = " and denoising step" if work.steps > 1 else ""
        once = (
            f"; {loops} loops whose turns only the device knows are counted once" if loops and work.steps == 1 else ""
        )
        lines.append(f"  collectives of a device{step}: {told}{once}")
    if time is not None:
        slow, low = program.calls * time.high, program.calls * time.low
        lines.append(
            f"  time a step: {_seconds(low)} (all of the {time.limit}) to {_seconds(slow)} ({REACHED:.0%} of it)"
        )
    return lines


def notes(plan: Plan, verdicts: Sequence[Verdict]) -> list[str]:
    """What a reader must know of these numbers."""
    topology, found = plan.topology, []
    if any(verdict.is_estimate for verdict in verdicts):
        found.append(
            "temporaries are an ESTIMATE by formula (fit/cost.py): programs were compiled for virtual CPU devices, because no "
            "compiler of these GPUs is here; weights, optimizer, reference and rows are exact, collectives are those on CPUs"
        )
    if topology.platform == "cpu":
        found.append(
            "temporaries are the CPU compiler's, which computes bfloat16 in float32: those of an accelerator are smaller; the memory "
            "is this machine's, shared out over the devices"
        )
    if any(verdict.compiled.memory.refused for verdict in verdicts):
        found.append("where the compiler refuses a program, the peak is what it names in its refusal")
    for one in verdicts:
        if one.time is not None and one.time.limit == LINKS and one.program.parts > 1:
            found.append(
                f"{one.program.title} waits for the links: every micro-batch gathers the weights, so fewer grad_accumulation_steps "
                f"(here {one.program.parts}) are faster where they fit"
            )
    found.append(
        "FLOPs are counted by formula: XLA's cost analysis takes the body of a loop once; beside: what else lies in memory while a "
        "program runs (of a sampler: optimizer, master weights, reference); evaluation, rewards and the updates of PPO's value model "
        "are not counted"
    )
    return found


def last_line(plan: Plan, verdicts: Sequence[Verdict]) -> str:
    """How full the fullest device is, and what JAX must be told so that it takes that much of a GPU."""
    share = max(verdict.peak / verdict.part.memory for verdict in verdicts)
    line = f"at most {share:.0%} of the memory of a device"
    if plan.topology.platform == "gpu" and not plan.topology.is_here and share > DEFAULT_GPU_SHARE:
        line += (
            f"; JAX takes {DEFAULT_GPU_SHARE:.0%} of a GPU unless XLA_PYTHON_CLIENT_MEM_FRACTION is set, e.g. to 0.95"
        )
    return line


def _gib(size: int) -> str:
    gib = size / GIB
    return "-" if size == 0 else f"{gib:.2f}" if gib >= 0.005 else f"{gib:.1g}"


def _counted(number: float, unit: str) -> str:
    """1234567.0 FLOP -> 1.23 MFLOP."""
    for prefix, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {prefix}{unit}"
    return f"{number:.0f} {unit}"


def _seconds(number: float) -> str:
    return f"{number:.3g} s" if number < 120 else f"{number / 60:.3g} min"
