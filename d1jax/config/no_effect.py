"""Settings that nothing reads, given what the others say: a value other than the default there is a misunderstanding.

A setting is in a table below where something must hold for it to be read. Where a combination is impossible rather than idle,
config_rules.py and rl_rules.py refuse it. The section of a stage that is not among the stages is another matter: one file serves
several choices of stages, so it is named in the log, not refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from d1jax.config import ADAPTIVE, Config, ConfigError, SamplerConfig

Command = Literal["train", "evaluate", "audit"]
RANDOM_VIEWS = ("elbo", "coupled", "quadrature", "block")  # estimators whose maskings are drawn


class Reader(NamedTuple):
    """Whether something reads a setting, and what must be set so that something does."""

    reads: bool
    where: str


def unread(config: Config, command: Command = "train") -> dict[str, str]:
    """{full name of a setting that differs from its default and has no effect: what would have to be set for one}."""
    readers = {f"sampler.{name}": reader for name, reader in _sampler(config.sampler, _drawn(config, command)).items()}
    readers |= _shared(config, command)
    if command == "train":
        readers |= _rl(config)
    return {name: reader.where for name, reader in readers.items() if not reader.reads and _differs(config, name)}


def idle_stages(config: Config) -> list[str]:
    """The stages whose sections differ from the defaults although they are not among config.stages."""
    sections = {"sft": (config.sft, Config().sft), "rl": (config.rl, Config().rl)}
    return [name for name, (here, default) in sections.items() if name not in config.stages and here != default]


def without_unread(config: Config, command: Command = "train") -> Config:
    """`config` with every setting that has no effect at its default."""
    # Again and again, because one that is reset may have been the only reader of another one.
    while names := unread(config, command):
        for name in names:
            config = _replaced(config, name, value_at(Config(), name))
    return config


def check_sampler(config: SamplerConfig, temperature: float, names: Mapping[str, str] | None = None) -> None:
    """Raises ConfigError for a setting of the sampler that has no effect at this temperature. `names`: what to call them, and
    only those are looked at."""
    names = {field.name: f"sampler.{field.name}" for field in dataclasses.fields(config)} if names is None else names
    default = SamplerConfig()
    for name, reader in _sampler(config, temperature > 0).items():
        value = getattr(config, name)
        if name in names and not reader.reads and value != getattr(default, name):
            raise ConfigError(no_effect(f"{names[name]} = {value}", reader.where))


def with_effect(config: SamplerConfig, temperature: float) -> SamplerConfig:
    """`config` with those settings at their defaults that have no effect at this temperature."""
    default = SamplerConfig()
    while names := [
        name
        for name, reader in _sampler(config, temperature > 0).items()
        if not reader.reads and getattr(config, name) != getattr(default, name)
    ]:
        config = dataclasses.replace(config, **{name: getattr(default, name) for name in names})
    return config


def no_effect(settings: str, where: str) -> str:
    """What to say of settings written as `name = value, ...`."""
    return f"{settings}: without effect here, read only with {where}; set that, or leave this out"


def value_at(config: Any, name: str) -> Any:
    """The value under a full name, e.g. `rl.optimizer.beta1`."""
    for key in name.split("."):
        config = getattr(config, key)
    return config


def leaves(section: Any, prefix: str = "") -> Iterator[str]:
    """The full name of every setting of a section."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def _differs(config: Config, name: str) -> bool:
    return value_at(config, name) != value_at(Config(), name)


def _replaced(section: Any, name: str, value: Any) -> Any:
    key, _, rest = name.partition(".")
    return dataclasses.replace(section, **{key: _replaced(getattr(section, key), rest, value) if rest else value})


def _drawn(config: Config, command: Command) -> bool:
    """Whether any token is drawn, and not always the likeliest taken."""
    rollouts = command == "audit" or (command == "train" and "rl" in config.stages and config.rl.data != "targets")
    return rollouts or config.evaluation.temperature > 0


# -- the tables --------------------------------------------------------------------------------------------------------


def _sampler(sampler: SamplerConfig, drawn: bool) -> dict[str, Reader]:
    filtered = sampler.top_k > 0 or sampler.top_p < 1
    narrowed = Reader(
        drawn or sampler.confidence_of == "sampling", "a temperature above 0, or confidence_of = sampling"
    )
    return {
        "threshold": Reader(sampler.schedule in ("threshold", "klass"), "schedule = threshold or klass"),
        "kl_threshold": Reader(sampler.schedule == "klass", "schedule = klass"),
        "factor": Reader(sampler.schedule == "factor", "schedule = factor"),
        "entropy_bound": Reader(sampler.schedule == "entropy_bound", "schedule = entropy_bound"),
        "steps": Reader(sampler.schedule not in ADAPTIVE, "schedule = even, time or chance"),
        "cache_refresh": Reader(sampler.cache != "none", "cache = prefix or dual"),
        "confidence_of": Reader(drawn or filtered, "a temperature above 0, top_k or top_p"),
        "top_k": narrowed,
        "top_p": narrowed,
    }


def _shared(config: Config, command: Command) -> dict[str, Reader]:
    sources = [config.task.train, *config.task.eval_sets.values()]
    drawn_rows = any(source == "generated" or source.startswith("share:") for source in sources)
    adapted = Reader(config.lora.rank > 0, "lora.rank above 0")
    # Without a stage 'rl', too: its section stays in the configuration, and rl_rules.py wants recorded entropies beside subset < 1.
    by_entropy = command != "evaluate" and config.rl.estimator.subset < 1
    return {
        "task.numbers": Reader(config.task.name == "countdown", "task.name = countdown"),
        "task.seed": Reader(drawn_rows, "a source that is generated, or share:"),
        "lora.alpha": adapted,
        "lora.targets": adapted,
        "sampler.record_entropy": Reader(by_entropy, "rl.estimator.subset below 1"),
    }


def _rl(config: Config) -> dict[str, Reader]:
    rl, estimator = config.rl, config.rl.estimator
    if "rl" not in config.stages:
        return {}
    replayed = estimator.name == "trajectory" and estimator.shrink == 0
    ranged = Reader(estimator.name in ("elbo", "coupled", "block"), "rl.estimator.name = elbo, coupled or block")
    masks = rl.prompt_mask > 0 or estimator.name in RANDOM_VIEWS
    compared = rl.ratio != "none"
    penalised = Reader(rl.kl_coefficient > 0, "rl.kl_coefficient above 0")
    watched = Reader(rl.guard.patience > 0, "rl.guard.patience above 0")
    return {
        "rl.estimator.samples": Reader(
            estimator.name in RANDOM_VIEWS or replayed,
            "rl.estimator.name = elbo, coupled, quadrature, block, or trajectory without shrink",
        ),
        "rl.estimator.counts": ranged,
        "rl.estimator.low": ranged,
        "rl.estimator.high": ranged,
        "rl.estimator.upper_exponent": Reader(estimator.upper_share > 0, "rl.estimator.upper_share above 0"),
        "rl.mask_sharing": Reader(masks, "rl.prompt_mask above 0, or an estimator that draws its maskings"),
        "rl.fresh_masks": Reader(
            masks and rl.inner_updates > 1, "rl.inner_updates above 1 and rl.prompt_mask above 0, or drawn maskings"
        ),
        "rl.temperature": Reader(rl.data != "targets", "rl.data = policy or reference"),
        "rl.clip_low": Reader(compared and rl.clip in ("ppo", "dual"), "a rl.ratio, and rl.clip = ppo or dual"),
        "rl.clip_high": Reader(compared and rl.clip != "none", "a rl.ratio, and a rl.clip"),
        "rl.dual_clip": Reader(compared and rl.clip == "dual", "a rl.ratio, and rl.clip = dual"),
        "rl.softmax_scale": Reader(rl.advantage == "softmax", "rl.advantage = softmax"),
        "rl.accept": Reader(rl.advantage == "accepted", "rl.advantage = accepted"),
        "rl.preference_scale": Reader(rl.advantage == "pairs", "rl.advantage = pairs"),
        "rl.supervision_steps": Reader(rl.supervision == "commit_steps", "rl.supervision = commit_steps"),
        "rl.kl": penalised,
        "rl.kl_in": penalised,
        "rl.kl_level": penalised,
        "rl.kl_to": penalised,
        "rl.guard.repeated_tokens": watched,
        "rl.guard.distinct": watched,
        "rl.guard.entropy": watched,
        "rl.guard.log_ratio": watched,
        "rl.guard.kl": Reader(
            rl.guard.patience > 0 and rl.kl_coefficient > 0, "rl.guard.patience and rl.kl_coefficient above 0"
        ),
    }
