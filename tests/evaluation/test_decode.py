"""Completions of a set of problems: whatever the batches, and never of a model whose predictions are not numbers."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d1jax.config import MeshConfig, SamplerConfig
from d1jax.config.errors import Diverged
from d1jax.data.examples import Problems
from d1jax.data.tokenizers import SpecialTokens
from d1jax.diffusion.sampler import Sampler
from d1jax.evaluation.decode import decode, look_ahead, texts_of
from d1jax.models.sharding import make_mesh

SPECIAL = SpecialTokens(mask=12, end=10, turn_end=11)
CONFIG = SamplerConfig(completion_length=6, block_length=3, steps=4)


@pytest.fixture
def context(tiny):
    """`context(batch_size)` -> what decoding needs of one, with seven problems."""
    model, _ = tiny(seed=1)
    rng = np.random.default_rng(0)
    problems = Problems([{}] * 7, rng.integers(0, 10, (7, 3)).astype(np.int32), np.full(7, 3, np.int32), None, None)

    def make(batch_size):
        return SimpleNamespace(
            config=SimpleNamespace(sampler=CONFIG, evaluation=SimpleNamespace(batch_size=batch_size, temperature=1.0)),
            mesh=make_mesh(MeshConfig()),
            model=model,
            sampler=lambda temperature: Sampler(model, CONFIG, SPECIAL, temperature),
            key=lambda purpose: jax.random.key(0),
            tokenizer=SimpleNamespace(special=SPECIAL, decode=lambda ids: " ".join(map(str, ids))),
        ), problems

    return make


def test_every_problem_is_decoded_once_and_as_in_any_other_batch(tiny, context):
    _, variables = tiny(seed=1)
    whole, problems = context(8)
    parts, _ = context(8 // 2)
    one = decode(whole, variables, problems)
    other = decode(parts, variables, problems)
    assert one.tokens_BC.shape == (7, 6) and isinstance(one.tokens_BC, np.ndarray)
    for name in ("tokens_BC", "unmask_step_BC", "nfe_B"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    assert texts_of(whole, one) == [" ".join(map(str, row)) for row in one.tokens_BC.tolist()]
    assert look_ahead(whole, variables, problems).entropy_BC.shape == (7, 6)


def test_predictions_that_are_not_numbers_are_told_with_their_batch(tiny, context):
    _, variables = tiny(seed=1)
    broken = jax.tree.map(lambda x: x * jnp.nan, variables)
    with pytest.raises(Diverged, match="batch from row 0: row 0 .8 of 8 rows.: the model's predictions are NaN"):
        made, problems = context(8)
        decode(made, broken, problems)
