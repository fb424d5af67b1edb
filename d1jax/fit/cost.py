"""The work of a program, counted by hand: XLA's own count takes the body of a loop once, and layers, micro-batches and denoising
steps are loops.

    forward    2 x weights of matrix products x tokens  +  4 T^2 D a row and layer (attention is bidirectional)
    backward   as much again for the inputs, and again for the weights that are trained; attention twice, and
               its scores once more, because no layer keeps them
    remat      full: the forward pass once more (dots: its attention); several views (likelihood.py) once more
    head       2 D V a scored position

B rows, T columns, D width, F MLP width, L layers, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import jax

from d1jax.config import LoraConfig, ModelConfig, SamplerConfig
from d1jax.diffusion.kv_cache import window_sizes
from d1jax.diffusion.schedule import step_schedule
from d1jax.fit.compiled import device_bytes
from d1jax.fit.programs import Program
from d1jax.fit.topology import Part
from d1jax.models.sharding import row_shards
from d1jax.models.token_logprobs import LOGITS_PER_CHUNK

LINKS = "links between devices"
REACHED = 0.3  # of a part's limit: the slow end of the range of times
ACTIVATIONS = (10, 5)  # arrays of width D and F that a block reads or writes, a token
SCORES = 10  # bytes that attention reads and writes a score: fp32 out, softmax, bf16 in


@dataclass(frozen=True)
class Work:
    """Of one call of a program."""

    flops: float  # over all devices
    bytes: float  # that a device moves to and from its memory
    steps: int = 1  # denoising steps of the sampler, at most
    at_most: bool = False  # the sampler may stop before it


@dataclass(frozen=True)
class Time:
    """Seconds of one call: at the limit of the part, and at REACHED of it."""

    low: float
    high: float
    limit: str  # what the low end is limited by


def work_of(program: Program) -> Work:
    """FLOPs and memory traffic of one call."""
    return _sampling(program) if program.name == "sampler" else _update(program)


def time_of(work: Work, program: Program, part: Part, collective_bytes: int) -> Time | None:
    """The range of one call; None for a part whose limits are not known. collective_bytes: of a call, or of a denoising step."""
    if part.flops is None or part.bandwidth is None:
        return None
    limits = {
        "FLOP/s": work.flops / program.mesh.size / part.flops,
        "memory bandwidth": work.bytes / part.bandwidth,
        LINKS: work.steps * collective_bytes / part.links if part.links else 0.0,
    }
    limit = max(limits, key=lambda name: limits[name])
    return Time(limits[limit], limits[limit] / REACHED, limit)


# -- FLOPs -------------------------------------------------------------------------------------------------------------


def block_weights(model: ModelConfig) -> int:
    """Weights of the matrix products of all blocks."""
    return _block_weights(model, active=False)


def active_weights(model: ModelConfig) -> int:
    """Those that a token passes through: all, but of a mixture of experts the chosen and the shared ones."""
    return _block_weights(model, active=True)


def _block_weights(model: ModelConfig, active: bool) -> int:
    queries, keys = model.heads * model.head_columns, model.kv_heads * model.head_columns
    return model.width * (model.layers * (2 * queries + 2 * keys) + model.mlp_columns(active))


def adapter_weights(model: ModelConfig, lora: LoraConfig) -> int:
    """Weights of all adapters."""
    width, keys, hidden = model.width, model.width * model.kv_heads // model.heads, model.mlp_width
    sizes = {"q_proj": 2 * width, "attn_out": 2 * width} | dict.fromkeys(("k_proj", "v_proj"), width + keys)
    sizes |= dict.fromkeys(("ff_proj", "up_proj", "ff_out"), width + hidden)
    return model.layers * lora.rank * sum(sizes[name] for name in lora.targets) if lora.rank else 0


def linear_flops(tokens: int, weights: int) -> float:
    return 2.0 * tokens * weights


def attention_flops(model: ModelConfig, rows: int, queries: int, keys: int) -> float:
    return 4.0 * rows * queries * keys * model.width * model.layers


def forward_flops(model: ModelConfig, lora: LoraConfig, rows: int, queries: int, keys: int) -> float:
    """A pass of the blocks over `queries` columns a row, which attend to `keys` columns."""
    weights = active_weights(model) + adapter_weights(model, lora)
    return linear_flops(rows * queries, weights) + attention_flops(model, rows, queries, keys)


def head_flops(model: ModelConfig, positions: int) -> float:
    return linear_flops(positions, model.width * model.vocab_size)


def _update(program: Program) -> Work:
    config = program.config
    model, lora, full = _model(program), config.lora, config.lora.rank == 0
    rows, length = program.rows, program.columns + program.prompt_columns
    tokens, again = rows * length, _recomputed(program)
    passes = {  # of the forward pass's products, in one pass with gradients
        "base": 2 + full + again,
        "adapters": 3 + again,
        "attention": 3.5 + again + (model.remat in ("dots", "offload")),
        "head": 2 + full + (_head_chunks(program) > 1),
    }
    one = (
        passes["base"] * linear_flops(tokens, active_weights(model))
        + passes["adapters"] * linear_flops(tokens, adapter_weights(model, lora))
        + passes["attention"] * attention_flops(model, rows, length, length)
    )
    positions = rows * program.columns * program.head_passes
    gradient = program.views * one + passes["head"] * head_flops(model, positions)
    score = program.views * forward_flops(model, lora, rows, length, length) + head_flops(model, positions)
    updates, scores = _calls(program)
    passes_over_weights = program.parts * math.ceil(program.views)
    reads = passes_over_weights * (updates * (2 + again) + scores)
    moved = reads * _weight_bytes(program) + updates * _state_bytes(program)
    moved += _activation_bytes(program, length) * program.views * (updates * (3 + again) + scores)
    return Work(updates * gradient + scores * score, moved)


def _calls(program: Program) -> tuple[int, int]:
    """(passes with gradients over all rows, passes without) in one call."""
    config, kinds = program.config, {stage.name: stage.kind for stage in program.config.stages}
    kind = kinds[program.stage]
    if kind == "preference":
        return 1, 1
    if kind != "rl":
        return 1, 0
    rl, updates = config.rl, config.rl.num_iterations
    with_old = rl.policy_loss.name != "policy_gradient" or (rl.kl.name == "loss" and rl.kl.to == "old")
    scores = (updates - 1) * with_old
    scores += updates * (rl.kl.name == "loss" and rl.kl.to == "reference")
    scores += (updates - 1) * (rl.policy_loss.name == "self_normalized")
    scores += updates * (rl.kl.name == "loss" and rl.kl.level == "relative")
    return updates, scores


def _recomputed(program: Program) -> int:
    """How often the forward pass is done again for the way back."""
    return (_model(program).remat == "full") + (program.views > 1)


def _head_chunks(program: Program) -> int:
    chunk = max(LOGITS_PER_CHUNK // program.vocabulary, 1)
    return math.ceil(program.rows * min(program.head_passes, 1) * program.columns / program.parts / chunk)


def _model(program: Program) -> ModelConfig:
    return dataclasses.replace(program.config.model, vocab_size=program.vocabulary)


def _sampling(program: Program) -> Work:
    config, sampler, model = program.config, program.config.sampler, _model(program)
    length, rows = program.columns + program.prompt_columns, program.rows
    widths = _widths(sampler, length)
    passes = 2 if sampler.guidance > 0 else 1
    flops = sum(forward_flops(model, config.lora, rows, width, length) for width in widths)
    flops += len(widths) * head_flops(model, rows * sampler.block_length)
    moved = len(widths) * passes * _weight_bytes(program)
    moved += passes * sum(_activation_bytes(program, width) for width in widths)
    return Work(passes * flops, moved, len(widths), sampler.schedule.adaptive or sampler.early_exit)


def _widths(sampler: SamplerConfig, length: int) -> list[int]:
    """Columns that each denoising step passes over, when all steps are done."""
    block = sampler.block_length
    if sampler.schedule.adaptive:
        starts = [start for start in range(0, sampler.completion_length, block) for _ in range(block)]
    else:
        starts = step_schedule(sampler).start_K.tolist()
    if sampler.cache.name == "none":
        return [length] * len(starts)
    widths, age, before = [], 0, None
    for start in starts:
        age = 0 if start != before or (sampler.cache.refresh and age == sampler.cache.refresh) else age
        needed = block if sampler.cache.name == "dual" else sampler.completion_length - start
        widths.append(next(size for size in window_sizes(sampler) if size >= needed) if age else length)
        age, before = age + 1, start
    return widths


# -- bytes -------------------------------------------------------------------------------------------------------------


def _weight_bytes(program: Program) -> float:
    """Of all weights as a device reads them in a pass: gathered over fsdp, cut by tensor."""
    leaves = jax.tree.leaves(program.held["weights"])
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / program.mesh.shape["tensor"]


def _state_bytes(program: Program) -> float:
    """What an optimizer update moves: gradients in and out, moments and masters read and written."""
    return 2 * device_bytes(program.held["optimizer"]) * 2


def _activation_bytes(program: Program, width: int) -> float:
    """What one forward pass of all rows moves beside weights, on one device."""
    model, length = program.config.model, program.columns + program.prompt_columns
    rows, tensor = program.rows / row_shards(program.mesh), program.mesh.shape["tensor"]
    of_width, of_hidden = ACTIVATIONS
    a_token = (of_width * model.width + of_hidden * model.hidden_columns / tensor) * _size(model)
    scores = model.heads / tensor * width * length * SCORES
    return model.layers * rows * (width * a_token + scores)


def _size(model: ModelConfig) -> int:
    return 2 if model.dtype == "bfloat16" else 4


# -- temporaries, where no compiler of the target is at hand -----------------------------------------------------------


def estimated_temporaries(program: Program) -> int:
    """About what a program holds beside its arguments on one device, bytes: gradients, what is kept for the way back, one block at
    work, gathered weights of two blocks and of the head, logits of a chunk."""
    model, mesh, size = _model(program), program.mesh, _size(_model(program))
    tensor, update = mesh.shape["tensor"], program.name != "sampler"
    rows = math.ceil(program.rows * min(program.views, 1) / program.parts / row_shards(mesh))
    length = program.columns + program.prompt_columns
    stream = rows * length * model.width * size
    scores = rows * model.heads / tensor * length**2
    # Of a block: normed, q, k, v, mixed, residual; gate, up and their product. The scores, in fp32 and in the dtype of the values, are not
    # kept for the way back.
    kept_block = 6 * stream + 3 * rows * length * model.hidden_columns / tensor * size
    block = kept_block + scores * (4 + size)
    kept = 0.0
    if update:
        products = 5 * stream + 2 * rows * length * model.hidden_columns / tensor * size
        a_block = {"full": stream, "dots": stream + products, "offload": stream, "none": kept_block}[model.remat]
        kept = model.layers * a_block
        block *= 3  # and their gradients, and what waits for both
    stored = 4 if program.config.lora.rank == 0 and update else size
    split = mesh.shape["fsdp"] > 1 and (update or program.config.mesh.rollout_weights == "as_trained")
    gathered = 2 * block_weights(model) / model.layers / tensor * (stored if split else 0)
    casts = (size if stored != size else 0) * block_weights(model) / model.layers / tensor
    head = model.width * model.vocab_size / tensor * ((stored if split else 0) + (size if stored != size else 0))
    trained = device_bytes(program.held["optimizer"]) / 2 if update else 0.0  # as much as one of Adam's moments
    gradients = trained * (1 + (program.parts > 1))
    chunk = (
        LOGITS_PER_CHUNK if update else rows * max(LOGITS_PER_CHUNK // (rows * model.vocab_size), 1) * model.vocab_size
    )
    passes = kept + block + gathered + casts + head + gradients + 3 * 4 * chunk / tensor
    return round(max(passes, 2 * trained))  # then gradient and change, for the optimizer
