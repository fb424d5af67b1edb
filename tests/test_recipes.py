"""The 8B recipes, traced and lowered at their real size on eight virtual devices: shapes and placements only, no weights."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from d1jax.config.parse import parse
from d1jax.data.tokenizers import SpecialTokens
from d1jax.diffusion.canvas import Canvas
from d1jax.diffusion.decoding import Prompts
from d1jax.diffusion.noise import KeyedNoise
from d1jax.diffusion.sampler import Sampler
from d1jax.models.reward_head import HEAD
from d1jax.models.sharding import make_mesh, replicated, rows_sharding
from d1jax.models.transformer import Transformer, abstract_variables
from d1jax.preference import loop as preference
from d1jax.reward_model import loop as reward_model
from d1jax.reward_model import pairs
from d1jax.rl import update as rl
from d1jax.sft import loop as sft
from d1jax.training.likelihood import RolloutBatch, Scorer
from d1jax.training.optimizer import TrainState, make_optimizer
from d1jax.training.setup import split

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
LLADA = SpecialTokens(mask=126336, end=126081, turn_end=126348, vocab_size=126349)
DREAM = SpecialTokens(mask=151666, end=151643, turn_end=151645, vocab_size=151667)
PROMPT = 256

RECIPES = [
    ("d1_sft_8b", "llada_8b", LLADA),
    ("d1_countdown_8b", "llada_8b", LLADA),
    ("d1_gsm8k_8b", "llada_8b", LLADA),
    ("diffucoder_coupled_7b", "diffucoder_7b", DREAM),
    ("d1_sudoku_8b", "dream_7b", DREAM),
    ("d1_sudoku_8b", "diffucoder_7b", DREAM),
]
ONE_PROGRAM = {
    "d1_gsm8k_8b": ("d1_math_8b", "d1_code_8b", "d1_unified_8b")
}  # the recipe that is lowered, and those that compile to the same


@pytest.fixture(params=RECIPES, ids=lambda recipe: "-".join(recipe[:2]))
def recipe(request):
    run, model, special = request.param
    files = ["--config", str(CONFIGS / "runs" / f"{run}.yaml"), "--model", str(CONFIGS / "models" / f"{model}.yaml")]
    config = parse([*files, "--init_from", "a/checkpoint"])
    model, variables, mesh = abstract_model(config)
    with jax.set_mesh(mesh):
        yield config, model, variables, special, mesh


def abstract_model(config):
    """(model, its variables without values, mesh)."""
    mesh = make_mesh(config.mesh)
    adapted = config.lora.rank > 0
    # What is trained is held in float32.
    stored = config.model if adapted else dataclasses.replace(config.model, param_dtype="float32")
    model = Transformer(stored, config.lora)
    return model, abstract_variables(model, mesh, ("params", "lora") if adapted else ("params",)), mesh


def abstract(mesh, dtype, *shape):
    x = jax.ShapeDtypeStruct(shape, dtype)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=rows_sharding(mesh, x))


def abstract_state(optimizer, trainable):
    """Moments where the adapters are, counters everywhere."""
    moments = jax.eval_shape(optimizer.init, trainable)
    placed = {x.shape: x.sharding for x in jax.tree.leaves(trainable)}
    mesh = next(iter(placed.values())).mesh
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed.get(x.shape, everywhere))  # noqa: E731
    return TrainState(trainable, jax.tree.map(place, moments))


@pytest.mark.parametrize(
    ("lowered", "other"), [(one, other) for one, others in ONE_PROGRAM.items() for other in others]
)
def test_recipes_that_are_not_lowered_compile_to_one_that_is(lowered, other):
    """The number of steps and the names of rewards are no part of a program of sampling or updating; everything else is."""
    first, second = (_shapes_of(name) for name in (lowered, other))
    assert first == second
    assert lowered in {run for run, *_ in RECIPES}


def test_every_recipe_of_a_large_model_is_lowered():
    known = {run for run, *_ in RECIPES} | {name for others in ONE_PROGRAM.values() for name in others}
    large = {path.stem for path in (CONFIGS / "runs").glob("*.yaml") if path.stem.endswith(("_7b", "_8b"))}
    assert large and large <= known


def _shapes_of(name):
    config = parse(["--config", str(CONFIGS / "runs" / f"{name}.yaml"), "--init_from", "a/checkpoint"])
    rl_config = dataclasses.replace(config.rl, steps=1, reward_weights={})
    return config.kinds, config.model, config.lora, config.sampler, config.mesh, rl_config


def test_weights_are_sharded_over_all_devices(recipe):
    leaves = jax.tree.leaves(recipe[2])
    held = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
    assert held < sum(x.size * x.dtype.itemsize for x in leaves) / 7.9


def test_rollout_and_update_lower(recipe):
    config, model, variables, special, mesh = recipe
    if "sft" in config.kinds:
        lower_sft(config, model, variables, special, mesh)
    else:
        lower_sampler(config, config.rl, model, variables, special, mesh)
        lower_rl(config, model, variables, special, mesh)


# Those of a small model need no lowering: they are run.
PIPELINES = sorted(
    path.stem for path in (CONFIGS / "pipelines").glob("*.yaml") if "models/llada_8b" in path.read_text()
)


def pipeline(name):
    return parse(["--config", str(CONFIGS / "pipelines" / f"{name}.yaml"), "--init_from", "a/checkpoint"])


def test_pipelines_have_stages_to_lower_and_ask_every_reward_model_that_they_train():
    assert {"r1_zero", "r1", "deepseekmath", "deepseek_v2", "llada15_vrpo"} <= set(PIPELINES)
    for name in PIPELINES:
        config = pipeline(name)
        assert config.kinds & LOWERED.keys(), name
        asked = {model for stage in config.stages for model in config.models_of(stage)}
        assert asked == {stage.name for stage in config.stages if stage.kind == "reward_model"}, name


@pytest.mark.parametrize("name", PIPELINES)
def test_every_stage_of_a_pipeline_lowers(name):
    config = pipeline(name)
    model, variables, mesh = abstract_model(config)
    with jax.set_mesh(mesh):
        for stage in config.stages:
            if stage.kind in LOWERED:
                LOWERED[stage.kind](config.for_stage(stage.name), model, variables, LLADA, mesh)


def canvas(mesh, rows, length):
    shapes = (rows, length), (rows, PROMPT), (rows,)
    return Canvas(*(abstract(mesh, jnp.int32, *shape) for shape in shapes))


def lower_sampler(config, section, model, variables, special, mesh):
    rows = section.rows_at_a_time
    prompts = Prompts(abstract(mesh, jnp.int32, rows, PROMPT), abstract(mesh, jnp.int32, rows))
    sampler = Sampler(model, config.sampler, special, section.temperature)
    noise = KeyedNoise(jax.random.key(0), abstract(mesh, jnp.int32, rows))
    assert "while" in Sampler.sample.lower(sampler, variables, prompts, noise).as_text()


def lower_sft(config, model, variables, special, mesh):
    trainable, frozen = split(variables)
    optimizer = make_optimizer(config.sft.optimizer, config.sft.steps)
    state = abstract_state(optimizer, trainable)
    update = sft.make_update(model, optimizer, config.sft, special, state)
    clean = canvas(mesh, config.sft.batch_size, config.sft.completion_length or config.sampler.completion_length)
    assert update.lower(state, frozen, clean, jax.random.key(0)).as_text()


def lower_rl(config, model, variables, special, mesh):
    trainable, frozen = split(variables)
    rows, length = config.rl.rollout_rows, config.sampler.completion_length
    optimizer = make_optimizer(config.rl.optimizer, config.rl.steps)
    state = abstract_state(optimizer, trainable)
    parts = config.rl.grad_accumulation_steps
    scorer = Scorer(model, config.rl.estimator, config.sampler, special, config.rl.prompt_mask, parts)
    update = rl.make_update(scorer, optimizer, config.rl, state)
    rollout = stored_rollout(mesh, rows, length)
    batch = rl.Batch(rollout, abstract(mesh, jnp.float32, rows, length))
    assert update.lower(state, frozen, variables, batch, jax.random.key(0)).as_text()


def lower_preference(config, model, variables, special, mesh):
    section, (trainable, frozen) = config.preference, split(variables)
    optimizer = make_optimizer(section.optimizer, section.steps)
    state = abstract_state(optimizer, trainable)
    scorer = Scorer(model, section.estimator, config.sampler, special, parts=section.grad_accumulation_steps)
    update = preference.make_update(scorer, optimizer, section, state)
    batch = stored_rollout(mesh, 2 * section.prompts_per_step, config.sampler.completion_length)
    kept_Q = abstract(mesh, jnp.bool_, section.prompts_per_step)
    assert update.lower(state, frozen, variables, batch, kept_Q, jax.random.key(0)).as_text()


def lower_reward_model(config, model, variables, special, mesh):
    section, (trainable, frozen) = config.reward_model, split(variables)
    everywhere = replicated(mesh)
    head = {
        "kernel": jax.ShapeDtypeStruct((config.model.width,), jnp.float32, sharding=everywhere),
        "bias": jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere),
    }
    optimizer = make_optimizer(section.optimizer, section.steps)
    state = abstract_state(optimizer, {**trainable, HEAD: head})
    update = reward_model.make_update(model, optimizer, section, special, state)
    texts = canvas(mesh, section.batch_size, config.sampler.completion_length)
    rows = pairs.Rows(texts, texts, abstract(mesh, jnp.float32, section.batch_size))
    assert update.lower(state, frozen, rows).as_text()


def stored_rollout(mesh, rows, length):
    ids = abstract(mesh, jnp.int32, rows)
    return RolloutBatch(canvas(mesh, rows, length), ids, abstract(mesh, jnp.int32, rows, length))


def lower_sampler_and_rl(config, *others):
    lower_sampler(config, config.rl, *others)
    lower_rl(config, *others)


LOWERED = {
    "sft": lower_sft,
    "rl": lower_sampler_and_rl,
    "generate": lambda config, *others: lower_sampler(config, config.generate, *others),
    "preference": lower_preference,
    "reward_model": lower_reward_model,
}


def test_only_adapters_of_blocks_are_trained(recipe):
    config, _, variables, *_ = recipe
    trainable, _ = split(variables)
    if config.lora.rank == 0:
        assert set(trainable) == {"params"}
        return
    assert set(trainable) == {"lora"} and set(trainable["lora"]["blocks"]) == set(config.lora.targets)
    assert config.lora.rank == 128
