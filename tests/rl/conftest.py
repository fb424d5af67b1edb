"""What the tests of every method file share: its section made small, a tiny model, and a batch of two groups of four."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from d1jax.config import ModelConfig, OptimizerConfig, SamplerConfig
from d1jax.config.parse import parse
from d1jax.data.tokenizers import SpecialTokens
from d1jax.diffusion.canvas import Canvas
from d1jax.rl.advantages import group_advantages
from d1jax.rl.likelihood import Batch

FOLDER = Path(__file__).parents[2] / "configs"
FILES = sorted((FOLDER / "methods").glob("*.yaml"))
ROWS = 8


@pytest.fixture(scope="module", params=FILES, ids=lambda path: path.stem)
def method(request):
    """The rl section, at most three inner updates of eight rows."""
    config = parse(["--config", str(FOLDER / "quickstart.yaml"), "--rl", str(request.param)]).rl
    small = {"prompts_per_step": 2, "group_size": 4, "inner_updates": min(config.inner_updates, 3), "micro_batches": 1}
    return dataclasses.replace(config, **small, optimizer=OptimizerConfig(learning_rate=1e-2, clip_norm=1.0))


@pytest.fixture(scope="session")
def toy():
    return SimpleNamespace(
        files=FILES,
        quickstart=FOLDER / "quickstart.yaml",
        special=SpecialTokens(mask=9, end=8),
        sampler=SamplerConfig(completion_length=8, block_length=4, steps=4),
        model=ModelConfig(width=16, layers=1, heads=2, kv_heads=2, mlp_width=24, vocab_size=16, rope_theta=100),
        advantages=advantages,
        batch=batch,
    )


def advantages(method, rewards):
    """[B]: of two groups of four; under pairs the first half of the rows is chosen, the second rejected."""
    if method.advantage == "pairs":
        return np.repeat([1.0, -1.0], ROWS // 2) * (rewards.max() > rewards.min())
    if method.advantage == "accepted":
        rewards = (rewards > 0.3) * 1.0 * (rewards.max() > rewards.min())  # of equal ones none is right
    return group_advantages(method.advantage, rewards).reshape(-1)


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
    return Batch(Canvas(completions, prompts, lengths), ids, reveal.astype(np.int32), advantage_BC, np.ones(ROWS, bool))
