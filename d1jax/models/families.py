"""The families of published models, and which of them a config.json or an architecture belongs to.

A family says how its config.json spells a ModelConfig (config_json.py reads and writes it), which tensor holds which weight, which
logit scores which token, which columns see which, and which token closes a turn of a chat. A new family is one more `Family` in
published.py. The autoregressive ones are what masked diffusion models are made from (adapt/).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from d1jax.config import MixtureOfExperts, ModelConfig, UserError
from d1jax.models.family import Family
from d1jax.models.published import A2D, CAUSAL, DREAM, LLADA, LLADA2, LLADA_MOE, LLAMA, MMADA, QWEN2, QWEN3, SDAR

FAMILIES = {family.name: family for family in (LLADA, MMADA, DREAM, *CAUSAL, *A2D.values(), SDAR, LLADA_MOE, LLADA2)}
# How a turn is closed, and what a rendered chat ends with before the answer.
TURNS = tuple(dict.fromkeys((family.turn_end, family.assistant_header) for family in (DREAM, LLADA, LLADA2)))


def is_a2d(family: Family) -> bool:
    """Whether it is one of the families whose config.json says how its logits are aligned."""
    return family in A2D.values()


def family_of(published: Mapping[str, Any], where: str) -> Family:
    """The family that a config.json belongs to. Raises UserError for a model type that d1jax does not know."""
    model_type = published.get("model_type")
    if model_type in LLADA.model_types and published.get("architectures") == [LLADA_MOE.architecture]:
        return LLADA_MOE
    for family in FAMILIES.values():
        if model_type in family.model_types:
            return family
    known = ", ".join(repr(kind) for family in FAMILIES.values() for kind in family.model_types)
    raise UserError(
        f"{where}: model_type {model_type!r} (architectures {published.get('architectures')}) is none of {known}; "
        "d1jax loads models of these families"
    )


def adapted_family(config: ModelConfig) -> Family:
    """The family that publishes a model which was made from an autoregressive one: Dream with shifted logits, else an A2D one."""
    dream = config.alignment == "shifted" and not config.qk_norm and not config.head_size
    return DREAM if dream else A2D[_autoregressive(config).name]


def _autoregressive(config: ModelConfig) -> Family:
    return QWEN3 if config.qk_norm else QWEN2 if config.qkv_bias else LLAMA


def family_for(config: ModelConfig) -> Family:
    """The family that can publish a model with this architecture.

    Dream's logits are shifted, LLaDA's are not; normalised queries and heads of another size need Qwen3's kin; a causal model is Llama's or
    Qwen's. Raises UserError for combinations that none can express.
    """
    if isinstance(config.mlp, MixtureOfExperts):
        return _checked(config, LLADA2 if config.mlp.router == "sigmoid" else LLADA_MOE)
    base = _autoregressive(config)
    if config.attention_mask == "causal":
        family = base
    elif config.attention_mask == "block_causal":
        family = SDAR
    elif config.qk_norm or config.head_size:
        family = A2D[base.name]
    else:
        family = DREAM if config.alignment == "shifted" else LLADA
    return _checked(config, family)


def _checked(config: ModelConfig, family: Family) -> Family:
    """The family. Raises UserError for what it cannot express."""
    fixed = {**family.implied, "attention_mask": family.attention_mask}
    if not family.experts:
        fixed["rotary_columns"] = 0
    if not is_a2d(family):
        fixed["alignment"] = family.alignment
    odd = [name for name, value in fixed.items() if getattr(config, name) != value]
    if odd:
        needed = ", ".join(f"model.{name} = {fixed[name]}" for name in odd)
        raise UserError(f"this model cannot be written as a {family.name} checkpoint, which needs {needed}")
    return family
