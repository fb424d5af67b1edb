"""LoRA adapters in PEFT's format: adapter_config.json and adapter_model.safetensors.

PEFT keeps A as [r, in] and B as [out, r] a layer; here a is [L, in, r] and b [L, r, out]. PEFT matches a list of target names
against the end of every module's name, so that "ff_out" would adapt LLaDA's vocabulary head along with the MLP. What is
written here is a pattern that matches modules of a block only, and an adapter of the head is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from safetensors.numpy import load_file, save_file

from d1jax.config import LoraConfig, ModelConfig, UserError
from d1jax.files import new_directory, write_json
from d1jax.models import sharding
from d1jax.models.family import Family
from d1jax.models.transformer import Transformer, Variables, abstract_variables, stacks
from d1jax.weights.hf_directory import headers, read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Settings that change what an adapter computes, with the values that d1jax implements.
FIXED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": (None, []),
    "layers_to_transform": (None,),
    "fan_in_fan_out": (False,),
    "target_parameters": (None, []),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "arrow_config": (None,),
    "trainable_token_indices": (None,),
    "megatron_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
    # Others (pissa, olora, ...) change the base weights when PEFT loads the adapter.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}
# What PEFT writes beside them: where the adapter came from, how it was trained, which modules it names (the tensors say which
# they are), and the settings of initialisations.
HARMLESS = frozenset(
    """
    auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config exclude_modules inference_mode layers_pattern
    loftq_config lora_alpha lora_dropout lora_ga_config megatron_core peft_version qalora_group_size r revision runtime_config
    target_modules task_type use_rslora
    """.split()
)
LARGEST = 2**16  # of rank and alpha; fp32 keeps whole numbers far beyond, so this is a bound on nonsense


def is_adapter(path: Path) -> bool:
    return (path / CONFIG).is_file()


def read_adapter(path: str | Path, config: ModelConfig, family: Family, mesh: Mesh) -> tuple[LoraConfig, Variables]:
    """(LoraConfig, {"lora": ...}) of a PEFT directory, placed by the rule table.

    Raises UserError: not an adapter, a variant that d1jax does not implement, an adapter of the vocabulary head, or one
    whose tensors do not fit this model.
    """
    path = Path(path)
    _check_expressible(family, f"adapter {str(path)!r}")
    if not is_adapter(path) or not (path / WEIGHTS).is_file():
        raise UserError(f"adapter {str(path)!r}: needs {CONFIG} and {WEIGHTS}")
    settings = read_json(path / CONFIG)
    for name, allowed in FIXED.items():
        if settings.get(name, allowed[0]) not in allowed:
            raise UserError(
                f"{path / CONFIG}: {name} = {settings[name]!r} is not supported; d1jax implements {allowed[0]!r}"
            )
    # PEFT writes every setting that it has; one of a newer version that is not used is null.
    used = {name for name, value in settings.items() if value is not None}
    unknown = sorted(used - FIXED.keys() - HARMLESS)
    if unknown:
        raise UserError(
            f"{path / CONFIG}: d1jax does not know {', '.join(map(repr, unknown))}, which may change what the adapter computes; "
            "take out of the file what does not"
        )
    rank, alpha, scaled = settings.get("r"), settings.get("lora_alpha"), settings.get("use_rslora")
    numbers = isinstance(rank, int) and isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if not numbers or rank is True or not (1 <= rank <= LARGEST and 0 < alpha <= LARGEST):  # NaN is in no range
        raise UserError(
            f"{path / CONFIG}: r = {rank!r:.40} and lora_alpha = {alpha!r:.40} must be numbers, r from 1 and lora_alpha above 0, "
            f"both up to {LARGEST}"
        )
    if not isinstance(scaled, bool | None):
        raise UserError(f"{path / CONFIG}: use_rslora = {scaled!r:.40} must be true or false")
    shapes = {name: tensor.shape for name, tensor in headers(path / WEIGHTS).items()}
    targets = _targets(path, shapes, config, family)
    # rslora scales by alpha / sqrt(r); here the scale is alpha / r.
    scale = math.sqrt(rank) if scaled else 1.0
    lora = LoraConfig(rank=rank, alpha=float(alpha) * scale, targets=targets)
    like = abstract_variables(Transformer(config, lora), mesh, ("lora",))["lora"]
    names = _names(like, family, config)
    _check(path, shapes, like, names)
    tensors = load_file(path / WEIGHTS)
    broken = next((name for name, tensor in tensors.items() if not np.isfinite(tensor).all()), None)
    if broken is not None:
        raise UserError(f"adapter {str(path)!r}: tensor {broken} holds NaN or infinite values; export it again")

    def place(keys: tuple[Any, ...], target: jax.ShapeDtypeStruct) -> jax.Array:
        layers = [tensors[name].T for name in names[_path(keys)]]
        return jax.device_put(np.stack(layers).astype(target.dtype), target.sharding)

    return lora, {"lora": jax.tree_util.tree_map_with_path(place, like)}


def save_adapter(
    adapters: Mapping[str, Any], lora: LoraConfig, config: ModelConfig, family: Family, out: Path, base: str = ""
) -> None:
    """Writes the "lora" collection as a directory that `peft.PeftModel.from_pretrained` loads onto the published model.

    `base` is written down as the model that it belongs to. Raises FileExistsError where `out` is not new.
    """
    _check_expressible(family, f"adapter {str(out)!r}")
    names = _names(adapters, family, config)
    tensors = {}
    for keys, stacked in jax.tree_util.tree_flatten_with_path(adapters)[0]:
        layers = np.asarray(sharding.fetch(stacked))
        for name, layer in zip(names[_path(keys)], layers, strict=True):
            tensors[name] = np.ascontiguousarray(layer.T)
    modules = "|".join(re.escape(family.names.layer[name]) for name in adapters["blocks"])
    block = re.escape(family.names.block).replace(re.escape("{layer}"), r"\d+")
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": base or None,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": rf"(.*\.)?{block}\.({modules})",
        "inference_mode": True,
        # No task type: PEFT's wrappers for tasks expect methods that remote code may lack.
        "task_type": None,
    }
    with new_directory(out) as beside:
        save_file(tensors, beside / WEIGHTS, metadata={"format": "pt"})
        write_json(beside / CONFIG, settings)


def _targets(path: Path, shapes: Mapping[str, tuple[int, ...]], config: ModelConfig, family: Family) -> tuple[str, ...]:
    """Our names of the adapted modules, from the tensors that are there. Raises UserError for any that is not in a block."""
    pattern = re.compile(
        re.escape(PREFIX)
        + re.escape(family.names.block).replace(re.escape("{layer}"), r"\d+")
        + r"\.(?P<module>.+)\.lora_[AB]\.weight"
    )
    ours = {theirs: name for name, theirs in family.names.layer.items() if not name.endswith("norm")}
    found = set()
    for name in shapes:
        match = pattern.fullmatch(name)
        if name.startswith(f"{PREFIX}{family.names.head}."):
            raise UserError(
                f"adapter {str(path)!r}: tensor {name} adapts the vocabulary head, which d1jax does not; "
                "train again with target_modules that name layers of a block only"
            )
        if match is None or match["module"] not in ours:
            raise UserError(f"adapter {str(path)!r}: tensor {name} belongs to no linear layer of a {family.name} model")
        found.add(ours[match["module"]])
    if not found:
        raise UserError(f"adapter {str(path)!r}: {WEIGHTS} holds no tensors")
    return tuple(name for name in LoraConfig().targets if name in found)


def _check_expressible(family: Family, where: str) -> None:
    if family.fused:
        raise UserError(
            f"{where}: q, k and v of a {family.name} model are one tensor ({family.names.layer['q_proj']}), which PEFT adapts as one and "
            "d1jax as three; merge the adapter instead (convert to-hf without --adapter-only)"
        )


def _names(adapters: Any, family: Family, config: ModelConfig) -> dict[tuple[str, ...], list[str]]:
    """{path in the collection: PEFT's name a layer}."""
    made = {}
    for keys, _ in jax.tree_util.tree_flatten_with_path(adapters)[0]:
        stack, module, kind = _path(keys)
        name = f"{PREFIX}{family.names.block}.{family.names.layer[module]}.lora_{kind.upper()}.weight"
        made[_path(keys)] = [name.format(layer=layer) for layer in stacks(config)[stack]]
    return made


def _check(path: Path, shapes: Mapping[str, tuple[int, ...]], like: Any, names: Mapping[tuple[str, ...], Any]) -> None:
    expected = {}
    for keys, target in jax.tree_util.tree_flatten_with_path(like)[0]:
        expected |= dict.fromkeys(names[_path(keys)], target.shape[1:][::-1])
    for name in sorted(expected.keys() | shapes.keys()):
        if expected.get(name) != shapes.get(name):
            raise UserError(
                f"adapter {str(path)!r} is for another model: tensor {name} has shape {shapes.get(name)}, "
                f"this model needs {expected.get(name)}"
            )


def _path(keys: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(key.key for key in keys)
