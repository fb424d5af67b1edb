"""The layout: positions, lengths and alignment against plain re-layouts, and what padding must not change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d1jax.config import OneStep, SamplerConfig
from d1jax.data.tokenizers import SpecialTokens
from d1jax.diffusion.canvas import Canvas, completion_hidden, row_keys, row_uniforms, through_first_end
from d1jax.diffusion.decoding import Prompts
from d1jax.diffusion.estimators import views_of
from d1jax.diffusion.likelihood import score
from d1jax.diffusion.noise import KeyedNoise
from d1jax.diffusion.sampler import Sampler
from d1jax.models.transformer import head_matrix, hidden_states, project

PAD = 11
run = jax.jit(hidden_states, static_argnums=0)
head = jax.jit(project)
pick = jax.jit(completion_hidden, static_argnums=(2, 4))


def canvas_of(prompts, completions, width):
    """Ragged prompts, right-padded to `width` columns."""
    prompt_BP = np.full((len(prompts), width), PAD, np.int32)
    for row, prompt in enumerate(prompts):
        prompt_BP[row, : len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    return Canvas(jnp.asarray(completions, jnp.int32), jnp.asarray(prompt_BP), jnp.asarray(lengths))


@settings(max_examples=8)
@given(st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=3), st.integers(1, 4), st.integers(0, 2))
def test_columns_positions_and_lengths_are_those_of_a_plain_layout(prompts, completion_length, extra):
    completions = [[10 + row] * completion_length for row in range(len(prompts))]
    width = max(map(len, prompts)) + extra
    canvas = canvas_of(prompts, completions, width)
    for row, prompt in enumerate(prompts):
        natural = prompt + completions[row]
        stored = np.asarray(canvas.tokens_BT)[row].tolist()
        positions = np.asarray(canvas.positions_BT)[row].tolist()
        length = int(canvas.length_B[row])
        assert length == len(natural)
        # The first `length` columns are the natural row, each token at its own position, in some order.
        assert sorted(zip(positions[:length], stored[:length], strict=True)) == list(enumerate(natural))
        assert stored[:completion_length] == completions[row]
        assert stored[length:] == [PAD] * (width - len(prompt))
        assert np.asarray(canvas.prompt_mask_BP)[row].tolist() == [i < len(prompt) for i in range(width)]


@pytest.mark.parametrize("alignment", ["same_position", "shifted"])
def test_completion_logits_equal_those_of_the_natural_order(tiny, oracle, alignment):
    model, variables = tiny(alignment=alignment, qkv_bias=True)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 10, n).tolist() for n in (4, 1, 0, 2)]
    completions = rng.integers(0, 13, (4, 5)).tolist()
    canvas = canvas_of(prompts, completions, 6)
    hidden_BTD = run(model, variables, canvas.tokens_BT, canvas.positions_BT, canvas.length_B)
    natural_order = oracle(model, variables)
    head_DV = head_matrix(variables)
    for start, size in ((0, None), (0, 2), (3, 2), (1, 3)):
        picked_BSD = pick(hidden_BTD, canvas, alignment, jnp.int32(start), size)
        logits_BSV = head(picked_BSD, head_DV)
        end = 5 if size is None else start + size
        for row, prompt in enumerate(prompts):
            _, z = natural_order(prompt + completions[row])
            if alignment == "shifted":
                z = np.concatenate([z[:1], z[:-1]])
            expected = z[len(prompt) + start : len(prompt) + end]
            np.testing.assert_allclose(logits_BSV[row], expected, atol=5e-5, rtol=0)


@settings(max_examples=10)
@given(st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=1, max_size=3), st.integers(0, 9))
def test_holes_between_prompt_tokens_have_the_logits_of_the_natural_order(tiny, oracle, before, seed):
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 10, rng.integers(1, 5)).tolist() for _ in before]
    before = [sorted(min(count, len(prompt)) for count in row) for row, prompt in zip(before, prompts, strict=True)]
    completions = rng.integers(0, 13, (len(before), 3)).tolist()
    canvas = canvas_of(prompts, completions, 5)._replace(prompt_before_BC=jnp.array(before))
    for alignment in ("same_position", "shifted"):
        model, variables = tiny(alignment=alignment, qkv_bias=True)
        hidden_BTD = run(model, variables, canvas.tokens_BT, canvas.positions_BT, canvas.length_B)
        logits_BCV = head(pick(hidden_BTD, canvas, alignment, jnp.int32(0), 3), head_matrix(variables))
        for row, prompt in enumerate(prompts):
            natural, places = list(prompt), []
            for index, (count, token) in enumerate(zip(before[row], completions[row], strict=True)):
                places.append(count + index)
                natural.insert(count + index, token)
            _, z = oracle(model, variables)(natural)
            if alignment == "shifted":
                z = np.concatenate([z[:1], z[:-1]])
            np.testing.assert_allclose(logits_BCV[row], z[places], atol=5e-5, rtol=0)


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=5, max_size=5), min_size=1, max_size=4),
    st.sampled_from([(0,), (3,), (1, 2), (3, 0)]),
)
def test_through_first_end_equals_a_loop(rows, ends):
    mask_BC = np.asarray(jax.jit(through_first_end, static_argnums=1)(jnp.array(rows), ends))
    for row, mask in zip(rows, mask_BC.tolist(), strict=True):
        expected, ended = [], False
        for token in row:
            expected.append(not ended)
            ended = ended or token in ends
        assert mask == expected


def test_draws_are_functions_of_key_row_and_column_only():
    key, ids = jax.random.key(0), jnp.array([5, 2, 900])
    together = np.asarray(row_uniforms(key, ids, 6))
    assert ((together >= 0) & (together < 1)).all() and len(np.unique(together)) == 18
    np.testing.assert_array_equal(row_uniforms(key, ids[::-1], 6), together[::-1])
    np.testing.assert_array_equal(row_uniforms(key, ids[1:2], 6), together[1:2])
    np.testing.assert_array_equal(row_uniforms(key, ids, 4), together[:, :4])  # a column's draw ignores the padding
    assert (np.asarray(row_uniforms(jax.random.key(1), ids, 6)) != together).all()
    assert len(np.unique(jax.random.key_data(row_keys(key, jnp.arange(100))), axis=0)) == 100


@pytest.mark.parametrize("alignment", ["same_position", "shifted"])
def test_a_prompt_alone_in_a_batch_and_at_any_padding_is_the_same(tiny, alignment):
    """DESIGN invariant 3: log-probabilities within 1e-5 and the same greedy tokens."""
    model, variables = tiny(seed=4, alignment=alignment)
    special = SpecialTokens(mask=12, end=PAD)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 10, n).tolist() for n in (3, 5, 1)]
    completions = rng.integers(0, 12, (3, 6)).tolist()
    config = SamplerConfig(completion_length=6, block_length=3, steps=4)

    @jax.jit
    def scores_and_tokens(canvas, ids):
        views = views_of(
            jax.random.key(7), canvas, ids, jnp.zeros_like(canvas.completion_BC),
            estimator=OneStep(), sampler=config, special=special, prompt_mask=0.4,
        )  # fmt: skip
        rollout = Sampler(model, config, special).sample(
            variables, Prompts(canvas.prompt_BP, canvas.prompt_length_B), KeyedNoise(jax.random.key(0), ids)
        )
        return score(model, variables, canvas, views).logp, rollout

    logp_BC, rollout = scores_and_tokens(canvas_of(prompts, completions, 5), jnp.arange(3))
    assert len(np.unique(rollout.tokens_BC)) > 2
    for row, width in ((0, 3), (1, 9)) if alignment == "same_position" else ((2, 2),):
        alone = canvas_of(prompts[row : row + 1], completions[row : row + 1], width)
        logp_1C, single = scores_and_tokens(alone, jnp.array([row]))
        np.testing.assert_allclose(logp_1C[0], logp_BC[row], atol=1e-5, rtol=0)
        for field in ("tokens_BC", "unmask_step_BC", "length_B", "nfe_B"):
            np.testing.assert_array_equal(getattr(single, field)[0], getattr(rollout, field)[row], err_msg=field)
