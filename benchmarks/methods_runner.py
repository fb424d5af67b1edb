"""One run of the table of methods, inside a worker process that does many."""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import math
import multiprocessing
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import jax
from methods_plan import Run, base_config, number_of_views, stage_of

from d1jax import train as command
from d1jax.config import Config, RlConfig, SamplerConfig
from d1jax.config.stored import from_yaml
from d1jax.evaluation import decode, grade, summary
from d1jax.files import write_json
from d1jax.models.transformer import Variables
from d1jax.training.context import Context, build
from d1jax.weights.run import RunDirectory, open_run
from d1jax.weights.variables import variables_at

CURVE_POINTS = 40


class Notebook:
    """Stands in for the journal: a run is so short that it is done again instead of resumed, and its files would cost more than it."""

    def __init__(self, stage: str = "rl") -> None:
        self.stage = stage
        self.values: list[dict[str, float]] = []
        self.recent: list[dict[str, float]] = []  # nothing watches for a collapse: it is a result here

    def evaluates(self, step: int) -> bool:
        return False

    def note(self, line: str) -> None:
        pass

    def notes(self, lines: Sequence[str]) -> None:
        pass

    def resume(self, items: dict[str, Any]) -> tuple[dict[str, Any], int]:
        return items, 0

    def log_metrics(self, step: int, values: Mapping[str, float], watch: Sequence[str]) -> None:
        self.values.append(dict(values))

    def save_checkpoint(self, step: int, items: dict[str, Any]) -> None:
        pass


# -- the base ------------------------------------------------------------------------------------------------------------


def sft_config(task: str, extra: tuple[str, ...]) -> Config:
    """The SFT stage by itself: it knows nothing of RL and of how many steps the sampler takes, so neither makes it void."""
    config = base_config(task, extra)
    length = config.sampler.completion_length
    sampler = SamplerConfig(completion_length=length, block_length=length, steps=length)
    return dataclasses.replace(config, stages=("sft",), rl=RlConfig(), sampler=sampler)


def train_base(task: str, extra: tuple[str, ...]) -> str:
    """SFT of a task, as an ordinary run directory: continued where it was stopped, not repeated where it is done."""
    config, began = sft_config(task, extra), time.perf_counter()
    run = RunDirectory(Path(config.run_dir))
    if not (run.evaluation("sft").exists() and from_yaml(run.config) == config):
        command.run(config)
    return f"{task}: base ready after {time.perf_counter() - began:.0f} s"


@functools.cache
def prepared(task: str, extra: tuple[str, ...]) -> tuple[Context, Variables]:
    """Problems and base weights of a task: the same for every run of it."""
    config = base_config(task, extra)
    run, source = open_run(config.run_dir)
    built = build(config, log=lambda line: None)
    return built, variables_at(dataclasses.replace(built, config=source), run, "sft")[0]


# -- one run -------------------------------------------------------------------------------------------------------------


def scores(context: Context, variables: Variables, config: Config, temperature: float = 0.0) -> dict[str, float]:
    """Grades on the held-out problems under the sampler of `config`: greedy, or at the temperature that RL works at."""
    evaluation = dataclasses.replace(config.evaluation, temperature=temperature)
    chosen = dataclasses.replace(context, config=dataclasses.replace(config, evaluation=evaluation, seed=0))
    problems = next(iter(chosen.eval_sets.values()))
    texts = decode.texts_of(chosen, decode.decode(chosen, variables, problems))
    graded = grade.score_texts(chosen, problems, texts)
    graded["solved"] = graded.pop("solved_rate")
    return {name: round(value, 5) for name, value in graded.items() if isinstance(value, float)}


@functools.cache
def scores_before(task: str, sampler: Any, temperature: float, extra: tuple[str, ...]) -> dict[str, float]:
    context, variables = prepared(task, extra)
    return scores(context, variables, dataclasses.replace(context.config, sampler=sampler), temperature)


def execute(run: Run, extra: tuple[str, ...] = ()) -> dict[str, Any]:
    """Trains and evaluates one run; everything that the report needs, as JSON."""
    began = time.perf_counter()
    shared, base = prepared(run.task, extra)
    kind, stage = run.config.stages[-1].kind, stage_of(run.config)
    context, notebook = dataclasses.replace(shared, config=run.config), Notebook(kind)
    with jax.set_mesh(shared.mesh):
        sampler, sampled = shared.config.sampler, stage.temperature
        before = {
            "shared": scores_before(run.task, sampler, 0.0, extra),
            "sampled": scores_before(run.task, sampler, sampled, extra),
        }
        training = time.perf_counter()
        variables = command.TRAIN[kind](context, base, notebook)
        trained = time.perf_counter()
        after = {
            "shared": scores(context, variables, shared.config),
            "sampled": scores(context, variables, shared.config, sampled),
        }
        # A method with a sampler of its own is compared under everybody's, and shown under its own too.
        if run.config.sampler != shared.config.sampler:
            before["own"] = scores_before(run.task, run.config.sampler, 0.0, extra)
            after["own"] = scores(context, variables, run.config)
    values = notebook.values
    del variables, context
    return {
        **identity(run),
        "before": before,
        "after": after,
        "train": training_figures(values, run.config.max_bad_updates),
        "curve": curve(values),
        "views": number_of_views(stage.estimator, run.config.sampler),
        "seconds": round(time.perf_counter() - began, 1),
        "seconds_training": round(trained - training, 1),
        "seconds_first_step": round(values[0]["time/rollout_s"] + values[0]["time/update_s"], 1),
        "environment": summary.environment() | {"commit": commit()},
    }


def identity(run: Run) -> dict[str, Any]:
    """What is known of a run before it is done."""
    stage = stage_of(run.config)
    return {
        "task": run.task, "arm": run.arm, "seed": run.seed, "digest": run.digest, "steps": stage.steps,
        "inner_updates": stage.updates_per_step, "passes_of_step": run.passes_of_step, "forward_passes": run.spends,
        "budget": run.budget, "overridden": run.overridden,
    }  # fmt: skip


def training_figures(values: list[dict[str, float]], max_bad: int) -> dict[str, Any]:
    """Means over the last tenth of the steps, and whether training came to a halt."""
    last = values[-max(len(values) // 10, 1) :]
    names = ("reward", "rewards/solved/mean", "entropy", "ratio/log_rms", "clip_ratio/region_mean", "kl", "sampler/nfe")
    figures = {
        name: finite(sum(v[name] for v in last) / len(last), 5) for name in names if all(name in v for v in last)
    }
    return {
        **figures,
        "reward_first": finite(values[0]["reward"], 5),
        "skipped_updates": int(values[-1]["nonfinite/total"]),
        "diverged": any(v["nonfinite/in_a_row"] >= max_bad for v in values),
    }


def curve(values: list[dict[str, float]]) -> dict[str, list[float | None]]:
    """Reward by step, in at most CURVE_POINTS means."""
    size = -(-len(values) // CURVE_POINTS)
    parts = [values[start : start + size] for start in range(0, len(values), size)]
    steps = [min((i + 1) * size, len(values)) for i in range(len(parts))]
    return {"step": steps, "reward": [finite(sum(v["reward"] for v in part) / len(part), 4) for part in parts]}


def finite(value: float, digits: int) -> float | None:
    """JSON has no NaN."""
    return round(value, digits) if math.isfinite(value) else None


@functools.cache
def commit() -> str:
    here = Path(__file__).parent
    found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    return found.stdout.strip()


# -- the queue -----------------------------------------------------------------------------------------------------------


def unfinished(runs: Sequence[Run], folder: Path) -> list[Run]:
    """The runs without a result, each setting once."""
    todo: dict[str, Run] = {}
    for run in runs:
        if not result_file(run, folder).exists():
            todo.setdefault(run.digest, run)
    return list(todo.values())


def result_file(run: Run, folder: Path) -> Path:
    return folder / f"{run.task}-{run.digest}.json"


def finish_all(runs: Sequence[Run], folder: Path, carry_out: Callable[[Sequence[Run]], Iterator[Any]]) -> int:
    """Carries out what has no result yet, and keeps each result as it comes; returns how many failed.

    `carry_out(runs)` yields (run, result or exception) in any order. A run that raises leaves no result, so it is tried
    again by the next command.
    """
    todo, failures = unfinished(runs, folder), 0
    print(f"{len(runs)} rows, {len(todo)} runs to do")
    for number, (run, result) in enumerate(carry_out(todo), 1):
        label = f"[{number}/{len(todo)}] {run.task} / {run.arm} / seed {run.seed}"
        if isinstance(result, BaseException):
            failures += 1
            print(f"{label}: failed: {type(result).__name__}: {str(result)[:300]}", flush=True)
            continue
        write_json(result_file(run, folder), result)
        gain = 100 * (result["after"]["shared"]["solved"] - result["before"]["shared"]["solved"])
        sampled = 100 * (result["after"]["sampled"]["solved"] - result["before"]["sampled"]["solved"])
        print(
            f"{label}: {result['steps']} steps, solved {gain:+.1f} points, sampled {sampled:+.1f}, {result['seconds']:.0f} s",
            flush=True,
        )
    return failures


def collected(runs: Sequence[Run], folder: Path) -> list[dict[str, Any]]:
    """The results there are, one a row: arms of equal settings repeat the run that they share, under their own name."""
    found = []
    for run in runs:
        path = result_file(run, folder)
        if path.exists():
            found.append(json.loads(path.read_text(encoding="utf-8")) | {"arm": run.arm, "overridden": run.overridden})
    return found


def start_worker(cores: Any, cache: str) -> None:
    """One core each: small matrices gain nothing from a second one."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {cores.get()})
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    parent = multiprocessing.parent_process()

    def follow() -> None:  # a killed command leaves no workers behind
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def one_job(run: Run, extra: tuple[str, ...]) -> dict[str, Any]:
    try:
        return execute(run, extra)
    finally:
        jax.clear_caches()  # programs of a method are of no use to the next; the cache on disk has them
        gc.collect()


def in_workers(cores: Sequence[int], cache: Path, extra: tuple[str, ...]) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")  # JAX has threads, which a fork would lose
    queue = context.Queue()
    for core in cores:
        queue.put(core)
    return ProcessPoolExecutor(len(cores), context, start_worker, (queue, str(cache)))


def carried_out(pool: ProcessPoolExecutor, runs: Sequence[Run], extra: tuple[str, ...]) -> Iterator[tuple[Run, Any]]:
    futures = {pool.submit(one_job, run, extra): run for run in runs}
    for future in as_completed(futures):
        yield futures[future], future.exception() or future.result()
