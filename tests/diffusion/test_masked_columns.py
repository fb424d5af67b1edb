"""Only chunks with masked columns are computed, and every masked column gets its own result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.diffusion import masked_columns
from d1jax.diffusion.masked_columns import apply_to_masked, column_chunk
from d1jax.diffusion.predictions import Predictions


def counted(calls):
    def function(draws_BS, hidden_BSD):
        jax.debug.callback(lambda: calls.append(1))
        values_BS = jnp.sum(hidden_BSD, axis=2)
        nothing = jnp.zeros(values_BS.shape)
        return Predictions(
            values_BS.astype(jnp.int32), values_BS if draws_BS is None else draws_BS, nothing, nothing, None, None
        )

    return function


@given(
    st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=3),
    st.sampled_from([1, 2, 3]),
    st.booleans(),
)
def test_masked_columns_get_their_own_results_in_as_few_chunks_as_possible(rows, chunk, with_draws):
    masked_BS = jnp.array(rows)
    hidden_BSD = jnp.arange(len(rows) * 18, dtype=jnp.float32).reshape(len(rows), 6, 3)
    draws_BS = jnp.asarray(np.random.default_rng(0).random(masked_BS.shape), jnp.float32) if with_draws else None
    calls = []
    found = jax.jit(apply_to_masked, static_argnums=(0, 1))(counted(calls), chunk, masked_BS, draws_BS, hidden_BSD)
    jax.effects_barrier()
    assert len(calls) == -(-max(map(sum, rows)) // chunk)
    expected = np.asarray(hidden_BSD.sum(axis=2))
    np.testing.assert_array_equal(found.token_BS[masked_BS], expected[np.asarray(masked_BS)])
    np.testing.assert_array_equal(
        found.token_logp_BS[masked_BS], (expected if draws_BS is None else np.asarray(draws_BS))[np.asarray(masked_BS)]
    )


@pytest.mark.parametrize(
    ("rows", "block", "vocabulary", "expected"),
    [
        (4, 32, 32_000, 8),  # 32 rows a product
        (64, 32, 32_000, 1),
        (1, 16, 50, 16),  # never as many: the whole block
        (768, 20, 14, 20),  # not worth it
        (4, 32, 2**24, 1),  # memory comes first
    ],
)
def test_chunks_divide_the_block_and_are_large_enough(monkeypatch, rows, block, vocabulary, expected):
    monkeypatch.setattr(masked_columns.jax, "default_backend", lambda: "cpu")
    assert column_chunk(rows, block, vocabulary) == expected and block % expected == 0
