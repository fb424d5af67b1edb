"""The benchmarks that people name: which task grades them, and where their rows come from."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

GENERATED = "generated"


@dataclass(frozen=True)
class Benchmark:
    """A task with its rows: `source` and `shots` are what `task.train` may be (a hub id, a file, generated)."""

    task: str
    source: str  # the test rows
    shots: str = ""  # rows for worked examples; "": none are known
    options: Mapping[str, Any] = field(default_factory=dict)  # fields of the task


BENCHMARKS: dict[str, Benchmark] = {
    "gsm8k": Benchmark("gsm8k", "hub:openai/gsm8k/main:test", "hub:openai/gsm8k/main:train"),
    "math500": Benchmark("math", "hub:HuggingFaceH4/MATH-500:test", "hub:DigitalLearningGmbH/MATH-lighteval:train"),
    "humaneval": Benchmark("code", "hub:openai/openai_humaneval:test"),
    "humaneval_plus": Benchmark("code", "hub:evalplus/humanevalplus:test"),
    "mbpp": Benchmark(
        "code", "hub:google-research-datasets/mbpp/full:test", "hub:google-research-datasets/mbpp/full:prompt"
    ),
    "mbpp_plus": Benchmark("code", "hub:evalplus/mbppplus:test", "hub:google-research-datasets/mbpp/full:prompt"),
    "countdown": Benchmark("countdown", GENERATED, GENERATED, {"numbers": (3,)}),
    "countdown4": Benchmark("countdown", GENERATED, GENERATED, {"numbers": (4,)}),
    "arithmetic": Benchmark("arithmetic", GENERATED, GENERATED),
    "sudoku": Benchmark("sudoku", GENERATED, GENERATED),
}
GENERATED_ROWS = 256  # of a benchmark that is generated, as many as d1 evaluates


def benchmark(name: str, tasks: Mapping[str, Any]) -> Benchmark:
    """The benchmark of a name; a task that is none (my/file.py:Mine) needs `--data NAME=SOURCE`. Raises ValueError."""
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    if name in tasks or name.rpartition(":")[0].endswith(".py"):
        return Benchmark(name, "")
    near = difflib.get_close_matches(name, [*BENCHMARKS, *tasks], n=1)
    suggestion = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(f"--tasks: {name!r} is not one of {', '.join(BENCHMARKS)}{suggestion}, nor my/file.py:Mine")
