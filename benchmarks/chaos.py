"""Runs that are killed again and again, at random moments, end with the bits of one that was left alone.

    python benchmarks/chaos.py --kills 200 --out benchmarks/results/chaos.json

One small run has stages of every kind. Its command is started and, after a random time of training, killed (SIGKILL), asked to stop
(SIGTERM), killed and the newest checkpoint cut short, or left without room: from then on every write to a file fails, as on a full disk,
and it has to end by itself. Then the same command is started again, until it ends with everything done; then the next run, until
there were so many stops. For Linux.

Compared with the run that was left alone is every metric but times, every kept row, sample and evaluation, and the digest of every array of
every checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from d1jax.files import write_json
from d1jax.telemetry.metrics import read_metrics
from d1jax.weights.checkpoints import RECORD

CONFIG = """
stages:
  - {name: base, kind: sft}
  - {name: sampled, kind: generate}
  - {name: imitated, kind: sft, data: [task, sampled], steps: 4}
  - {name: judge, kind: reward_model, data: [sampled]}
  - {name: d1, kind: rl, reward_weights: {cells: 1, "model:judge": 0.5}}
  - {name: vrpo, kind: preference}
  - {name: after, kind: evaluate, samples: 2, rows: 8}
  - {name: out, kind: export}
task: {name: sudoku, train_rows: 64, eval_rows: 16}
model: {width: 16, layers: 1, heads: 2, kv_heads: 2, mlp_width: 16, rope_theta: 100}
sampler: {completion_length: 20, block_length: 20, steps: 2}
sft: {steps: 8, batch_size: 16}
generate: {prompts: 32, prompts_per_step: 8, num_generations: 4, accept: {}, keep_per_prompt: 0, reward_weights: {cells: 1}}
reward_model: {steps: 4, batch_size: 8}
rl: {steps: 6, prompts_per_step: 4, num_generations: 4, num_iterations: 2}
preference: {steps: 4, prompts_per_step: 4, num_generations: 4, reward_weights: {cells: 1}}
checkpoint_every: 2
evaluation: {batch_size: 16, every: 2}
compile_cache: programs
"""
WAYS = {"kill -9": 8, "SIGTERM": 1, "kill -9, newest checkpoint cut short": 1, "no room on the disk": 2}  # how often
LONGEST_SECONDS = 10.0
ENDS_WITHIN_SECONDS = 120.0  # where it cannot write
CODES = {  # with which a run may end; undisturbed with 0 alone
    "": (),
    "kill -9": (-signal.SIGKILL,),
    "kill -9, newest checkpoint cut short": (-signal.SIGKILL,),
    "SIGTERM": (128 + signal.SIGTERM, -signal.SIGTERM),  # the second before it listens
    "no room on the disk": (1,),
}


def command(run: Path) -> list[str]:
    return [sys.executable, "-m", "d1jax.train", "--config", "run.yaml", "--run_dir", run.name]


def disturbed(
    run: Path, folder: Path, chance: random.Random, counts: Counter[str], during: Counter[str], most: int
) -> int:
    """Starts the command and stops it, until it ends by itself; returns how often it was stopped. `counts` is told how, `during` where."""
    stopped = 0
    while True:
        # After so many times it is left alone, so that the count ends.
        seconds = chance.uniform(0, LONGEST_SECONDS) if sum(counts.values()) < most else None
        way, code, text = once(run, folder, seconds, chance)
        if code == 0:  # also one that was at its end when it was stopped
            return stopped
        if code not in CODES[way] or ("Traceback" in text and not way.startswith("kill")):
            raise SystemExit(
                f"{run.name} ended with {code} ({way or 'undisturbed'}) after {stopped} stops: {text[-3000:]}"
            )
        counts[way] += 1
        stopped += 1
        during[last_stage(run)] += 1
        if "cut short" in way:
            cut_newest(run, chance)


def once(run: Path, folder: Path, seconds: float | None, chance: random.Random) -> tuple[str, int, str]:
    """(the way in which the command was stopped after so many seconds of training, "" where it ended before; its code; what it said)."""
    # It speaks into a pipe, so that it can say why it ends where no file can be written.
    spoken = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    said: list[str] = []
    way = ""
    with subprocess.Popen(command(run), cwd=folder, **spoken) as running:
        try:
            reader = threading.Thread(target=said.extend, args=(running.stdout,), daemon=True)
            reader.start()
            while running.poll() is None and not any("settings from" in line for line in said):
                time.sleep(0.05)  # imports are no moment worth a kill
            with suppress(subprocess.TimeoutExpired):
                running.wait(seconds)
            if running.returncode is None:
                way = chance.choices(list(WAYS), list(WAYS.values()))[0]
                stop(running, way)
        except subprocess.TimeoutExpired:
            raise SystemExit(f"{run.name} goes on where it cannot write: {''.join(said)[-3000:]}") from None
        finally:
            running.kill()
        reader.join(ENDS_WITHIN_SECONDS)
        return way, running.wait(), "".join(said)


def stop(running: subprocess.Popen[str], way: str) -> None:
    """Ends the process in one of WAYS. Raises subprocess.TimeoutExpired where it does not end for want of room."""
    if "no room" not in way:
        running.send_signal(signal.SIGTERM if way == "SIGTERM" else signal.SIGKILL)
        running.wait()
        return
    with suppress(ProcessLookupError):  # it has just ended
        # No file may grow beyond 0 bytes: EFBIG, where a full disk says ENOSPC.
        most = resource.prlimit(running.pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(running.pid, resource.RLIMIT_FSIZE, (0, most))
    running.wait(ENDS_WITHIN_SECONDS)


def last_stage(run: Path) -> str:
    """The stage whose metrics came last."""
    rows = read_metrics(run / "metrics.jsonl")
    return rows[-1]["stage"] if rows else "before the first step"


def cut_newest(run: Path, chance: random.Random) -> None:
    """Takes the second half of a file of the newest checkpoint away, as a lost disk cache would."""
    steps = sorted((run / "checkpoints").glob("*/[0-9]*"), key=lambda path: path.stat().st_mtime)
    files = [path for path in steps[-1].rglob("*") if path.is_file() and path.stat().st_size > 1] if steps else []
    if files:
        victim = chance.choice(files)
        os.truncate(victim, victim.stat().st_size // 2)


def left_by(run: Path) -> dict[str, Any]:
    """What a run has left that must not depend on how often it was stopped."""
    found: dict[str, Any] = {
        "metrics": [
            {name: value for name, value in row.items() if not name.startswith("time/")}
            for row in read_metrics(run / "metrics.jsonl")
        ]
    }
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if name.startswith(("evaluations/", "generated/", "samples.jsonl", "data.json")) and path.is_file():
            found[name] = path.read_text()
        elif path.name == RECORD and path.parent.name.isdigit() and name.startswith("checkpoints/"):
            found[name] = json.loads(path.read_text())["custom_metadata"]["digests"]
        elif path.suffix == ".safetensors":
            found[name] = path.read_bytes()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "d1jax-chaos")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.folder.is_dir() and any(given.folder.iterdir()):
        if not (given.folder / "run.yaml").exists():
            raise SystemExit(
                f"{given.folder} holds something else than an earlier time of this; choose another --folder"
            )
        shutil.rmtree(given.folder)
    given.folder.mkdir(parents=True, exist_ok=True)
    (given.folder / "run.yaml").write_text(CONFIG)
    began = time.monotonic()
    subprocess.run(command(given.folder / "alone"), cwd=given.folder, check=True, capture_output=True)
    alone = left_by(given.folder / "alone")
    chance, counts, during, runs = random.Random(given.seed), Counter(), Counter(), []
    while sum(counts.values()) < given.kills:
        run = given.folder / f"run{len(runs)}"
        stopped = disturbed(run, given.folder, chance, counts, during, given.kills)
        found = left_by(run)
        # A stop leaves a checkpoint of a step that else has none.
        names = alone.keys() | {name for name in found if not name.startswith("checkpoints/")}
        different = sorted(name for name in names if alone.get(name) != found.get(name))
        runs.append({"stopped": stopped, "different": different})
        print(
            f"{run.name}: stopped {stopped} times; {len(alone) - len(different)} of {len(alone)} equal {different}",
            flush=True,
        )
        shutil.rmtree(run)
    result = {
        "stopped": dict(counts), "last_metrics_of": dict(during), "seed": given.seed, "compared": len(alone), "runs": runs,
        "minutes": round((time.monotonic() - began) / 60, 1), "jax": version("jax"), "python": sys.version.split()[0],
    }  # fmt: skip
    print(json.dumps({name: value for name, value in result.items() if name != "runs"}))
    if given.out:
        write_json(given.out, result)
    if any(one["different"] for one in runs):
        raise SystemExit("some runs differ from the one that was left alone")


if __name__ == "__main__":
    main()
