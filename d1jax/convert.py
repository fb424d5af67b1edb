"""python -m d1jax.convert: checkpoints between formats, from the command line.

    d1jax convert to-orbax  CHECKPOINT OUT             Hugging Face -> d1jax's own form
    d1jax convert to-hf     CHECKPOINT_OR_RUN OUT      d1jax's form, or a run's weights -> Hugging Face
    d1jax convert to-hf     RUN OUT --adapter-only     the trained adapter alone, as PEFT loads it
    d1jax convert merge     CHECKPOINT ADAPTER OUT     a PEFT adapter into its weights
    d1jax convert inspect   PATH                       family, sizes, dtype, keys
    d1jax convert verify    A B                        every tensor equal, bit for bit?

A checkpoint may be a GGUF file, which is turned into a Hugging Face directory first (docs/checkpoints.md).
Weights keep the dtype in which they are stored unless --dtype says otherwise. OUT must not exist yet.
Exit code: 0 done, 1 out of memory or a full disk, 2 a mistake in the arguments or a broken file, 3 verify found a difference.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from d1jax.config import MeshConfig, ModelConfig, UserError
from d1jax.config.flags import asks_for_version, dashed, version_text
from d1jax.config.no_effect import no_effect
from d1jax.config.values import plain
from d1jax.files import check_new
from d1jax.inference.policy import EXPORT_CURE, load_pretrained, save_pretrained
from d1jax.models.families import family_of
from d1jax.models.lora import Rounding, merge_each, warn_of_rounding
from d1jax.models.sharding import make_mesh
from d1jax.telemetry.command_line import exit_code
from d1jax.telemetry.terminal import printable
from d1jax.training.setup import set_up
from d1jax.weights.hf_directory import Checkpoint, headers, is_checkpoint, open_checkpoint, read_json
from d1jax.weights.hf_io import (
    PathAndArray,
    arrays_of,
    companions_of,
    compare,
    save_native,
    save_weights,
    streamed,
)
from d1jax.weights.names import entries, expected_shapes, parameter_count
from d1jax.weights.peft import WEIGHTS, is_adapter, read_adapter, save_adapter
from d1jax.weights.run import is_run, open_run
from d1jax.weights.source import CheckpointSource, RunSource, directory_of, open_source
from d1jax.weights.variables import adapter_of

DIFFERENT = 3


def main(argv: Sequence[str]) -> int:
    """The exit code: 0 done, 1 out of memory or a full disk, 2 a mistake in the arguments, 3 `verify` found a difference."""
    if asks_for_version(argv):
        print(version_text())
        return 0
    arguments = _parser().parse_args(dashed(argv))
    return exit_code(lambda: arguments.run(arguments))


def to_orbax(arguments: argparse.Namespace) -> int:
    return _write(arguments, native=True)


def to_hf(arguments: argparse.Namespace) -> int:
    if not arguments.adapter_only:
        return _write(arguments, native=False)
    if arguments.dtype:
        raise UserError(no_effect(f"--dtype {arguments.dtype}", "whole weights; an adapter keeps its own dtype"))
    check_new(arguments.out)
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        source = _adapted_run(arguments.source)
        setup = set_up(source.config, source.run.source, mesh)
        adapters = adapter_of(setup, source)
        base = str(directory_of(setup.config.init_from))
        family = family_of(read_json(Path(base) / "config.json"), base)
        save_adapter(adapters["lora"], setup.config.lora, setup.model.config, family, arguments.out, base)
    return _done(arguments.out)


def _adapted_run(path: Path) -> RunSource:
    """A run that trained an adapter of a checkpoint. Raises UserError for one without, and for one whose base exists nowhere."""
    source = open_source(path)
    if isinstance(source, CheckpointSource):
        raise UserError(f"{str(path)!r} is no run directory: it has no config.yaml")
    config = source.config
    if config.lora.rank and config.init_from and is_checkpoint(directory_of(config.init_from)):
        return source
    what = "it trained all weights" if not config.lora.rank else "it did not start from a checkpoint directory"
    raise UserError(
        f"run {str(source.path)!r} has no adapter of a checkpoint: {what} (lora.rank {config.lora.rank}, init_from "
        f"{config.init_from!r}); export its merged weights, without --adapter-only. For an adapter, export the weights first "
        "and train with lora.rank and init_from that directory"
    )


def merge(arguments: argparse.Namespace) -> int:
    check_new(arguments.out)
    checkpoint, mesh = open_checkpoint(directory_of(arguments.source)), make_mesh(MeshConfig())
    config = _stored_as(checkpoint.config, arguments.dtype)
    lora, adapters = read_adapter(arguments.adapter, config, checkpoint.family, mesh)
    rounding = Rounding()
    arrays = merge_each(_arrays(checkpoint, checkpoint.config), adapters["lora"], lora, rounding, config.param_dtype)
    save_weights(arrays, config, checkpoint.family, arguments.out, companions_of(checkpoint, config.param_dtype))
    warn_of_rounding(rounding, config.param_dtype, EXPORT_CURE)
    return _done(arguments.out)


def _write(arguments: argparse.Namespace, native: bool) -> int:
    """The weights of a checkpoint or a run, in the other form."""
    check_new(arguments.out)  # before an hour of reading, not after it
    source = directory_of(arguments.source)
    if not is_checkpoint(source):
        # Read as stored and rounded once, when it is written; what was trained in fp32 is read as such where fp32 is asked for.
        policy = load_pretrained(arguments.source, dtype="float32" if arguments.dtype == "float32" else None)
        save_pretrained(policy, arguments.out, native=native, dtype=arguments.dtype)
        return _done(arguments.out)
    checkpoint = open_checkpoint(source)
    config, save = _stored_as(checkpoint.config, arguments.dtype), save_native if native else save_weights
    companions = companions_of(checkpoint, config.param_dtype)
    save(_arrays(checkpoint, config), config, checkpoint.family, arguments.out, companions)
    return _done(arguments.out)


def _arrays(checkpoint: Checkpoint, config: ModelConfig) -> Iterator[PathAndArray]:
    """The arrays of a checkpoint one by one: what is converted need not fit into memory."""
    return streamed(arrays_of(checkpoint, config, make_mesh(MeshConfig()), entries(config, checkpoint.family)))


def _stored_as(config: ModelConfig, dtype: str | None) -> ModelConfig:
    return dataclasses.replace(config, param_dtype=dtype) if dtype else config


def inspect(arguments: argparse.Namespace) -> int:
    path = directory_of(arguments.path)
    if is_adapter(path):
        print(f"{path}: a PEFT adapter")
        for name, tensor in sorted(headers(path / WEIGHTS).items()):
            print(f"  {printable(name):<76} {_sides(tensor.shape):>16}  {tensor.dtype}")
        return 0
    if is_run(path):
        run, config = open_run(path)
        saved = ", ".join(f"{stage} {step}" for stage, step in run.saved_steps(config.stage_names).items())
        print(f"{path}: a run; last checkpoints: {saved or 'none'}")
        source = run.source / "config.json"
        family = family_of(read_json(source), str(source)).name if source.is_file() else "of its own"
        _describe(family, set_up(config, run.source).model.config, "trained by d1jax")
        return 0
    checkpoint = open_checkpoint(path)
    form = "d1jax (Orbax)" if checkpoint.native else f"Hugging Face, {len(checkpoint.files)} safetensors file(s)"
    print(f"{path}: {form}, {sum(file.stat().st_size for file in checkpoint.files) / 1e9:.2f} GB")
    _describe(
        checkpoint.family.name,
        checkpoint.config,
        f"{len(expected_shapes(checkpoint.config, checkpoint.family))} tensors",
    )
    for entry in entries(checkpoint.config, checkpoint.family):
        count = f"{len(entry.names)} x " if len(entry.names) > 1 else ""
        print(f"  {entry.names[0]:<56} {count + _sides(entry.shape):>20}  -> {'/'.join(entry.path)}")
    return 0


def verify(arguments: argparse.Namespace) -> int:
    one, two = open_checkpoint(directory_of(arguments.a)), open_checkpoint(directory_of(arguments.b))
    if one.family.names != two.family.names or one.config != two.config:
        pairs = {**plain(one.config)}, {**plain(two.config)}
        other = [f"{name} {a} and {pairs[1][name]}" for name, a in pairs[0].items() if a != pairs[1][name]]
        print(f"different models: {', '.join(other) or 'other families'}")
        return DIFFERENT
    different = compare(one, two, make_mesh(MeshConfig()))
    for entry in different:
        print(f"different: {'/'.join(entry.path)} ({entry.names[0]}{' ...' if len(entry.names) > 1 else ''})")
    tensors, count = len(expected_shapes(one.config, one.family)), parameter_count(one.config)
    print(f"{tensors} tensors, {count:,} parameters: " + ("they differ" if different else "equal bit for bit"))
    return DIFFERENT if different else 0


def _describe(family: str, config: ModelConfig, note: str) -> None:
    print(f"family {family} ({config.alignment}), {parameter_count(config):,} parameters, {note}")
    print("model:")
    for name, value in plain(config).items():
        print(f"  {name}: {str(value).lower() if isinstance(value, bool) else value}")


def _sides(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _done(out: Path) -> int:
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{out}: {size / 1e9:.2f} GB written")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m d1jax.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: object, help: str, *paths: str, dtype: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help)
        for path in paths:
            sub.add_argument(path, type=Path)
        if dtype:
            sub.add_argument("--dtype", choices=("float32", "bfloat16"), help="write in this dtype")
        sub.set_defaults(run=run)
        return sub

    command("to-orbax", to_orbax, "Hugging Face -> d1jax's own form", "source", "out")
    hf = command("to-hf", to_hf, "d1jax's form or a run -> Hugging Face", "source", "out")
    hf.add_argument("--adapter-only", action="store_true", help="write a run's adapter in PEFT's format")
    command("merge", merge, "a PEFT adapter into its weights", "source", "adapter", "out")
    command("inspect", inspect, "family, sizes, dtype, keys", "path", dtype=False)
    command("verify", verify, "compare two checkpoints bit for bit", "a", "b", dtype=False)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
