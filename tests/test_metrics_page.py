"""docs/metrics.md has a line for every metric that the code writes, and none for others."""

import re
from pathlib import Path

import pytest

from d1jax.config import RlConfig, SftConfig
from d1jax.inference.policy import load_pretrained
from d1jax.notebook.stages import rl, sft

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "metrics.md").read_text()
PUZZLE, ANSWER = "4130\n0300\n1004\n0000\n", "4132\n2341\n1324\n3214\n"
BY_THE_JOURNAL = {"eval/SET/GRADE", "time/step_s"}


def documented(section: str) -> list[str]:
    part = PAGE.split(f"## {section}")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in part.splitlines() if line.startswith("| `")]
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def pattern(name: str) -> str:
    return (
        re.escape(name).replace("NAME", r"\w+").replace("SET", r"\w+").replace("GRADE", r"\w+").replace("_K", r"_\d+")
    )


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_every_metric_has_a_line_and_every_line_a_metric(small_run, stage):
    policy = load_pretrained(small_run)
    quiet = {"log": lambda line: None}
    if stage == "sft":
        (values,) = sft(policy, [(PUZZLE, ANSWER)] * 8, SftConfig(steps=1, batch_size=8), **quiet).metrics
        names = [*documented("Both stages"), *documented("SFT")]
    else:
        method = RlConfig(steps=1, prompts_per_step=2, group_size=4, inner_updates=1, kl_coefficient=0.1)
        (values,) = rl(policy, [PUZZLE, "1\n"], method, reward=lambda row, text: 0.0, **quiet).metrics
        names = [
            *documented("Both stages"),
            *(name for part in ("rewards", "completions", "updates") for name in documented(f"RL: {part}")),
        ]
    written = set(values) - {"step"}
    assert [name for name in written if not any(re.fullmatch(pattern(known), name) for known in names)] == []
    unknown = [name for name in names if not any(re.fullmatch(pattern(name), one) for one in written)]
    assert set(unknown) <= BY_THE_JOURNAL


def test_every_line_says_what_is_healthy_and_what_to_do():
    lines = [line for line in PAGE.splitlines() if line.startswith("| `")]
    assert len(lines) > 25
    assert all(
        len(cells) == 4 and all(cells)
        for cells in ([c.strip() for c in line.strip("|").split(" | ")] for line in lines)
    )
