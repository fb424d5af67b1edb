"""python -m d1jax lm_eval --model d1jax --model_args pretrained=DIR --tasks gsm8k: EleutherAI's lm-evaluation-harness.

What follows `lm_eval` are the harness's own arguments, and it prints and writes what it always does. The harness (0.4.13) knows only the
models of its own table and reads no entry points, so d1jax has to be imported before its command begins; this does no more than that.
Settings of the model: docs/evaluation.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from d1jax.config import UserError
from d1jax.config.flags import asks_for_version, version_text
from d1jax.telemetry.command_line import exit_code


def main(argv: Sequence[str]) -> int:
    """The exit code: 0 done, 1 out of memory, 2 a mistake in the arguments, 130 interrupted."""
    if asks_for_version(argv):
        print(version_text())
        return 0
    return exit_code(lambda: _lm_eval(argv))


def _lm_eval(argv: Sequence[str]) -> int:
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        raise UserError(f"lm_eval: {error}; install the harness with `pip install 'd1jax[lm-eval]'`") from None
    import d1jax.inference.lm_eval  # noqa: F401  registers the model

    before = sys.argv
    sys.argv = ["lm_eval", *argv]  # the harness reads nothing else
    try:
        cli_evaluate()
    finally:
        sys.argv = before
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
