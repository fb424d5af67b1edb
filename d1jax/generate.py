"""python -m d1jax.generate --model DIR --prompt "...": prompt in, text out, with the denoising shown.

The model is a checkpoint (Hugging Face or d1jax) or a run directory. Prompts come from --prompt (also more than once), --file
(one a line; or .jsonl with "prompt"), standard input, or a conversation (--chat, and when standard input is a terminal).
A prompt with holes, "def f(x): {{mask:16}} return y", comes back with each of them filled by as many tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from d1jax.config import Config, ConfigError, MeshConfig, SamplerConfig
from d1jax.config_rules import check
from d1jax.infilling import has_holes, take_apart
from d1jax.policy import Policy, load_pretrained
from d1jax.runtime.run_directory import is_run, open_run
from d1jax.sampling import check_draws
from d1jax.session import Answer, Request, answer, converse
from d1jax.telemetry.player import write_player
from d1jax.telemetry.terminal import printable
from d1jax.weights.checkpoint_directory import is_checkpoint

USER_MISTAKE = 2
# The settings of the sampler that are flags by their own names; its sizes have flags of their own.
SIZES = ("completion_length", "block_length", "steps")
RULES = {field.name: field for field in dataclasses.fields(SamplerConfig) if field.name not in SIZES}


def main(argv: Sequence[str]) -> int:
    """The exit code: 0 done, 2 a mistake in the arguments, 130 interrupted."""
    arguments = _parser().parse_args(argv)
    try:
        prompts = _prompts(arguments)
        player = _player_path(arguments.player, prompts)
        config = _sampler(arguments)  # before a large model is read
        check_draws(arguments.seed, arguments.temperature)
        if arguments.batch < 1:
            raise ConfigError(f"--batch {arguments.batch} must be above 0")
        policy = load_pretrained(
            arguments.model, dtype=arguments.dtype, mesh=_mesh(arguments.mesh), adapter=arguments.adapter
        )
        terminal = sys.stdout.isatty() and sys.stderr.isatty() and not arguments.json
        show = terminal if arguments.show == "auto" else arguments.show == "always"
        request = Request(
            policy, config, arguments.seed, arguments.temperature, arguments.system, arguments.raw, show,
            drop_too_long=arguments.too_long == "drop", fixed_batches=len(prompts or []) > arguments.batch,
        )  # fmt: skip
        if prompts is None:
            converse(request)
        else:
            answers = answer(request, prompts, arguments.batch, arguments.json)
            if player:
                samples = [_shown(policy, found) | {"index": index} for index, found in enumerate(answers, start=1)]
                write_player(player, samples, _player_title(arguments.model, config))
    except ConfigError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return USER_MISTAKE
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


def _shown(policy: Policy, found: Answer) -> dict[str, Any]:
    """What the player needs."""
    return found._asdict() | {"set": "prompt", "pieces": policy.tokenizer.pieces(found.tokens)}


def _player_path(text: str | None, prompts: list[str] | None) -> Path | None:
    """Where the player goes. Raises ConfigError for what could not be written in the end, before a large model is read."""
    if text is None:
        return None
    path = Path(text)
    if prompts is None:
        raise ConfigError("--player shows answered prompts, not a conversation; add --prompt or --file")
    if path.is_dir():
        raise ConfigError(f"--player {text!r} is a directory; name a file in it, e.g. {str(path / 'player.html')!r}")
    if not path.parent.is_dir():
        raise ConfigError(f"--player {text!r}: there is no directory {str(path.parent)!r}; make it first")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"--player {text!r}: the directory {str(path.parent)!r} may not be written to")
    return path


def _player_title(model: str, config: SamplerConfig) -> str:
    return f"{Path(model).absolute().name}: completions of {config.completion_length} tokens"


def _prompts(arguments: argparse.Namespace) -> list[str] | None:
    """The prompts, or None for a conversation. Raises ConfigError for an unreadable file and for blank prompts."""
    prompts: list[str] = list(arguments.prompt or [])
    if arguments.file:
        prompts += _read_file(Path(arguments.file))
    if arguments.chat:
        if prompts:
            raise ConfigError("--chat asks for its prompts; leave --prompt and --file out")
        return None
    if not prompts:
        if sys.stdin.isatty():
            return None
        prompts = [sys.stdin.read()]
    blank = next((index for index, prompt in enumerate(prompts) if not prompt.strip()), None)
    if blank is not None:
        raise ConfigError(f"prompt {blank} is empty; write --prompt TEXT, --file FILE, or pipe a text in")
    for prompt in filter(has_holes, prompts):
        take_apart(prompt)
    return prompts


def _read_file(path: Path) -> list[str]:
    try:
        # Not splitlines, which also cuts at characters that a text may hold.
        lines = path.read_text(encoding="utf-8-sig").replace("\r\n", "\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--file {path}: not readable as text ({error})") from None
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise ConfigError(f"--file {path}: holds no prompts")
    return [_prompt_of(path, number, line) for number, line in numbered]


def _prompt_of(path: Path, number: int, line: str) -> str:
    if path.suffix != ".jsonl":
        return line
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError, RecursionError):
        prompt = None
    if not isinstance(prompt, str):
        raise ConfigError(f'{path}:{number}: expected an object with a text "prompt"')
    return prompt


def _sampler(arguments: argparse.Namespace) -> SamplerConfig:
    """What the flags say; else what a run was trained with, or 128 tokens in blocks of 32, two a step."""
    path = Path(arguments.model)
    run = next((parent for parent in (path, *path.absolute().parents[:3]) if is_run(parent)), None)
    base = open_run(run)[1].sampler if run is not None and not is_checkpoint(path) else SamplerConfig(128, 32, 64)
    length = arguments.length or base.completion_length
    widest = min(arguments.block or base.block_length, length) if length > 0 else 1
    block = arguments.block or next((size for size in range(widest, 0, -1) if length % size == 0), 1)
    if not arguments.block and block * 4 < widest:
        near = [size for size in (length // widest * widest, -(-length // widest) * widest) if size]
        raise ConfigError(
            f"--length {length} has no block near {widest} tokens (the next is {block}); try --length {' or '.join(map(str, near))}, "
            "or name a --block"
        )
    blocks = max(length // block, 1)
    per_token = base.steps / base.completion_length
    steps = arguments.steps or max(round(length * per_token / blocks), 1) * blocks
    named = {name: value for name in RULES if (value := getattr(arguments, name)) is not None}
    config = dataclasses.replace(base, completion_length=length, block_length=block, steps=steps, **named)
    try:
        check(Config(sampler=config))
    except ConfigError as error:  # in the words of the flags
        raise ConfigError(re.sub(r"sampler\.(\w+)", lambda found: _flag(found[1]), str(error))) from None
    return config


def _flag(name: str) -> str:
    sizes = {"completion_length": "--length", "block_length": "--block", "steps": "--steps"}
    return sizes.get(name, "--" + name.replace("_", "-"))


def _mesh(text: str) -> MeshConfig:
    try:
        data, fsdp, tensor = (int(size) for size in text.split(","))
    except ValueError:
        raise ConfigError(f"--mesh {text!r} is not of the form data,fsdp,tensor, e.g. 1,1,-1") from None
    return MeshConfig(data, fsdp, tensor)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m d1jax.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="checkpoint or run directory, or RUN/checkpoints/STAGE/STEP")
    add("--adapter", help="a PEFT adapter on top of it")
    add("--prompt", action="append", help="a prompt; may be given more than once")
    add("--file", help="prompts, one a line, or .jsonl with a key 'prompt'")
    add("--chat", action="store_true", help="a conversation")
    add("--system", default="", help="the system message of a chat")
    add("--raw", action="store_true", help="continue the prompt as it is, without the chat template")
    add("--length", type=int, default=0, help="new tokens [as the run was trained, or 128]")
    add("--block", type=int, default=0, help="tokens of a block [as the run was trained, or 32]")
    add(
        "--steps",
        type=int,
        default=0,
        help="denoising steps over all blocks [as many a token as in training, or one for two]",
    )
    add("--temperature", type=float, default=0.0, help="0 is greedy [0]")
    add("--seed", type=int, default=0)
    add("--dtype", choices=("float32", "bfloat16"), help="of weights and activations [as stored]")
    add("--mesh", default="-1,1,1", help="devices along data,fsdp,tensor [-1,1,1]")
    add("--batch", type=int, default=8, help="prompts at a time where the denoising is not shown [8]")
    add("--show", choices=("auto", "always", "never"), default="auto", help="draw the denoising [on a terminal]")
    add("--json", action="store_true", help="one JSON object a prompt: text, tokens, reveal_step, confidence")
    add(
        "--too-long",
        choices=("fail", "drop"),
        default="fail",
        help="a prompt that does not fit: an error, or left out and counted",
    )
    add("--player", metavar="FILE", help="also write a page that plays the denoising of every prompt, e.g. player.html")
    rules = parser.add_argument_group("how to decode [as the run was trained, or the first named]")
    types = typing.get_type_hints(SamplerConfig)
    for name, field in RULES.items():
        kind, flag, text = types[name], _flag(name), field.metadata["help"].replace("%", "%%")
        if kind is bool:
            rules.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        elif typing.get_origin(kind) is Literal:
            rules.add_argument(flag, choices=typing.get_args(kind), help=text)
        else:
            rules.add_argument(flag, type=kind, help=f"{text} [{field.default}]")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
