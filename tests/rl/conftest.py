"""What the tests of every method file share: its section made small, a tiny model, and a batch of two groups of four."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from d1jax.config import ModelConfig, OptimizerConfig, SamplerConfig
from d1jax.config.advantage import Center
from d1jax.config.parse import parse
from d1jax.data.tokenizers import SpecialTokens
from d1jax.diffusion.canvas import Canvas
from d1jax.rl.advantages import group_advantages
from d1jax.rl.update import Batch
from d1jax.training.likelihood import RolloutBatch

FOLDER = Path(__file__).parents[2] / "configs"
FILES = sorted((FOLDER / "methods").glob("*.yaml"))
ROWS = 8


def named(name):
    """The rl section of a method file over the quickstart's."""
    path = next(path for path in FILES if path.stem == name)
    return parse(["--config", str(FOLDER / "quickstart.yaml"), "--rl", str(path)]).rl


@pytest.fixture(scope="module", params=FILES, ids=lambda path: path.stem)
def method(request):
    """The rl section, at most three inner updates of eight rows."""
    config = parse(["--config", str(FOLDER / "quickstart.yaml"), "--rl", str(request.param)]).rl
    return small(config, iterations=3, optimizer=OptimizerConfig(learning_rate=1e-2, clip_norm=1.0))


def small(config, iterations=2, **changes):
    """The section of a method with two problems of four completions, and at most so many inner updates."""
    sizes = {"prompts_per_step": 2, "num_generations": 4, "grad_accumulation_steps": 1}
    sizes["num_iterations"] = min(config.num_iterations, iterations)
    return dataclasses.replace(config, **sizes | changes)


@pytest.fixture(scope="session")
def toy():
    return SimpleNamespace(
        files=FILES,
        named=named,
        small=small,
        quickstart=FOLDER / "quickstart.yaml",
        special=SpecialTokens(mask=9, end=8),
        sampler=SamplerConfig(completion_length=8, block_length=4, steps=4),
        model=ModelConfig(width=16, layers=1, heads=2, kv_heads=2, mlp_width=24, vocab_size=16, rope_theta=100),
        advantages=advantages,
        batch=batch,
    )


def advantages(method, rewards):
    """[B]: of two groups of four."""
    if method.advantage.name == "reward":
        rewards = (rewards > 0.3) * 1.0 * (rewards.max() > rewards.min())  # of equal ones none is right
    rule = Center() if method.advantage.name == "gae" else method.advantage  # whose advantages come from values
    return group_advantages(rule, rewards).reshape(-1)


def batch(advantage):
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 7, ROWS // 4).repeat(4).astype(np.int32)
    prompts = rng.integers(0, 8, (ROWS // 4, 6)).repeat(4, axis=0).astype(np.int32)
    completions = rng.integers(0, 9, (ROWS, 8)).astype(np.int32)
    reveal = np.concatenate(
        [rng.permuted(np.tile([0, 0, 1, 1], (ROWS, 1)), axis=1) + 2 * half for half in (0, 1)], axis=1
    )
    ids = (np.arange(ROWS) // 4).astype(np.int32)
    advantage_BC = np.repeat(np.asarray(advantage, np.float32)[:, None], 8, axis=1)
    return Batch(RolloutBatch(Canvas(completions, prompts, lengths), ids, reveal.astype(np.int32)), advantage_BC)
