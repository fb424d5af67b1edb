"""The frozen dataclasses that every YAML file fills, and the few lines that fill them.

    config = parse(["--config", "configs/quickstart.yaml", "--rl.steps", "50"])

YAML is read by draccus (so `!include` works and `1e-6` is a float where the field is one). Later sources win: defaults of
the dataclasses, then the file, then the command line. Every mistake is a `ConfigError` that names the key, its value and the cure.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import draccus
from draccus.utils import DecodingError, ParsingError


class ConfigError(ValueError):
    """The user's configuration is wrong; the message says where and what to write instead."""


def setting(default: Any, help: str) -> Any:
    if callable(default):
        return dataclasses.field(default_factory=default, metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


def section(factory: Any) -> Any:
    return dataclasses.field(default_factory=factory)


@dataclass(frozen=True)
class TaskConfig:
    """What is learnt: the rows, the prompts, the rewards."""

    name: Literal["sudoku", "countdown"] = setting("sudoku", "one of d1jax/tasks")
    style: Literal["bare", "instruct"] = setting(
        "bare", "bare: puzzle in, answer out; instruct: instructions and <answer> tags"
    )
    train: str = setting("generated", "'generated', or a JSONL file (.jsonl, .jsonl.gz)")
    train_rows: int = setting(20000, "rows to generate, or to keep of the file (0 = all)")
    eval_sets: dict[str, str] = setting(
        lambda: {"held_out": "generated"}, "name -> 'generated' or a JSONL file; the first is the headline"
    )
    eval_rows: int = setting(1024, "rows of each evaluation set (0 = all of a file)")
    held_out_by_solution: tuple[str, ...] = setting(
        (), "evaluation sets whose solutions may not occur in training (all: no problem may)"
    )
    seed: int = setting(0, "seeds the generator and the train/test split")
    numbers: tuple[int, ...] = setting((3,), "countdown: how many numbers a problem may have")


@dataclass(frozen=True)
class ModelConfig:
    """A bidirectional transformer with LLaDA's architecture."""

    width: int = setting(64, "residual stream")
    layers: int = setting(3, "blocks")
    heads: int = setting(4, "query heads")
    kv_heads: int = setting(4, "key and value heads (grouped-query attention where fewer than heads)")
    mlp_width: int = setting(160, "hidden units of the SwiGLU")
    vocab_size: int = setting(0, "rows of the embedding (0 = as many as the tokenizer has)")
    rope_theta: float = setting(5e5, "base of the rotary angles")
    norm_eps: float = setting(1e-5, "epsilon of RMSNorm")
    qkv_bias: bool = setting(False, "biases on q, k, v (Dream)")
    tied_head: bool = setting(False, "the head is the transposed embedding")
    alignment: Literal["same_position", "shifted"] = setting(
        "same_position", "row p of the output scores token p (LLaDA) or p + 1 (Dream)"
    )
    dtype: Literal["float32", "bfloat16"] = setting("float32", "activations")
    param_dtype: Literal["float32", "bfloat16"] = setting("float32", "stored weights")
    remat: bool = setting(False, "recompute each block in the backward pass")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters; rank 0 trains all weights."""

    rank: int = setting(0, "0 = full fine-tuning")
    alpha: float = setting(64.0, "adapters are scaled by alpha / rank")
    targets: tuple[str, ...] = setting(
        ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"),
        "linear layers of a block (never the head)",
    )


@dataclass(frozen=True)
class SamplerConfig:
    """Semi-autoregressive denoising."""

    completion_length: int = setting(16, "new tokens C")
    block_length: int = setting(16, "tokens of a block; divides completion_length")
    steps: int = setting(8, "denoising steps over all blocks; a multiple of the number of blocks")
    remasking: Literal["low_confidence", "random"] = setting("low_confidence", "which candidates are committed first")
    end_token: Literal["allowed", "forbidden", "last"] = setting(
        "allowed", "forbidden: never sampled; last: committed only when nothing else is left"
    )
    early_exit: bool = setting(True, "stop a row once its text up to the end token is decided")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with clipping."""

    learning_rate: float = setting(1e-3, "peak")
    schedule: Literal["constant", "linear", "cosine"] = setting(
        "constant", "after the warm-up: constant, or down to zero"
    )
    warmup_steps: int = setting(0, "optimizer updates from 0 to the peak")
    beta1: float = setting(0.9, "")
    beta2: float = setting(0.99, "")
    weight_decay: float = setting(0.0, "on matrices; not on norms, biases and embeddings")
    clip_norm: float = setting(1.0, "global gradient norm (0 = no clipping)")


@dataclass(frozen=True)
class SftConfig:
    """Masked supervised fine-tuning (LLaDA's law)."""

    steps: int = setting(100, "optimizer updates")
    batch_size: int = setting(128, "rows of an update")
    micro_batches: int = setting(1, "gradient accumulation: parts of a batch")
    eps: float = setting(1e-3, "mask probability is (1 - eps) t + eps")
    normalizer: Literal["per_row", "batch_token"] = setting("per_row", "per_row: LLaDA; batch_token: d1")
    optimizer: OptimizerConfig = section(
        lambda: OptimizerConfig(learning_rate=3e-3, schedule="cosine", warmup_steps=10)
    )


@dataclass(frozen=True)
class RlConfig:
    """diffu-GRPO."""

    steps: int = setting(40, "rollout batches")
    prompts_per_step: int = setting(64, "problems of a rollout batch")
    group_size: int = setting(8, "completions of a problem, G")
    inner_updates: int = setting(4, "optimizer updates on a rollout batch, mu, each under its own prompt masks")
    micro_batches: int = setting(1, "gradient accumulation: parts of a rollout batch")
    temperature: float = setting(1.0, "of the rollouts")
    prompt_mask: float = setting(0.15, "probability p that the likelihood hides a prompt token")
    mask_sharing: Literal["group", "row"] = setting(
        "group", "completions of a group meet one prompt mask, or (d1) each its own"
    )
    fresh_masks: bool = setting(
        True, "a new prompt mask in every inner update (false: d1's ablation, one mask for all)"
    )
    clip_low: float = setting(0.2, "ratio is clipped below 1 - clip_low")
    clip_high: float = setting(0.2, "and above 1 + clip_high")
    advantage: Literal["center", "zscore", "leave_one_out"] = setting(
        "center", "how a group's rewards become advantages"
    )
    kl_coefficient: float = setting(0.0, "beta of the k3 penalty to the reference (0 = no reference)")
    reference_sync_every: int = setting(
        0, "steps between copies of the policy into the reference (0 = frozen; full fine-tuning only)"
    )
    pooling: Literal["bnpo", "grpo", "dr_grpo"] = setting(
        "bnpo", "bnpo: mean over tokens (d1); grpo: mean of row means; dr_grpo: sum / (rows x C)"
    )
    reward_weights: dict[str, float] = setting(
        lambda: {"solved": 1.0}, "reward = sum of weight x the task's reward of that name"
    )
    negative_control: Literal["none", "shuffled_rewards", "zero_advantages"] = setting("none", "must teach nothing")
    optimizer: OptimizerConfig = section(lambda: OptimizerConfig(learning_rate=3e-4, clip_norm=0.2))


@dataclass(frozen=True)
class EvaluationConfig:
    """Greedy decoding with the grader."""

    batch_size: int = setting(256, "rows at a time")
    temperature: float = setting(0.0, "0 = greedy")
    every: int = setting(0, "steps between evaluations of the headline set during a stage (0 = only at its end)")
    samples: int = setting(8, "rows kept for the report")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one of them may be -1 (all that are left)."""

    data: int = setting(-1, "copies of the model")
    fsdp: int = setting(1, "shards of every weight, gathered when used")
    tensor: int = setting(1, "shards of heads, MLP and vocabulary")


@dataclass(frozen=True)
class Config:
    """One run: one config in, one run directory out."""

    run_dir: str = setting("runs/run", "where everything goes")
    stages: tuple[Literal["sft", "rl"], ...] = setting(("sft", "rl"), "in this order")
    seed: int = setting(0, "of weights, masks, rollouts and row order")
    init_from: str = setting("", "start from the last weights of another run directory ('' = random weights)")
    checkpoint_every: int = setting(20, "steps between checkpoints (the last step always has one)")
    max_bad_updates: int = setting(10, "stop after so many skipped (NaN or infinite) updates in a row")
    task: TaskConfig = section(TaskConfig)
    model: ModelConfig = section(ModelConfig)
    lora: LoraConfig = section(LoraConfig)
    sampler: SamplerConfig = section(SamplerConfig)
    sft: SftConfig = section(SftConfig)
    rl: RlConfig = section(RlConfig)
    evaluation: EvaluationConfig = section(EvaluationConfig)
    mesh: MeshConfig = section(MeshConfig)


# -- reading ------------------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str]) -> Config:
    """`--config file.yaml` and `--a.b value` (or `--a.b=value`) -> a checked Config. Raises ConfigError."""
    raw = to_dict(Config())
    for key, value, source in _command_line(argv):
        _merge(raw, _read_yaml(value) if key == "config" else _nested(key, value), Config, source)
    return check(decode(raw))


def decode(raw: Mapping[str, Any]) -> Config:
    try:
        return draccus.decode(Config, raw)
    except (DecodingError, ParsingError) as error:
        raise ConfigError(f"config: {error}") from error


def to_dict(config: Any) -> dict[str, Any]:
    """Plain dictionaries and lists, as YAML and JSON want them."""
    return draccus.encode(config)


def to_yaml(config: Config) -> str:
    return draccus.dump(config)


def from_yaml(path: str | Path) -> Config:
    """The resolved configuration that a run directory keeps."""
    raw = to_dict(Config())
    _merge(raw, _read_yaml(str(path)), Config, str(path))
    return check(decode(raw))


def differences(old: Config, new: Config) -> list[str]:
    """`rl.steps: 40 -> 50`, one line a field."""
    flat_old, flat_new = _flatten(to_dict(old)), _flatten(to_dict(new))
    keys = sorted(flat_old.keys() | flat_new.keys())
    return [f"{k}: {flat_old.get(k)!r} -> {flat_new.get(k)!r}" for k in keys if flat_old.get(k) != flat_new.get(k)]


def help_text(program: str) -> str:
    """Every key with its default, its choices and what it means."""
    lines = [
        f"usage: {program} --config FILE.yaml [--section.key VALUE ...]",
        "",
        "Later sources win: defaults below, then the file, then the command line.",
    ]

    def describe(cls: type, default: Any, prefix: str) -> None:
        hints = get_type_hints(cls)
        lines.extend(["", f"{prefix[:-1] or 'run'}: {(cls.__doc__ or '').strip()}"])
        nested = []
        for field in dataclasses.fields(cls):
            value = getattr(default, field.name)
            if dataclasses.is_dataclass(value):
                nested.append((hints[field.name], value, f"{prefix}{field.name}."))
                continue
            choices = get_args(hints[field.name]) if get_origin(hints[field.name]) is Literal else ()
            shown = " | ".join(map(str, choices)) if choices else str(draccus.encode(value))
            flag = f"--{prefix}{field.name}"
            mark = f"[{value}] of {shown}" if choices else f"[{shown}]"
            lines.append(f"  {flag:<34} {field.metadata['help']}  {mark}".rstrip())
        for child in nested:
            describe(*child)

    describe(Config, Config(), "")
    return "\n".join(lines)


def _command_line(argv: Sequence[str]) -> list[tuple[str, str, str]]:
    """[(key, value, where it stood)], with the config file first so that flags win wherever it stands."""
    pairs, rest = [], list(argv)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise ConfigError(f"command line: {flag!r} is not a flag; write --section.key value")
        key, equals, value = flag[2:].partition("=")
        if not equals:
            if not rest:
                raise ConfigError(f"command line: {flag} has no value")
            value = rest.pop(0)
        pairs.append((key, value, value if key == "config" else f"command line: --{key}"))
    return sorted(pairs, key=lambda pair: pair[0] != "config")


def _read_yaml(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise ConfigError(f"config file {path!r} does not exist")
    try:
        with open(path, encoding="utf-8") as stream:
            loaded = draccus.cfgparsing.load_config(stream, file=path)
    except (ParsingError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error.__cause__ or error}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(loaded).__name__}")
    return loaded


def _nested(dotted: str, value: str) -> dict[str, Any]:
    """'rl.steps', '50' -> {'rl': {'steps': 50}}; the value is YAML, so lists and mappings can be written too."""
    try:
        node: Any = draccus.cfgparsing.parse_string(value)
    except Exception as error:
        raise ConfigError(f"command line: --{dotted} {value!r} is not a YAML value: {error}") from error
    for key in reversed(dotted.split(".")):
        node = {key: node}
    return node


def _merge(base: dict[str, Any], extra: Mapping[str, Any], cls: type, source: str, path: str = "") -> None:
    """Lays `extra` over `base` in place. Only sections merge; mappings that are values (reward_weights) are replaced."""
    hints = get_type_hints(cls)
    for key, value in extra.items():
        if key not in hints:
            meant = _meant(str(key), path, hints)
            suggestion = f" (did you mean '{meant}'?)" if meant else ""
            raise ConfigError(f"{source}: unknown key '{path}{key}'{suggestion}; choices: {', '.join(hints)}")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{source}: '{path}{key}' is a section; write '{path}{key}.<key>' (got {value!r})")
            _merge(base[key], value, hints[key], source, f"{path}{key}.")
            continue
        if get_origin(hints[key]) is Literal and value not in get_args(hints[key]):
            choices = get_args(hints[key])
            near = difflib.get_close_matches(str(value), choices, n=1)
            suggestion = f" (did you mean '{near[0]}'?)" if near else ""
            raise ConfigError(f"{source}: {path}{key} = {value!r} is not one of {', '.join(choices)}{suggestion}")
        if value is None:
            raise ConfigError(f"{source}: {path}{key} has no value; write one, or leave the key out for its default")
        if get_origin(hints[key]) is tuple and not isinstance(value, (list, tuple)):
            # A string would be read letter by letter.
            raise ConfigError(f"{source}: {path}{key} = {value!r} is not a list; write [{value}]")
        base[key] = value


def _meant(key: str, path: str, hints: Mapping[str, Any]) -> str | None:
    """The full name of the key that was meant: the same name in another section, or else a similar one here or there."""
    every = list(_keys(Config))
    same = [name for name in every if name.rpartition(".")[2] == key]
    if same:
        return difflib.get_close_matches(path + key, same, n=1, cutoff=0)[0]
    here = difflib.get_close_matches(key, hints, n=1, cutoff=0.5)
    if here:
        return path + here[0]
    last = {name.rpartition(".")[2]: name for name in every}
    return next((last[match] for match in difflib.get_close_matches(key, last, n=1, cutoff=0.8)), None)


def _keys(cls: type, prefix: str = "") -> Iterator[str]:
    """The full name of every section and key."""
    for key, hint in get_type_hints(cls).items():
        yield prefix + key
        if dataclasses.is_dataclass(hint):
            yield from _keys(hint, f"{prefix}{key}.")


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


# -- checking -----------------------------------------------------------------------------------------------------------


def check(config: Config) -> Config:
    """The same config, or a ConfigError that lists every impossible combination and what to change."""
    problems = [message for broken, message in _rules(config) if broken]
    if problems:
        raise ConfigError("config: " + "\nconfig: ".join(problems))
    return config


def _rules(config: Config) -> list[tuple[bool, str]]:
    model, sampler, sft, rl = config.model, config.sampler, config.sft, config.rl
    c, block, steps = sampler.completion_length, sampler.block_length, sampler.steps
    blocks = max(c // max(block, 1), 1)
    rows = rl.prompts_per_step * rl.group_size
    positive = {
        "model.width": model.width, "model.layers": model.layers, "model.heads": model.heads, "model.kv_heads": model.kv_heads,
        "model.mlp_width": model.mlp_width, "sampler.completion_length": c, "sampler.block_length": block, "sampler.steps": steps,
        "sft.steps": sft.steps, "sft.batch_size": sft.batch_size, "sft.micro_batches": sft.micro_batches, "rl.steps": rl.steps,
        "rl.prompts_per_step": rl.prompts_per_step, "rl.inner_updates": rl.inner_updates, "rl.micro_batches": rl.micro_batches,
        "evaluation.batch_size": config.evaluation.batch_size, "checkpoint_every": config.checkpoint_every,
        "max_bad_updates": config.max_bad_updates, "sft.optimizer.learning_rate": sft.optimizer.learning_rate,
        "rl.optimizer.learning_rate": rl.optimizer.learning_rate,
    }  # fmt: skip
    not_negative = {
        "lora.rank": config.lora.rank, "task.train_rows": config.task.train_rows, "task.eval_rows": config.task.eval_rows,
        "evaluation.every": config.evaluation.every, "evaluation.samples": config.evaluation.samples,
        "evaluation.temperature": config.evaluation.temperature, "rl.kl_coefficient": rl.kl_coefficient,
        "rl.reference_sync_every": rl.reference_sync_every, "rl.clip_low": rl.clip_low, "rl.clip_high": rl.clip_high,
    }  # fmt: skip
    rules = [(value <= 0, f"{name} = {value} must be above 0") for name, value in positive.items()]
    if any(broken for broken, _ in rules):
        return rules  # the divisions below need positive numbers
    rules += [(value < 0, f"{name} = {value} must not be negative") for name, value in not_negative.items()]
    rules += [
        (not config.stages, "stages is empty; write e.g. [sft, rl]"),
        (
            len(set(config.stages)) != len(config.stages),
            f"stages = {list(config.stages)} names a stage twice; use two runs and init_from",
        ),
        (
            config.stages == ("rl",) and not config.init_from,
            "stages = ['rl'] starts from random weights; set init_from to a run, or add 'sft'",
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
            not config.task.numbers or not set(config.task.numbers) <= {3, 4},
            f"task.numbers = {list(config.task.numbers)} must be 3, 4 or both",
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
            c % block != 0,
            f"sampler.block_length = {block} does not divide sampler.completion_length = {c}; try {_divisor(c, block)}",
        ),
        (steps < blocks, f"sampler.steps = {steps} is fewer than the {blocks} blocks; every block needs a step"),
        (steps > c, f"sampler.steps = {steps} is more than the {c} tokens of sampler.completion_length"),
        (
            steps % blocks != 0,
            f"sampler.steps = {steps} is not a multiple of the {blocks} blocks; try {max(steps // blocks, 1) * blocks}",
        ),
        (
            rl.group_size < 2,
            f"rl.group_size = {rl.group_size}: advantages compare completions of a group, so at least 2",
        ),
        (
            rows % rl.micro_batches != 0,
            f"rl.micro_batches = {rl.micro_batches} does not divide the {rows} rows of a step",
        ),
        (
            sft.batch_size % sft.micro_batches != 0,
            f"sft.micro_batches = {sft.micro_batches} does not divide sft.batch_size = {sft.batch_size}",
        ),
        (not 0 <= rl.prompt_mask < 1, f"rl.prompt_mask = {rl.prompt_mask} must lie in [0, 1)"),
        (not 0 < sft.eps < 1, f"sft.eps = {sft.eps} must lie in (0, 1)"),
        (rl.clip_low > 1, f"rl.clip_low = {rl.clip_low} must be at most 1 (the ratio is never negative)"),
        (
            rl.temperature <= 0,
            f"rl.temperature = {rl.temperature}: a group of greedy completions is all the same; use e.g. 1.0",
        ),
        (not rl.reward_weights, "rl.reward_weights is empty; write e.g. {solved: 1.0}"),
        (
            rl.reference_sync_every > 0 and config.lora.rank > 0,
            "rl.reference_sync_every > 0 with LoRA: the reference is the model without its adapter and never moves; set it to 0",
        ),
        (config.lora.rank > 0 and not config.lora.targets, "lora.targets is empty"),
        ([config.mesh.data, config.mesh.fsdp, config.mesh.tensor].count(-1) > 1, "mesh: at most one axis may be -1"),
    ]
    return rules


def _divisor(length: int, wanted: int) -> int:
    return min((d for d in range(1, length + 1) if length % d == 0), key=lambda d: abs(d - wanted))
