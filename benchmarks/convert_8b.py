"""Conversion at real size: a random checkpoint of LLaDA-8B's shape, to d1jax's form and back, with time and peak memory.

    python benchmarks/convert_8b.py --folder /path/with/50GB --out benchmarks/results/convert_8b.json

Physical limit: each direction reads 16.0 GB and writes 16.0 GB, so at the disk's speed (measured first, by writing the
checkpoint) neither can take less than reading plus writing; memory is at least the model's own 16.0 GB on a CPU device.
The bits are random, NaNs of every kind among them: what survives is every bit, not every number.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from d1jax.config import ModelConfig
from d1jax.files import write_json
from d1jax.models.families import FAMILIES, write_config
from d1jax.weights.names import expected_shapes, parameter_count

LLADA_8B = ModelConfig(
    width=4096, layers=32, heads=32, kv_heads=32, mlp_width=12288, vocab_size=126464, max_positions=4096,
    rope_theta=5e5, norm_eps=1e-5, param_dtype="bfloat16",
)  # fmt: skip
SHARDS = 6
TOOL = Path(__file__).resolve().parents[1] / "tools" / "convert_weights.py"


def write_random(config: ModelConfig, out: Path) -> None:
    """Six shards and their index, every bit random."""
    family, rng = FAMILIES["llada"], np.random.default_rng(0)
    shapes = expected_shapes(config, family)
    ids = {"mask_token_id": 126336, "eos_token_id": 126081, "pad_token_id": 126081}
    out.mkdir(parents=True)
    write_json(out / "config.json", write_config(config, ids))
    names, weight_map = sorted(shapes), {}
    for index in range(SHARDS):
        file = f"model-{index + 1:05d}-of-{SHARDS:05d}.safetensors"
        part = names[index * len(names) // SHARDS : (index + 1) * len(names) // SHARDS]
        tensors = {
            name: np.frombuffer(rng.bytes(2 * int(np.prod(shapes[name]))), ml_dtypes.bfloat16).reshape(shapes[name])
            for name in part
        }
        save_file(tensors, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    write_json(out / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def measured(label: str, program: Path, *arguments: object) -> dict[str, object]:
    """Runs a program; seconds, and the peak resident memory of its process."""
    command = [sys.executable, str(program), *map(str, arguments)]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    said = process.stdout.read() if process.stdout else ""
    _, status, usage = os.wait4(process.pid, 0)
    row = {
        "step": label,
        "seconds": round(time.perf_counter() - began, 1),
        "peak_memory_GB": round(usage.ru_maxrss * 1024 / 1e9, 2),
        "exit_code": os.waitstatus_to_exitcode(status),
        "said": said.strip().splitlines()[-1] if said.strip() else "",
    }
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, required=True, help="scratch folder; 50 GB are written and removed again"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/convert_8b.json"))
    parser.add_argument("--layers", type=int, default=LLADA_8B.layers, help="fewer for a trial")
    parser.add_argument("--write-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    config = ModelConfig(**{**vars(LLADA_8B), "layers": arguments.layers})
    if arguments.write_only:
        return write_random(config, arguments.folder)
    scratch = arguments.folder / "d1jax-convert-8b"
    source, native, back = scratch / "source", scratch / "native", scratch / "back"
    scratch.mkdir(parents=True)
    try:
        # In a process of its own: a child's peak begins with what its parent holds.
        writer = (Path(__file__), "--write-only", "--layers", config.layers, "--folder", source)
        rows = [measured("write the random checkpoint", *writer)]
        largest = max(file.stat().st_size for file in source.glob("*.safetensors")) / 1e9
        rows.append(measured("to-orbax", TOOL, "to-orbax", source, native))
        rows.append(measured("to-hf", TOOL, "to-hf", native, back))
        rows.append(measured("verify", TOOL, "verify", source, back))
        rows = [{**row, "said": str(row["said"]).replace(f"{scratch}/", "")} for row in rows]
    finally:
        shutil.rmtree(scratch)
    size = parameter_count(config) * 2 / 1e9
    result = {
        "checkpoint": {"parameters": parameter_count(config), "GB": round(size, 2), "shards": SHARDS},
        "memory_target_GB": round(size + 1.25 * largest, 2),  # the model on its device and 1.25 of the largest shard
        "environment": {
            "machine": platform.platform(), "cpus": os.cpu_count(), "python": platform.python_version(), "jax": jax.__version__
        },
        "rows": rows,
    }  # fmt: skip
    write_json(arguments.out, result)
    print(json.dumps(result, indent=2))
    sys.exit(any(row["exit_code"] for row in rows))


if __name__ == "__main__":
    main()
