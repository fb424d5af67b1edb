"""What ends a command is a line and an exit code; what is a fault of d1jax is not hidden."""

import jax
import pytest

from d1jax.command_line import exit_code, output_file
from d1jax.config import ConfigError
from d1jax.runtime.stopping import CannotSave, Diverged, Stopped
from d1jax.tasks.task import DataError

MEMORY = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 99 bytes\nand a page more")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("config: seed"), 2, "error: config: seed"),
        (DataError("row 3\x1b[31m"), 2, "error: row 3\N{REPLACEMENT CHARACTER}[31m"),
        (FileExistsError("out exists already"), 2, "error: out exists already"),
        (FileNotFoundError(2, "No such file or directory", "a.json"), 2, "error: [Errno 2] No such file or directory: 'a.json'"),
        (Diverged("sft step 3: NaN"), 1, "error: sft step 3: NaN"),
        (CannotSave("gone"), 1, "error: gone"),
        (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device; again"),
        (MEMORY, 1, "error: out of memory (RESOURCE_EXHAUSTED: 99 bytes); lower the batch"),
        (KeyboardInterrupt(), 130, ""),
        (Stopped(15, "sft step 2: stopped"), 143, "sft step 2: stopped"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)  # fmt: skip
def test_what_a_user_can_mend_is_one_line(capsys, error, code, line):
    def command():
        raise error

    assert exit_code(command, "; again") == code
    assert capsys.readouterr().err.startswith(line)


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
        with pytest.raises(ConfigError, match=f"--out .*{message}"):
            output_file("--out", str(path))
