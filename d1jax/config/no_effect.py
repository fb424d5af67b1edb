"""Settings that nothing reads, given what the others say: a value other than the default there is a misunderstanding.

A setting is in a table below where something must hold for it to be read. Where a combination is impossible rather than idle,
the section itself refuses it (its method `rules`). The section of a stage that is not among the stages is another matter: one file serves
several choices of stages, so it is named in the log, not refused.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

from d1jax.config.errors import UserError
from d1jax.config.objective import StopOnCollapse
from d1jax.config.sampler import SamplerConfig
from d1jax.config.schema import Config
from d1jax.config.setting import is_choice, value_at
from d1jax.config.stage import KINDS, SAMPLED, TRAINING

Command = Literal["train", "evaluate", "audit"]


class Reader(NamedTuple):
    """Whether something reads a setting, and what must be set so that something does."""

    reads: bool
    where: str


def unread(config: Config, command: Command = "train") -> dict[str, str]:
    """{full name of a setting that differs from its default and has no effect: what would have to be set for one}."""
    readers = _shared(config, command)
    readers |= {f"sampler.{name}": reader for name, reader in _sampler(config.sampler, _drawn(config, command)).items()}
    for kind, table in READERS.items() if command == "train" else ():
        stages = [table(config.for_stage(stage.name)) for stage in config.stages if stage.kind == kind]
        if stages:  # what one of several stages reads is no misunderstanding
            readers |= {
                name: next((one[name] for one in stages if one[name].reads), found) for name, found in stages[0].items()
            }
    return {name: reader.where for name, reader in readers.items() if not reader.reads and _differs(config, name)}


def unread_by_stage(config: Config, kind: str) -> dict[str, str]:
    """`unread` of the section `kind` alone, in the configuration as one stage of that kind sees it."""
    readers = READERS[kind](config) if kind in READERS else {}
    return {name: reader.where for name, reader in readers.items() if not reader.reads and _differs(config, name)}


def idle_stages(config: Config) -> list[str]:
    """The kinds of stages whose sections differ from the defaults although no stage is of that kind."""
    return [kind for kind in KINDS if kind not in config.kinds and getattr(config, kind) != getattr(_defaults(), kind)]


def without_unread(config: Config, command: Command = "train") -> Config:
    """`config` with every setting that has no effect at its default."""
    # Again and again, because one that is reset may have been the only reader of another one.
    while names := unread(config, command):
        for name in names:
            config = _replaced(config, name, default_at(config, name))
    return config


def check_sampler(config: SamplerConfig, temperature: float, names: Mapping[str, str] | None = None) -> None:
    """Raises UserError for a setting of the sampler that has no effect at this temperature. `names`: what to call them, and
    only those are looked at."""
    for name, where in unread_of_sampler(config, temperature).items():
        called = f"sampler.{name}" if names is None else names.get(name)
        if called:
            raise UserError(no_effect(f"{called} = {value_at(config, name)}", where))


def unread_of_sampler(config: SamplerConfig, temperature: float) -> dict[str, str]:
    """{name of a sampler's setting that differs from its default and has no effect at this temperature: what would have to be set}."""
    return {
        name: reader.where
        for name, reader in _sampler(config, temperature > 0).items()
        if not reader.reads and value_at(config, name) != _sampler_default(config, name)
    }


def with_effect(config: SamplerConfig, temperature: float) -> SamplerConfig:
    """`config` with those settings at their defaults that have no effect at this temperature."""
    while names := unread_of_sampler(config, temperature):
        for name in names:
            config = _replaced(config, name, _sampler_default(config, name))
    return config


def no_effect(settings: str, where: str) -> str:
    """What to say of settings written as `name = value, ...`."""
    return f"{settings}: without effect here, read only with {where}; set that, or leave this out"


def _differs(config: Config, name: str) -> bool:
    return value_at(config, name) != default_at(config, name)


@functools.cache
def _defaults() -> Config:
    return Config()


def default_at(config: Config, name: str) -> Any:
    """The default of a setting; of a parameter of a choice, that of the choice which is made here."""
    above, _, key = name.rpartition(".")
    parent = value_at(config, above) if above else config
    return getattr(type(parent)(), key, None) if is_choice(parent) else value_at(_defaults(), name)


def _sampler_default(config: SamplerConfig, name: str) -> Any:
    return default_at(Config(sampler=config), f"sampler.{name}")


def _replaced(section: Any, name: str, value: Any) -> Any:
    key, _, rest = name.partition(".")
    return dataclasses.replace(section, **{key: _replaced(getattr(section, key), rest, value) if rest else value})


def _drawn(config: Config, command: Command) -> bool:
    """Whether any token is drawn, and not always the likeliest taken."""
    rollouts = command == "audit" or (command == "train" and bool(config.kinds & (SAMPLED | {"evaluate"})))
    return rollouts or config.evaluation.temperature > 0


# -- the tables --------------------------------------------------------------------------------------------------------


def _sampler(sampler: SamplerConfig, drawn: bool) -> dict[str, Reader]:
    filtered = sampler.top_k > 0 or sampler.top_p < 1
    narrowed = Reader(
        drawn or sampler.remasking.confidence_of == "sampling",
        "a temperature above 0, or remasking.confidence_of = sampling",
    )
    return {
        "steps": Reader(not sampler.schedule.adaptive, "schedule = even, time or chance"),
        "remasking.confidence_of": Reader(drawn or filtered, "a temperature above 0, top_k or top_p"),
        "top_k": narrowed,
        "top_p": narrowed,
    }


def _shared(config: Config, command: Command) -> dict[str, Reader]:
    sources = [config.task.train, *config.task.eval_sets.values()]
    drawn_rows = any(source == "generated" or source.startswith("share:") for source in sources)
    adapted = Reader(config.lora.rank > 0, "lora.rank above 0")
    return {
        "task.seed": Reader(drawn_rows, "a source that is generated, or share:"),
        "mesh.rollout_weights": Reader(config.mesh.fsdp != 1 and command != "audit", "mesh.fsdp other than 1"),
        "profile.start": Reader(config.profile.steps > 0, "profile.steps above 0"),
        "lora.alpha": adapted,
        "lora.targets": adapted,
    }


def _adapt(config: Config) -> dict[str, Reader]:
    masked = Reader(config.model.attention_mask != "causal", "a model.attention_mask other than causal")
    names = (
        "weighting",
        "weighting.p",
        "normalizer",
        "low",
        "high",
        "clean_prefix",
        "truncated",
        "anneal_steps",
        "validation_samples",
        "order_windows",
    )
    return {f"adapt.{name}": masked for name in names}


def _preference(config: Config) -> dict[str, Reader]:
    written = Reader(not config.preference.data, "preference.data = ''")
    names = ("writer", "num_generations", "temperature", "reward_weights", "rollout_batch_size")
    return {f"preference.{name}": written for name in names}


def _reward_model(config: Config) -> dict[str, Reader]:
    section = config.reward_model
    paired = section.loss != "stepwise" and any(name != "task" for name in section.data)
    return {
        "reward_model.replay": Reader(len(section.data) > 1, "reward_model.data naming more than one"),
        "reward_model.pairs_per_prompt": Reader(paired, "reward_model.data naming a generate stage, and pairs"),
    }


def _rl(config: Config) -> dict[str, Reader]:
    rl, estimator = config.rl, config.rl.estimator
    masks = rl.prompt_mask > 0 or estimator.draws_masks
    watched = isinstance(rl.collapse, StopOnCollapse)
    return {
        "rl.estimator.upper_exponent": Reader(estimator.upper_share > 0, "rl.estimator.upper_share above 0"),
        "rl.mask_sharing": Reader(masks, "rl.prompt_mask above 0, or an estimator that draws its maskings"),
        "rl.fresh_masks": Reader(
            masks and rl.num_iterations > 1, "rl.num_iterations above 1 and rl.prompt_mask above 0, or drawn maskings"
        ),
        "rl.collapse.log_ratio": Reader(
            watched and rl.policy_loss.name != "policy_gradient", "a rl.policy_loss that compares with the old policy"
        ),
        "rl.collapse.kl": Reader(watched and rl.kl.name != "none", "a rl.kl"),
    }


def _of_optimizer(config: Config, kind: str) -> dict[str, Reader]:
    """What the section of a kind that trains reads of its optimizer, beside what its own table says."""
    falls = getattr(config, kind).optimizer.schedule != "constant"
    table = OF_A_KIND.get(kind)
    own = table(config) if table else {}
    return {**own, f"{kind}.optimizer.final": Reader(falls, f"{kind}.optimizer.schedule = linear or cosine")}


OF_A_KIND = {
    "adapt": _adapt,
    "rl": _rl,
    "preference": _preference,
    "reward_model": _reward_model,
}  # what the section of a stage reads
READERS = {kind: partial(_of_optimizer, kind=kind) for kind in (*TRAINING, "reward_model")}
