"""One rejection-sampling stage: completions of the policy as it is, of which the right ones are kept as rows for an SFT stage.

The rows are a JSONL file, written when all are there; a stage that was stopped begins again, and makes the same rows.

Source: RFT in DeepSeekMath's unified view, arXiv 2402.03300, section 5.2; DeepSeek-R1, arXiv 2501.12948, section 2.3.3.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from d1jax.config import UserError
from d1jax.data.examples import Problems
from d1jax.diffusion.rollout import Rollout
from d1jax.files import write_json, write_jsonl
from d1jax.models.transformer import Variables, in_model_dtype
from d1jax.rollouts.generate import Generator, Prompts, fetch_and_grade
from d1jax.tasks.task import DataError
from d1jax.training.context import Context
from d1jax.training.stage_log import Clock
from d1jax.training.stopping import StopRequest
from d1jax.weights.run import read_record, read_records


def run(context: Context, variables: Variables, stage: str, out: Path, stop: StopRequest) -> None:
    """Writes the kept rows of a stage: {"row": place among the training rows, "prompt", "completion", "tokens"}.

    Of a problem at most keep_per_prompt different right completions stay. Raises DataError where none is right: nothing could be learnt.
    """
    if out.exists() and _record(out).exists():
        _check_record(out)
        return
    config = context.config.rejection
    generate = Generator(context, config)
    policy = in_model_dtype(variables, context.config.model)
    wanted = config.prompts or len(context.train)
    kept: list[dict[str, Any]] = []
    seen: dict[int, set[str]] = {}  # the texts that are kept of each problem
    sampled = 0
    for step, first in enumerate(range(0, wanted, config.prompts_per_step)):
        stop.check(f"{stage}, after {first} of {wanted} problems")
        prompts = generate.prompts(step)
        key = jax.random.fold_in(context.key(stage), step)
        parts = generate(policy, prompts, key)
        group = config.num_generations
        rollout, graded = fetch_and_grade(context, {config.accept: 1.0}, prompts, parts, group, Clock())
        # The last batch is as large as the others, for one compiled program; what is beyond the wanted problems does not count.
        wanted_B = np.arange(len(prompts.rows)) < (wanted - first) * config.num_generations
        right_B = (graded.parts_B[config.accept] == 1.0) & wanted_B
        sampled += int(wanted_B.sum())
        kept += _distinct(context, prompts, rollout, graded.texts, right_B, seen, config.keep_per_prompt)
    if not kept:
        raise DataError(
            f"stage {stage!r}: none of {sampled} completions earned {config.accept!r}, so nothing is kept; sample more of them "
            "(rejection.num_generations), or train longer before"
        )
    write_jsonl(out, kept)
    write_json(_record(out), {"rows": len(kept), "sha256": hashlib.sha256(out.read_bytes()).hexdigest()})
    problems = len({one["row"] for one in kept})
    print(f"{stage}: kept {len(kept)} right completions of {problems} problems, out of {sampled}", file=sys.stderr)


def _distinct(
    context: Context,
    prompts: Prompts,
    rollout: Rollout,
    texts: list[str],
    right_B: np.ndarray,
    seen: dict[int, set[str]],
    most: int,
) -> list[dict[str, Any]]:
    """The right completions of a batch, with those in `seen` at most `most` different ones a problem, in their order."""
    rows = []
    for index in np.flatnonzero(right_B):
        place, text = prompts.ids[index], texts[index]
        found = seen.setdefault(place, set())
        if text in found or len(found) >= most:
            continue
        found.add(text)
        tokens = rollout.tokens_BC[index, : rollout.length_B[index]].tolist()
        rows.append(
            {"row": place, "prompt": context.task.prompt(prompts.rows[index]), "completion": text, "tokens": tokens}
        )
    return rows


def _record(out: Path) -> Path:
    """What the rows were when they were written; without it the stage has not finished."""
    return out.with_suffix(".json")


def _check_record(out: Path) -> None:
    """Raises UserError where the kept rows are not those that were written."""
    then = read_record(_record(out))
    if hashlib.sha256(out.read_bytes()).hexdigest() != then.get("sha256"):
        raise UserError(
            f"{out}: not the {then.get('rows')} rows that this run has kept; put them back, or move the file away, and the same command "
            "makes them again"
        )


def kept_problems(context: Context, path: Path, columns: int) -> Problems:
    """The rows that a rejection stage has kept, as what an SFT stage learns from. Raises UserError where they do not fit.

    columns: those of a target. The file holds what the model wrote; it is read as token ids, never as control text.
    """
    records = read_records(path)
    if _record(path).exists():  # runs before 0.2 left none
        _check_record(path)
    if not records:
        raise UserError(f"{path}: holds no rows; move the file away, and the same command makes it again")
    for number, one in enumerate(records, start=1):
        tokens, place = one.get("tokens"), one.get("row")
        known = isinstance(place, int) and 0 <= place < len(context.train)
        known = known and one.get("prompt") == context.task.prompt(context.train.rows[place])
        vocabulary = context.model.config.vocab_size
        if (
            not known
            or not isinstance(tokens, list)
            or not all(isinstance(t, int) and 0 <= t < vocabulary for t in tokens)
        ):
            raise UserError(
                f"{path}:{number}: no row that this run has kept; move the file away, and the same command makes it again"
            )
    train, end = context.train, context.tokenizer.special.end
    longest = max((len(one["tokens"]) for one in records), default=0)
    if longest > columns:
        raise UserError(
            f"{path}: a completion has {longest} tokens, more than the {columns} of sft.completion_length; raise it"
        )
    rows_B = np.array([one["row"] for one in records])
    target_BC = np.full((len(records), columns), end, np.int32)
    for index, one in enumerate(records):
        target_BC[index, : len(one["tokens"])] = one["tokens"]
    return dataclasses.replace(
        train,
        rows=[train.rows[place] for place in rows_B],
        prompt_RP=train.prompt_RP[rows_B],
        prompt_length_R=train.prompt_length_R[rows_B],
        target_RC=target_BC,
        has_target_R=np.ones(len(records), bool),
    )
