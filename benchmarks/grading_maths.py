"""How long it takes to grade 1,319 answers to GSM8K and 500 to MATH-500.

    python benchmarks/grading_maths.py --data /path/of/shared/data --out benchmarks/results/grading_maths.json

The texts are written from the rows: half state the reference, half another row's. In MATH every reference is spelt so that it differs
from the row's (a factor of one, a term of zero), so that math-verify is asked about each that is no number; "stored" rows are the
generations of LLaDA-8B-Instruct. Times are wall clock, median and all of the rounds; the first call also starts the processes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from d1jax.evaluation.regrade import regrade
from d1jax.files import write_json
from d1jax.tasks.grading.equivalence import decide
from d1jax.tasks.grading.pool import shared_pool
from d1jax.tasks.gsm8k import Gsm8k
from d1jax.tasks.jsonl import read_rows
from d1jax.tasks.maths import Maths

ROUNDS = 3


def seconds_of(work: Callable[[], object]) -> dict[str, object]:
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        work()
        times.append(round(time.perf_counter() - began, 3))
    return {"seconds": statistics.median(times), "rounds": times}


def gsm8k(data: Path) -> dict[str, object]:
    task = Gsm8k()
    rows = read_rows(data / "gsm8k/test.jsonl.gz", task)
    texts = [task.target(rows[index - index % 2]) for index in range(len(rows))]
    solved = sum(task.grade(row, text)["solved"] for row, text in zip(rows, texts, strict=True))
    return {
        "answers": len(rows),
        "solved": int(solved),
        **seconds_of(lambda: [task.grade(row, text) for row, text in zip(rows, texts, strict=True)]),
    }


def maths(data: Path) -> dict[str, object]:
    task = Maths()
    rows = read_rows(data / "math/math500_test.jsonl", task)
    spelt = [f"1\\cdot({row['answer']})+0" for row in rows]
    texts = [f"<answer>\\boxed{{{spelt[index - index % 2]}}}</answer>" for index in range(len(rows))]
    shared_pool().close()
    began = time.perf_counter()
    task.grade(rows[3], texts[2])
    start = time.perf_counter() - began
    grades = task.grade_many(rows, texts)
    return {
        "answers": len(rows),
        "asked_of_math_verify": sum(
            decide(row["answer"], spelt[index - index % 2]) is None for index, row in enumerate(rows)
        ),
        "solved": int(sum(grade["solved"] for grade in grades)),
        "undecided": int(sum(grade["undecided"] for grade in grades)),
        "first_call_seconds": round(start, 3),
        **seconds_of(lambda: task.grade_many(rows, texts)),
    }


def stored(data: Path) -> dict[str, object]:
    path = data / "d1_eval_baselines/gsm8k_llada8b_instruct.jsonl.gz"
    return {"generations": 3390, **seconds_of(lambda: regrade(path, "gsm8k"))}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    result = {
        "environment": {
            "python": platform.python_version(),
            "math-verify": version("math-verify"),
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "workers": shared_pool().size,
        },
        "gsm8k": gsm8k(given.data),
        "math500": maths(given.data),
        "stored_gsm8k": stored(given.data),
    }
    print(json.dumps(result, indent=2))
    write_json(given.out, result)
