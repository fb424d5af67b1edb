"""What generate does with a loaded model: answer prompts, fill holes, converse; with the denoising drawn while it happens."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from d1jax.config import ConfigError, SamplerConfig
from d1jax.diffusion.sampler import Decoding
from d1jax.infilling import Filled, has_holes, infill, interleave, take_apart, tokens_before, watch_infill
from d1jax.policy import Policy
from d1jax.sampling import Completions, Prompt, sample, too_long, watch
from d1jax.telemetry.terminal import DenoisingView, printable


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


def answer(request: Request, prompts: list[str], batch: int, as_json: bool) -> list[Answer]:
    """Prints a completion of each prompt, or the prompt with its holes filled, and returns them.

    Rows keep their place in the list, so batches change nothing. Prompts that are too long are an error, or left out and
    counted.
    """
    size, answers, dropped = 1 if request.show else batch, [], 0
    for start in range(0, len(prompts), size):
        part = prompts[start : start + size]
        why = [_too_long(request, prompt) if request.drop_too_long else "" for prompt in part]
        for prompt, found, reason in zip(part, _answers(request, part, why, start), why, strict=True):
            if found is None:
                dropped += 1
                if as_json:
                    print(json.dumps({"prompt": prompt, "text": None, "dropped": reason}), flush=True)
                continue
            if as_json:
                print(json.dumps(found._asdict()), flush=True)  # ASCII: nothing that a terminal obeys
            else:
                print(printable(found.text), flush=True)
            answers.append(found)
    if dropped:
        print(f"left out {dropped} of {len(prompts)} prompts that are too long (--too-long drop)", file=sys.stderr)
    return answers


def _answers(request: Request, prompts: list[str], left_out: list[str], start: int) -> list[Answer | None]:
    """The answers in the order of the prompts; None for those left out. Plain prompts are one batch."""
    found: list[Answer | None] = [None] * len(prompts)
    plain = []
    for row, prompt in enumerate(prompts):
        if left_out[row]:
            continue
        if has_holes(prompt):
            found[row] = _fill(request, prompt, start + row)
        else:
            plain.append(row)
    # A batch of rows that are not neighbours would change their draws: each run of neighbours is sampled by itself.
    for run in _neighbours(plain):
        completions = _sample(request, [_as_prompt(request, prompts[row]) for row in run], start + run[0])
        for index, row in enumerate(run):
            found[row] = Answer(
                prompts[row], completions.text[index],
                *_lists(completions.tokens[index], completions.reveal_step[index], completions.confidence[index]),
                int(completions.nfe[index]),
            )  # fmt: skip
    return found


def _fill(request: Request, prompt: str, row: int) -> Answer:
    if request.system:
        raise ConfigError("--system has no place in a text with holes; leave it out")
    if request.show:
        filled = _watched_filling(request, prompt, row)
    else:
        (filled,) = infill(request.policy, [prompt], request.config, **request.settings(row))
    return Answer(prompt, filled.text, *_lists(filled.tokens, filled.reveal_step, filled.confidence), filled.nfe)


def _lists(tokens: np.ndarray, reveal_step: np.ndarray, confidence: np.ndarray) -> tuple[list, list, list]:
    return tokens.tolist(), reveal_step.tolist(), [round(float(value), 4) for value in confidence]


def _neighbours(rows: Sequence[int]) -> Iterator[list[int]]:
    run: list[int] = []
    for row in rows:
        if run and row != run[-1] + 1:
            yield run
            run = []
        run.append(row)
    if run:
        yield run


def _too_long(request: Request, prompt: str) -> str:
    if has_holes(prompt):
        holed = take_apart(prompt)
        given, _ = tokens_before(request.policy.tokenizer, holed)
        return too_long(request.policy, given, SamplerConfig(completion_length=sum(holed.sizes)))
    return too_long(request.policy, _as_prompt(request, prompt), request.config)


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
    if not request.show:
        return sample(request.policy, prompts, request.config, **request.settings(first_row))
    states = watch(request.policy, prompts, request.config, **request.settings(first_row))
    return _draw(request, states, lambda pieces: pieces)


def _watched_filling(request: Request, prompt: str, row: int) -> Filled:
    given, before = tokens_before(request.policy.tokenizer, take_apart(prompt))
    around = [(piece, False) for piece in request.policy.tokenizer.pieces(given)]
    states = watch_infill(request.policy, prompt, request.config, **request.settings(row))
    return _draw(request, states, lambda holes: interleave(around, holes, before))


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
        return request.policy.tokenizer.encode(text) if request.raw else text
    system = [{"role": "system", "content": request.system}] if request.system else []
    return [*system, {"role": "user", "content": text.strip()}]  # what is piped in ends with a line break


def _ask() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""
