"""Does LLaDA-8B fit? Peak memory of a device under full fine-tuning, a LoRA diffu-GRPO update and its sampler, on six topologies.

    python benchmarks/fit_table.py            # -> benchmarks/results/fit_8b.json and a table; half an hour on two cores, needs libtpu
    python benchmarks/fit_table.py v5e:2x4    # this topology alone, the others as they are in the file

Everything is compiled from shapes alone: TPUs by their real compiler, GPUs for virtual CPU devices with temporaries by formula.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "fit_8b.json"
# Full fine-tuning at 2,048 columns, a row a device at a time; d1's diffu-GRPO on Countdown as its recipe has it (96 rows in 12 parts of 8,
# 512 columns, adapters of rank 128 on all matrices). Prompts of 256 columns.
FULL = ["--config", "configs/runs/d1_sft_8b.yaml", "--lora.rank", "0", "--sft.completion_length", "1792"]
LORA = ["--config", "configs/runs/d1_countdown_8b.yaml"]
# Attention by XLA everywhere, and weights that stay cut while texts are decoded: a whole copy of 15 GiB does not fit a small chip.
BOTH = ["--model.attention", "xla", "--mesh.rollout_weights", "as_trained"]
PARTS = {"v6e:2x2": 2, "gpu:1x141GiB": 8, "gpu:1x80GiB": 8}  # micro-batches of 8 rows where there are fewer devices
TOPOLOGIES = ("v5e:2x4", "v6e:2x2", "v6e:2x4", "v5p:2x2x2", "gpu:1x80GiB", "gpu:1x141GiB", "gpu:8x80GiB")
PROMPT = 256


def one(topology: str) -> list[dict[str, Any]]:
    """The rows of one topology, in a process of its own: the number of virtual devices is fixed when JAX starts."""
    from d1jax.fit.compiled import GIB, positions_with_logits, whole_parameters
    from d1jax.fit.plan import judge, make_plan, read_config
    from d1jax.fit.topology import parse_topology, prepare

    asked = parse_topology(topology)
    prepare(asked)
    found = []
    for flags in (LORA, [*FULL, "--sft.grad_accumulation_steps", str(PARTS.get(topology, 1))]):
        plan = make_plan(read_config([*flags, *BOTH]), asked, PROMPT)
        for program in plan.programs:
            verdict = judge(program, asked)
            memory = verdict.compiled.memory
            row = {
                "topology": topology,
                "program": ("full fine-tuning" if flags is not LORA else "LoRA diffu-GRPO") + f" {program.name}",
                "command": " ".join(["python -m d1jax.fit", *flags, *BOTH, "--topology", topology]),
                "mesh": dict(plan.mesh.shape),
                "GiB": {
                    **{name: round(size / GIB, 3) for name, size in memory.held.items()},
                    "beside": round(memory.beside / GIB, 3),
                    "temporaries": round(verdict.temporaries / GIB, 3),
                    "peak": round(verdict.peak / GIB, 2),
                    "memory": round(verdict.part.memory / GIB, 2),
                },
                "temporaries": "estimate" if verdict.is_estimate else "refused" if memory.refused else "compiler",
                "fits": verdict.fits,
                "PFLOP": round(verdict.work.flops / 1e15, 3),
                "calls_a_step": program.calls,
                "seconds": dataclasses.asdict(verdict.time) if verdict.time else None,
                "collectives": [dataclasses.asdict(found) for found in verdict.compiled.collectives],
                "whole_parameters": whole_parameters(program),
                "positions_with_logits": positions_with_logits(verdict.compiled),
                "compile_seconds": round(verdict.compiled.seconds),
            }
            print(
                f"{topology} {row['program']}: {row['GiB']['peak']} GiB, {row['compile_seconds']} s",
                file=sys.stderr,
                flush=True,
            )
            found.append(row)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line a topology, peak GiB of each program."""
    programs = list(dict.fromkeys(row["program"] for row in rows))
    lines = ["| devices | memory of one | " + " | ".join(programs) + " |", "|---|---|" + "---|" * len(programs)]
    for topology in dict.fromkeys(row["topology"] for row in rows):
        mine = {row["program"]: row for row in rows if row["topology"] == topology}
        memory = next(iter(mine.values()))["GiB"]["memory"]
        cells = [_cell(mine[program]) if program in mine else "" for program in programs]
        lines.append(f"| `{topology}` | {memory:g} GiB | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    about = {"estimate": "about ", "refused": "refused, names ", "compiler": ""}[row["temporaries"]]
    return f"{about}{row['GiB']['peak']:.1f}" + ("" if row["fits"] else ", **does not fit**")


def main(argv: list[str]) -> int:
    if argv[:1] == ["--one"]:
        print(json.dumps(one(argv[1])))
        return 0
    kept = json.loads(RESULTS.read_text())["rows"] if argv and RESULTS.exists() else []
    wanted = argv or list(TOPOLOGIES)
    rows = [row for row in kept if row["topology"] not in wanted]
    for topology in wanted:
        done = subprocess.run(
            [sys.executable, __file__, "--one", topology], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
        )
        rows += json.loads(done.stdout.splitlines()[-1])
        rows.sort(key=lambda row: TOPOLOGIES.index(row["topology"]) if row["topology"] in TOPOLOGIES else 99)
        versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}
        RESULTS.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
