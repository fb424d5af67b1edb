"""The programs that a run compiles, from shapes alone: no weights and no rows are made.

They are made by the functions that training calls (`make_update` of each kind of stage, `Sampler.sample`), with arguments of the
shapes, dtypes and places that training gives them.

B rows, C completion columns, P prompt columns, Q pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from d1jax.adapt import loop as adapt
from d1jax.config import Config, Stage
from d1jax.data.tokenizers import SpecialTokens
from d1jax.diffusion.canvas import Canvas
from d1jax.diffusion.decoding import Prompts
from d1jax.diffusion.masked_columns import column_chunk
from d1jax.diffusion.noise import KeyedNoise
from d1jax.diffusion.sampler import Sampler
from d1jax.models.reward_head import HEAD
from d1jax.models.sharding import gathered, replicated, rows_sharding
from d1jax.models.transformer import Transformer, Variables, abstract_variables
from d1jax.preference import loop as preference
from d1jax.reward_model import loop as reward_model
from d1jax.reward_model import pairs, steps
from d1jax.rl import update as rl
from d1jax.sft import loop as sft
from d1jax.training.likelihood import RolloutBatch, Scorer
from d1jax.training.optimizer import TrainState, abstract_state, make_optimizer
from d1jax.training.setup import split

LABELLED_STEPS = 16  # of a text, for a process reward model: the rows are not read, and their number changes little


@dataclass(frozen=True)
class Shapes:
    """What all programs of a run have in common; weights are shapes with placements."""

    model: Transformer
    mesh: Mesh
    special: SpecialTokens
    prompt_columns: int
    platform: str  # what the programs are for: cpu, gpu, tpu

    def rows(self, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        """An array of rows, cut over the devices."""
        sharding = rows_sharding(self.mesh, jax.ShapeDtypeStruct(shape, dtype))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def whole(self, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        """An array that every device has."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(self.mesh))

    @property
    def sizes(self) -> dict[str, int]:
        return {"prompt_columns": self.prompt_columns, "vocabulary": self.model.config.vocab_size}

    @property
    def key(self) -> jax.ShapeDtypeStruct:
        return self.whole(jax.eval_shape(jax.random.key, 0).dtype)

    def canvas(self, rows: int, columns: int) -> Canvas:
        sizes = (rows, columns), (rows, self.prompt_columns), (rows,)
        return Canvas(*(self.rows(jnp.int32, *size) for size in sizes))

    def stored_rollout(self, rows: int, columns: int, with_entropy: bool) -> RolloutBatch:
        entropy_BC = self.rows(jnp.float32, rows, columns) if with_entropy else None
        ids_B, step_BC = self.rows(jnp.int32, rows), self.rows(jnp.int32, rows, columns)
        return RolloutBatch(self.canvas(rows, columns), ids_B, step_BC, entropy_BC)


@dataclass(frozen=True)
class Program:
    """A compiled function of training and the shapes of its arguments."""

    stage: str
    name: str  # update or sampler
    config: Config  # as the stage sees it
    mesh: Mesh
    trace: Callable[[], jax.stages.Lowered]
    held: dict[str, Any]  # what its arguments are, every array once: weights, optimizer, reference, rows
    twice: Any = ()  # arrays that are two of its arguments: the base of an adapter, shared with the reference
    beside: Any = ()  # arrays that lie in memory while it runs and are none of its arguments
    rows: int = 0  # of the model's passes, over all devices
    columns: int = 0  # of completions
    prompt_columns: int = 0
    vocabulary: int = 0  # rows of the embedding
    parts: int = 1  # micro-batches
    calls: int = 1  # a step
    views: Fraction | int = 1  # forward passes of a score over all rows
    head_passes: Fraction | int = 1  # passes of the vocabulary head of a score

    @property
    def title(self) -> str:
        return f"{self.stage} {self.name}"

    def lower(self) -> jax.stages.Lowered:
        """The program before it is compiled."""
        with jax.set_mesh(self.mesh):
            return self.trace()


def programs_of(config: Config, shapes: Shapes) -> tuple[Program, ...]:
    """The programs of every stage, in the order of the stages."""
    found: list[Program] = []
    for stage in config.stages:
        if stage.kind in PROGRAMS:
            found += PROGRAMS[stage.kind](config.for_stage(stage.name), stage, shapes)
    return tuple(found)


def variables_of(shapes: Shapes, config: Config) -> Variables:
    """The variables of a stage: what is trained in float32, as `new_state` keeps it, the rest in model.param_dtype."""
    collections = ("params", "lora") if config.lora.rank else ("params",)
    return abstract_variables(shapes.model, shapes.mesh, collections)


def _adapt(config: Config, stage: Stage, shapes: Shapes) -> list[Program]:
    section, (trainable, frozen) = config.adapt, split(variables_of(shapes, config))
    optimizer = make_optimizer(section.optimizer, section.steps)
    state = abstract_state(optimizer, trainable, shapes.mesh, section.optimizer.offload)
    update = adapt.make_update(shapes.model, optimizer, section, shapes.special.mask, state)
    tokens_BT = shapes.rows(jnp.int32, section.batch_size, section.length)
    share = shapes.whole(jnp.float32) if section.anneal_steps else None  # the annealed mask takes the most memory
    held = {**_held(state, frozen), "rows": tokens_BT}

    def lower() -> jax.stages.Lowered:
        return update.lower(state, frozen, tokens_BT, shapes.key, share)

    sizes = {
        "rows": section.batch_size,
        "columns": section.length,
        "vocabulary": shapes.model.config.vocab_size,
        "parts": section.grad_accumulation_steps,
    }
    return [Program(stage.name, "update", config, shapes.mesh, lower, held, **sizes)]


def _sft(config: Config, stage: Stage, shapes: Shapes) -> list[Program]:
    section, (trainable, frozen) = config.sft, split(variables_of(shapes, config))
    optimizer = make_optimizer(section.optimizer, section.steps)
    state = abstract_state(optimizer, trainable, shapes.mesh, section.optimizer.offload)
    update = sft.make_update(shapes.model, optimizer, section, shapes.special, state)
    clean = shapes.canvas(section.batch_size, section.completion_length or config.sampler.completion_length)
    held = {**_held(state, frozen), "rows": clean}
    sizes = {
        "rows": section.batch_size,
        **shapes.sizes,
        "columns": clean.completion_BC.shape[1],
        "parts": section.grad_accumulation_steps,
    }

    def lower() -> jax.stages.Lowered:
        return update.lower(state, frozen, clean, shapes.key)

    return [Program(stage.name, "update", config, shapes.mesh, lower, held, **sizes)]


def _rl(config: Config, stage: Stage, shapes: Shapes) -> list[Program]:
    section, (trainable, frozen) = config.rl, split(variables_of(shapes, config))
    rows, columns = section.rollout_rows, config.sampler.completion_length
    optimizer = make_optimizer(section.optimizer, section.steps)
    state = abstract_state(optimizer, trainable, shapes.mesh, section.optimizer.offload)
    parts = section.grad_accumulation_steps
    alike = rl.rows_alike(section, shapes.mesh)
    scorer = Scorer(shapes.model, section.estimator, config.sampler, shapes.special, section.prompt_mask, parts, alike)
    update = rl.make_update(scorer, optimizer, section, state)
    reference: Variables = {}
    if section.needs_reference:
        start = {**frozen, **state.trainable}
        reference = start if section.reference.name == "moving" else _in_dtype(start, config.model.dtype)
    own, shared = _own(reference, frozen)
    rollout = shapes.stored_rollout(rows, columns, section.estimator.needs_entropy)
    batch = rl.Batch(rollout, shapes.rows(jnp.float32, rows, columns))
    held = {**_held(state, frozen), "reference": own, "rows": batch}

    def lower() -> jax.stages.Lowered:
        return update.lower(state, frozen, reference, batch, shapes.key)

    values = abstract_state(optimizer, trainable, shapes.mesh) if section.advantage.name == "gae" else ()
    beside = {"optimizer": state.optimizer, "reference": own, "values": values}
    sampler = _sampler(config, stage, shapes, section, state, frozen, beside, section.estimator.needs_entropy)
    sizes = {"rows": rows, **shapes.sizes, "columns": columns, "parts": parts, **_views(scorer, rollout, shapes)}
    update_program = Program(stage.name, "update", config, shapes.mesh, lower, held, shared, values, **sizes)
    return [sampler, update_program]


def _preference(config: Config, stage: Stage, shapes: Shapes) -> list[Program]:
    section, (trainable, frozen) = config.preference, split(variables_of(shapes, config))
    optimizer = make_optimizer(section.optimizer, section.steps)
    state = abstract_state(optimizer, trainable, shapes.mesh, section.optimizer.offload)
    parts = section.grad_accumulation_steps
    scorer = Scorer(shapes.model, section.estimator, config.sampler, shapes.special, parts=parts)
    update = preference.make_update(scorer, optimizer, section, state)
    reference = _in_dtype({**frozen, **state.trainable}, config.model.dtype)
    own, shared = _own(reference, frozen)
    pairs_Q, columns = section.prompts_per_step, config.sampler.completion_length
    batch = shapes.stored_rollout(2 * pairs_Q, columns, section.estimator.needs_entropy)
    kept_Q = shapes.rows(jnp.bool_, pairs_Q)
    held = {**_held(state, frozen), "reference": own, "rows": batch}

    def lower() -> jax.stages.Lowered:
        return update.lower(state, frozen, reference, batch, kept_Q, shapes.key)

    sizes = {"rows": 2 * pairs_Q, **shapes.sizes, "columns": columns, "parts": parts, **_views(scorer, batch, shapes)}
    found = [Program(stage.name, "update", config, shapes.mesh, lower, held, twice=shared, **sizes)]
    if section.data:
        return found
    beside = {"optimizer": state.optimizer, "reference": own}
    return [_sampler(config, stage, shapes, section, state, frozen, beside, section.estimator.needs_entropy), *found]


def _reward_model(config: Config, stage: Stage, shapes: Shapes) -> list[Program]:
    section, (trainable, frozen) = config.reward_model, split(variables_of(shapes, config))
    head = {"kernel": shapes.whole(jnp.float32, config.model.width), "bias": shapes.whole(jnp.float32)}
    optimizer = make_optimizer(section.optimizer, section.steps)
    state = abstract_state(optimizer, {**trainable, HEAD: head}, shapes.mesh, section.optimizer.offload)
    update = reward_model.make_update(shapes.model, optimizer, section, shapes.special, state)
    count, columns = section.batch_size, config.sampler.completion_length
    texts = shapes.canvas(count, columns)
    rows: Any = pairs.Rows(texts, texts, shapes.rows(jnp.float32, count))
    if section.loss == "stepwise":
        of_steps = (shapes.rows(dtype, count, LABELLED_STEPS) for dtype in (jnp.float32, jnp.float32))
        lengths = shapes.rows(jnp.int32, count), shapes.rows(jnp.int32, count, columns)
        rows = steps.Rows(texts, *lengths, *of_steps)
    held = {**_held(state, frozen), "rows": rows}
    texts_of_all = count * (1 if section.loss == "stepwise" else 2)
    sizes = {
        "rows": texts_of_all,
        **shapes.sizes,
        "columns": columns,
        "parts": section.grad_accumulation_steps,
        "head_passes": 0,
    }

    def lower() -> jax.stages.Lowered:
        return update.lower(state, frozen, rows)

    return [Program(stage.name, "update", config, shapes.mesh, lower, held, **sizes)]


def _generate(config: Config, stage: Stage, shapes: Shapes) -> list[Program]:
    variables = variables_of(shapes, config)
    nothing = TrainState(variables, ())
    return [_sampler(config, stage, shapes, config.generate, nothing, {}, (), False)]


PROGRAMS = {
    "adapt": _adapt,
    "sft": _sft,
    "rl": _rl,
    "preference": _preference,
    "reward_model": _reward_model,
    "generate": _generate,
}


def _sampler(
    config: Config,
    stage: Stage,
    shapes: Shapes,
    section: Any,
    state: TrainState,
    frozen: Variables,
    beside: Any,
    record_entropy: bool,
) -> Program:
    """The sampler of a rollout: it reads the weights in the dtype in which they compute, beside the state that it leaves alone."""
    rows = section.rows_at_a_time
    stored = {**frozen, **state.trainable}
    variables = _in_dtype(stored, config.model.dtype)
    if config.mesh.rollout_weights != "as_trained":  # `decoding_copy`
        variables = jax.tree.map(lambda x: _placed(x, gathered(x.sharding)), variables)
    masters, _ = _own(stored, variables)  # in another dtype or place than what is sampled from
    prompts = Prompts(shapes.rows(jnp.int32, rows, shapes.prompt_columns), shapes.rows(jnp.int32, rows))
    block, vocabulary = config.sampler.block_length, shapes.model.config.vocab_size
    noise = KeyedNoise(shapes.key, shapes.rows(jnp.int32, rows))
    held = {"weights": variables, "rows": (prompts, noise)}

    def lower() -> jax.stages.Lowered:
        sampler = Sampler(
            shapes.model, config.sampler, shapes.special, section.temperature, record_entropy=record_entropy,
            chunk=column_chunk(rows, block, vocabulary, shapes.platform),
        )  # fmt: skip
        return sampler.lower(variables, prompts, noise)

    return Program(
        stage.name,
        "sampler",
        config,
        shapes.mesh,
        lower,
        held,
        beside=(masters, beside),
        rows=rows,
        calls=section.rollout_rows // rows,
        **shapes.sizes,
        columns=config.sampler.completion_length,
    )


def _views(scorer: Scorer, rollout: RolloutBatch, shapes: Shapes) -> dict[str, Fraction]:
    """The passes of a score over all rows, as the plan of the estimator has them; a part of one where one pass serves several rows."""
    views = jax.eval_shape(scorer.views, shapes.key, rollout)
    count = views.weight_NBC.shape[0]
    saved = sum(views.hides_all_N) * (1 - Fraction(1, views.rows_alike))  # exact: the rows of a part are rounded up
    return {"views": count - saved, "head_passes": max(views.head_group_N, default=count - 1) + 1 - saved}


def _held(state: TrainState, frozen: Variables) -> dict[str, Any]:
    return {"weights": (state.trainable, frozen), "optimizer": state.optimizer}


def _in_dtype(variables: Variables, dtype: str) -> Variables:
    """`in_model_dtype` of shapes."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), variables)


def _placed(x: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _own(variables: Variables, other: Variables) -> tuple[Variables, Variables]:
    """(the collections that are arrays of their own, those that are the very arrays of `other`: equal in dtype and place, never copied)."""
    shared = {name: tree for name, tree in variables.items() if name in other and _kinds(tree) == _kinds(other[name])}
    return {name: tree for name, tree in variables.items() if name not in shared}, shared


def _kinds(tree: Any) -> list[Any]:
    return [(leaf.dtype, leaf.sharding) for leaf in jax.tree.leaves(tree)]
