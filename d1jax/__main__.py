"""python -m d1jax COMMAND, and the console script `d1jax COMMAND`: one door to all commands."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from d1jax.config.flags import version_text

COMMANDS = {
    "train": "one config in, one run directory out",
    "evaluate": "the table of a run again, without training",
    "generate": "prompt in, text out, with the denoising shown",
    "audit": "how good each likelihood estimator is on a run's own rollouts",
    "convert": "checkpoints between formats",
    "fit": "will it fit into memory, and about how long does it take: from shapes alone",
    "lm_eval": "the tasks of EleutherAI's lm-evaluation-harness",
}
USER_MISTAKE = 2


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of the command, or 2 where there is no such command."""
    argv = sys.argv[1:] if argv is None else argv
    name, rest = (argv[0], argv[1:]) if argv else ("", [])
    if name in COMMANDS:
        # Lazily: the help needs no JAX.
        return importlib.import_module(f"d1jax.{name}").main(rest)
    if name == "--version":
        print(version_text())
        return 0
    asked = name in ("-h", "--help")
    lines = [f"  {command:<10} {what}" for command, what in COMMANDS.items()]
    usage = "usage: d1jax COMMAND [...]     (or python -m d1jax COMMAND; --version tells the version)\n\n" + "\n".join(
        lines
    )
    print(usage + "\n\nd1jax COMMAND --help says more.", file=sys.stdout if asked else sys.stderr)
    if name and not asked:
        print(f"\nerror: there is no command {name!r}; choices: {', '.join(COMMANDS)}", file=sys.stderr)
    return 0 if asked else USER_MISTAKE


if __name__ == "__main__":
    sys.exit(main())
