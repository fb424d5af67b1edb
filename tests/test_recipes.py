"""The 8B recipes, traced and lowered at their real size on eight virtual devices: shapes and placements only, no weights."""

import dataclasses
import math
from pathlib import Path

import jax
import pytest

from d1jax.config.parse import parse
from d1jax.data.tokenizers import SpecialTokens
from d1jax.fit.compiled import whole_parameters
from d1jax.fit.programs import PROGRAMS, Shapes, programs_of, variables_of
from d1jax.models.sharding import make_mesh
from d1jax.models.transformer import Transformer
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
    ("diffucoder_adapt_7b", "qwen25_coder_7b", DREAM),
    ("diffucoder_sft_7b", "qwen25_coder_7b", DREAM),
    ("d1_sudoku_8b", "dream_7b", DREAM),
    ("d1_sudoku_8b", "diffucoder_7b", DREAM),
]
ONE_PROGRAM = {
    "d1_gsm8k_8b": ("d1_math_8b", "d1_code_8b", "d1_unified_8b")
}  # the recipe that is lowered, and those that compile to the same


@pytest.fixture(params=RECIPES, ids=lambda recipe: "-".join(recipe[:2]))
def recipe(request):
    """(config, what its programs have in common)."""
    run, model, special = request.param
    files = ["--config", str(CONFIGS / "runs" / f"{run}.yaml"), "--model", str(CONFIGS / "models" / f"{model}.yaml")]
    config = parse([*files, "--init_from", "a/checkpoint"])
    return config, shapes_of(config, special)


def shapes_of(config, special):
    return Shapes(Transformer(config.model, config.lora), make_mesh(config.mesh), special, PROMPT, "cpu")


@pytest.mark.parametrize(
    ("lowered", "other"), [(one, other) for one, others in ONE_PROGRAM.items() for other in others]
)
def test_recipes_that_are_not_lowered_compile_to_one_that_is(lowered, other):
    """The number of steps and the names of rewards are no part of a program of sampling or updating; everything else is."""
    first, second = (_shapes_of(name) for name in (lowered, other))
    assert first == second
    assert lowered in {run for run, *_ in RECIPES}


def test_every_recipe_of_a_large_model_is_lowered():
    known = {"diffucoder_mid_7b"}  # the program of diffucoder_adapt_7b with another number of windows
    known |= {run for run, *_ in RECIPES} | {name for others in ONE_PROGRAM.values() for name in others}
    large = {path.stem for path in (CONFIGS / "runs").glob("*.yaml") if path.stem.endswith(("_7b", "_8b"))}
    assert large and large <= known


def _shapes_of(name):
    config = parse(["--config", str(CONFIGS / "runs" / f"{name}.yaml"), "--init_from", "a/checkpoint"])
    rl_config = dataclasses.replace(config.rl, steps=1, reward_weights={})
    return config.kinds, config.model, config.lora, config.sampler, config.mesh, rl_config


def test_weights_are_sharded_over_all_devices(recipe):
    config, shapes = recipe
    leaves = jax.tree.leaves(variables_of(shapes, config))
    held = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
    assert held < sum(x.size * x.dtype.itemsize for x in leaves) / 7.9


def test_rollout_and_update_lower(recipe):
    programs = programs_of(*recipe)
    names = ["update"] if recipe[0].kinds & {"adapt", "sft"} else ["sampler", "update"]
    assert [program.name for program in programs] == names
    for program in programs:
        text = program.lower().as_text()
        assert program.name == "update" or "while" in text
        # None above 1 MiB; the copy that the sampler reads is gathered on purpose.
        assert program.name == "sampler" or not whole_parameters(program)


# Those of a small model need no lowering: they are run.
PIPELINES = sorted(path.stem for path in (CONFIGS / "pipelines").glob("*.yaml") if "../models/" in path.read_text())


def pipeline(name):
    return parse(["--config", str(CONFIGS / "pipelines" / f"{name}.yaml"), "--init_from", "a/checkpoint"])


def test_pipelines_have_stages_to_lower_and_ask_every_reward_model_that_they_train():
    assert {"r1_zero", "r1", "distill", "deepseekmath", "deepseek_v2", "llada15_vrpo"} <= set(PIPELINES)
    for name in PIPELINES:
        config = pipeline(name)
        assert config.kinds & PROGRAMS.keys(), name
        asked = {model for stage in config.stages for model in config.models_of(stage)}
        assert asked == {stage.name for stage in config.stages if stage.kind == "reward_model"}, name


@pytest.mark.parametrize("name", PIPELINES)
def test_every_stage_of_a_pipeline_lowers(name):
    config = pipeline(name)
    special = LLADA if config.model.alignment == "same_position" else DREAM
    programs = programs_of(config, shapes_of(config, special))
    assert {program.stage for program in programs} == {x.name for x in config.stages if x.kind in PROGRAMS}
    for program in programs:
        assert program.lower().as_text()


def test_only_adapters_of_blocks_are_trained(recipe):
    config, shapes = recipe
    trainable, _ = split(variables_of(shapes, config))
    if config.lora.rank == 0:
        assert set(trainable) == {"params"}
        return
    assert set(trainable) == {"lora"} and set(trainable["lora"]["blocks"]) == set(config.lora.targets)
    assert config.lora.rank == 128
