"""A config.json and the ModelConfig that it describes: reading one, strictly, and writing one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from d1jax.config import ModelConfig, UserError
from d1jax.models.experts_json import HELD, read_experts, rotated, write_experts
from d1jax.models.families import family_for, family_of, is_a2d
from d1jax.models.family import Family

UNBOUNDED = 4096  # what a model without a limit of its own writes as its longest text
SHIFT = "right_shift_logits"  # how a model of the A2D families says that its logits are shifted


def read_config(published: Mapping[str, Any], where: str) -> ModelConfig:
    """The architecture that a config.json describes. Raises UserError naming the setting that is missing or not supported."""
    family = family_of(published, where)
    if family.experts and published.get("quantization_config") is not None:
        raise UserError(
            f"{where}: quantization_config: the weights are quantised; d1jax reads float32, bfloat16 and float16, so take the checkpoint "
            "that this one was made from"
        )
    published = _without_redundant(_with_theta(published, where), family, where)
    alignment = family.alignment
    if is_a2d(family):
        shift = published.get(SHIFT, False)
        if not isinstance(shift, bool):
            raise UserError(f"{where}: {SHIFT} = {shift!r} is not true or false")
        alignment = "shifted" if shift else "same_position"
        published = {name: value for name, value in published.items() if name != SHIFT}
    known = {*family.fields.values(), *family.fixed, *family.harmless, *family.experts.values()}
    known |= HELD if family.experts else set()
    unknown = sorted(published.keys() - known)
    if unknown:
        raise UserError(
            f"{where}: d1jax does not know {', '.join(map(repr, unknown))} of a {family.name} model, which may change what it "
            "computes; take out of config.json what does not"
        )
    for name, allowed in family.fixed.items():
        if published.get(name, allowed[0]) not in allowed:
            raise UserError(
                f"{where}: {name} = {published[name]!r} is not supported; d1jax implements {name} = {allowed[0]!r}"
            )
    values = {ours: published.get(theirs) for ours, theirs in family.fields.items()}
    values |= {ours: value for ours, value in family.assumed.items() if ours in values and values[ours] is None}
    # embedding_size counts padding rows too; it may be absent, and older than a vocab_size that was extended (MMaDA).
    rows = [published[name] for name in ("embedding_size", "vocab_size") if isinstance(published.get(name), int)]
    values["vocab_size"] = max(rows, default=None)
    if values["kv_heads"] is None:
        values["kv_heads"] = 1 if published.get("multi_query_attention") else values["heads"]
    if values["mlp_width"] is None and isinstance(published.get("mlp_ratio"), int) and isinstance(values["width"], int):
        values["mlp_width"] = published["mlp_ratio"] * values["width"]
    if family.experts and values["mlp_width"] is None:
        values["mlp_width"] = ModelConfig().mlp_width  # where no layer is dense, nothing reads it
    defaults = {"qkv_bias": False, "tied_head": False, "rope_full_precision": True, "qk_norm": False}
    values = {name: defaults.get(name) if value is None else value for name, value in values.items()}
    if "head_size" in values and values["head_size"] in (None, _head_size(values)):
        del values["head_size"]  # that of width / heads
    missing = [family.fields[name] for name, value in values.items() if value is None]
    if missing:
        raise UserError(f"{where}: has no {', '.join(missing)}; it is needed to build a {family.name} model")
    for name, value in values.items():
        kinds = (int, float) if name in ("rope_theta", "norm_eps") else (bool,) if name in defaults else (int,)
        number_wanted = kinds != (bool,)
        if not isinstance(value, kinds) or (
            number_wanted and (isinstance(value, bool) or not 0 < value < float("inf"))
        ):
            raise UserError(f"{where}: {family.fields[name]} = {value!r} is not a valid size or switch")
    config = ModelConfig(**{**values, **family.implied}, alignment=alignment, attention_mask=family.attention_mask)
    if (not config.head_size and config.width % config.heads) or config.heads % config.kv_heads:
        raise UserError(
            f"{where}: heads = {config.heads} must divide width = {config.width}, and be divided by "
            f"kv_heads = {config.kv_heads}"
        )
    if family.experts:
        experts = read_experts(published, family, config.layers, where)
        if experts.dense_layers and published.get(family.fields["mlp_width"]) is None:
            raise UserError(f"{where}: has no {family.fields['mlp_width']}, which its dense layers need")
        return dataclasses.replace(config, mlp=experts, rotary_columns=rotated(published, config.head_columns, where))
    return config


def _head_size(values: Mapping[str, Any]) -> int | None:
    """The columns of a head where they are those of width / heads."""
    width, heads = values["width"], values["heads"]
    whole = isinstance(width, int) and isinstance(heads, int) and heads > 0 and width % heads == 0
    return width // heads if whole else None


def _with_theta(published: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """A config.json with `rope_theta` on its own, as before transformers 5, which keeps it in `rope_parameters`.

    Raises UserError for every way of scaling the positions: d1jax implements none.
    """
    plain = {name: value for name, value in published.items() if name not in ("rope_parameters", "rope_scaling")}
    for name in ("rope_parameters", "rope_scaling"):
        given = published.get(name)
        if given is None:
            continue
        rest = dict(given) if isinstance(given, Mapping) else {"": given}
        kinds = {rest.pop(key, "default") for key in ("rope_type", "type")}
        theta, share = rest.pop("rope_theta", None), rest.pop("partial_rotary_factor", None)
        if kinds != {"default"} or share not in (None, 1, plain.get("partial_rotary_factor")) or rest:
            raise UserError(
                f"{where}: {name} = {given!r} is not supported; d1jax implements {name} = None, or rope_type = 'default' "
                "with a rope_theta alone"
            )
        if theta is not None and plain.get("rope_theta") not in (None, theta):
            raise UserError(
                f"{where}: rope_theta = {plain['rope_theta']!r}, but {name} says {theta!r}; write the one that is right"
            )
        if theta is not None:
            plain["rope_theta"] = theta
    return plain


def _without_redundant(published: Mapping[str, Any], family: Family, where: str) -> Mapping[str, Any]:
    """A config.json without what newer versions write beside what it follows from. Raises UserError where it does not follow."""
    heads, width = (published.get(family.fields[name]) for name in ("heads", "width"))
    derived = {
        "head_dim": lambda value: isinstance(value, int) and isinstance(heads, int) and value * heads == width,
        "layer_types": lambda value: isinstance(value, list) and set(value) <= {"full_attention"},
        "partial_rotary_factor": lambda value: value == 1,
        "attention_bias": lambda value: value is family.implied.get("qkv_bias"),
        "mlp_bias": lambda value: value is False,
        "is_decoder": lambda value: value is False,
        "is_encoder_decoder": lambda value: value is False,
        "add_cross_attention": lambda value: value is False,
        "pruned_heads": lambda value: value == {},
    }
    kept = {*family.fields.values(), *(HELD if family.experts else ())}
    for name, follows in derived.items():
        if name in kept:
            continue
        value = published.get(name)
        if value is not None and not follows(value):
            raise UserError(f"{where}: {name} = {value!r:.80} is not supported by d1jax for a {family.name} model")
    return {name: value for name, value in published.items() if name not in derived or name in kept}


def write_config(config: ModelConfig, token_ids: Mapping[str, int], family: Family | None = None) -> dict[str, Any]:
    """A config.json for a model that was not made from a published one. `token_ids` are its *_token_id entries.

    family: None for the one that `family_for` names.
    """
    family = family or family_for(config)
    more = {SHIFT: config.alignment == "shifted"} if is_a2d(family) else {}
    if "head_size" in family.fields:
        more[family.fields["head_size"]] = config.head_columns
    return {
        "architectures": [family.architecture],
        "model_type": family.model_types[0],
        **{theirs: getattr(config, ours) for ours, theirs in family.fields.items()},
        **{name: allowed[0] for name, allowed in family.fixed.items()},
        "vocab_size": config.vocab_size,
        **write_experts(config, family),
        family.fields["max_positions"]: config.max_positions or UNBOUNDED,
        **more,
        **token_ids,
        "torch_dtype": config.param_dtype,
    }
