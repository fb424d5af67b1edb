"""The mixture of experts that a config.json describes, and the columns of a head that it rotates: read strictly, and written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from d1jax.config import MixtureOfExperts, ModelConfig, UserError
from d1jax.config.setting import bounds
from d1jax.models.family import Family

FACTOR, COLUMNS = "partial_rotary_factor", "rotary_dim"  # the share of a head that is rotated, or its columns
BY_LAYER, BY_COUNT = "moe_layer_freq", "num_shared_experts"
HELD = frozenset({FACTOR, COLUMNS})  # read by `rotated`


def read_experts(published: Mapping[str, Any], family: Family, layers: int, where: str) -> MixtureOfExperts:
    """The section model.mlp. Raises UserError that names what is missing or impossible, under its name in config.json."""
    names = family.experts
    values = {ours: published.get(theirs) for ours, theirs in names.items()}
    if names["dense_layers"] == BY_LAYER:
        values["dense_layers"] = _leading_zeros(values["dense_layers"], layers, where)
    for ours in ("shared_width", "dense_layers"):
        values[ours] = 0 if values[ours] is None else values[ours]
    missing = [names[ours] for ours, value in values.items() if value is None]
    if missing:
        raise UserError(f"{where}: has no {', '.join(missing)}; it is needed to build a {family.name} model")
    for ours, value in values.items():
        kinds = (int, float) if ours == "scaling" else (int,)
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise UserError(f"{where}: {names[ours]} = {value!r:.80} is not a valid size or switch")
    if names["shared_width"] == BY_COUNT:
        values["shared_width"] *= values["expert_width"]
    made = MixtureOfExperts(**{**values, "scaling": float(values.get("scaling", 1.0)), "router": family.router})
    if made.dense_layers >= layers:
        raise UserError(f"{where}: {names['dense_layers']} leaves none of {layers} layers for experts")
    for broken, message in [*bounds(made), *made.rules()]:
        if broken:
            for ours, theirs in names.items():
                message = message.replace(f"{ours} = ", f"{theirs} = ")
            raise UserError(f"{where}: {message}")
    return made


def write_experts(config: ModelConfig, family: Family) -> dict[str, Any]:
    """What config.json says of the experts and of the rotated columns."""
    experts = config.mlp
    if not isinstance(experts, MixtureOfExperts):
        return {}
    made = {theirs: getattr(experts, ours) for ours, theirs in family.experts.items()}
    if BY_LAYER in made:
        made[BY_LAYER] = [int(layer >= experts.dense_layers) for layer in range(config.layers)]
        made["shared_expert_intermediate_size"] = experts.shared_width or None
    if BY_COUNT in made:
        if experts.shared_width % experts.expert_width:
            raise UserError(
                f"this model cannot be written as a {family.name} checkpoint, where model.mlp.shared_width is a multiple of expert_width"
            )
        made[BY_COUNT] = experts.shared_width // experts.expert_width or None
        made[COLUMNS] = config.rotary_columns or config.head_columns
    made[FACTOR] = (config.rotary_columns or config.head_columns) / config.head_columns
    return made


def rotated(published: Mapping[str, Any], head_columns: int, where: str) -> int:
    """rotary_columns: 0 where all of a head are rotated. Raises UserError where the share and the columns do not agree."""
    factor, columns = published.get(FACTOR), published.get(COLUMNS)
    for name, value, kinds in ((FACTOR, factor, (int, float)), (COLUMNS, columns, (int,))):
        if value is not None and (not isinstance(value, kinds) or isinstance(value, bool) or not value > 0):
            raise UserError(f"{where}: {name} = {value!r:.80} is not a valid size or switch")
    if factor is None and columns is None:
        raise UserError(f"{where}: has no {FACTOR}; it says how many columns of a head are rotated")
    by_factor = head_columns * factor if factor is not None else columns
    if columns not in (None, by_factor) or by_factor != int(by_factor) or by_factor % 2 or by_factor > head_columns:
        raise UserError(
            f"{where}: {FACTOR} = {factor!r} and {COLUMNS} = {columns!r} must name the same even number of the {head_columns} columns "
            "of a head"
        )
    return 0 if by_factor == head_columns else int(by_factor)


def _leading_zeros(layers_with: Any, layers: int, where: str) -> int:
    """The first layers, without experts: [0, 1, 1] -> 1. Raises UserError where others follow later."""
    if not isinstance(layers_with, list) or len(layers_with) != layers or not set(map(str, layers_with)) <= {"0", "1"}:
        raise UserError(
            f"{where}: {BY_LAYER} = {layers_with!r:.80} is not a list of a 0 or 1 for each of {layers} layers"
        )
    dense = layers_with.index(1) if 1 in layers_with else layers
    if 0 in layers_with[dense:]:
        raise UserError(
            f"{where}: {BY_LAYER} has dense layers behind others; d1jax implements them as the first ones only"
        )
    return dense
