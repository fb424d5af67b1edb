"""`d1jax evaluate --model DIR --tasks ...`: from flags to samples, table, summary and page."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from d1jax.config import MeshConfig, UserError
from d1jax.config.benchmark import BenchmarkConfig
from d1jax.config.flags import split_flags
from d1jax.config.values import keys_of
from d1jax.config.yaml_text import parse_yaml, shown
from d1jax.evaluation import suite
from d1jax.evaluation.benchmark import refuse_others
from d1jax.evaluation.protocol import Protocol, load_protocol
from d1jax.evaluation.summary import environment
from d1jax.files import write_json
from d1jax.inference.policy import Policy, load_pretrained
from d1jax.telemetry.report.browse import write_browse_page
from d1jax.telemetry.terminal import printable
from d1jax.weights.source import RunSource, located, open_source

LISTS: dict[str, Callable[[str], Any]] = {"lengths": int, "steps_per_token": float, "temperature": float}
NAMES = (
    "model", "adapter", "tasks", "protocol", "data", "shots", "base", "out", "batch", "dtype", "mesh", "tokenizer", *LISTS,
)  # fmt: skip
BATCH = 32
NO_BASE = "none"


def put_benchmarks(argv: Sequence[str]) -> int:
    """Evaluates as the flags say; prints the table. Raises UserError before a model is loaded where they cannot be followed."""
    own, rest = split_flags(argv, NAMES)
    for name in ("model", "tasks"):
        if not own.get(name):
            raise UserError(f"--{name} is missing; e.g. --model DIR --tasks gsm8k,sudoku")
    asked = _asked(own, rest)
    batch = _number("batch", own.get("batch", str(BATCH)), int)
    if batch < 1:
        raise UserError(f"--batch {batch} must be above 0")
    cells = suite.plan(asked)
    models = _models(own)
    folder = Path(own.get("out") or Path("evaluations") / Path(own["model"]).resolve().name)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {str(folder)!r} is a file; name a directory")
    places = {name: folder if one.is_asked else folder / "base" for name, one in models.items()}
    for name, one in models.items():
        for cell in cells:
            refuse_others(cell, places[name], _identity(one))
    found = {}
    for name, one in models.items():
        found[name] = suite.run(_load(own, one), cells, places[name], _identity(one), batch)
    by_model = {name: suite.summaries(samples) for name, samples in found.items()}
    result = {
        "models": {name: _identity(one) for name, one in models.items()},
        "protocol": {"name": asked.protocol.name, "source": asked.protocol.source},
        "results": by_model,
        "compared": suite.compared(*found.values()) if len(found) == 2 else [],
        "rows": {cell.name: dict(cell.identity) for cell in cells},
        "environment": environment(),
    }
    write_json(folder / "summary.json", result)
    write_browse_page(folder / "report.html", result, {name: _shown(samples) for name, samples in found.items()})
    print(suite.table(by_model))
    for one in result["compared"]:
        names = " and ".join(printable(name) for name in by_model)
        print(
            f"{one['cell']}: {names} alone solve {one['only_first']} and {one['only_second']} rows; McNemar p = {one['p']:.3g}"
        )
    print(f"\npage: {folder / 'report.html'}   numbers: {folder / 'summary.json'}")
    return 0


def _shown(samples: Sequence[tuple[suite.Cell, list[dict[str, Any]]]]) -> dict[str, list[dict[str, Any]]]:
    return {cell.label: found for cell, found in samples}


# -- flags ---------------------------------------------------------------------------------------------------------------


def _asked(own: Mapping[str, str], rest: Sequence[str]) -> suite.Asked:
    lists = {
        name: tuple(_number(name, part, kind) for part in _parts(own.get(name, ""))) for name, kind in LISTS.items()
    }
    benchmarks, given = tuple(_parts(own["tasks"])), _settings(rest)
    if not benchmarks:
        raise UserError(f"--tasks {shown(own['tasks'])} names none; e.g. --tasks gsm8k,sudoku")
    if "length" in given and "lengths" in own:
        raise UserError("command line: --length beside --lengths: give one of them")
    return suite.Asked(
        benchmarks=benchmarks,
        protocol=load_protocol(own["protocol"]) if "protocol" in own else Protocol(),
        given=given,
        lengths=lists["lengths"],
        steps_per_token=lists["steps_per_token"],
        temperatures=lists["temperature"],
        data=_sources("data", own.get("data", "")),
        shots=_sources("shots", own.get("shots", "")),
    )


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _number(name: str, text: str, kind: Callable[[str], Any]) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise UserError(f"--{name} {shown(text)}: write numbers, with a comma between several") from None


def _sources(name: str, text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in _parts(text)]
    wrong = next((key for key, equals, source in pairs if not (equals and key and source)), None)
    if wrong is not None:
        raise UserError(f"--{name} {shown(wrong)}: write BENCHMARK=SOURCE, e.g. --{name} gsm8k=rows.jsonl")
    return {key: source for key, _, source in pairs}


def _settings(rest: Sequence[str]) -> dict[str, Any]:
    """The other flags, as settings of BenchmarkConfig. Raises UserError for one that is none."""
    hints, given, queue = dict(keys_of(BenchmarkConfig)), {}, list(rest)
    while queue:
        flag = queue.pop(0)
        if not flag.startswith("--"):
            raise UserError(f"command line: {shown(flag)} is not a flag; write --setting value")
        key, equals, value = flag[2:].partition("=")
        if not equals and not queue:
            raise UserError(f"command line: {flag} has no value")
        value = value if equals else queue.pop(0)
        key = key.replace("-", "_")
        parsed: Any = value if hints.get(key) is str else parse_yaml(value, f"command line: --{key}")
        node = given
        *above, last = key.split(".")
        for name in above:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise UserError(
                    f"command line: --{key} beside --{name}: give both as --{name} '{{name: ..., {last}: ...}}'"
                )
        if last in node:
            raise UserError(f"command line: --{key} is given twice; once is meant")
        node[last] = parsed
    return given


# -- models --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Model:
    """What is evaluated: where it lies, and the adapter on top."""

    path: str
    adapter: str | None
    is_asked: bool  # not the one that it is compared with


def _models(own: Mapping[str, str]) -> dict[str, Model]:
    """{name in the table: model}: the one that is asked for, then what it is compared with. Raises UserError where one is not there."""
    asked = Model(own["model"], own.get("adapter"), is_asked=True)
    if asked.adapter and not Path(asked.adapter).is_dir():
        raise UserError(f"--adapter {asked.adapter!r}: no such directory; name one that holds a PEFT adapter")
    made = {_name(asked): asked}
    source = open_source(asked.path)
    base = own.get("base")
    if base is None and asked.adapter:
        base = asked.path
    if base is None and isinstance(source, RunSource) and source.config.init_from:
        base = source.config.init_from
        if not located(base).exists():
            print(
                f"note: {printable(base)}, which the run started from, is not there; --base DIR names it",
                file=sys.stderr,
            )
            base = None
    if base is not None and base != NO_BASE:
        if not located(base).exists():
            raise UserError(f"--base {base!r}: no such directory; name a checkpoint or a run, or {NO_BASE}")
        open_source(base)
        other = Model(base, None, is_asked=False)
        if located(base).resolve() == located(asked.path).resolve() and asked.adapter is None:
            raise UserError(f"--base {base!r} is the model itself; name another, or leave it out")
        made[f"base {_name(other)}"] = other
    return made


def _name(model: Model) -> str:
    path = Path(model.path).resolve()
    name = "/".join(path.parts[-4:]) if path.name.isdigit() else path.name
    return f"{name}+{Path(model.adapter).name}" if model.adapter else name


def _identity(model: Model) -> dict[str, Any]:
    found = {"path": str(located(model.path).resolve()), **open_source(model.path).identity()}
    return found | ({"adapter": str(Path(model.adapter).resolve())} if model.adapter else {})


def _load(own: Mapping[str, str], model: Model) -> Policy:
    mesh = None
    if "mesh" in own:
        sizes = [_number("mesh", part, int) for part in _parts(own["mesh"])]
        if len(sizes) != 3:
            raise UserError(f"--mesh {own['mesh']!r} is not of the form data,fsdp,tensor, e.g. 1,-1,1")
        mesh = MeshConfig(*sizes)
    settings = {"dtype": own.get("dtype"), "mesh": mesh, "adapter": model.adapter}
    return load_pretrained(model.path, **settings, tokenizer=own.get("tokenizer"))
