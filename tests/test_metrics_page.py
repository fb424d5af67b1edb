"""docs/metrics.md has a line for every metric that the code writes, and none for others."""

import dataclasses
import re
from pathlib import Path

import pytest

from d1jax import train
from d1jax.config import KlInLoss, RlConfig, SftConfig
from d1jax.config.advantage import Gae
from d1jax.config.parse import parse
from d1jax.config.stored import from_yaml
from d1jax.inference.policy import load_pretrained
from d1jax.notebook.stages import rl, sft
from d1jax.telemetry.metrics import read_metrics

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "metrics.md").read_text()
PUZZLE, ANSWER = "4130\n0300\n1004\n0000\n", "4132\n2341\n1324\n3214\n"
# What the run's journal adds, and what only runs with a reward model, or with texts that are no grids, write.
ELSEWHERE = {"eval/SET/GRADE", "time/step_s", "rewards/agreement/NAME", "completions/reflection_words"}


def documented(section: str) -> list[str]:
    part = PAGE.split(f"## {section}")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in part.splitlines() if line.startswith("| `")]
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def pattern(name: str) -> str:
    return (
        re.escape(name).replace("NAME", r"\w+").replace("SET", r"\w+").replace("GRADE", r"\w+").replace("_K", r"_\d+")
    )


ROLLOUTS = ("Rollouts: rewards", "Rollouts: completions")
SECTIONS = {
    "adapt": ("Plain text",),
    "sft": ("SFT",),
    "rl": (*ROLLOUTS, "RL: updates"),
    "preference": (*ROLLOUTS, "Preferences: updates"),
}


def written_by(stage: str, run: Path, out: Path) -> set[str]:
    """The names of the metrics of one step of a stage."""
    policy = load_pretrained(run)
    quiet = {"log": lambda line: None}
    if stage == "sft":
        (values,) = sft(policy, [(PUZZLE, ANSWER)] * 8, SftConfig(steps=1, batch_size=8), **quiet).metrics
    elif stage == "adapt":
        text = out.with_suffix(".txt")
        text.write_text("4130\n0300\n" * 40)
        flags = [
            "--adapt.steps",
            "1",
            "--adapt.batch_size",
            "8",
            "--adapt.length",
            "16",
            "--adapt.data",
            f"{{{text}: 1}}",
        ]
        flags += ["--adapt.validation_windows", "2", "--evaluation.every", "1"]
        config = dataclasses.replace(
            from_yaml(run / "config.yaml"), run_dir=str(out), init_from=str(run), stages=("adapt",)
        )
        train.run(parse(flags, config))
        (values,) = read_metrics(out / "metrics.jsonl")
        return values.keys() - {"stage", "step"}
    elif stage == "rl":
        method = RlConfig(
            steps=1, prompts_per_step=2, num_generations=4, num_iterations=1, kl=KlInLoss(), advantage=Gae()
        )
        (values,) = rl(policy, [PUZZLE, "1\n"], method, reward=lambda row, text: 0.0, **quiet).metrics
    else:
        flags = ["--preference.steps", "1", "--preference.prompts_per_step", "8", "--preference.num_generations", "4"]
        config = dataclasses.replace(
            from_yaml(run / "config.yaml"), run_dir=str(out), init_from=str(run), stages=("preference",)
        )
        train.run(parse(flags, config))
        (values,) = read_metrics(out / "metrics.jsonl")
    return set(values) - {"stage", "step"}


@pytest.mark.parametrize("stage", SECTIONS)
def test_every_metric_has_a_line_and_every_line_a_metric(small_run, tmp_path, stage):
    written = written_by(stage, small_run, tmp_path / "run")
    names = [name for part in ("Every stage that trains", *SECTIONS[stage]) for name in documented(part)]
    assert [name for name in written if not any(re.fullmatch(pattern(known), name) for known in names)] == []
    unknown = [name for name in names if not any(re.fullmatch(pattern(name), one) for one in written)]
    assert set(unknown) <= ELSEWHERE


def test_every_section_of_the_page_is_of_a_stage():
    headings = set(re.findall(r"^## (.+)$", PAGE, re.MULTILINE))
    assert headings == {"Every stage that trains", *(part for parts in SECTIONS.values() for part in parts)}


def test_every_line_says_what_is_healthy_and_what_to_do():
    lines = [line for line in PAGE.splitlines() if line.startswith("| `")]
    assert len(lines) > 25
    assert all(
        len(cells) == 4 and all(cells)
        for cells in ([c.strip() for c in line.strip("|").split(" | ")] for line in lines)
    )
