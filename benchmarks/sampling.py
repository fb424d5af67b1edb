"""Seconds, tokens per second and memory of sampling: d1jax against LLaDA's published decoding in PyTorch, and against itself.

    python benchmarks/sampling.py --out benchmarks/results/sampling_cpu.json
    python benchmarks/sampling.py --preset 8b --out benchmarks/results/sampling_h200.json     # one GPU; PyTorch takes no part

Speed depends on shapes only, so the weights are random; both sides have the same. Each side has a process of its own and works
only while the other waits. Within a group the settings alternate, and the median over the rounds is reported; the call before
them warms up. d1jax is compiled ahead of it, and that time is reported by itself.
"""

import argparse
import dataclasses
import importlib.metadata
import os
import platform
import statistics
import tempfile
from pathlib import Path

import limits
import numpy as np
from sampling_sides import PROGRAMS, Setting, Side, serve

import d1jax
from d1jax.config import ModelConfig
from d1jax.files import write_json

ROOT = Path(__file__).resolve().parents[1]
SMALL = ModelConfig(width=256, layers=6, heads=4, kv_heads=4, mlp_width=688, vocab_size=32000)
MODELS = {
    "cpu": lambda: SMALL,
    "8b": lambda: published("llada_8b"),
    "trial": lambda: ModelConfig(width=64, layers=2, heads=4, kv_heads=4, mlp_width=160, vocab_size=600),
}
MAIN = {
    "cpu": Setting(batch=4, prompt=128, new=128, steps=64, block=32),
    "8b": Setting(batch=1, prompt=128, new=256, steps=128, block=32),
    "trial": Setting(batch=2, prompt=8, new=32, steps=16, block=8),
}
BATCHES_8B = (1, 8, 64)
DISTURBED = 0.1  # CPUs. PyTorch's threads wait for each other: one busy neighbour on two cores can slow it seventyfold
TARGETS = {"exact": 4.0, "exact, T 0.9": 5.0, "dual cache": 3.0}  # times as fast


def published(name):
    """The architecture in configs/models."""
    import yaml

    fields = yaml.safe_load((ROOT / "configs" / "models" / f"{name}.yaml").read_text(encoding="utf-8"))
    # YAML 1.1 reads 5e5 as text.
    return ModelConfig(**{**fields, **{name: float(fields[name]) for name in ("rope_theta", "norm_eps")}})


class Bench:
    def __init__(self, config, sides, rounds, budget):
        self.config, self.sides, self.rounds, self.budget = config, sides, rounds, budget

    def group(self, cases):
        """Rows of [(side, setting), ...], called in turn; and what the last call of each gave.

        A case that has taken `budget` seconds is not called again; where its first call is the only one, that one counts.
        """
        seconds, others, last = {case: [] for case in cases}, {case: [] for case in cases}, {}
        for number in range(self.rounds + 1):
            for side, setting in cases:
                taken = seconds[side, setting]
                if number == 0 or sum(taken) < self.budget:
                    last[side, setting] = found = self.sides[side].call(setting)
                    taken.append(found["seconds"])
                    others[side, setting].append(found["cpus_others_used"])
        return [self.row(case, seconds[case], others[case], last[case]) for case in cases], last

    def row(self, case, taken, others, found):
        side, setting = case
        rounds = taken[1:] or taken
        median = statistics.median(rounds)
        row = {"side": side, "setting": str(setting), **dataclasses.asdict(setting)}
        row |= {"seconds": round(median, 4), "rounds": [round(s, 4) for s in rounds], "first_call": round(taken[0], 4)}
        row |= {name: found[name] for name in ("forward_passes", "over_windows")}
        row["tokens_per_second"] = round(setting.batch * setting.new / median, 1)
        row["peak_memory_GB"] = round(found["peak_memory_GB"], 3)
        row |= {name: found[name] for name in ("planned_memory_GB", "compile_seconds") if name in found}
        row["cpus_others_used"] = round(max(others[1:] or others), 2)
        if side == "d1jax" and setting.schedule == "even":
            flops = limits.sampling_flops(self.config, **setting.shapes())
            row["GFLOP_per_second"] = round(flops / median / 1e9, 1)
        print(
            f"{side:8} {row['setting']:48} {median:9.3f} s {row['tokens_per_second']:9.1f} tok/s "
            f"{row['forward_passes']:4} passes {row['peak_memory_GB']:7.2f} GB  "
            f"compiled in {row.get('compile_seconds', 0):5.1f} s  {row.get('GFLOP_per_second', ''):>9} GFLOP/s",
            flush=True,
        )
        if row["cpus_others_used"] > DISTURBED:
            print(f"  disturbed: other processes kept {row['cpus_others_used']} CPUs busy meanwhile", flush=True)
        return row


def compare(bench, main):
    """d1jax against PyTorch, and whether they did the same work."""
    rows, checks, ratios = [], [], {}
    for temperature, name in ((0.0, "exact"), (0.9, "exact, T 0.9")):
        setting = dataclasses.replace(main, temperature=temperature)
        cases = [("d1jax", setting), ("pytorch", setting)]
        made, last = bench.group(cases)
        ours, theirs = (last[case] for case in cases)
        check = {"temperature": temperature}
        check["equal_forward_passes"] = ours["forward_passes"] == theirs["forward_passes"]
        check["equal_commits_per_step"] = np.array_equal(ours["unmasked_BK"], theirs["unmasked_BK"])
        if temperature == 0:
            check["share_of_equal_tokens"] = round(float((ours["tokens_BC"] == theirs["tokens_BC"]).mean()), 4)
        print(f"  the same work? {check}", flush=True)
        rows, checks = rows + made, checks + [check]
        ratios[name] = made[1]["seconds"] / made[0]["seconds"]
    return {"comparison": rows, "same_work": checks}, ratios


def caches(bench, main):
    """Caches with threshold decoding, against exact decoding in as many steps as the dual cache took passes."""
    dual, prefix = (dataclasses.replace(main, cache=cache, schedule="threshold") for cache in ("dual", "prefix"))
    passes = bench.sides["d1jax"].call(dual)["forward_passes"]
    blocks = main.new // main.block
    exact = dataclasses.replace(main, steps=min(main.new, -(-passes // blocks) * blocks))  # a multiple of the blocks
    rows, _ = bench.group([("d1jax", setting) for setting in (exact, prefix, dual)])
    ratios = {PROGRAMS[row["cache"]]: rows[0]["seconds"] / row["seconds"] for row in rows[1:]}
    return {"caches_at_equal_tokens_per_step": rows}, ratios


def sweep(bench, main):
    """One factor at a time. The cost grows linearly where GFLOP_per_second stays the same."""
    factors = {
        "batch": (main.batch // 4, main.batch // 2, main.batch, main.batch * 2),
        "new": (main.new // 2, main.new, main.new * 2),
        "steps": (main.steps // 2, main.steps, main.steps * 2),
        "cache": ("none", "prefix", "dual"),
    }
    settings = {name: [dataclasses.replace(main, **{name: v}) for v in vs if v] for name, vs in factors.items()}
    every = dict.fromkeys(setting for along in settings.values() for setting in along)
    rows, _ = bench.group([("d1jax", setting) for setting in every])
    by_setting = dict(zip(every, rows, strict=True))
    growth = {}
    for name in ("batch", "new", "steps"):
        first, *_, last = settings[name]
        work = [limits.sampling_flops(bench.config, **setting.shapes()) for setting in (first, last)]
        seconds = [by_setting[setting]["seconds"] for setting in (first, last)]
        growth[name] = {"from": getattr(first, name), "to": getattr(last, name)}
        growth[name] |= {"times_the_operations": round(work[1] / work[0], 2)}
        growth[name] |= {"times_the_seconds": round(seconds[1] / seconds[0], 2)}
        print(f"  growth with {name}: {growth[name]}", flush=True)
    along_each = {name: [by_setting[setting] for setting in along] for name, along in settings.items()}
    return {"growth": growth, "sweep": along_each}


def against_limits(bench, main, batch):
    """Exact decoding and the dual cache, with the time below which no sampler can come on an H200."""
    settings = [dataclasses.replace(main, batch=batch, cache=cache) for cache in ("none", "dual")]
    rows, _ = bench.group([("d1jax", setting) for setting in settings])
    for setting, row in zip(settings, rows, strict=True):
        least = limits.sampling_seconds(bench.config, **setting.shapes())
        row["limit_seconds"] = float(f"{least:.4g}")
        row["limit_tokens_per_second"] = round(setting.batch * setting.new / least, 1)
        row["fraction_of_limit"] = round(least / row["seconds"], 3)
        print(
            f"  {row['setting']:48} H200 limit {least:8.3f} s {row['limit_tokens_per_second']:9.1f} tok/s; "
            f"reached {row['fraction_of_limit']:.1%}",
            flush=True,
        )
    return rows


def environment(sides):
    versions = {}
    for name in ("jax", "jaxlib", "torch", "transformers"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    machine = {"python": platform.python_version(), "platform": platform.platform(), "cpus": os.cpu_count()}
    return {"d1jax": d1jax.__version__, **versions, **machine, **{name: side.device for name, side in sides.items()}}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--preset", choices=MODELS, default="cpu", help="trial: tiny sizes, every part, no figure of use"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES_8B, help="of the preset 8b")
    parser.add_argument("--layers", type=int, help="fewer for a trial of the preset 8b")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    config, setting = MODELS[arguments.preset](), MAIN[arguments.preset]
    if arguments.layers:
        config = dataclasses.replace(config, layers=arguments.layers)
    on_gpu, trial = arguments.preset == "8b", arguments.preset == "trial"
    with tempfile.TemporaryDirectory() as folder:
        names = ["d1jax"] if on_gpu else ["d1jax", "pytorch"]
        sides = {name: Side(serve, name, config, folder, len(names) > 1) for name in names}
    bench = Bench(config, sides, arguments.rounds, budget=60 if on_gpu else float("inf"))
    parameters = limits.body_parameters(config) + 2 * limits.head_parameters(config)
    result = {
        "environment": environment(sides),
        "model": {**dataclasses.asdict(config), "million_parameters": round(parameters / 1e6, 1)},
        "rounds": arguments.rounds,
        "main_setting": dataclasses.asdict(setting),
    }

    def add(found):  # at once: a run that is cut short keeps what it has
        result.update(found)
        write_json(arguments.out, result)

    if not on_gpu:
        compared, ratios = compare(bench, setting)
        add(compared)
        cached, cache_ratios = caches(bench, setting)
        ratios |= cache_ratios
        add(cached)
        targets = [
            {"what": name, "times_as_fast": round(ratio, 2), "target": TARGETS.get(name)}
            | ({"met": ratio >= TARGETS[name]} if name in TARGETS else {})
            for name, ratio in ratios.items()
        ]
        for target in targets:
            print(f"  {target}", flush=True)
        add({"targets": targets})
        add(sweep(bench, setting))
    if on_gpu or trial:
        rows = []
        for batch in arguments.batches if on_gpu else (1, 2):
            rows += against_limits(bench, setting, batch)
            add({"against_the_limits_of_an_H200": rows})
    for side in sides.values():
        side.close()


if __name__ == "__main__":
    main()
