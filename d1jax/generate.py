"""python -m d1jax.generate --model DIR --prompt "...": prompt in, text out, with the denoising shown.

The model is a checkpoint (Hugging Face or d1jax) or a run directory. Prompts come from --prompt (also more than once),
--prompt-json (as the report of a run prints them), --row (of a run's evaluation set), --ids (token ids), --file (one a line; or
.jsonl with "prompt"), standard input, or a conversation (--chat, and when standard input is a terminal).
A prompt with holes, "def f(x): {{mask:16}} return y", comes back with each of them filled by as many tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from d1jax.config import MeshConfig, SamplerConfig, UserError
from d1jax.config.flags import asks_for_version, dashed, version_text
from d1jax.config.no_effect import no_effect
from d1jax.config.yaml_text import shown
from d1jax.files import distinct
from d1jax.inference.chat import Asked, Generation, GenerationOptions, chat, generate
from d1jax.inference.complete import check_draws
from d1jax.inference.infill import has_holes, parse_spans
from d1jax.inference.policy import Policy, load_pretrained, sampler_of
from d1jax.inference.sampler_flags import add_sampler_flags, sampler_from_flags
from d1jax.telemetry.command_line import exit_code, output_file
from d1jax.telemetry.report.player import write_player
from d1jax.training.context import Context, build
from d1jax.training.setup import make_task
from d1jax.weights.hf_directory import is_checkpoint
from d1jax.weights.run import open_run, run_above
from d1jax.weights.source import located


def main(argv: Sequence[str]) -> int:
    """The exit code: 0 done, 1 the predictions are not finite or out of memory, 2 a mistake in the arguments, 130 interrupted."""
    if asks_for_version(argv):
        print(version_text())
        return 0
    arguments = _parser().parse_args(dashed(argv))
    return exit_code(lambda: _generate(arguments))


def _generate(arguments: argparse.Namespace) -> int:
    rows = _rows(arguments)
    prompts = _prompts(arguments, rows)
    check_draws(arguments.seed, arguments.temperature)
    player = _player_path(arguments.player, prompts)
    _check_read(arguments, prompts)
    config = sampler_from_flags(arguments, sampler_of(arguments.model))  # before a large model is read
    if arguments.batch < 1:
        raise UserError(f"--batch {arguments.batch} must be above 0")
    policy = load_pretrained(
        arguments.model,
        dtype=arguments.dtype,
        mesh=_mesh(arguments.mesh),
        adapter=arguments.adapter,
        tokenizer=arguments.tokenizer,
    )
    terminal = sys.stdout.isatty() and sys.stderr.isatty() and not arguments.json
    show = terminal if arguments.show == "auto" else arguments.show == "always"
    options = GenerationOptions(
        policy, config, arguments.seed, arguments.temperature, arguments.system, arguments.raw, show,
        drop_too_long=arguments.too_long == "drop", fixed_batches=len(prompts or []) > arguments.batch,
    )  # fmt: skip
    _show_form(arguments, rows)
    _hint_at_json(arguments.prompt or [])
    if prompts is None:
        chat(options)
    else:
        generations = generate(options, prompts, arguments.batch, arguments.json)
        _show_grades(rows, generations)
        if player:
            samples = [_shown(policy, found) | {"index": index} for index, found in enumerate(generations, start=1)]
            write_player(player, samples, _player_title(arguments.model, config))
    return 0


# -- a run's own problems ----------------------------------------------------------------------------------------------


class Rows(typing.NamedTuple):
    """Rows of an evaluation set of a run."""

    context: Context
    name: str  # of the set
    numbers: list[int]


def _rows(arguments: argparse.Namespace) -> Rows | None:
    """What --row asks for. Raises UserError where the model is no run, or the set has no such row."""
    if not arguments.row:
        if arguments.set:
            raise UserError(no_effect(f"--set {arguments.set}", "--row N"))
        return None
    path = run_above(Path(arguments.model))
    if not located(arguments.model).exists():
        raise UserError(f"--model {arguments.model!r}: no such directory")
    if path is None or is_checkpoint(Path(arguments.model)):
        raise UserError(f"--row takes a problem of a run, and --model {arguments.model!r} is none; write --prompt TEXT")
    run, config = open_run(path)
    context = build(config, training=False, saved=run.source)
    name = arguments.set or next(iter(context.eval_sets))
    if name not in context.eval_sets:
        raise UserError(f"--set {name!r} is no evaluation set of the run; choices: {', '.join(context.eval_sets)}")
    count = len(context.eval_sets[name])
    for number in arguments.row:
        if not 0 <= number < count:
            raise UserError(f"--row {number}: the rows of {name} are 0 to {count - 1}")
    return Rows(context, name, arguments.row)


def _asked_rows(rows: Rows) -> list[Asked]:
    problems = rows.context.eval_sets[rows.name]
    lengths = problems.prompt_length_R
    return [
        Asked(rows.context.task.prompt(problems.rows[n]), problems.prompt_RP[n, : lengths[n]].tolist())
        for n in rows.numbers
    ]


def _show_form(arguments: argparse.Namespace, rows: Rows | None) -> None:
    """What a prompt of the run's task looks like, for who types one."""
    if rows is not None:
        for number, asked in zip(rows.numbers, _asked_rows(rows), strict=True):
            print(f"{rows.name} row {number}: prompt {json.dumps(asked.text)}", file=sys.stderr)
        return
    path = run_above(Path(arguments.model))
    if path is None or is_checkpoint(Path(arguments.model)):
        return
    _, config = open_run(path)
    task = make_task(config.task)
    try:
        example = task.prompt(task.generate("test", 1, config.task.seed)[0])
    except ValueError:  # a task that is read from files only
        print(f"a run of task {task.name}: --row N asks a problem of its evaluation sets", file=sys.stderr)
        return
    form = f"a prompt of task {task.name} has the form {json.dumps(example)}"
    print(f"{form} (--prompt-json takes it like that, --row N from the evaluation set)", file=sys.stderr)


def _show_grades(rows: Rows | None, generations: list[Generation]) -> None:
    if rows is None:
        return
    problems = rows.context.eval_sets[rows.name]
    for number, found in zip(rows.numbers, generations, strict=True):
        grades = rows.context.task.grade(problems.rows[number], found.text)
        told = ", ".join(f"{name} {value:g}" for name, value in grades.items())
        print(f"{rows.name} row {number}: {told}", file=sys.stderr)


def _shown(policy: Policy, found: Generation) -> dict[str, Any]:
    """What the player needs."""
    return found.as_record() | {"set": "prompt", "pieces": policy.tokenizer.pieces(found.tokens)}


def _player_path(text: str | None, prompts: list[Asked] | None) -> Path | None:
    """Where the player goes. Raises UserError for what could not be written in the end, before a large model is read."""
    if text is None:
        return None
    if prompts is None:
        raise UserError("--player shows answered prompts, not a conversation; add --prompt or --file")
    return output_file("--player", text)


def _player_title(model: str, config: SamplerConfig) -> str:
    return f"{Path(model).absolute().name}: completions of {config.completion_length} tokens"


def _prompts(arguments: argparse.Namespace, rows: Rows | None) -> list[Asked] | None:
    """The prompts, or None for a conversation. Raises UserError for an unreadable file and for blank prompts."""
    prompts = [Asked(text) for text in arguments.prompt or []]
    prompts += [Asked(_from_json(text)) for text in arguments.prompt_json or []]
    prompts += [Asked(text, _token_ids(text)) for text in arguments.ids or []]
    if arguments.file:
        prompts += [Asked(text) for text in _read_file(Path(arguments.file))]
    if rows is not None:
        if prompts:
            raise UserError("--row asks problems of the run; leave --prompt, --prompt-json, --ids and --file out")
        prompts = _asked_rows(rows)
    if arguments.chat:
        if prompts:
            raise UserError("--chat asks for its prompts; leave --prompt, --prompt-json, --ids, --row and --file out")
        return None
    if not prompts:
        if sys.stdin.isatty():
            return None
        prompts = [Asked(sys.stdin.read())]
    blank = next((index for index, prompt in enumerate(prompts) if not prompt.text.strip()), None)
    if blank is not None:
        raise UserError(f"prompt {blank} is empty; write --prompt TEXT, --file FILE, or pipe a text in")
    for prompt in prompts:
        if prompt.ids is None and has_holes(prompt.text):
            parse_spans(prompt.text)
    return prompts


def _from_json(text: str) -> str:
    try:
        prompt = json.loads(text)
    except (ValueError, RecursionError):
        prompt = None
    if not isinstance(prompt, str):
        raise UserError(
            f'--prompt-json {shown(text)} is no JSON text; write it in quotes, e.g. "one line\\nanother line"'
        )
    return prompt


def _hint_at_json(prompts: Sequence[str]) -> None:
    """A prompt that was copied with its quotes from where --prompt-json texts are printed."""
    for text in prompts:
        if len(text) > 1 and text[0] == text[-1] == '"' and "\\n" in text:
            print(
                f"note: --prompt takes {shown(text)} with its quotes and backslashes; --prompt-json reads it",
                file=sys.stderr,
            )


def _token_ids(text: str) -> list[int]:
    words = text.replace(",", " ").split()
    if not words or not all(word.isascii() and word.isdecimal() and len(word) < 10 for word in words):
        raise UserError(f'--ids {shown(text)} are no token ids; write whole numbers, e.g. "1 2 3"')
    return [int(word) for word in words]


def _check_read(arguments: argparse.Namespace, prompts: list[Asked] | None) -> None:
    """Raises UserError for a flag that nothing would read."""
    given = {name for name, value in vars(arguments).items() if value != DEFAULTS.get(name)}

    def refuse(names: Sequence[str], where: str) -> None:
        for name in names:
            if name in given:
                raise UserError(no_effect(f"--{name.replace('_', '-')}", where))

    drawn = (
        arguments.temperature > 0
        or (arguments.remasking_temperature or 0) > 0
        or arguments.remasking == "random"
        or arguments.schedule == "chance"
    )
    if not drawn and not sampler_draws(arguments):
        refuse(["seed"], "--temperature above 0, --remasking random or --remasking-temperature above 0")
    if prompts is None:
        refuse(["batch", "json", "too_long"], "prompts, not a conversation")
        return
    if arguments.show == "always":
        refuse(["batch"], "--show never or auto")
    if all(prompt.ids is not None for prompt in prompts):
        refuse(["raw", "system"], "prompts of text")
    if all(prompt.ids is None and has_holes(prompt.text) for prompt in prompts):
        forced = ["block", "end_token", "early_exit", "raw", *([] if arguments.steps else ["length"])]
        refuse(forced, "a prompt without holes")


def sampler_draws(arguments: argparse.Namespace) -> bool:
    """Whether what the model brings along draws the order of positions, and no flag says otherwise."""
    remasking = sampler_of(arguments.model).remasking
    by_order = remasking.name == "random" and arguments.remasking is None
    return by_order or (remasking.temperature > 0 and arguments.remasking_temperature is None)


def _read_file(path: Path) -> list[str]:
    try:
        # Not splitlines, which also cuts at characters that a text may hold.
        lines = path.read_text(encoding="utf-8-sig").replace("\r\n", "\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--file {path}: not readable as text ({error})") from None
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise UserError(f"--file {path}: holds no prompts")
    return [_prompt_of(path, number, line) for number, line in numbered]


def _prompt_of(path: Path, number: int, line: str) -> str:
    if path.suffix != ".jsonl":
        return line
    try:
        prompt = json.loads(line, object_pairs_hook=distinct)["prompt"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f'{path}:{number}: expected an object with a text "prompt" ({error})') from None
    if not isinstance(prompt, str):
        raise UserError(f'{path}:{number}: expected an object with a text "prompt", not a {type(prompt).__name__}')
    return prompt


def _mesh(text: str) -> MeshConfig:
    try:
        data, fsdp, tensor = (int(size) for size in text.split(","))
    except ValueError:
        raise UserError(f"--mesh {text!r} is not of the form data,fsdp,tensor, e.g. 1,1,-1") from None
    return MeshConfig(data, fsdp, tensor)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m d1jax.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="checkpoint or run directory, GGUF file, or RUN/checkpoints/STAGE/STEP")
    add("--adapter", help="a PEFT adapter on top of it")
    add("--prompt", action="append", help="a prompt; may be given more than once")
    add("--prompt-json", action="append", metavar="TEXT", help='a prompt as a JSON text: "one line\\nanother line"')
    add("--ids", action="append", help='a prompt of token ids, e.g. "1 2 3"; needs no tokenizer')
    add(
        "--row",
        action="append",
        type=int,
        metavar="N",
        help="row N, from 0, of an evaluation set of the run; also graded",
    )
    add("--set", default="", help="which evaluation set of the run [the first]")
    add("--tokenizer", metavar="DIR", help="a directory with tokenizer files, for a checkpoint that has none")
    add("--file", help="prompts, one a line, or .jsonl with a key 'prompt'")
    add("--chat", action="store_true", help="a conversation")
    add("--system", default="", help="the system message of a chat")
    add("--raw", action="store_true", help="continue the prompt as it is, without the chat template")
    add("--temperature", type=float, default=0.0, help="0 is greedy [0]")
    add("--seed", type=int, default=0, help="what is drawn at a temperature above 0 [0]")
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
    add_sampler_flags(parser)
    return parser


DEFAULTS = vars(_parser().parse_args(["--model", ""]))

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
