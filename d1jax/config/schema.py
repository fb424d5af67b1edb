"""The frozen dataclasses that every YAML file fills.

config_file.py fills them; config_rules.py knows which combinations are impossible.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

Alignment = Literal["same_position", "shifted"]
# Schedules of the sampler whose steps commit as many positions as the model is sure of.
ADAPTIVE = ("threshold", "factor", "entropy_bound", "klass")


def setting(default: Any, help: str) -> Any:
    if callable(default):
        return dataclasses.field(default_factory=default, metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


def section(factory: Any) -> Any:
    return dataclasses.field(default_factory=factory)


@dataclass(frozen=True)
class TaskConfig:
    """What is learnt: the rows, the prompts, the rewards."""

    name: Literal["sudoku", "countdown", "traces"] = setting("sudoku", "one of d1jax/tasks")
    style: Literal["bare", "instruct"] = setting(
        "bare", "bare: puzzle in, answer out; instruct: instructions and <answer> tags"
    )
    train: str = setting("generated", "'generated', a JSONL file (.jsonl, .jsonl.gz), or hub:NAME of a dataset")
    train_rows: int = setting(20000, "rows to generate, or to keep of the file (0 = all)")
    eval_sets: dict[str, str] = setting(
        lambda: {"held_out": "generated"},
        "name -> such a source, or 'share:0.01' of task.train; the first is the headline",
    )
    eval_rows: int = setting(1024, "rows of each evaluation set (0 = all of a file)")
    held_out_by_solution: tuple[str, ...] = setting(
        (), "evaluation sets whose solutions may not occur in training (all: no problem may)"
    )
    too_long: Literal["fail", "drop"] = setting(
        "fail", "a training row whose prompt or target has too many tokens: an error, or left out and counted"
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
    max_positions: int = setting(0, "longest prompt and completion together (0 = no limit)")
    rope_theta: float = setting(5e5, "base of the rotary angles")
    norm_eps: float = setting(1e-5, "epsilon of RMSNorm")
    qkv_bias: bool = setting(False, "biases on q, k, v (Dream)")
    tied_head: bool = setting(False, "the head is the transposed embedding")
    rope_full_precision: bool = setting(True, "rotate in fp32 (LLaDA), or in the dtype of the activations (Dream)")
    alignment: Alignment = setting("same_position", "row p of the output scores token p (LLaDA) or p + 1 (Dream)")
    dtype: Literal["float32", "bfloat16"] = setting("float32", "activations")
    param_dtype: Literal["float32", "bfloat16", "float16"] = setting(
        "float32",
        "weights that are not trained (the base of an adapter), and exported ones; what is trained is kept in float32 (master "
        "weights), and so are Adam's moments",
    )
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
    """How a completion is denoised: its length, its blocks, how many tokens a step commits, and which.

    `d1jax.SamplerConfig(completion_length=64, block_length=32, steps=32)` decodes 64 tokens in two blocks from left to right,
    two tokens a step. The temperature is no part of it (`sample(..., temperature=0.8)`). ConfigError where settings contradict
    each other, or one has no effect, comes when it is used.
    """

    completion_length: int = setting(20, "new tokens C")  # a 4x4 grid and its line breaks
    block_length: int = setting(20, "tokens of a block; divides completion_length")
    steps: int = setting(4, "denoising steps over all blocks; a multiple of the number of blocks")
    remasking: Literal["low_confidence", "topk_margin", "entropy", "random", "left_to_right"] = setting(
        "low_confidence",
        "committed first: the likeliest, those furthest ahead of the second, of least entropy, any, the left",
    )
    remasking_temperature: float = setting(
        0.0, "Dream's alg_temp: the order is drawn by priority / this (0 = the highest first)"
    )
    schedule: Literal["even", "time", "chance", "threshold", "factor", "entropy_bound", "klass"] = setting(
        "even",
        "tokens of a step: even in a block (LLaDA), by Dream's time, each by its chance (Dream's origin); or all that the next "
        "settings allow, at least one, until the block is full (approximate; sampler.steps does not count then)",
    )
    threshold: float = setting(0.9, "schedules threshold and klass: what is at least (klass: more) confident")
    kl_threshold: float = setting(
        0.01, "schedule klass: and whose distribution moved less in each of the last two steps, nats"
    )
    factor: float = setting(1.0, "schedule factor: the n most confident, while the n-th has 1 - factor / (n + 1)")
    entropy_bound: float = setting(
        0.35, "schedule entropy_bound: the surest, while the others' entropies sum to no more, nats"
    )
    confidence_of: Literal["model", "sampling"] = setting(
        "model", "confidence under the model (LLaDA), or under what is sampled from: tempered and filtered (Dream)"
    )
    top_k: int = setting(0, "sample from the k likeliest tokens (0 = all)")
    top_p: float = setting(1.0, "sample from the likeliest tokens that together reach p (1 = all)")
    guidance: float = setting(0.0, "classifier-free guidance against a hidden prompt; a second forward pass (0 = none)")
    end_token: Literal["allowed", "forbidden", "all_forbidden", "last"] = setting(
        "allowed",
        "forbidden: never sampled (all_forbidden: nor what closes a turn); last: committed only when nothing else is left",
    )
    early_exit: bool = setting(True, "stop a row once its text, through the first token that ends it, is decided")
    cache: Literal["none", "prefix", "dual"] = setting(
        "none",
        "keys and values kept within a block (approximate): of the text before it, or of all but the block (Fast-dLLM)",
    )
    cache_refresh: int = setting(0, "steps after which a cache is made anew within a block (0 = only at its start)")
    record_entropy: bool = setting(
        False, "keep the entropy of the prediction behind every token (for rl.estimator.subset)"
    )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with clipping."""

    learning_rate: float = setting(1e-3, "peak")
    schedule: Literal["constant", "linear", "cosine"] = setting(
        "constant", "after the warm-up: constant, or down to zero"
    )
    warmup_steps: int = setting(0, "optimizer updates from 0 to the peak")
    beta1: float = setting(0.9, "decay of the mean of gradients (the first moment)")
    beta2: float = setting(0.99, "decay of the mean of their squares (the second moment)")
    weight_decay: float = setting(0.0, "on matrices; not on norms, biases and embeddings")
    clip_norm: float = setting(1.0, "global gradient norm (0 = no clipping)")


@dataclass(frozen=True)
class SftConfig:
    """Masked supervised fine-tuning (LLaDA's law)."""

    steps: int = setting(100, "optimizer updates")
    completion_length: int = setting(0, "columns of a target (0 = sampler.completion_length)")
    batch_size: int = setting(128, "rows of an update")
    micro_batches: int = setting(1, "gradient accumulation: parts of a batch")
    eps: float = setting(1e-3, "mask probability is (1 - eps) t + eps")
    score_padding: bool = setting(True, "end tokens behind the text are targets too (LLaDA, d1), or only what ends it")
    normalizer: Literal["per_row", "batch_token"] = setting(
        "per_row",
        "per_row: mean of row means (LLaDA); batch_token: mean over tokens (d1); equal when padding is scored",
    )
    optimizer: OptimizerConfig = section(
        lambda: OptimizerConfig(learning_rate=3e-3, schedule="cosine", warmup_steps=10)
    )


@dataclass(frozen=True)
class EstimatorConfig:
    """How the likelihood of a completion is estimated: a plan of masked views (diffusion/estimators.py)."""

    name: Literal["one_step", "elbo", "coupled", "quadrature", "block", "trajectory", "autoregressive"] = setting(
        "one_step",
        "all masked (d1); random maskings; complementary pairs; fixed ratios; inside one block; recorded states; left to right",
    )
    samples: int = setting(1, "maskings (elbo, block), pairs (coupled), nodes (quadrature), segments (trajectory)")
    counts: Literal["exact", "independent"] = setting(
        "exact", "a masking hides a drawn number of tokens, or each token with a drawn probability"
    )
    weight: Literal["inverse", "uniform"] = setting(
        "inverse", "elbo, block: by 1 / share that is masked, or the mean over the views that mask a token"
    )
    low: float = setting(0.0, "smallest share that is masked")
    high: float = setting(1.0, "largest share that is masked")
    full_mask: bool = setting(False, "coupled, elbo: half of a score with all masked, too (DiffuCoder)")
    subset: float = setting(
        1.0, "autoregressive: score this share of the columns only, those of highest entropy (JustGRPO-Fast: 0.25)"
    )
    shrink: int = setting(0, "trajectory: segments of so many steps instead of `samples` segments (TraceRL)")
    upper_share: float = setting(
        0.0,
        "where the advantage is negative, share of an upper bound in the score (SPG's omega; 0 = the lower bound alone)",
    )
    upper_exponent: float = setting(1.5, "of that bound (SPG's beta)")


@dataclass(frozen=True)
class GuardConfig:
    """When a run has collapsed: any of these for `patience` steps in a row stops it (rl/guards.py)."""

    patience: int = setting(5, "steps in a row (0 = never stop)")
    repeated_tokens: float = setting(0.8, "share of tokens that equal the one before them is above this")
    distinct: float = setting(
        0.0, "distinct completions / completions of a group are at or below this (0 = not watched)"
    )
    entropy: float = setting(0.0, "mean entropy of a prediction, in nats, is below this (0 = not watched)")
    log_ratio: float = setting(5.0, "rms of the log ratio is above this (0 = not watched)")
    kl: float = setting(0.0, "mean KL is above this (0 = not watched)")


@dataclass(frozen=True)
class RlConfig:
    """One method: diffu-GRPO (d1) by default; configs/methods has the others."""

    steps: int = setting(40, "rollout batches")
    prompts_per_step: int = setting(64, "problems of a rollout batch")
    group_size: int = setting(8, "completions of a problem, G")
    inner_updates: int = setting(4, "optimizer updates on a rollout batch, mu, each under its own prompt masks")
    micro_batches: int = setting(1, "gradient accumulation: parts of a rollout batch")
    temperature: float = setting(1.0, "of the rollouts")
    data: Literal["policy", "reference", "targets"] = setting(
        "policy", "who writes the completions: the policy, the reference (offline), or the task's solutions"
    )
    estimator: EstimatorConfig = section(EstimatorConfig)
    prompt_mask: float = setting(0.15, "probability p that the likelihood hides a prompt token")
    mask_sharing: Literal["group", "row"] = setting(
        "group", "completions of a group meet one prompt mask, or (d1) each its own"
    )
    fresh_masks: bool = setting(
        True, "a new prompt mask in every inner update (false: d1's ablation, one mask for all)"
    )
    ratio: Literal["none", "token", "block", "sequence_mean", "sequence_sum"] = setting(
        "token", "what the new and the old likelihood are compared on; none: the policy gradient, without old scores"
    )
    clip: Literal["ppo", "dual", "cispo", "none"] = setting(
        "ppo", "ppo; ppo with a bound where the advantage is negative; cispo (keeps every gradient); none"
    )
    clip_low: float = setting(0.2, "ratio is clipped below 1 - clip_low")
    clip_high: float = setting(0.2, "and above 1 + clip_high")
    dual_clip: float = setting(3.0, "clip dual: the loss is at most this times -advantage")
    advantage: Literal["center", "zscore", "leave_one_out", "batch", "softmax", "accepted", "pairs"] = setting(
        "center",
        "how a group's rewards become advantages; softmax: wd1's weights of good minus those of bad completions; "
        "accepted: 1 where `accept` is earned (RFT); pairs: the best against the worst of a group (DPO)",
    )
    softmax_scale: float = setting(1.0, "advantage softmax: psi, the scale of the centred rewards")
    accept: str = setting("solved", "advantage accepted: the reward that must be 1")
    preference_scale: float = setting(0.1, "advantage pairs: beta of DPO")
    drop_equal_groups: bool = setting(False, "leave groups of equal rewards out of the means, too (DAPO)")
    supervision: Literal["outcome", "text_steps", "commit_steps"] = setting(
        "outcome", "one reward a completion, or the gain of each line or of each part of the decoding (DeepSeekMath)"
    )
    supervision_steps: int = setting(4, "commit_steps: parts of equal length that the decoding is cut into")
    kl_coefficient: float = setting(0.0, "beta of the KL penalty (0 = none)")
    kl: Literal["k1", "k2", "k3"] = setting("k3", "its estimator")
    kl_in: Literal["loss", "reward"] = setting("loss", "a term of the loss, or (PPO) taken off the reward")
    kl_level: Literal["token", "sequence"] = setting("token", "of each token, or of their sum / L")
    kl_to: Literal["reference", "old"] = setting(
        "reference", "the policy at the start, or that of the rollouts (TraceRL)"
    )
    entropy_coefficient: float = setting(0.0, "bonus for the entropy of the predictions, in the loss")
    reference_sync_every: int = setting(
        0, "steps between moves of the reference towards the policy (0 = frozen; full fine-tuning only)"
    )
    reference_mix: float = setting(1.0, "share of the policy in such a move (DiffuCoder: 0.6; 1 = a copy)")
    pooling: Literal["bnpo", "group_bnpo", "grpo", "sequence_mean", "dr_grpo", "row_sum"] = setting(
        "bnpo",
        "bnpo: mean over tokens (DAPO's too); group_bnpo: mean over groups of the mean over a group's tokens (d1's code); grpo, "
        "sequence_mean: mean of row means (d1's eq. 4); dr_grpo: sum / (rows x C); row_sum: mean of row sums",
    )
    reward_weights: dict[str, float] = setting(
        lambda: {"solved": 1.0}, "reward = sum of weight x the task's reward of that name"
    )
    guard: GuardConfig = section(GuardConfig)
    negative_control: Literal["none", "shuffled_rewards", "zero_advantages"] = setting("none", "must teach nothing")
    optimizer: OptimizerConfig = section(lambda: OptimizerConfig(learning_rate=3e-4, clip_norm=0.2))

    @property
    def needs_reference(self) -> bool:
        """Whether the method looks at a policy that the updates do not move."""
        with_kl = self.kl_coefficient > 0 and self.kl_to == "reference"
        return with_kl or self.advantage == "pairs" or self.data == "reference"

    @property
    def kl_in_loss(self) -> bool:
        return self.kl_coefficient > 0 and self.kl_in == "loss"

    @property
    def kl_in_reward(self) -> bool:
        return self.kl_coefficient > 0 and self.kl_in == "reward"


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
    init_from: str = setting(
        "",
        "start from a checkpoint (Hugging Face or d1jax), the last weights of a run, or RUN/checkpoints/STAGE/STEP ('' = random weights)",
    )
    tokenizer: Literal["characters", "bytes"] = setting(
        "characters", "of random weights: the task's characters, or UTF-8 bytes; a checkpoint brings its own"
    )
    checkpoint_every: int = setting(20, "steps between checkpoints (the last step always has one)")
    keep_last: int = setting(
        0,
        "checkpoints of a stage that stay: so many, the best by evaluation.every, and what a roll-back needs (0 = all)",
    )
    max_bad_updates: int = setting(
        10,
        "stop after so many skipped (NaN or infinite) updates in a row, or RL steps without a text that could be rewarded",
    )
    task: TaskConfig = section(TaskConfig)
    model: ModelConfig = section(ModelConfig)
    lora: LoraConfig = section(LoraConfig)
    sampler: SamplerConfig = section(SamplerConfig)
    sft: SftConfig = section(SftConfig)
    rl: RlConfig = section(RlConfig)
    evaluation: EvaluationConfig = section(EvaluationConfig)
    mesh: MeshConfig = section(MeshConfig)


def _with_fields(cls: type) -> None:
    """Adds every field, its default and its meaning to the docstring: what `help(SamplerConfig)` is asked for."""
    told = []
    for field in dataclasses.fields(cls):
        if "help" in field.metadata:
            default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
            told.append(f"    {field.name} = {default!r}: {field.metadata['help']}")
        else:
            told.append(f"    {field.name}: a {field.type}, whose fields are described there")
    cls.__doc__ = f"{(cls.__doc__ or '').rstrip()}\n\n    Fields, with their defaults:\n\n" + "\n".join(told) + "\n    "


for _section in (
    TaskConfig, ModelConfig, LoraConfig, SamplerConfig, OptimizerConfig, SftConfig, EstimatorConfig, GuardConfig, RlConfig,
    EvaluationConfig, MeshConfig, Config,
):  # fmt: skip
    _with_fields(_section)
