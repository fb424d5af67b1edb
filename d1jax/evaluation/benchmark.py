"""A benchmark put to a model: completions graded and written down as they come, so that what was stopped continues.

A row of the file is one sample: {"row", "sample", "prompt", "completion", "grade", "offer", "tokens", "nfe", "local_ar",
"global_ar", "ended"}, and for the first rows what a player needs.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from d1jax.config import UserError
from d1jax.config.benchmark import BenchmarkConfig
from d1jax.config.values import plain
from d1jax.diffusion.rollout import Rollout
from d1jax.evaluation import statistics
from d1jax.evaluation.decoding_order import global_ar, local_ar, unmask_order
from d1jax.evaluation.prompting import Prompter
from d1jax.files import write_json
from d1jax.inference.complete import Completions, completions_of, hand_over
from d1jax.inference.policy import Policy
from d1jax.tasks.judging import grade_all, offers
from d1jax.tasks.task import Row

PLAYED = 16  # rows whose denoising is kept
SUMMARISED = ("grade", "offer", "tokens", "nfe", "seconds", "local_ar", "global_ar", "ended")
"""What the numbers of a cell are made of; a sample without one of them is damaged."""


@dataclass(frozen=True)
class Cell:
    """One benchmark under one setting, and the file that holds its samples."""

    name: str  # of the benchmark
    config: BenchmarkConfig
    prompter: Prompter
    rows: Sequence[Row]
    identity: Mapping[str, Any]  # of the rows: source, number, sha256

    @property
    def label(self) -> str:
        """What the files of this cell are called; of a task of the user's own, my/file.py:Mine, the class alone."""
        config, name = self.config, self.name.rpartition(":")[2]
        drawn = f"_t{config.temperature:g}" if config.temperature else ""
        return f"{name}_{config.length}_s{config.decoding.max_steps}{drawn}"

    def settings(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """What the samples of a file depend on; another one's are not continued. The batch size is no part of it."""
        return {"benchmark": self.name, "model": dict(model), "data": dict(self.identity), "config": plain(self.config)}


def run_cell(policy: Policy, cell: Cell, folder: Path, model: Mapping[str, Any], batch: int) -> list[dict[str, Any]]:
    """All samples of a cell, in order; those that folder/LABEL.jsonl holds already are not drawn again.

    Row r's sample s draws from (seed, r x samples + s) alone, so it does not depend on the batch. Raises UserError where the file
    is of other settings.
    """
    path, count = folder / f"{cell.label}.jsonl", cell.config.samples
    refuse_others(cell, folder, model)
    done = _continued(path, cell, model)
    wanted = [number for number in range(len(cell.rows) * count) if (number // count, number % count) not in done]
    if wanted:
        ids = {place: cell.prompter.ids(cell.rows[place], policy.tokenizer) for place in {n // count for n in wanted}}
        _check_room(policy, cell, ids)
        with open(path, "a", encoding="utf-8") as file:
            for found in _batches(policy, cell, ids, wanted, batch):
                file.writelines(json.dumps(one, ensure_ascii=True) + "\n" for one in found)
                file.flush()
                os.fsync(file.fileno())
                done |= {(one["row"], one["sample"]): one for one in found}
    return [done[key] for key in sorted(done)]


def _check_room(policy: Policy, cell: Cell, ids: Mapping[int, list[int]]) -> None:
    """Raises UserError for prompts that do not fit, before hours are spent on the rows in front of them."""
    limit, new = policy.config.max_positions, cell.config.length
    longest = max(ids, key=lambda place: len(ids[place]))
    over = sum(len(prompt) + new > limit for prompt in ids.values())
    if limit and over:
        raise UserError(
            f"{cell.label}: the prompts of {over} of {len(ids)} rows leave no room for {new} new tokens in the model's {limit} positions "
            f"(the longest: row {longest} with {len(ids[longest])} tokens); lower length, shorten the prompts (template, few_shot), or "
            "give a file of shorter rows (data)"
        )


def _has_samples(path: Path) -> bool:
    """Whether an earlier start has come as far as a first sample: it may have run out of memory before, or lacked room for a prompt."""
    return path.exists() and path.stat().st_size > 0


def refuse_others(cell: Cell, folder: Path, model: Mapping[str, Any]) -> None:
    """Raises UserError where the file of a cell holds samples of other settings, rows or weights."""
    path = folder / f"{cell.label}.jsonl"
    beside = path.with_suffix(".settings.json")
    if not _has_samples(path):
        return
    if not beside.exists():
        raise UserError(
            f"{path}: holds samples of settings that nothing tells ({beside.name} is not there); move it away"
        )
    try:
        stored = json.loads(beside.read_text(encoding="utf-8"))
        if not isinstance(stored, dict):
            raise ValueError("no JSON object")
    except ValueError as error:
        raise UserError(f"{beside}: is damaged ({error}); move it and {path.name} away") from None
    wanted = json.loads(json.dumps(cell.settings(model)))
    if stored != wanted:
        other = sorted(key for key in stored.keys() | wanted.keys() if stored.get(key) != wanted.get(key))
        raise UserError(
            f"{path}: holds samples of another evaluation (other {', '.join(other)}); name another --out, or move it"
        )


def _continued(path: Path, cell: Cell, model: Mapping[str, Any]) -> dict[tuple[int, int], dict[str, Any]]:
    """What an earlier start has left, a half-written last line cut off. Raises UserError for a line that is no sample of the cell."""
    if not _has_samples(path):
        write_json(path.with_suffix(".settings.json"), cell.settings(model))
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with open(path, "r+b") as file:
            file.truncate(len(whole))
    done = {}
    for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
        try:
            one = json.loads(line)
            _check_sample(one, cell)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}:{number}: is damaged ({type(error).__name__}: {error}); move the file away, and the same command makes it again"
            ) from None
        done[one["row"], one["sample"]] = one
    return done


def _check_sample(one: Any, cell: Cell) -> None:
    """Raises KeyError, TypeError or ValueError where a stored value is no sample of the cell."""
    place = (one["row"], one["sample"])
    if not (0 <= place[0] < len(cell.rows) and 0 <= place[1] < cell.config.samples):
        raise ValueError(f"there is no row {place[0]} with a sample {place[1]}")
    for key in SUMMARISED:
        one[key]
    one["grade"]["solved"]


def _batches(
    policy: Policy, cell: Cell, ids: Mapping[int, list[int]], wanted: Sequence[int], size: int
) -> Iterator[list[dict[str, Any]]]:
    """The graded samples of each batch. A batch is graded while the next is decoded."""
    config, count = cell.config, cell.config.samples
    for numbers, found, seconds in _completed(policy, cell, ids, wanted, size):
        texts = [config.prefill + text for text in found.text[: len(numbers)]]
        rows = [cell.rows[number // count] for number in numbers]
        grades = grade_all(cell.prompter.task, rows, texts)
        offered = offers(cell.prompter.task, rows, texts) or [None] * len(numbers)
        yield [
            {
                "row": number // count,
                "sample": number % count,
                "prompt": cell.prompter.asked(rows[place]),
                "completion": texts[place],
                "reference": cell.prompter.task.target(rows[place]),
                "grade": {name: float(value) for name, value in grades[place].items()},
                "offer": offered[place],
                "seconds": seconds,
                **_decoded(policy, found, place, cell.prompter.task.columns is not None),
                **(_played(policy, found, place) if number // count < PLAYED and number % count == 0 else {}),
            }
            for place, number in enumerate(numbers)
        ]


def _completed(
    policy: Policy, cell: Cell, ids: Mapping[int, list[int]], wanted: Sequence[int], size: int
) -> Iterator[tuple[list[int], Completions, float | None]]:
    """(numbers of the samples, their completions, seconds a sample) of each batch; the next one is on the devices already.

    Seconds are from the batch before to this one: decoding, or grading where that takes longer.
    """
    config, count = cell.config, cell.config.samples
    batches = [list(wanted[start : start + size]) for start in range(0, len(wanted), size)]

    def start(numbers: list[int]) -> Rollout:
        filled = numbers + [numbers[-1]] * (size - len(numbers))  # one program serves all batches
        prompts = [ids[number // count] for number in filled]
        return hand_over(policy, prompts, config.decoding, config.seed, config.temperature, filled)

    began = time.perf_counter()
    under_way = start(batches[0])
    for index, numbers in enumerate(tqdm(batches, desc=cell.label, unit="batch", leave=False, disable=None)):
        next_one = start(batches[index + 1]) if index + 1 < len(batches) else None
        found = completions_of(policy, under_way)
        now = time.perf_counter()
        # The first batch also compiles; where it is the only one there is nothing else to go by.
        counts = index > 0 or len(batches) == 1
        yield numbers, found, round((now - began) / len(numbers), 4) if counts else None
        began, under_way = now, next_one


def _decoded(policy: Policy, found: Completions, place: int, grid: bool) -> dict[str, Any]:
    """How a completion came about: tokens of its text, forward passes, autoregressiveness, and whether the text is whole: it has a
    token that ends it, which is not one of its text; a grid that fills its columns needs none.
    """
    length = int(found.length[place])
    has_end_token = length > 0 and int(found.tokens[place, length - 1]) in policy.tokenizer.special.end_ids
    order = unmask_order(found.unmask_step[place])
    local, overall = float(local_ar(order, (1,))[0]), float(global_ar(order, (1,))[0])
    return {
        "tokens": length - has_end_token,
        "nfe": int(found.nfe[place]),
        "local_ar": None if np.isnan(local) else round(local, 4),
        "global_ar": None if np.isnan(overall) else round(overall, 4),
        "ended": has_end_token or (grid and found.text[place].endswith("\n")),
    }


def _played(policy: Policy, found: Completions, place: int) -> dict[str, Any]:
    """What a player needs: each token's piece, step and confidence."""
    length = int(found.length[place])
    return {
        "pieces": policy.tokenizer.pieces(found.tokens[place, :length].tolist()),
        "reveal_step": found.unmask_step[place][:length].tolist(),
        "confidence": [round(float(p), 4) for p in found.confidence[place][:length]],
    }


def summarise(cell: Cell, found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The numbers of a cell: accuracy with its interval, the other grades, effective tokens, passes, speed, autoregressiveness.

    Accuracy is over all samples with rows as what is drawn again; with one sample a row its interval is Wilson's.
    """
    rows, count = len(cell.rows), cell.config.samples
    right_RS = np.array([one["grade"]["solved"] == 1.0 for one in found]).reshape(rows, count)
    means = {
        name: float(np.mean([one["grade"][name] for one in found])) for name in found[0]["grade"] if name != "solved"
    }
    accuracy = float(right_RS.mean())
    several = {}
    if count > 1:
        answers = [[one["offer"] for one in found[place : place + count]] for place in range(0, len(found), count)]
        named = any(one["offer"] is not None for one in found)
        several = statistics.of_samples(right_RS, answers if named else None, cell.config.seed)
        interval = several[f"avg@{count}"]["ci95"]
    else:
        interval = list(statistics.wilson_interval(float(right_RS.sum()), rows))
    return {
        "benchmark": cell.name,
        "length": cell.config.length,
        "steps": cell.config.decoding.max_steps,
        "temperature": cell.config.temperature,
        "n": rows,
        "samples": count,
        "correct": int(right_RS.sum()),
        "accuracy": accuracy,
        "accuracy_ci95": interval,
        **several,
        "grades": means,
        "effective_tokens": float(np.mean([one["tokens"] for one in found])),
        "cut_off": float(np.mean([not one["ended"] for one in found])),
        "nfe": float(np.mean([one["nfe"] for one in found])),
        "tokens_per_second": _speed([one for one in found if one["seconds"] is not None]),
        "local_ar": _mean(one["local_ar"] for one in found),
        "global_ar": _mean(one["global_ar"] for one in found),
    }


def _speed(timed: Sequence[Mapping[str, Any]]) -> float | None:
    """Tokens of texts a second, of the samples whose time is known."""
    seconds = sum(one["seconds"] for one in timed)
    return sum(one["tokens"] for one in timed) / seconds if seconds else None


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
