"""python -m d1jax.fit --config configs/runs/d1_countdown_8b.yaml --topology v5e:2x4: will it fit, and about how long does it take?

Lowers and compiles the programs of every stage of a configuration, from shapes alone: no weights, no rows, no accelerator.

--topology T        v5e:2x4, v6e:2x2, v5p:2x2x2 (the real TPU compiler: pip install 'd1jax[tpu]'), gpu:8x80GiB, gpu:1x141GiB, cpu:8;
                    by default the devices of this machine
--prompt_length N   columns of the longest prompt, where the rows of the task are not at hand
--suggest no        do not look for a change that makes it fit (each try is compiled)
--section.key VALUE a setting, as in training; --init_from is not needed: sizes come from the section `model`
--version           the version of d1jax

Exit codes: 0 everything fits, 1 something does not, 2 a mistake in the arguments or the configuration.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from d1jax.config import UserError
from d1jax.config.flags import asks_for_version, split_flags, version_text
from d1jax.fit.compiled import Compiled
from d1jax.fit.plan import check_stages, judge, make_plan, read_config
from d1jax.fit.report import header, last_line, memory_table, notes, work_lines
from d1jax.fit.suggest import CHECKED, shown, suggest
from d1jax.fit.topology import of_this_machine, parse_topology, prepare
from d1jax.telemetry.command_line import FAILED, USER_MISTAKE, exit_code

NAMES = ("topology", "prompt_length", "suggest")


def main(argv: Sequence[str]) -> int:
    """The exit code: 0 everything fits, 1 something does not, 2 a mistake in the arguments or the configuration."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    if asks_for_version(argv):
        print(version_text())
        return 0
    if not argv:
        print(f"{__doc__}\nerror: nothing to look at; begin with --config configs/quickstart.yaml", file=sys.stderr)
        return USER_MISTAKE
    return exit_code(lambda: _fit(argv))


def _fit(argv: Sequence[str]) -> int:
    own, rest = split_flags(argv, NAMES)
    prompt_columns, suggests = _length(own.get("prompt_length")), _yes(own.get("suggest", "yes"))
    asked = parse_topology(own["topology"]) if "topology" in own else None
    prepare(asked)
    config = read_config(rest)
    plan = make_plan(config, asked or of_this_machine(), prompt_columns)
    check_stages(plan)
    print(header(plan), flush=True)
    verdicts = [judge(program, plan.topology, _seen) for program in plan.programs]
    print(f"\n{memory_table(verdicts)}\n")
    for verdict in verdicts:
        print("\n".join(work_lines(verdict)))
    print()
    for note in notes(plan, verdicts):
        print(f"note: {note}")
    if all(verdict.fits for verdict in verdicts):
        print(f"\nfits: {last_line(plan, verdicts)}")
        return 0
    if not suggests:
        return FAILED
    found = suggest(rest, plan, verdicts, lambda line: print(line, file=sys.stderr, flush=True))
    if found is None:
        print(
            f"\ndoes not fit, and no change of up to {CHECKED} that were compiled makes it fit; take more or larger devices"
        )
        return FAILED
    print(f"\ndoes not fit; compiled, it does with\n  {shown(found.change, plan)}\n{memory_table(found.verdicts)}")
    print(last_line(plan, found.verdicts))
    return FAILED


def _seen(compiled: Compiled) -> None:
    print(f"compiled {compiled.program.title} in {compiled.seconds:.0f} s", file=sys.stderr, flush=True)


def _length(text: str | None) -> int:
    """Columns of prompts; 0: not given."""
    if text is None:
        return 0
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise UserError(f"command line: --prompt_length {text!r} is not a number above 0")
    return int(text)


def _yes(text: str) -> bool:
    if text not in ("yes", "no"):
        raise UserError(f"command line: --suggest {text!r} is not yes or no")
    return text == "yes"
