"""One door to all commands: `d1jax COMMAND` and `python -m d1jax COMMAND`."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import d1jax
from d1jax.__main__ import COMMANDS, main

ROOT = Path(__file__).resolve().parents[1]
VERSION = f"d1jax {d1jax.__version__}\n"


@pytest.mark.parametrize("command", [*COMMANDS, ""])
def test_every_command_tells_the_version(command, capsys):
    assert main([*filter(None, [command]), "--version"]) == 0
    assert capsys.readouterr().out == VERSION


@pytest.mark.parametrize("argv", [[], ["trian"], ["train"]])
def test_without_a_command_the_help_is_shown_and_the_code_is_two(argv, capsys):
    assert main(argv) == 2
    said = capsys.readouterr()
    assert "usage: " in said.out + said.err and "Traceback" not in said.err


def test_the_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in COMMANDS)


def test_python_m_d1jax_works_and_needs_no_jax_for_it():
    code = "import sys; from d1jax.__main__ import main; main(['--help']); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT).returncode == 0
    said = subprocess.run([sys.executable, "-m", "d1jax", "--version"], capture_output=True, text=True, cwd=ROOT)
    assert said.stdout == VERSION


def test_the_package_declares_the_script_and_the_machines():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"]["d1jax"] == "d1jax.__main__:main"
    assert {"cuda12", "cuda13", "tpu", "tensorboard"} <= set(project["optional-dependencies"])


def test_no_setting_is_without_help():
    from d1jax.config.help import help_text

    lines = [line for line in help_text("x").splitlines() if line.startswith("  --")]
    assert lines and all(len(line.split()) > 2 and not line.split()[1].startswith("[") for line in lines)
