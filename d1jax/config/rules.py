"""Which combinations of settings are impossible, and what to change."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from d1jax.config import ADAPTIVE, Config, ConfigError, ModelConfig, RlConfig
from d1jax.config.no_effect import Command
from d1jax.config.rl_rules import rl_rules

MOST_TOKENS = 1_000_000  # schedules are arrays of this length
MOST_PARAMETERS = 10**13
MOST = 2**31 - 1  # what an index can be
# Beyond these something runs for hours, or asks for more memory than there is, before it fails.
LARGEST = {
    "seed": 2**32 - 1, "task.seed": 2**32 - 1,  # what keys of random numbers are made from
    "model.width": 2**17, "model.layers": 2**12, "model.heads": 2**12, "model.kv_heads": 2**12, "model.mlp_width": 2**20,
    "model.vocab_size": 2**24, "model.max_positions": 2**24, "lora.rank": 2**16,
    "task.train_rows": 10**8, "task.eval_rows": 10**8,
    "sft.batch_size": 2**20, "rl.prompts_per_step": 2**20, "rl.group_size": 2**16, "rl.inner_updates": 2**12,
    "rl.estimator.samples": 2**10, "rl.supervision_steps": 2**16, "evaluation.batch_size": 2**20, "evaluation.samples": 2**20,
}  # fmt: skip


def check(config: Config, command: Command = "train") -> Config:
    """`config` as it is. Raises a ConfigError that lists every impossible combination and what to change.

    `evaluate` does not read the section rl: a run's sampler may be changed there in ways in which it could not be trained.
    """
    read = dataclasses.replace(config, rl=RlConfig()) if command == "evaluate" else config
    problems = [message for broken, message in _rules(read) if broken]
    if problems:
        raise ConfigError("config: " + "\nconfig: ".join(problems))
    return config


def _rules(config: Config) -> list[tuple[bool, str]]:
    model, sampler, sft, rl = config.model, config.sampler, config.sft, config.rl
    c, block, steps = sampler.completion_length, sampler.block_length, sampler.steps
    blocks = max(c // max(block, 1), 1)
    estimator = rl.estimator
    positive = {
        "model.width": model.width, "model.layers": model.layers, "model.heads": model.heads, "model.kv_heads": model.kv_heads,
        "model.mlp_width": model.mlp_width, "sampler.completion_length": c, "sampler.block_length": block, "sampler.steps": steps,
        "sft.steps": sft.steps, "sft.batch_size": sft.batch_size, "sft.micro_batches": sft.micro_batches, "rl.steps": rl.steps,
        "rl.prompts_per_step": rl.prompts_per_step, "rl.inner_updates": rl.inner_updates, "rl.micro_batches": rl.micro_batches,
        "evaluation.batch_size": config.evaluation.batch_size, "checkpoint_every": config.checkpoint_every,
        "max_bad_updates": config.max_bad_updates, "sft.optimizer.learning_rate": sft.optimizer.learning_rate,
        "rl.optimizer.learning_rate": rl.optimizer.learning_rate, "model.rope_theta": model.rope_theta,
        "model.norm_eps": model.norm_eps,
        "lora.alpha": config.lora.alpha, "rl.estimator.samples": estimator.samples, "rl.softmax_scale": rl.softmax_scale,
        "rl.preference_scale": rl.preference_scale, "rl.supervision_steps": rl.supervision_steps,
    }  # fmt: skip
    not_negative = {
        "sampler.remasking_temperature": sampler.remasking_temperature, "sampler.top_k": sampler.top_k,
        "sampler.guidance": sampler.guidance, "sampler.factor": sampler.factor,
        "sampler.kl_threshold": sampler.kl_threshold, "sampler.cache_refresh": sampler.cache_refresh,
        "sampler.entropy_bound": sampler.entropy_bound, "model.max_positions": model.max_positions,
        "model.vocab_size": model.vocab_size,
        "sft.completion_length": sft.completion_length,
        "seed": config.seed, "task.seed": config.task.seed, "keep_last": config.keep_last,
        "rl.estimator.shrink": estimator.shrink,
        "lora.rank": config.lora.rank, "task.train_rows": config.task.train_rows, "task.eval_rows": config.task.eval_rows,
        "evaluation.every": config.evaluation.every, "evaluation.samples": config.evaluation.samples,
        "evaluation.temperature": config.evaluation.temperature, "rl.kl_coefficient": rl.kl_coefficient,
        "rl.entropy_coefficient": rl.entropy_coefficient, "rl.guard.patience": rl.guard.patience,
        "rl.guard.repeated_tokens": rl.guard.repeated_tokens, "rl.guard.distinct": rl.guard.distinct,
        "rl.guard.entropy": rl.guard.entropy, "rl.guard.log_ratio": rl.guard.log_ratio, "rl.guard.kl": rl.guard.kl,
        "rl.reference_sync_every": rl.reference_sync_every, "rl.clip_low": rl.clip_low, "rl.clip_high": rl.clip_high,
    }  # fmt: skip
    for name, optimizer in (("sft.optimizer", sft.optimizer), ("rl.optimizer", rl.optimizer)):
        not_negative |= {
            f"{name}.{key}": getattr(optimizer, key) for key in ("warmup_steps", "weight_decay", "clip_norm")
        }
    sizes = [(value <= 0, f"{name} = {value} must be above 0") for name, value in positive.items()]
    sizes += [(value < 0, f"{name} = {value} must not be negative") for name, value in not_negative.items()]
    sizes += [
        (not math.isfinite(value), f"{name} = {value} must be a finite number")
        for name, value in _numbers(config, float)
    ]
    sizes += [
        (
            value > LARGEST.get(name, MOST),
            f"{name} = {value} is more than {LARGEST.get(name, MOST)}, the most there may be",
        )
        for name, value in _numbers(config, int)
    ]
    if any(broken for broken, _ in sizes):
        return sizes  # what follows divides by these, and makes arrays of them
    if c > MOST_TOKENS:
        return [*sizes, (True, f"sampler.completion_length = {c} is more than {MOST_TOKENS} tokens")]
    fits, steps_count = c % block == 0, sampler.schedule not in ADAPTIVE
    rules = [
        (
            not fits,
            f"sampler.block_length = {block} does not divide sampler.completion_length = {c}; try {block if fits else _divisor(c, block)}",
        ),
        (
            fits and steps_count and steps < blocks,
            f"sampler.steps = {steps} is fewer than the {blocks} blocks; every block needs a step",
        ),
        (
            steps_count and steps > c,
            f"sampler.steps = {steps} is more than the {c} tokens of sampler.completion_length",
        ),
        (
            fits and steps_count and steps >= blocks and steps % blocks != 0,
            f"sampler.steps = {steps} is not a multiple of the {blocks} blocks; try {max(steps // blocks, 1) * blocks}",
        ),
    ]
    rules += [
        (
            sampler.schedule in ("time", "chance") and block != c,
            f"sampler.schedule = {sampler.schedule} works on the whole completion; set sampler.block_length = {c}",
        ),
        (not 0 < sampler.threshold <= 1, f"sampler.threshold = {sampler.threshold} must lie in (0, 1]"),
        (
            sampler.schedule == "entropy_bound" and sampler.remasking != "entropy",
            f"sampler.schedule = entropy_bound takes the surest first; set sampler.remasking = entropy (here: {sampler.remasking})",
        ),
        (
            sampler.schedule in ADAPTIVE and (sampler.remasking == "random" or sampler.remasking_temperature > 0),
            f"sampler.schedule = {sampler.schedule} takes the surest together; set sampler.remasking to an order that is not "
            f"drawn (here: {sampler.remasking}) and sampler.remasking_temperature = 0",
        ),
        (
            sampler.cache != "none" and sampler.guidance > 0,
            f"sampler.cache = {sampler.cache} with guidance: its second pass would need a cache of its own; set one to none or 0",
        ),
        (
            sampler.cache == "none" and sampler.cache_refresh > 0,
            f"sampler.cache_refresh = {sampler.cache_refresh} without a cache; set sampler.cache to prefix or dual",
        ),
        (not 0 < sampler.top_p <= 1, f"sampler.top_p = {sampler.top_p} must lie in (0, 1]"),
        (
            sampler.remasking_temperature > 0 and sampler.remasking in ("random", "left_to_right"),
            f"sampler.remasking_temperature > 0 does nothing for remasking {sampler.remasking}; set it to 0",
        ),
        (
            sampler.schedule == "chance" and sampler.remasking != "random",
            f"sampler.schedule = chance commits whatever the draw says; set sampler.remasking = random (here: {sampler.remasking})",
        ),
        (
            _parameters(model) > MOST_PARAMETERS,
            f"model has {_parameters(model):.1e} parameters, more than {MOST_PARAMETERS:.0e}; lower its width, layers or vocabulary",
        ),
        *(
            (
                rows * length > MOST,
                f"{name} makes arrays of {rows} rows of {length} tokens, more than {MOST} numbers; lower it",
            )
            for name, rows, length in (
                ("sft.batch_size", sft.batch_size, sft.completion_length or c),
                ("rl.prompts_per_step x rl.group_size", rl.prompts_per_step * rl.group_size, c),
                ("evaluation.batch_size", config.evaluation.batch_size, c),
            )
        ),
        (not config.run_dir, "run_dir is empty; name a directory"),
        (not config.stages, "stages is empty; write e.g. [sft, rl]"),
        (
            len(set(config.stages)) != len(config.stages),
            f"stages = {list(config.stages)} names a stage twice; use two runs and init_from",
        ),
        (
            config.stages[:1] == ("rl",) and not config.init_from,
            "stages begins with 'rl', from random weights; set init_from to a run, or put 'sft' first",
        ),
        (not config.task.eval_sets, "task.eval_sets is empty; write e.g. {held_out: generated}"),
        (
            config.task.train == "generated" and config.task.train_rows == 0,
            "task.train_rows = 0 with generated rows; say how many",
        ),
        (
            config.task.eval_rows == 0 and "generated" in config.task.eval_sets.values(),
            "task.eval_rows = 0 with a generated evaluation set; say how many",
        ),
        (
            not set(config.task.held_out_by_solution) <= set(config.task.eval_sets),
            f"task.held_out_by_solution = {list(config.task.held_out_by_solution)} names sets that are not in task.eval_sets",
        ),
        (
            model.param_dtype == "float16",
            "model.param_dtype = float16 is for reading checkpoints; train with bfloat16 or float32",
        ),
        (model.width % model.heads != 0, f"model.heads = {model.heads} does not divide model.width = {model.width}"),
        (
            (model.width // model.heads) % 2 == 1,
            f"model.width / model.heads = {model.width // model.heads} is odd; RoPE rotates pairs",
        ),
        (
            model.heads % model.kv_heads != 0,
            f"model.kv_heads = {model.kv_heads} does not divide model.heads = {model.heads}",
        ),
        (
            sft.batch_size % sft.micro_batches != 0,
            f"sft.micro_batches = {sft.micro_batches} does not divide sft.batch_size = {sft.batch_size}",
        ),
        (not 0 < sft.eps < 1, f"sft.eps = {sft.eps} must lie in (0, 1)"),
        (config.lora.rank > 0 and not config.lora.targets, "lora.targets is empty"),
        ([config.mesh.data, config.mesh.fsdp, config.mesh.tensor].count(-1) > 1, "mesh: at most one axis may be -1"),
    ]
    for name, optimizer in (("sft.optimizer", sft.optimizer), ("rl.optimizer", rl.optimizer)):
        for beta in ("beta1", "beta2"):
            value = getattr(optimizer, beta)
            rules.append((not 0 <= value < 1, f"{name}.{beta} = {value} must lie in [0, 1)"))
    return [*sizes, *rules, *rl_rules(config)]


def _numbers(section: Any, kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The full name and value of every setting that is an int, or a float."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from _numbers(value, kind, f"{prefix}{field.name}.")
        elif type(value) is kind:
            yield prefix + field.name, value


def _parameters(model: ModelConfig) -> int:
    """About how many weights a model of these sizes has."""
    return model.layers * model.width * (4 * model.width + 3 * model.mlp_width) + 2 * model.vocab_size * model.width


def _divisor(length: int, wanted: int) -> int:
    """The divisor of `length` that is nearest to `wanted`."""
    wanted = min(wanted, length)
    near = (size for away in range(wanted) for size in (wanted - away, wanted + away))
    return next(size for size in near if length % size == 0)
