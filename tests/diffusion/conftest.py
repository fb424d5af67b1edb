"""What the sampler's tests share."""

import jax.numpy as jnp
import numpy as np
import pytest

END = 10


@pytest.fixture(scope="session")
def random_prompts():
    """`random_prompts(seed, rows, width)` -> (right-padded prompts, lengths) of different lengths, at least one full row.

    None is empty: without a prompt all positions of the first step see the same and tie exactly, up to rounding.
    """

    def make(seed, rows, width):
        rng = np.random.default_rng(seed)
        length_B = rng.integers(1, width + 1, rows)
        length_B[rng.integers(rows)] = width
        prompt_BP = np.where(np.arange(width)[None, :] < length_B[:, None], rng.integers(0, 10, (rows, width)), END)
        return jnp.asarray(prompt_BP, jnp.int32), jnp.asarray(length_B, jnp.int32)

    return make


@pytest.fixture(scope="session")
def towards_end():
    """`towards_end(variables, strength)`: the same model, but every position likes the end token more.

    Channel 0 feeds its column of the head.
    """

    def make(variables, strength):
        params = variables["params"]
        wte = params["wte"].at[:, 0].add(6.0)
        return {"params": {**params, "wte": wte, "ff_out": params["ff_out"].at[0, END].add(strength)}}

    return make
