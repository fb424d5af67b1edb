"""python -m d1jax.generate --model DIR --prompt "...": prompt in, text out, with the denoising shown.

The model is a checkpoint (Hugging Face or d1jax) or a run directory. Prompts come from --prompt (also more than once), --file
(one a line; or .jsonl with "prompt"), standard input, or a conversation (--chat, and when standard input is a terminal).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from d1jax.config import Config, ConfigError, MeshConfig, SamplerConfig
from d1jax.config_rules import check
from d1jax.policy import Policy, load_pretrained
from d1jax.runtime.run_directory import is_run, open_run
from d1jax.sampling import Completions, Prompt, check_draws, sample, watch
from d1jax.telemetry.player import write_player
from d1jax.telemetry.terminal import DenoisingView, printable
from d1jax.weights.checkpoint_directory import is_checkpoint

USER_MISTAKE = 2


class Request(NamedTuple):
    """How to sample, and how to show it."""

    policy: Policy
    config: SamplerConfig
    seed: int
    temperature: float
    system: str
    raw: bool
    show: bool


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
        request = Request(policy, config, arguments.seed, arguments.temperature, arguments.system, arguments.raw, show)
        if prompts is None:
            converse(request)
        else:
            samples = answer(request, prompts, arguments.batch, arguments.json, keep=player is not None)
            if player:
                write_player(player, samples, _player_title(arguments.model, config))
    except ConfigError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return USER_MISTAKE
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


def answer(request: Request, prompts: list[str], batch: int, as_json: bool, keep: bool = False) -> list[dict[str, Any]]:
    """Prints a completion of each prompt; rows keep their place in the list, so batches change nothing.

    Returns what the player needs of each, or nothing without `keep`.
    """
    size, samples = 1 if request.show else batch, []
    for start in range(0, len(prompts), size):
        part = prompts[start : start + size]
        completions = _sample(request, [_as_prompt(request, text) for text in part], start)
        for row, prompt in enumerate(part):
            if as_json:
                print(json.dumps(_record(prompt, completions, row)), flush=True)  # ASCII: nothing that a terminal obeys
            else:
                print(printable(completions.text[row]), flush=True)
            if keep:
                samples.append(_sample_of(request, prompt, completions, row) | {"index": start + row + 1})
    return samples


def converse(request: Request) -> None:
    """A conversation in the terminal; an empty line or end of input ends it, /new forgets what was said."""
    chats = request.policy.tokenizer.chats and not request.raw
    opening = [{"role": "system", "content": request.system}] if request.system and chats else []
    said, turn = list(opening), 0
    print("an empty line ends the conversation" + (", /new begins another one" if chats else ""), file=sys.stderr)
    while text := _ask():
        if text == "/new":
            said = list(opening)
            continue
        said.append({"role": "user", "content": text})
        try:
            completions = _sample(request, [said if chats else _as_prompt(request, text)], turn)
        except ConfigError as error:  # what cannot be written, or a conversation that has become too long
            print(f"error: {printable(str(error))}", file=sys.stderr)
            said.pop()
            continue
        said.append({"role": "assistant", "content": completions.text[0]})
        print(printable(completions.text[0]), flush=True)
        turn += 1


def _sample(request: Request, prompts: list[Prompt], first_row: int) -> Completions:
    settings: dict[str, Any] = {"seed": request.seed, "temperature": request.temperature, "first_row": first_row}
    if not request.show:
        return sample(request.policy, prompts, request.config, **settings)
    view, began, result = DenoisingView(sys.stderr), time.perf_counter(), None
    special, before = request.policy.tokenizer.special, np.full(request.config.completion_length, -1)
    for state in watch(request.policy, prompts, request.config, **settings):
        if isinstance(state, Completions):
            result = state
            continue
        tokens, revealed = state.tokens_BC[0], state.reveal_step_BC[0]
        named = request.policy.tokenizer.pieces(tokens.tolist())
        pieces = [None if token == special.mask else piece for token, piece in zip(tokens, named, strict=True)]
        done = sum(piece is not None for piece in pieces)
        status = f"step {state.step} of {request.config.steps}, {done} of {len(pieces)} tokens, {time.perf_counter() - began:.1f} s"
        view.draw(pieces, (revealed != before).tolist(), status)
        before = revealed
    view.clear()
    assert result is not None
    return result


def _as_prompt(request: Request, text: str) -> Prompt:
    if request.raw or not request.policy.tokenizer.chats:
        if request.system:
            raise ConfigError("--system needs a checkpoint with a chat template, and no --raw")
        return request.policy.tokenizer.encode(text) if request.raw else text
    system = [{"role": "system", "content": request.system}] if request.system else []
    return [*system, {"role": "user", "content": text.strip()}]  # what is piped in ends with a line break


def _record(prompt: str, completions: Completions, row: int) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "text": completions.text[row],
        "tokens": completions.tokens[row].tolist(),
        "reveal_step": completions.reveal_step[row].tolist(),
        "confidence": [round(float(value), 4) for value in completions.confidence[row]],
        "nfe": int(completions.nfe[row]),
    }


def _sample_of(request: Request, prompt: str, completions: Completions, row: int) -> dict[str, Any]:
    pieces = request.policy.tokenizer.pieces(completions.tokens[row].tolist())
    return _record(prompt, completions, row) | {"set": "prompt", "pieces": pieces}


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


def _ask() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


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
    blocks = max(length // block, 1)
    per_token = base.steps / base.completion_length
    steps = arguments.steps or max(round(length * per_token / blocks), 1) * blocks
    config = dataclasses.replace(base, completion_length=length, block_length=block, steps=steps)
    check(Config(sampler=config))
    return config


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
    add("--player", metavar="FILE", help="also write a page that plays the denoising of every prompt, e.g. player.html")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
