"""How many programs a second the code grader judges, on the published solutions of the real files.

    python benchmarks/grading_code.py --data /path/of/shared/data --out benchmarks/results/grading_code.json

Every program is graded with all its tests, in the sandbox that this machine allows. A row has the programs a second of
`self_test` (best, median and all of the rounds), the tests a second, and the solutions that did not pass.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from d1jax.files import write_json
from d1jax.tasks.code import Code
from d1jax.tasks.grading.sandbox import CONFINEMENTS, close_all, confinement_here, run_all
from d1jax.tasks.jsonl import read_rows

FILES = (
    "humaneval/HumanEval", "humaneval/HumanEvalPlus-OriginFmt", "mbpp/mbpp", "mbpp/sanitized-mbpp",
    "mbpp/MbppPlus-OriginFmt",
)  # fmt: skip


def measured(path: Path, task: Code, rounds: int) -> dict[str, object]:
    """Grades the solutions of a file, the servers being there already."""
    rows, seconds, wrong = read_rows(path, task), [], []
    task.self_test(rows[:2])  # starts the servers
    for _ in range(rounds):
        began = time.perf_counter()
        wrong = task.self_test(rows)
        seconds.append(round(time.perf_counter() - began, 2))
    row = {
        "file": f"{path.parent.name}/{path.name}",
        "programs": len(rows),
        "tests": sum(len(row["tests"]) for row in rows),
        "seconds": seconds,
        "programs_per_second": round(len(rows) / statistics.median(seconds), 1),
        "tests_per_second": round(sum(len(row["tests"]) for row in rows) / statistics.median(seconds), 1),
        "not_passed": [f"row {place}: {message}" for place, message in wrong],
    }
    print(json.dumps(row), flush=True)
    return row


def by_confinement(path: Path, task: Code) -> list[dict[str, object]]:
    """The same programs through every wall that can be had here."""
    rows, found = read_rows(path, task), []
    programs = [task.program(row, row["solution"]) for row in rows]
    for name in CONFINEMENTS:
        try:
            if run_all(programs[:2], confinement=name)[0].pass_rate != 1.0:
                continue  # namespaces are not allowed
        except FileNotFoundError:
            continue  # bwrap is not installed
        began = time.perf_counter()
        outcomes = run_all(programs, confinement=name)
        seconds = time.perf_counter() - began
        found.append(
            {
                "confinement": name,
                "programs_per_second": round(len(programs) / seconds, 1),
                "passed": sum(outcome.pass_rate == 1.0 for outcome in outcomes),
            }
        )
        close_all()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with humaneval/ and mbpp/")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/grading_code.json"))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    task = Code()
    rows = [measured(arguments.data / f"{name}.jsonl.gz", task, arguments.rounds) for name in FILES]
    walls = by_confinement(arguments.data / f"{FILES[0]}.jsonl.gz", task)
    result = {
        "environment": {
            "platform": platform.platform(), "cpus": len(os.sched_getaffinity(0)), "python": platform.python_version(),
            "numpy": np.__version__, "load_average": round(os.getloadavg()[0], 1),
        },
        "settings": {"confinement": confinement_here(), "workers": len(os.sched_getaffinity(0)), **vars(task)},
        "rows": rows,
        "humaneval_by_confinement": walls,
    }  # fmt: skip
    write_json(arguments.out, result)
    print(json.dumps(result, indent=2))
    sys.exit(rows[0]["programs_per_second"] < 20)


if __name__ == "__main__":
    main()
