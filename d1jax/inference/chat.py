"""What generate does with a loaded model: answer prompts, fill holes, chat; with the denoising drawn while it happens."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from d1jax.config import SamplerConfig, UserError
from d1jax.diffusion.decoding import Decoding
from d1jax.files import to_json
from d1jax.inference.complete import Completions, Prompt, filled_up, prompt_ids, sample, sample_ids, watch
from d1jax.inference.infill import Filled, fill, has_holes, merge, parse_template, watch_infill
from d1jax.inference.policy import Policy, check_length
from d1jax.telemetry.terminal import DenoisingView, printable


class Asked(NamedTuple):
    """A prompt: a text, or token ids with the text that stands for them."""

    text: str
    ids: list[int] | None = None


class GenerationOptions(NamedTuple):
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


class Generation(NamedTuple):
    """What became of a prompt; the lists are of the new tokens."""

    prompt: str
    text: str
    tokens: list[int]
    unmask_step: list[int]
    confidence: list[float]
    nfe: int

    def as_record(self) -> dict[str, Any]:
        """A line of JSON: the step of a token is called "reveal_step" there, as in the files of runs, which the pages read."""
        return {"reveal_step" if name == "unmask_step" else name: value for name, value in self._asdict().items()}


class PreparedPrompt(NamedTuple):
    """A prompt that can be answered."""

    row: int  # its place in the list: what its draws depend on
    prompt: str
    holes: bool
    ids: list[int]
    new: int  # tokens to be written


def generate(options: GenerationOptions, prompts: list[Asked], batch: int, as_json: bool) -> list[Generation]:
    """Prints a completion of each prompt, or the prompt with its holes filled, and returns them.

    All prompts are checked before the first is decoded. Rows keep their place in the list, so batches change nothing. Prompts
    that are too long are an error, or left out and counted.
    """
    tasks = [_prepared(options, row, prompt) for row, prompt in enumerate(prompts)]
    why = [_too_long(options, task) for task in tasks]
    dropped = [row for row, reason in enumerate(why) if reason]
    if dropped and not options.drop_too_long:
        raise UserError(
            f"prompt {dropped[0]}: {why[dropped[0]]}; shorten it, or leave such prompts out by --too-long drop"
        )
    size = 1 if options.show else batch
    generations: list[Generation] = []
    for start in range(0, len(tasks), size):
        part = [task for task in tasks[start : start + size] if not why[task.row]]
        found = dict(zip((task.row for task in part), _generations(options, part, size), strict=True))
        for row in range(start, min(start + size, len(tasks))):
            if as_json:  # ASCII: nothing that a terminal obeys
                left_out = {"prompt": prompts[row].text, "text": None, "dropped": why[row]}
                print(to_json(left_out if why[row] else found[row].as_record(), ensure_ascii=True), flush=True)
            elif not why[row]:
                print(printable(found[row].text), flush=True)
        generations += found.values()
    if dropped:
        which = ", ".join(map(str, dropped[:10])) + (", ..." if len(dropped) > 10 else "")
        print(f"left out {len(dropped)} of {len(prompts)} prompts that are too long: {which}", file=sys.stderr)
    return generations


def _prepared(options: GenerationOptions, row: int, asked: Asked) -> PreparedPrompt:
    prompt = asked.text
    if asked.ids is not None:
        return PreparedPrompt(row, prompt, False, asked.ids, options.config.completion_length)
    if has_holes(prompt):
        if options.system:
            raise UserError("--system has no place in a text with holes; leave it out")
        template = parse_template(options.policy.tokenizer, prompt)
        return PreparedPrompt(row, prompt, True, template.ids, len(template.before))
    ids = prompt_ids(options.policy, _as_prompt(options, prompt))
    return PreparedPrompt(row, prompt, False, ids, options.config.completion_length)


def _too_long(options: GenerationOptions, task: PreparedPrompt) -> str:
    """Why this prompt and what is to be written do not fit the model's positions, or ""."""
    given = len(task.ids)
    try:
        check_length(given + task.new, options.policy.config, f"{given} tokens of prompt and {task.new} new ones")
    except UserError as error:
        return str(error)
    return ""


def _generations(options: GenerationOptions, tasks: list[PreparedPrompt], size: int) -> list[Generation]:
    """Their generations. Plain prompts are one batch of `size` rows (the last one is repeated), so few programs are compiled."""
    found: dict[int, Generation] = {}
    plain, holed = ([task for task in tasks if task.holes == holes] for holes in (False, True))
    if plain and options.show:
        completions = _watched(options, plain[0].ids, plain[0].row)
    elif plain:
        full = plain + plain[-1:] * (size - len(plain))
        padded = full if options.fixed_batches else filled_up(options.policy, plain)
        draws = (options.seed, options.temperature, [task.row for task in padded])
        completions = sample_ids(options.policy, [task.ids for task in padded], options.config, *draws)
    for index, task in enumerate(plain):
        values = (values[index] for values in (completions.tokens, completions.unmask_step, completions.confidence))
        found[task.row] = Generation(
            task.prompt, completions.text[index], *_lists(*values), int(completions.nfe[index])
        )
    if holed and options.show:
        filled = [_watched_filling(options, holed[0].prompt, holed[0].row)]
    else:
        draws = (options.seed, options.temperature, [task.row for task in holed])
        filled = fill(options.policy, [task.prompt for task in holed], options.config, *draws)
    for task, one in zip(holed, filled, strict=True):
        found[task.row] = Generation(
            task.prompt, one.text, *_lists(one.tokens, one.unmask_step, one.confidence), one.nfe
        )
    return [found[task.row] for task in tasks]


def _lists(tokens: np.ndarray, unmask_step: np.ndarray, confidence: np.ndarray) -> tuple[list, list, list]:
    return tokens.tolist(), unmask_step.tolist(), [round(float(value), 4) for value in confidence]


def chat(options: GenerationOptions) -> None:
    """A conversation in the terminal; an empty line or end of input ends it, /new forgets what was said."""
    chats = options.policy.tokenizer.chats and not options.raw
    opening = [{"role": "system", "content": options.system}] if options.system and chats else []
    said = list(opening)
    turn = 0
    print("an empty line ends the conversation" + (", /new begins another one" if chats else ""), file=sys.stderr)
    while text := _ask():
        if text == "/new":
            said = list(opening)
            continue
        said.append({"role": "user", "content": text})
        try:
            prompt = said if chats else _as_prompt(options, text)
            if options.show:
                completions = _watched(options, prompt, turn)
            else:
                completions = sample(options.policy, [prompt], options.config, **options.settings(turn))
        except UserError as error:  # what cannot be written, or a conversation that has become too long
            print(f"error: {printable(str(error))}", file=sys.stderr)
            said.pop()
            continue
        said.append({"role": "assistant", "content": completions.text[0]})
        print(printable(completions.text[0]), flush=True)
        turn += 1


def _watched(options: GenerationOptions, prompt: Prompt, row: int) -> Completions:
    return _draw(
        options, watch(options.policy, [prompt], options.config, **options.settings(row)), lambda pieces: pieces
    )


def _watched_filling(options: GenerationOptions, prompt: str, row: int) -> Filled:
    template = parse_template(options.policy.tokenizer, prompt)
    around = [(piece, False) for piece in options.policy.tokenizer.pieces(template.ids)]
    states = watch_infill(options.policy, prompt, options.config, **options.settings(row))
    return _draw(options, states, lambda holes: merge(around, holes, template.before))


def _draw(options: GenerationOptions, states: Iterator[Any], merge_pieces: Any) -> Any:
    """Draws every state of one row; `merge_pieces` puts what belongs to new tokens into the order of the text. Returns the last value."""
    view = DenoisingView(sys.stderr)
    began = time.perf_counter()
    last = None
    result = None
    special = options.policy.tokenizer.special
    for state in states:
        if not isinstance(state, Decoding):
            result = state
            continue
        tokens = state.tokens_BC[0]
        unmask_step = state.unmask_step_BC[0]
        named = options.policy.tokenizer.pieces(tokens.tolist())
        pieces = [None if token == special.mask else piece for token, piece in zip(tokens, named, strict=True)]
        fresh = unmask_step != (-1 if last is None else last)
        merged = merge_pieces([(piece, bool(new)) for piece, new in zip(pieces, fresh, strict=True)])
        done = sum(piece is not None for piece in pieces)
        status = f"step {state.step}, {done} of {len(pieces)} tokens, {time.perf_counter() - began:.1f} s"
        view.draw([piece for piece, _ in merged], [new for _, new in merged], status)
        last = unmask_step
    view.clear()
    assert result is not None
    return result


def _as_prompt(options: GenerationOptions, text: str) -> Prompt:
    if options.raw or not options.policy.tokenizer.chats:
        if options.system:
            raise UserError("--system needs a checkpoint with a chat template, and no --raw")
        return _encoded(options, text) if options.raw else text
    system = [{"role": "system", "content": options.system}] if options.system else []
    return [*system, {"role": "user", "content": text.strip()}]  # what is piped in ends with a line break


def _encoded(options: GenerationOptions, text: str) -> list[int]:
    try:
        return options.policy.tokenizer.encode(text)
    except ValueError as error:
        raise UserError(f"--raw: {error}") from None


def _ask() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""
