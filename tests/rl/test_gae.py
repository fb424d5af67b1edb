"""Returns and advantages over denoising steps against plain loops, and TraceRL's two identities."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from d1jax.rl import gae

texts = st.integers(0, 2**32 - 1).map(np.random.default_rng)


def drawn(rng, rows=3, columns=7):
    """(reward, value, step, text) of rows whose steps may be empty, or may unmask what stands behind the text only."""
    step = rng.integers(0, 6, (rows, columns))
    text = np.arange(columns)[None, :] < rng.integers(1, columns + 1, (rows, 1))
    return rng.normal(size=rows), rng.normal(size=(rows, columns)), step, text


def plain(reward, value, step, text, discount, trace):
    """(returns, advantages) of one row, token by token, with dictionaries."""
    tokens = [j for j in range(len(step)) if text[j]]
    steps = sorted({step[j] for j in tokens})
    earned = {j: reward if step[j] == steps[-1] else 0.0 for j in tokens}
    mean = lambda of, t: float(np.mean([of[j] for j in tokens if step[j] == t]))  # noqa: E731
    of_return, of_advantage, of_value = {}, {}, {t: mean(value, t) for t in steps}
    returns, advantages = np.zeros(len(step)), np.zeros(len(step))
    for place in reversed(range(len(steps))):
        t, later = steps[place], steps[place + 1] if place + 1 < len(steps) else None
        next_return, next_value, next_advantage = (
            found.get(later, 0.0) for found in (of_return, of_value, of_advantage)
        )
        for j in (j for j in tokens if step[j] == t):
            returns[j] = earned[j] + discount * next_return
            advantages[j] = earned[j] - value[j] + discount * next_value + discount * trace * next_advantage
        of_return[t] = mean(earned, t) + discount * next_return
        delta = mean(earned, t) - of_value[t] + discount * next_value
        of_advantage[t] = delta + discount * trace * next_advantage
    return returns, advantages


@given(texts, st.sampled_from([0.0, 0.5, 0.99, 1.0]), st.sampled_from([0.0, 0.9, 1.0]))
def test_equal_plain_loops(rng, discount, trace):
    reward, value, step, text = drawn(rng)
    expected = [plain(*row, discount, trace) for row in zip(reward, value, step, text, strict=True)]
    np.testing.assert_allclose(gae.returns(reward, step, text, discount), [one for one, _ in expected], atol=1e-12)
    found = gae.advantages(reward, value, step, text, discount, trace)
    np.testing.assert_allclose(found, [one for _, one in expected], atol=1e-12)


@given(texts)
def test_undiscounted_and_whole_the_advantage_is_the_reward_less_the_value(rng):
    reward, value, step, text = drawn(rng)
    returns = gae.returns(reward, step, text, 1.0)
    np.testing.assert_allclose(returns, np.where(text, reward[:, None], 0), atol=1e-12)
    found = gae.advantages(reward, value, step, text, 1.0, 1.0)
    np.testing.assert_allclose(found, np.where(text, returns - value, 0), atol=1e-12)


@given(texts)
def test_without_a_trace_it_is_the_temporal_difference_of_one_step(rng):
    reward, value, step, text = drawn(rng)
    found = gae.advantages(reward, value, step, text, 1.0, 0.0)
    for row in range(len(reward)):
        steps = sorted(set(step[row][text[row]]))
        for t, later in zip(steps, [*steps[1:], None], strict=True):
            here = text[row] & (step[row] == t)
            ahead = reward[row] if later is None else value[row][text[row] & (step[row] == later)].mean()
            np.testing.assert_allclose(found[row][here], ahead - value[row][here], atol=1e-12)


def test_steps_are_merged_and_what_was_never_unmasked_is_no_token():
    unmask = np.array([[0, 3, 1, 2, -1]])
    step, text = gae.steps_of(unmask, np.array([[True, True, True, False, True]]), 2)
    assert step.tolist() == [[0, 1, 0, 0, 0]] and text.tolist() == [[True, True, True, False, False]]
