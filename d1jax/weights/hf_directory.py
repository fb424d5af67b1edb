"""A checkpoint directory: config.json, tokenizer files, and weights in one of two forms.

*.safetensors   as Hugging Face writes them, in one file or in shards with an index
params/         d1jax's own tree, written by Orbax

Everything is checked here from the headers alone, before a tensor is read. Nothing in a directory is executed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from d1jax.config import ModelConfig, UserError
from d1jax.files import distinct
from d1jax.models.config_json import read_config
from d1jax.models.families import family_of
from d1jax.models.family import Family
from d1jax.weights.arrays import stored_array
from d1jax.weights.names import MANY_LAYERS, Entry, check_tensors, entries, our_shape

INDEX, SINGLE, NATIVE = "model.safetensors.index.json", "model.safetensors", "params"
IGNORED = ".rotary_emb.inv_freq"  # of early Llama checkpoints: what follows from rope_theta
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf")
PROBE, PROBE_EVERY, PROBE_ALL = 2**12, 2**20, 2**26  # files up to PROBE_ALL are hashed whole
COMPANIONS = (".json", ".py", ".txt", ".jinja", ".model", ".tiktoken")  # configuration, remote code, tokenizer


class Tensor(NamedTuple):
    """What a safetensors header says of a tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    published: Mapping[str, Any]  # config.json
    family: Family
    config: ModelConfig  # param_dtype is the stored dtype
    tensors: Mapping[str, Tensor]  # empty in the native form

    @property
    def native(self) -> bool:
        return not self.tensors

    @property
    def files(self) -> list[Path]:
        """The files that hold the weights."""
        if self.native:
            return sorted(file for file in (self.path / NATIVE).rglob("*") if file.is_file())
        return sorted({tensor.file for tensor in self.tensors.values()})


def is_checkpoint(path: Path) -> bool:
    return os.path.isfile(path / "config.json")  # False also for a name that no file can have


def open_checkpoint(path: str | Path) -> Checkpoint:
    """What a directory holds, checked against the architecture that its config.json describes. No tensor is read.

    Raises UserError: no such directory, no config.json, an unknown architecture, a missing or broken file, tensors that are
    missing, unexpected, twice there, of a wrong shape or of mixed dtypes.
    """
    path = Path(path)
    if not os.path.isdir(path):
        raise UserError(f"checkpoint {str(path)!r}: no such directory")
    if not is_checkpoint(path):
        raise UserError(f"checkpoint {str(path)!r}: has no config.json; name the directory that holds it")
    where = str(path / "config.json")
    published = read_json(path / "config.json")
    family, config = family_of(published, where), read_config(published, where)
    if (path / NATIVE).is_dir():
        stored = _native_tensors(path, config, family)
        return Checkpoint(path, published, family, _with_dtype(config, _one_dtype(stored)), {})
    tensors = _tensors(path)
    check_tensors({name: tensor.shape for name, tensor in tensors.items()}, config, family, f"checkpoint {str(path)!r}")
    return Checkpoint(path, published, family, _with_dtype(config, _one_dtype(tensors)), tensors)


def fingerprint(checkpoint: Checkpoint) -> dict[str, str]:
    """{file: hash of its size and of four kilobytes in every megabyte}: tells weights apart in a second, not in minutes."""

    def of(file: Path) -> str:
        size = file.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        with open(file, "rb") as stream:
            for start in range(0, size, PROBE_EVERY if size > PROBE_ALL else PROBE):
                stream.seek(start)
                digest.update(stream.read(PROBE))
        return digest.hexdigest()

    return {str(file.relative_to(checkpoint.path)): of(file) for file in checkpoint.files}


def copy_companions(source: Path, out: Path, dtype: str | None = None) -> None:
    """Copies what is not weights: configuration, tokenizer, remote code, licence. `dtype` is put into config.json where given.

    Model cards stay behind, because they describe other weights.
    """
    for file in sorted(source.iterdir()):
        wanted = file.suffix in COMPANIONS or file.stem.upper() in ("LICENSE", "NOTICE")
        if file.is_file() and wanted and not file.name.endswith(".index.json"):
            _check_link(file, source)
            shutil.copyfile(file, out / file.name)  # the contents: the hub's cache holds links
    if dtype is not None:
        published = read_json(source / "config.json")
        changed = [name for name in ("torch_dtype", "dtype") if published.get(name, dtype) != dtype]
        if changed:  # an unchanged file stays the same to the byte
            text = json.dumps({**published, **dict.fromkeys(changed, dtype)}, indent=2, ensure_ascii=False)
            (out / "config.json").write_text(text + "\n", encoding="utf-8")


def _check_link(file: Path, source: Path) -> None:
    """Raises UserError for a link out of the checkpoint: what it points at may be nobody's to pass on.

    The hub's cache is a folder of links, snapshots/REVISION/FILE, to contents in the blobs/ beside snapshots/.
    """
    target, home = file.resolve(), source.resolve()
    blobs = home.parent.parent / "blobs"
    if target.is_relative_to(home) or (home.parent.name == "snapshots" and target.parent == blobs):
        return
    raise UserError(f"{file}: links to {target}, outside of the checkpoint; put the file itself there, or remove it")


# -- reading headers ----------------------------------------------------------------------------------------------------


def headers(file: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file. Raises UserError where it is truncated or not one."""
    try:
        with safe_open(file, framework="numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}
            read = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
            return {
                name: Tensor(file, shape, DTYPES.get(dtype, dtype))
                for name, (shape, dtype) in read.items()
                if not name.endswith(IGNORED)
            }
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file}: not a whole safetensors file ({error}); it was cut off or changed, so download it again"
        ) from None


def _tensors(path: Path) -> dict[str, Tensor]:
    if not (path / INDEX).is_file():
        if (path / SINGLE).is_file():
            return headers(path / SINGLE)
        others = sorted(file.name for file in path.iterdir() if file.suffix in WEIGHTS)
        found = f"; it has {', '.join(others[:4])}" if others else ""
        raise UserError(f"checkpoint {str(path)!r}: has neither {SINGLE} nor {INDEX} nor {NATIVE}/{found}")
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(x, str) for x in weight_map.values()):
        raise UserError(f"{path / INDEX}: has no weight_map from tensors to files")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or not (path / name).is_file():
            owner = next(tensor for tensor, file in weight_map.items() if file == name)
            raise UserError(f"{path / INDEX}: names shard {name!r} (of tensor {owner}), which is not there")
        shard = headers(path / name)
        twice = sorted(shard.keys() & tensors.keys())
        if twice:
            first = tensors[twice[0]].file.name
            raise UserError(f"checkpoint {str(path)!r}: tensor {twice[0]} is both in {first} and in {name}")
        tensors |= shard
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            raise UserError(f"{path / INDEX}: says that tensor {name} is in {file}, which does not hold it")
    return tensors


def native_directory(path: Path, entry: Entry) -> Path:
    """Where the native form keeps an array of the tree."""
    return path / NATIVE / ".".join(entry.path)


def _native_tensors(path: Path, config: ModelConfig, family: Family) -> dict[str, Tensor]:
    """What Orbax has stored, under the names of our tree."""
    found = {directory for directory in (path / NATIVE).iterdir() if not directory.name.startswith(".")}
    layers = next((_stored(directory)[0][0] for directory in sorted(found) if directory.name.startswith("blocks.")), 0)
    if config.layers > max(layers, MANY_LAYERS):  # before as many names are made
        raise UserError(
            f"{path / NATIVE}: holds {layers} layers, config.json says {family.fields['layers']} = {config.layers}"
        )
    expected = {native_directory(path, entry): our_shape(entry) for entry in entries(config, family)}
    for directory in sorted(expected.keys() ^ found):
        what = "is missing" if directory in expected else "is not expected"
        raise UserError(f"{directory}: {what} in a {family.name} checkpoint of this architecture; convert it again")
    tensors = {}
    for directory, shape in expected.items():
        stored, dtype = _stored(directory)
        if stored != shape:
            raise UserError(f"{directory}: has shape {stored}, config.json says {shape}")
        tensors[directory.name] = Tensor(path / NATIVE, stored, dtype)
    return tensors


def _stored(directory: Path) -> tuple[tuple[int, ...], str]:
    try:
        return stored_array(directory)
    except Exception as error:  # Orbax has no error class of its own
        raise UserError(
            f"{directory}: not readable by Orbax ({first_line(error)}); convert the checkpoint again"
        ) from None


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def _one_dtype(tensors: Mapping[str, Tensor]) -> str:
    first: dict[str, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(tensor.dtype, name)
    where = next(iter(tensors.values())).file.parent
    if len(first) > 1:
        named = ", ".join(f"{name} is {dtype}" for dtype, name in first.items())
        raise UserError(f"{where}: mixed dtypes: {named}; store all in one dtype")
    (stored,) = first
    if stored not in DTYPES.values():
        raise UserError(f"{where}: weights are stored as {stored}; d1jax reads {', '.join(DTYPES.values())}")
    return stored


def _with_dtype(config: ModelConfig, stored: str) -> ModelConfig:
    return dataclasses.replace(config, param_dtype=stored)


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=distinct)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected an object, found {type(value).__name__}")
    return value
