"""What generate does with a loaded model: answer prompts, fill holes, converse; with the denoising drawn while it happens."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from d1jax.config import ConfigError, SamplerConfig
from d1jax.diffusion.sampler import Decoding
from d1jax.files import to_json
from d1jax.inference.complete import Completions, Prompt, prompt_ids, sample, sample_ids, watch
from d1jax.inference.infill import Filled, fill, has_holes, interleave, lay_out, watch_infill
from d1jax.inference.policy import Policy, check_length
from d1jax.telemetry.terminal import DenoisingView, printable


class Asked(NamedTuple):
    """A prompt: a text, or token ids with the text that stands for them."""

    text: str
    ids: list[int] | None = None


class Request(NamedTuple):
    """How to sample, and how to show it."""

    policy: Policy
    config: SamplerConfig
    seed: int
    temperature: float
    system: str
    raw: bool
    show: bool
    drop_too_long: bool = False
    fixed_batches: bool = False  # fill the last batch up

    def settings(self, first_row: int) -> dict[str, Any]:
        return {"seed": self.seed, "temperature": self.temperature, "first_row": first_row}


class Answer(NamedTuple):
    """What became of a prompt; the arrays are of the new tokens."""

    prompt: str
    text: str
    tokens: list[int]
    reveal_step: list[int]
    confidence: list[float]
    nfe: int


class Checked(NamedTuple):
    """A prompt that can be answered."""

    row: int  # its place in the list: what its draws depend on
    prompt: str
    holes: bool
    ids: list[int]
    new: int  # tokens to be written


def answer(request: Request, prompts: list[Asked], batch: int, as_json: bool) -> list[Answer]:
    """Prints a completion of each prompt, or the prompt with its holes filled, and returns them.

    All prompts are checked before the first is decoded. Rows keep their place in the list, so batches change nothing. Prompts
    that are too long are an error, or left out and counted.
    """
    tasks = [_checked(request, row, prompt) for row, prompt in enumerate(prompts)]
    why = [_too_long(request, task) for task in tasks]
    dropped = [row for row, reason in enumerate(why) if reason]
    if dropped and not request.drop_too_long:
        raise ConfigError(
            f"prompt {dropped[0]}: {why[dropped[0]]}; shorten it, or leave such prompts out by --too-long drop"
        )
    size, answers = 1 if request.show else batch, []
    for start in range(0, len(tasks), size):
        part = [task for task in tasks[start : start + size] if not why[task.row]]
        found = dict(zip((task.row for task in part), _answers(request, part, size), strict=True))
        for row in range(start, min(start + size, len(tasks))):
            if as_json:  # ASCII: nothing that a terminal obeys
                left_out = {"prompt": prompts[row].text, "text": None, "dropped": why[row]}
                print(to_json(left_out if why[row] else found[row]._asdict(), ensure_ascii=True), flush=True)
            elif not why[row]:
                print(printable(found[row].text), flush=True)
        answers += found.values()
    if dropped:
        which = ", ".join(map(str, dropped[:10])) + (", ..." if len(dropped) > 10 else "")
        print(f"left out {len(dropped)} of {len(prompts)} prompts that are too long: {which}", file=sys.stderr)
    return answers


def _checked(request: Request, row: int, asked: Asked) -> Checked:
    prompt = asked.text
    if asked.ids is not None:
        return Checked(row, prompt, False, asked.ids, request.config.completion_length)
    if has_holes(prompt):
        if request.system:
            raise ConfigError("--system has no place in a text with holes; leave it out")
        laid = lay_out(request.policy.tokenizer, prompt)
        return Checked(row, prompt, True, laid.ids, len(laid.before))
    ids = prompt_ids(request.policy, _as_prompt(request, prompt))
    return Checked(row, prompt, False, ids, request.config.completion_length)


def _too_long(request: Request, task: Checked) -> str:
    """Why this prompt and what is to be written do not fit the model's positions, or ""."""
    given, new = len(task.ids), task.new
    try:
        check_length(given + new, request.policy.config, f"{given} tokens of prompt and {new} new ones")
    except ConfigError as error:
        return str(error)
    return ""


def _answers(request: Request, tasks: list[Checked], size: int) -> list[Answer]:
    """Their answers. Plain prompts are one batch of `size` rows (the last one is repeated), so few programs are compiled."""
    found: dict[int, Answer] = {}
    plain, holed = ([task for task in tasks if task.holes == holes] for holes in (False, True))
    if plain and request.show:
        completions = _watched(request, plain[0].ids, plain[0].row)
    elif plain:
        padded = plain + plain[-1:] * (size - len(plain) if request.fixed_batches else 0)
        draws = (request.seed, request.temperature, [task.row for task in padded])
        completions = sample_ids(request.policy, [task.ids for task in padded], request.config, *draws)
    for index, task in enumerate(plain):
        values = (values[index] for values in (completions.tokens, completions.reveal_step, completions.confidence))
        found[task.row] = Answer(task.prompt, completions.text[index], *_lists(*values), int(completions.nfe[index]))
    if holed and request.show:
        filled = [_watched_filling(request, holed[0].prompt, holed[0].row)]
    else:
        draws = (request.seed, request.temperature, [task.row for task in holed])
        filled = fill(request.policy, [task.prompt for task in holed], request.config, *draws)
    for task, one in zip(holed, filled, strict=True):
        found[task.row] = Answer(task.prompt, one.text, *_lists(one.tokens, one.reveal_step, one.confidence), one.nfe)
    return [found[task.row] for task in tasks]


def _lists(tokens: np.ndarray, reveal_step: np.ndarray, confidence: np.ndarray) -> tuple[list, list, list]:
    return tokens.tolist(), reveal_step.tolist(), [round(float(value), 4) for value in confidence]


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
            prompt = said if chats else _as_prompt(request, text)
            if request.show:
                completions = _watched(request, prompt, turn)
            else:
                completions = sample(request.policy, [prompt], request.config, **request.settings(turn))
        except ConfigError as error:  # what cannot be written, or a conversation that has become too long
            print(f"error: {printable(str(error))}", file=sys.stderr)
            said.pop()
            continue
        said.append({"role": "assistant", "content": completions.text[0]})
        print(printable(completions.text[0]), flush=True)
        turn += 1


def _watched(request: Request, prompt: Prompt, row: int) -> Completions:
    return _draw(
        request, watch(request.policy, [prompt], request.config, **request.settings(row)), lambda pieces: pieces
    )


def _watched_filling(request: Request, prompt: str, row: int) -> Filled:
    laid = lay_out(request.policy.tokenizer, prompt)
    around = [(piece, False) for piece in request.policy.tokenizer.pieces(laid.ids)]
    states = watch_infill(request.policy, prompt, request.config, **request.settings(row))
    return _draw(request, states, lambda holes: interleave(around, holes, laid.before))


def _draw(request: Request, states: Iterator[Any], weave: Any) -> Any:
    """Draws every state of one row; `weave` puts what belongs to new tokens into the order of the text. Returns the last value."""
    view, began, last, result = DenoisingView(sys.stderr), time.perf_counter(), None, None
    special = request.policy.tokenizer.special
    for state in states:
        if not isinstance(state, Decoding):
            result = state
            continue
        tokens, revealed = state.tokens_BC[0], state.reveal_step_BC[0]
        named = request.policy.tokenizer.pieces(tokens.tolist())
        pieces = [None if token == special.mask else piece for token, piece in zip(tokens, named, strict=True)]
        fresh = revealed != (-1 if last is None else last)
        woven = weave([(piece, bool(new)) for piece, new in zip(pieces, fresh, strict=True)])
        done = sum(piece is not None for piece in pieces)
        status = f"step {state.step}, {done} of {len(pieces)} tokens, {time.perf_counter() - began:.1f} s"
        view.draw([piece for piece, _ in woven], [new for _, new in woven], status)
        last = revealed
    view.clear()
    assert result is not None
    return result


def _as_prompt(request: Request, text: str) -> Prompt:
    if request.raw or not request.policy.tokenizer.chats:
        if request.system:
            raise ConfigError("--system needs a checkpoint with a chat template, and no --raw")
        return _encoded(request, text) if request.raw else text
    system = [{"role": "system", "content": request.system}] if request.system else []
    return [*system, {"role": "user", "content": text.strip()}]  # what is piped in ends with a line break


def _encoded(request: Request, text: str) -> list[int]:
    try:
        return request.policy.tokenizer.encode(text)
    except ValueError as error:
        raise ConfigError(f"--raw: {error}") from None


def _ask() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""
