"""What ends a command is a line and an exit code; what is a fault of d1jax is not hidden."""

import subprocess
import sys
from pathlib import Path

import jax
import pytest

from d1jax.config import UserError
from d1jax.config.errors import CannotSave, Diverged, Stopped
from d1jax.tasks.task import DataError
from d1jax.telemetry.command_line import exit_code, output_file

ROOT = Path(__file__).resolve().parents[2]
MEMORY = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 99 bytes\nand a page more")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("config: seed"), 2, "error: config: seed"),
        (DataError("row 3\x1b[31m"), 2, "error: row 3\N{REPLACEMENT CHARACTER}[31m"),
        (FileExistsError("out exists already"), 2, "error: out exists already"),
        (FileNotFoundError(2, "No such file or directory", "a.json"), 2, "error: [Errno 2] No such file or directory: 'a.json'"),
        (Diverged("sft step 3: NaN"), 1, "error: sft step 3: NaN"),
        (CannotSave("gone"), 1, "error: gone"),
        (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device"),
        (MEMORY, 1, "error: out of memory (RESOURCE_EXHAUSTED: 99 bytes); shard by mesh.fsdp, lower the batch, or in training raise "
         "grad_accumulation_steps"),
        (KeyboardInterrupt(), 130, ""),
        (Stopped(15, "sft step 2: stopped"), 143, "sft step 2: stopped"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)  # fmt: skip
def test_what_a_user_can_mend_is_one_line(capsys, error, code, line):
    def command():
        raise error

    assert exit_code(command) == code
    assert capsys.readouterr().err == f"{line}\n"


@pytest.mark.parametrize("error", [OSError(28, "full"), PermissionError(13, "denied"), FileNotFoundError(2, "gone")])
def test_a_command_that_keeps_what_it_did_says_so(capsys, error):
    def command():
        raise error

    assert exit_code(command, keeps=True) == 1
    assert capsys.readouterr().err == f"error: {error}; what was saved is good, and the same command continues\n"


def test_a_reader_that_has_gone_is_no_failure_unless_work_is_cut_short():
    code = "import sys; from d1jax.telemetry.command_line import exit_code; sys.exit(exit_code(lambda: print('x' * 10**6) or 0, {keeps}))"
    for keeps, expected in ((False, 0), (True, 1)):
        command = f'{sys.executable} -c "{code.format(keeps=keeps)}" | true; exit ${{PIPESTATUS[0]}}'
        assert subprocess.run(["bash", "-c", command], cwd=ROOT).returncode == expected


def test_a_fault_of_d1jax_keeps_its_traceback():
    for error in (ValueError("shapes"), jax.errors.JaxRuntimeError("INTERNAL: miscompiled")):

        def command(error=error):
            raise error

        with pytest.raises(type(error)):
            exit_code(command)


def test_a_command_that_is_done_says_how(capsys):
    assert (exit_code(lambda: 0), exit_code(lambda: 3)) == (0, 3) and capsys.readouterr().err == ""


def test_a_file_that_could_not_be_written_is_known_before_the_work(tmp_path):
    assert output_file("--out", str(tmp_path / "a.json")) == tmp_path / "a.json"
    for path, message in ((tmp_path, "is a directory"), (tmp_path / "no" / "a.json", "there is no directory")):
        with pytest.raises(UserError, match=f"--out .*{message}"):
            output_file("--out", str(path))


@pytest.mark.parametrize(("error", "code"), [(BrokenPipeError(), 1), (KeyboardInterrupt(), 130)])
def test_processes_that_wait_are_told_of_every_end(error, code):
    told = []

    def command():
        raise error

    def tell(problem, code):
        told.append(problem)
        return code

    assert exit_code(command, keeps=True, tell=tell) == code and len(told) == 1
