"""Seconds and memory of one diffu-GRPO update batch (mu = 4): d1jax's compiled update against the same arithmetic in PyTorch.

    python benchmarks/update.py --out benchmarks/results/update_cpu.json
    python benchmarks/update.py --preset tiny --rounds 2 --out update.json     # seconds; every part, no figure of use

16 prompts x 6 completions, 128 + 128 tokens, 21 million parameters, vocabulary 32,000, fp32. Under each of the four masks the reference
is scored (KL 0.04) and the old policy, then come four updates: ratio, clip, k3, mean over tokens, gradient clip, AdamW. PyTorch
runs once as d1's code does, and once without the old policy's first score, which d1jax leaves out because it is the policy's own.

d1jax runs also with one prompt mask a problem, its default, where one pass scores the completions of a problem; PyTorch has no such path,
and its time does not depend on the masks. With --iteration each side also samples the batch (d1: blocks of 32, two tokens a step, T 0.9).

Both sides have the same weights, masks and threads. Each has a process of its own and works only while the other waits. Nothing is timed
before both gave the same loss and gradient norm for the first inner update. Each side then picks its number of micro-batches
on one inner update; rounds of the whole batch alternate, every call from the same start, and the median is reported.
"""

import argparse
import dataclasses
import statistics
import tempfile
from pathlib import Path

import limits
from sampling import DISTURBED, SMALL
from sampling_sides import Side
from update_sides import Call, Setting, serve

from d1jax.config import ModelConfig
from d1jax.files import write_json

SETTINGS = {
    "cpu": Setting(SMALL, prompts=16, prompt=128, completion=128),
    "tiny": Setting(
        ModelConfig(width=32, layers=2, heads=4, kv_heads=4, mlp_width=80, vocab_size=600),
        prompts=4, prompt=8, completion=16, block=8, matmul=256,
    ),
}  # fmt: skip
MICRO_BATCHES = {"cpu": (3, 6, 12, 24), "tiny": (1, 2, 4)}
LEFT_OUT = "pytorch, first old score left out"
VARIANTS = {  # (side, what its calls change)
    "d1jax": ("d1jax", {"first_old": False}),
    "d1jax, one prompt mask a problem": ("d1jax", {"first_old": False, "shared": True}),
    "pytorch": ("pytorch", {}),
    LEFT_OUT: ("pytorch", {"first_old": False}),
}
TOLERANCE = 1e-3  # relative, of loss and gradient norm
PREDICTION = (  # written before the first run at this size
    "19 forward passes' worth of matrix products (reference 4, old 3, updates 4 x 3) are 9.0 TFLOP; PyTorch does 20. d1jax computes the "
    "logits of the updates twice (another 0.8 TFLOP), and the entropy of every prediction, which PyTorch is spared. The sampler "
    "reached 120 to 142 GFLOP/s on this machine; with a backward pass, and a softmax over 32,000 for every position, 100 to 120 are "
    "expected, so d1jax: 75 to 95 s. PyTorch's matrix products are as fast, but it writes logits, log_softmax and their gradients to "
    "fresh memory, 1.6 GB each for every inner update, and the first two for every score: 1.1 to 1.6 times d1jax's time, most likely "
    "1.3; 5 % less without the first old score. Memory: PyTorch's grows with the rows of a micro-batch, d1jax's logits do not."
    " With one prompt mask a problem one pass serves six completions: a sixth of the products, so at most 6 times d1jax's own time with "
    "a mask a row; 4 to 5.5 are expected, because the optimizer and the small batches of 4 problems stay. An iteration: PyTorch samples at "
    "T 0.9 in 20 times d1jax's time, so the rollout decides, and 10 to 20 are expected."
)


class Disagreement(SystemExit):
    """The two sides do not compute the same, so there is nothing to compare."""


def apart(ours, theirs):
    return abs(ours - theirs) / max(abs(theirs), 1e-12)


def agreement(ours, theirs, updates=1):
    """The largest relative difference of losses and of gradient norms over the first inner updates."""
    return {
        f"{name}_apart": max(apart(*pair) for pair in zip(ours[name][:updates], theirs[name][:updates], strict=True))
        for name in ("losses", "gradient_norms")
    }


def check(sides, micro_batches):
    """Refuses to go on where the first inner update differs."""
    call = Call(micro_batches, 1, first_old=False)
    ours, theirs = sides["d1jax"].call(call), sides["pytorch"].call(call)
    found = {
        "tolerance": TOLERANCE,
        "d1jax": {"loss": ours["losses"][0], "gradient_norm": ours["gradient_norms"][0]},
        "pytorch": {"loss": theirs["losses"][0], "gradient_norm": theirs["gradient_norms"][0]},
        **agreement(ours, theirs),
    }
    print(f"  the same first inner update? {found}", flush=True)
    if not max(found["losses_apart"], found["gradient_norms_apart"]) <= TOLERANCE:  # NaN too
        raise Disagreement(f"benchmarks/update.py: not timed, because the sides disagree: {found}")
    return found


def choose(sides, options, prompts):
    """{variant: best number of micro-batches}, and the seconds of one inner update (with its reference score): the faster of two."""
    rows, best = [], {}
    for name, (side, changes) in VARIANTS.items():
        if name == LEFT_OUT:  # one inner update is alike with and without it
            best[name] = best["pytorch"]
            continue
        seconds = {}
        for parts in options:
            if changes.get("shared") and prompts % parts:
                continue
            found = [sides[side].call(Call(parts, 1, **{**changes, "first_old": False})) for _ in range(2)]
            seconds[parts] = min(one["seconds"] for one in found)
            memory = round(found[-1]["peak_memory_GB"], 3)
            rows.append(
                {"side": name, "micro_batches": parts, "seconds": round(seconds[parts], 4), "peak_memory_GB": memory}
            )
            print(f"  {rows[-1]}", flush=True)
        best[name] = min(seconds, key=seconds.get)
    return best, rows


def rounds(sides, setting, best, count):
    """Rows of the variants, called in turn; the call before the rounds warms up."""
    found = {name: [] for name in VARIANTS}
    for _ in range(count + 1):
        for name, (side, changes) in VARIANTS.items():
            found[name].append(sides[side].call(Call(best[name], setting.inner_updates, **changes)))
            print(f"  {name:34} {found[name][-1]['seconds']:9.3f} s", flush=True)
    rows = []
    for name, (side, changes) in VARIANTS.items():
        first, *timed = found[name]
        seconds = [one["seconds"] for one in timed]
        scorings = 2 * setting.inner_updates - (not changes.get("first_old", True))
        passed = setting.prompts if changes.get("shared") else setting.rows
        flops = limits.update_flops(
            setting.model, passed, setting.prompt, setting.completion, setting.inner_updates, scorings
        )
        median, least = statistics.median(seconds), flops / sides[side].device["matmul_GFLOP_per_second"] / 1e9
        row = {"side": name, "micro_batches": best[name], "seconds": round(median, 4)}
        row |= {"rounds": [round(s, 4) for s in seconds], "first_call": round(first["seconds"], 4)}
        row |= {"peak_memory_GB": round(max(one["peak_memory_GB"] for one in timed), 3)}
        row |= {key: first[key] for key in ("planned_memory_GB", "compile_seconds") if key in first}
        row |= {"TFLOP": round(flops / 1e12, 4), "GFLOP_per_second": round(flops / median / 1e9, 1)}
        row |= {"limit_seconds": round(least, 4), "fraction_of_limit": round(least / median, 3)}
        row |= {"losses": first["losses"], "gradient_norms": first["gradient_norms"]}
        row["cpus_others_used"] = round(max(one["cpus_others_used"] for one in timed), 2)
        if row["cpus_others_used"] > DISTURBED:
            print(f"  disturbed: other processes kept {row['cpus_others_used']} CPUs busy meanwhile", flush=True)
        rows.append(row)
    return rows


def compare(rows, updates):
    """PyTorch's rows against d1jax's, of the same masks; and against one pass a problem, where the masks of its completions are one."""
    ours, shared, *others = rows
    return [
        {
            "against": theirs["side"],
            "times_as_fast_with_one_prompt_mask_a_problem": round(theirs["seconds"] / shared["seconds"], 3),
            "times_as_fast": round(theirs["seconds"] / ours["seconds"], 3),
            "of_each_round": [round(b / a, 3) for a, b in zip(ours["rounds"], theirs["rounds"], strict=True)],
            "times_the_memory": round(theirs["peak_memory_GB"] / ours["peak_memory_GB"], 2),
            **{f"{key}_over_all_updates": value for key, value in agreement(ours, theirs, updates).items()},
        }
        for theirs in others
    ]


def iteration(sides, rows):
    """One call of each side's rollout, after one that warms up where that is cheap; and what a rollout and an update take together."""
    call = Call(1, 0, sampled=True)
    sides["d1jax"].call(call)
    seconds = {name: round(side.call(call)["seconds"], 3) for name, side in sides.items()}
    whole = {row["side"]: seconds[VARIANTS[row["side"]][0]] + row["seconds"] for row in rows}
    return {
        "rollout_seconds": seconds,
        "rollout_times_as_fast": round(seconds["pytorch"] / seconds["d1jax"], 2),
        "seconds": {name: round(value, 3) for name, value in whole.items()},
        "times_as_fast": {name: round(whole["pytorch"] / value, 2) for name, value in whole.items()},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=SETTINGS, default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of each side")
    parser.add_argument("--prompts", type=int, help="other than the preset's")
    parser.add_argument("--micro_batches", type=int, nargs="+", help="numbers of parts to choose from")
    parser.add_argument(
        "--iteration", action="store_true", help="also one rollout of each side, which takes PyTorch minutes"
    )
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    changes = {"threads": arguments.threads, "prompts": arguments.prompts or SETTINGS[arguments.preset].prompts}
    setting = dataclasses.replace(SETTINGS[arguments.preset], **changes)
    options = arguments.micro_batches or MICRO_BATCHES[arguments.preset]
    if any(setting.rows % parts for parts in options):
        parser.error(f"--micro_batches {options} do not all divide {setting.rows} completions")
    with tempfile.TemporaryDirectory() as folder:
        sides = {name: Side(serve, name, setting, folder) for name in ("d1jax", "pytorch")}
    parameters = limits.body_parameters(setting.model) + 2 * limits.head_parameters(setting.model)
    result = {
        "prediction": PREDICTION,
        "environment": {name: value for side in sides.values() for name, value in side.device["environment"].items()},
        "setting": {
            **dataclasses.asdict(setting), "rows": setting.rows, "million_parameters": round(parameters / 1e6, 1),
            "rl": dataclasses.asdict(setting.rl()), "rounds": arguments.rounds, "micro_batches": list(options),
        },
        "matmul_GFLOP_per_second": {name: side.device["matmul_GFLOP_per_second"] for name, side in sides.items()},
    }  # fmt: skip
    print(f"  matrix products, GFLOP/s: {result['matmul_GFLOP_per_second']}", flush=True)

    def add(found):  # at once: a run that is cut short keeps what it has
        result.update(found)
        write_json(arguments.out, result)

    add({"same_first_inner_update": check(sides, options[-1])})
    best, choices = choose(sides, options, setting.prompts)
    add({"seconds_of_one_inner_update": choices})
    rows = rounds(sides, setting, best, arguments.rounds)
    add({"updates": rows, "comparison": compare(rows, setting.inner_updates)})
    for row in rows:
        print(
            f"  {row['side']:34} {row['seconds']:9.3f} s  {row['peak_memory_GB']:6.2f} GB  {row['GFLOP_per_second']:7.1f} GFLOP/s  "
            f"{row['fraction_of_limit']:.0%} of the limit",
            flush=True,
        )
    for line in result["comparison"]:
        print(f"  {line}", flush=True)
    if arguments.iteration:
        add({"iteration": iteration(sides, rows)})
        print(f"  {result['iteration']}", flush=True)
    for side in sides.values():
        side.close()


if __name__ == "__main__":
    main()
