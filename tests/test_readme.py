"""What the README tells a new user to type next works, on a smaller run than the quickstart's."""

import re
import shlex
from pathlib import Path

import pytest

from d1jax.__main__ import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
LINES = [
    line.split("  #")[0].strip()
    for block in re.findall(r"^```\w*\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
]
SMALLER_RUN = (
    "--task.train_rows 32 --task.eval_rows 8 --evaluation.batch_size 8 --evaluation.every 0 "
    "--model.width 8 --model.layers 1 --model.heads 2 --model.kv_heads 2 --model.mlp_width 8"
).split()
SMALLER_RL = (
    "--rl.steps 1 --rl.prompts_per_step 4 --rl.num_generations 4 --rl.num_iterations 1 --rl.grad_accumulation_steps 1"
).split()


def commands(fragment: str) -> list[list[str]]:
    """[command, argument, ...] of the lines with this fragment."""
    found = [line for line in LINES if fragment in line]
    assert found, fragment
    return [shlex.split(re.split(r"-m d1jax\.", line, maxsplit=1)[1]) for line in found]


@pytest.fixture
def beside_a_run(small_run, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(small_run, target_is_directory=True)
    (tmp_path / "configs").symlink_to(ROOT / "configs", target_is_directory=True)
    monkeypatch.chdir(tmp_path)


def test_the_lines_after_the_quickstart_work(beside_a_run, capsys):
    for line in [*commands("--row 0"), *commands("--prompt-json")]:
        assert main(line) == 0
        assert "prompt" in capsys.readouterr().err


def test_the_line_about_preferences_works(beside_a_run, tmp_path):
    (line,) = commands("--preference vrpo")
    sizes = ["--preference.steps", "1", "--preference.prompts_per_step", "8", "--preference.num_generations", "2"]
    assert main([*line, *SMALLER_RUN, *sizes]) == 0
    assert (tmp_path / "runs" / "vrpo" / "checkpoints" / "preference" / "1").is_dir()


def test_the_line_about_an_adapter_gives_one_that_exports(beside_a_run, tmp_path):
    (export,), (train,), (adapter,) = (
        commands("to-hf runs/quickstart"),
        commands("--lora.rank"),
        commands("--adapter-only"),
    )
    assert main(export) == 0
    assert main([*train, *SMALLER_RUN, *SMALLER_RL]) == 0
    assert main(adapter) == 0 and (tmp_path / "adapter" / "adapter_config.json").exists()


@pytest.mark.parametrize(
    "name", ["methods", "metrics", "install", "notebook", "checkpoints", "sampling", "architecture", "runs"]
)
def test_the_pages_that_are_linked_are_there(name):
    assert f"docs/{name}.md" in README and (ROOT / "docs" / f"{name}.md").exists()
