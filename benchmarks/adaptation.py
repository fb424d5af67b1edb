"""A small autoregressive model made into a diffusion model, against diffusion models from random weights: bits per byte.

    python benchmarks/adaptation.py --out benchmarks/results/adaptation_cpu.json --work runs/adaptation
    python benchmarks/adaptation.py --out out.json --work runs/tiny --size tiny --seeds 1    # two minutes, no figure of use

The text is Python's own standard library (the files of this interpreter, without its tests): 95 % of the files are learnt from, 5 % are
held out. A byte-level BPE of 2,048 tokens is made of the first. For every seed an autoregressive model is trained, and then, each for as
many tokens: that model adapted with the mask opened at once or step by step, with shifted logits or not; and the same architecture as a
diffusion model from random weights, with shifted logits or not. `long` is one from random weights that sees as many tokens as the
autoregressive model and its adaptation together.

Every run is a run directory under --work: the same command goes on where it was stopped.
"""

import argparse
import json
import random
import statistics
import sysconfig
from pathlib import Path

import jax
from sampling import environment

from d1jax import train
from d1jax.config.parse import parse
from d1jax.files import write_json
from d1jax.telemetry.metrics import read_metrics

SIZES = {
    "cpu": {
        "model": dict(width=192, layers=6, heads=6, kv_heads=6, mlp_width=512),
        "batch": 24, "length": 128, "causal": 240, "adapted": 80, "vocabulary": 2048, "windows": 96, "every": 20,
    },
    "tiny": {
        "model": dict(width=16, layers=1, heads=2, kv_heads=2, mlp_width=32),
        "batch": 8, "length": 32, "causal": 4, "adapted": 4, "vocabulary": 300, "windows": 8, "every": 2,
    },
}  # fmt: skip
ARCHITECTURE = dict(qkv_bias=True, rope_full_precision=False, rope_theta=10000.0)
PREDICTION = (  # written before the first run at this size
    "Adapted beats random weights at equal tokens by 0.3 to 0.6 bits per byte, because 250,000 tokens teach a model of 3 million weights "
    "little more than the frequencies of pairs. Shifted beats same_position after few tokens, since the last layers need no new wiring. "
    "Opening the mask step by step helps by less than 0.05. The long run from random weights ends between the two."
)


def corpus(work, share=0.05):
    """Writes learnt.jsonl and held_out.jsonl: files of the standard library, held out by a draw of seed 0. Returns their bytes."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    skipped = ("test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "pydoc_data", "idlelib")
    files = [path for path in sorted(folder.rglob("*.py")) if not set(skipped) & set(path.relative_to(folder).parts)]
    texts = []
    for path in files:
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
    random.Random(0).shuffle(texts)
    cut = max(1, round(share * len(texts)))
    parts = {"held_out": texts[:cut], "learnt": texts[cut:]}
    for name, chosen in parts.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in chosen)
        (work / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return {name: sum(len(text.encode()) for text in chosen) for name, chosen in parts.items()}


def make_tokenizer(work, size):
    """A byte-level BPE of what is learnt, with an end and a mask token, as a directory of transformers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>", "<|mask|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = (work / "learnt.jsonl").read_text(encoding="utf-8").splitlines()
    tokenizer.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
    out = work / "tokenizer"
    out.mkdir(exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    names = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "mask_token": "<|mask|>"}
    write_json(out / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})
    return out


def run(work, name, size, seed, steps, init_from=None, **more):
    """The bits per byte of one run, and its curve."""
    run_dir = work / f"{name}_{seed}"
    model = {} if init_from else {**size["model"], **ARCHITECTURE}
    samples = {} if more.get("model.attention_mask") == "causal" else {"adapt.validation_samples": 4}
    settings = {
        "run_dir": run_dir, "stages": "[adapt]", "seed": seed, "checkpoint_every": 1000, "evaluation.every": size["every"],
        **{f"model.{key}": value for key, value in model.items()},
        **({"init_from": init_from} if init_from else {"tokenizer": work / "tokenizer"}),
        "adapt.data": f"{{{work / 'learnt.jsonl'}: 1}}", "adapt.validation": f"{{held_out: {work / 'held_out.jsonl'}}}",
        "adapt.length": size["length"], "adapt.batch_size": size["batch"], "adapt.steps": steps,
        "adapt.validation_windows": size["windows"], **samples, "adapt.optimizer.learning_rate": 1e-3,
        "adapt.optimizer.warmup_steps": min(20, steps // 2), **more,
    }  # fmt: skip
    texts = train.run(parse([f"--{key}={value}" for key, value in settings.items()]))["texts"]["adapt"]
    curve = [
        {"tokens": row["tokens"], "bits_per_byte": row["validation/held_out/bits_per_byte"]}
        for row in read_metrics(run_dir / "metrics.jsonl")
        if "validation/held_out/bits_per_byte" in row
    ]
    before, after = (texts[when]["sets"]["held_out"] for when in ("before", "after"))
    return {"name": name, "seed": seed, "by": texts["after"]["by"], "before": before, "after": after, "curve": curve}


def one_seed(work, size, seed):
    """Every run of a seed."""
    causal, adapted = size["causal"], size["adapted"]
    yield run(
        work, "autoregressive", size, seed, causal, **{"model.attention_mask": "causal", "model.alignment": "shifted"}
    )
    source = work / f"autoregressive_{seed}"
    for alignment in ("shifted", "same_position"):
        chosen = {} if alignment == "same_position" else {"model.alignment": alignment}
        for name, steps in (("at_once", 0), ("annealed", adapted // 2)):
            more = {"adapt.anneal_steps": steps, **chosen}
            yield run(work, f"adapted_{alignment}_{name}", size, seed, adapted, source, **more)
        yield run(work, f"scratch_{alignment}", size, seed, adapted, **chosen)
    yield run(work, "long_same_position", size, seed, causal + adapted)


def summary(rows):
    """{name: mean and standard deviation over seeds of the bits per byte at the end}."""
    found = {}
    for name in dict.fromkeys(row["name"] for row in rows):
        values = [row["after"]["bits_per_byte"] for row in rows if row["name"] == name]
        spread = statistics.stdev(values) if len(values) > 1 else None
        found[name] = {
            "mean": round(statistics.mean(values), 4),
            "sd": spread and round(spread, 4),
            "seeds": len(values),
        }
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="where the text, the tokenizer and the runs go")
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    work, size = arguments.work.absolute(), SIZES[arguments.size]
    work.mkdir(parents=True, exist_ok=True)
    sizes = corpus(work)
    if not (work / "tokenizer").is_dir():
        make_tokenizer(work, size["vocabulary"])
    result = {
        "environment": {**environment({}), "device": str(jax.devices()[0])},
        "size": size, "bytes": sizes, "prediction": PREDICTION, "runs": [],
    }  # fmt: skip
    for seed in range(arguments.seeds):
        for row in one_seed(work, size, seed):
            result["runs"].append(row)
            result["bits_per_byte"] = summary(result["runs"])
            write_json(arguments.out, result)  # at once: a run that is cut short keeps what it has
            print(
                f"{row['name']:32} seed {seed}  {row['after']['bits_per_byte']:.4f} ± {row['after']['error']:.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
