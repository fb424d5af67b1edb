"""Loss terms against numpy written from the equations, and against the golden diffu-GRPO step."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies

from d1jax.config import Cispo, KlInLoss, PolicyGradient, Ppo, Regression, RlConfig, SelfNormalized
from d1jax.diffusion.canvas import Canvas
from d1jax.diffusion.likelihood import Views, score
from d1jax.models.families import FAMILIES
from d1jax.rl.loss import (
    AGGREGATIONS,
    KL,
    LEVELS,
    k3,
    relative_to_group,
    safe_exp,
    self_normalized_weights,
    token_terms,
)
from d1jax.weights.names import to_published


def each(advantage, columns):
    """One advantage a row, for every token."""
    return np.repeat(np.asarray(advantage, np.float32)[:, None], columns, axis=1)


def numpy_loss(new, old, reference, advantage, low, high, beta):
    loss = np.zeros_like(new)
    for i in range(new.shape[0]):
        for k in range(new.shape[1]):
            ratio = np.exp(new[i, k] - old[i, k])
            clipped = min(max(ratio, 1 - low), 1 + high)
            d = reference[i, k] - new[i, k]
            loss[i, k] = -min(ratio * advantage[i], clipped * advantage[i]) + beta * (np.exp(d) - d - 1)
    return loss


def test_terms_equal_plain_numpy():
    rng = np.random.default_rng(0)
    new, old, reference = (-rng.exponential(1.0, (5, 7)).astype(np.float32) for _ in range(3))
    advantage = np.array([1.0, -0.5, 0.0, 2.0, -1.5], np.float32)
    config = RlConfig(policy_loss=Ppo(clip_low=0.2, clip_high=0.3), kl=KlInLoss(0.04))
    terms = token_terms(new, old, reference, each(advantage, 7), np.ones(new.shape, bool), config)
    np.testing.assert_allclose(
        terms.loss_BC, numpy_loss(new, old, reference, advantage, 0.2, 0.3, 0.04), rtol=1e-5, atol=1e-6
    )
    ratio = np.exp(new - old)
    np.testing.assert_array_equal(terms.clipped_high_BC, (ratio > 1.3) & (advantage[:, None] > 0))
    np.testing.assert_array_equal(terms.clipped_low_BC, (ratio < 0.8) & (advantage[:, None] < 0))


def plain_terms(new, old, reference, advantage, mask, config):
    """Loss of every token, from the equations, one token at a time."""
    rows, columns = new.shape
    policy_loss, kl = config.policy_loss, config.kl
    loss = np.zeros((rows, columns))
    for i in range(rows):
        delta = (new[i] - old[i]) * mask[i]
        length = max(mask[i].sum(), 1)
        for k in range(columns):
            log_ratio = {"token": delta[k], "sequence_sum": delta.sum(), "sequence_mean": delta.sum() / length}[
                policy_loss.level
            ]
            r, a = np.exp(log_ratio), advantage[i]
            if policy_loss.name in ("policy_gradient", "self_normalized"):
                value = -a * new[i, k]
            elif policy_loss.name == "regression":
                low, high = np.log(1 - policy_loss.clip_low), np.log(1 + policy_loss.clip_high)
                value = (min(max(log_ratio, low), high) / length - policy_loss.scale * a) ** 2
            elif policy_loss.name == "cispo":
                value = -min(r, 1 + policy_loss.clip_high) * a * log_ratio
            else:
                value = -min(r * a, min(max(r, 1 - policy_loss.clip_low), 1 + policy_loss.clip_high) * a)
            if kl.name == "loss":
                p, q = new[i, k], reference[i, k]
                if kl.level != "token":
                    p, q = (new[i] * mask[i]).sum(), (reference[i] * mask[i]).sum()
                if kl.level == "relative":
                    p, q = p / length, q / length
                penalty = {"k2": (p - q) ** 2 / 2, "k3": np.exp(q - p) - (q - p) - 1}[kl.estimator]
                value += kl.coefficient * penalty / (length if kl.level == "sequence" else 1)
            loss[i, k] = value
    return loss


AXES = [
    {"policy_loss": PolicyGradient()},
    *({"policy_loss": Ppo(level, 0.2, 0.3)} for level in LEVELS),
    *({"policy_loss": Cispo(level, 0.3)} for level in LEVELS),
    {"policy_loss": Regression(0.7, 0.6, 1.5)},
    {"policy_loss": SelfNormalized(0.3)},
    *({"kl": KlInLoss(0.1, estimator)} for estimator in ("k2", "k3")),
    {"kl": KlInLoss(0.1, "k2", "relative")},
    {"kl": KlInLoss(0.1, "k2", "sequence"), "policy_loss": Ppo("sequence_mean", 0.2, 0.3)},
]


@pytest.mark.parametrize("changes", AXES, ids=str)
def test_every_axis_equals_its_equations(changes):
    config = RlConfig(**changes)
    rng = np.random.default_rng(0)
    new, old, reference = (-rng.exponential(0.6, (5, 6)).astype(np.float32) for _ in range(3))
    advantage = np.array([1.0, -0.5, 0.0, 2.0, -1.5], np.float32)
    mask = np.arange(6)[None, :] < np.array([6, 1, 3, 4, 5])[:, None]
    terms = token_terms(new, old, reference, each(advantage, 6), jnp.asarray(mask), config)
    expected = plain_terms(new, old, reference, advantage, mask, config)
    np.testing.assert_allclose(np.where(mask, terms.loss_BC, 0), np.where(mask, expected, 0), rtol=1e-4, atol=1e-5)


def test_without_a_ratio_the_gradient_is_that_of_advantage_times_log_probability():
    old, advantage, mask = jnp.zeros((2, 3)), each([2.0, -1.0], 3), jnp.ones((2, 3), bool)
    config = RlConfig(policy_loss=PolicyGradient())
    gradient = jax.grad(lambda x: token_terms(x, old, None, advantage, mask, config).loss_BC.sum())(-jnp.ones((2, 3)))
    np.testing.assert_allclose(gradient, [[-2.0] * 3, [1.0] * 3])


def test_cispo_keeps_the_gradient_of_a_clipped_token():
    config, mask = RlConfig(policy_loss=Cispo()), jnp.ones((1, 1), bool)
    new = jnp.log(jnp.array([[1.5]]))
    gradient = jax.grad(lambda x: token_terms(x, jnp.zeros((1, 1)), None, each([1.0], 1), mask, config).loss_BC.sum())(
        new
    )
    np.testing.assert_allclose(gradient, [[-1.2]], rtol=1e-6)


@hypothesis.given(
    strategies.lists(strategies.floats(-400, 400, width=32), min_size=1, max_size=6),
    strategies.floats(-3, 3, width=32),
    strategies.floats(0.125, 20, width=32),
)
def test_a_regressed_score_moves_towards_its_advantage_inside_the_clip_only(apart, advantage, scale):
    """d/d log p_k of (x / L - psi A)^2 is 2 (x / L - psi A) / L for every token, x the change of the sum; 0 where x is clipped."""
    new = jnp.asarray([apart], jnp.float32)
    config, mask = RlConfig(policy_loss=Regression(scale, 0.2, 0.3)), jnp.ones(new.shape, bool)
    total, length = float(new.sum()), len(apart)
    inside = np.log(0.8) < total < np.log(1.3)

    def loss(x):
        return token_terms(x, jnp.zeros(new.shape), None, each([advantage], length), mask, config).loss_BC[0, 0]

    value, gradient = jax.value_and_grad(loss)(new)
    left = np.clip(total, np.log(0.8), np.log(1.3)) / length - scale * advantage
    np.testing.assert_allclose(value, left**2, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(gradient, np.full((1, length), 2 * left / length * inside), rtol=1e-4, atol=1e-5)


@hypothesis.given(
    strategies.lists(
        strategies.lists(strategies.floats(-400, 400, width=32), min_size=3, max_size=3), min_size=4, max_size=4
    ),
    strategies.floats(0, 10, width=32),
)
def test_self_normalized_weights_are_clipped_ratios_over_their_mean_in_the_group(apart, high):
    """Two groups of two rows of three, two, one and three tokens; ratios of means over a text from e^-400 to e^400."""
    new, lengths = jnp.asarray(apart, jnp.float32), (3, 2, 1, 3)
    mask = jnp.arange(3, dtype=jnp.int32)[None, :] < jnp.array(lengths, jnp.int32)[:, None]
    found = self_normalized_weights(new, jnp.zeros(new.shape), mask, 2, SelfNormalized(high))
    expected = []
    for first in (0, 2):
        means = [sum(apart[row][: lengths[row]]) / lengths[row] for row in (first, first + 1)]
        logs = [min(mean, np.log(1 + high)) for mean in means]
        ratios = [np.exp(one - max(logs)) for one in logs]  # a common factor cancels
        expected += [[ratio / (sum(ratios) / 2)] for ratio in ratios]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)


def rspo_gradient(new, reference, advantage, lengths, group, strength):
    """Of -mean over texts of sg(A - lambda d') d', d' = d - sg(mean of d in the group), by hand: a token of a text of L has 1 / L of it."""
    d = [sum(new[i][:n] - reference[i][:n]) / n for i, n in enumerate(lengths)]
    gradient = np.zeros(new.shape)
    for i, n in enumerate(lengths):
        first = i // group * group
        centred = d[i] - sum(d[first : first + group]) / group
        gradient[i, :n] = -(advantage[i] - strength * centred) / n / len(lengths)
    return gradient


@hypothesis.given(strategies.integers(0, 2**31), strategies.floats(0.0078125, 2, width=32))
def test_a_relative_kl_with_policy_gradient_has_the_gradient_of_rspo(seed, strength):
    rng = np.random.default_rng(seed)
    new, reference = (-rng.exponential(1.0, (6, 5)).astype(np.float32) for _ in range(2))
    advantage, lengths = rng.standard_normal(6).astype(np.float32), rng.integers(1, 6, 6)
    mask = np.arange(5)[None] < lengths[:, None]
    config = RlConfig(policy_loss=PolicyGradient(), kl=KlInLoss(strength, "k2", "relative"))
    centred = relative_to_group(new, reference, jnp.asarray(mask), 3)

    def loss(x):
        terms = token_terms(x, x, centred, each(advantage, 5), jnp.asarray(mask), config)
        return jnp.sum(AGGREGATIONS["grpo"](mask.astype(np.float32), 3) * terms.loss_BC)

    expected = rspo_gradient(new, reference, advantage, lengths, 3, strength)
    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(new)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["k2", "k3"])
def test_kl_losses_pull_towards_the_reference_as_the_kl_does(name):
    """k2: its expected gradient under the policy is that of KL(policy || reference), exactly."""
    reference, at = jax.nn.log_softmax(jnp.array([-0.2, 0.4, 0.1])), jnp.array([0.3, -1.0, 0.5])
    exact = jax.grad(lambda z: jnp.sum(jax.nn.softmax(z) * (jax.nn.log_softmax(z) - reference)))(at)
    p = jax.nn.softmax(at)
    found = jax.grad(lambda z: jnp.sum(p * KL[name](jax.nn.log_softmax(z), reference)))(at)
    if name == "k2":
        np.testing.assert_allclose(found, exact, atol=1e-6)
    else:  # k3 has the gradient of the KL the other way round
        other = jax.grad(lambda z: jnp.sum(jnp.exp(reference) * (reference - jax.nn.log_softmax(z))))(at)
        np.testing.assert_allclose(found, other, atol=1e-6)


def test_a_clipped_token_has_no_gradient():
    old = jnp.zeros((2, 2))
    new = jnp.log(jnp.array([[1.5, 1.1], [0.5, 0.9]]))
    gradient = jax.grad(
        lambda x: token_terms(x, old, None, each([1.0, -1.0], 2), jnp.ones((2, 2), bool), RlConfig()).loss_BC.sum()
    )(new)
    assert (np.asarray(gradient) == 0).tolist() == [[True, False], [True, False]]


def test_k3_is_not_negative_and_flat_at_the_reference():
    x = jnp.linspace(-3, 3, 31)
    assert float(k3(x, jnp.zeros(31)).min()) >= 0
    assert float(jax.grad(lambda p: k3(p, jnp.float32(-1.0)))(jnp.float32(-1.0))) == 0.0


def test_k3_is_an_unbiased_estimate_of_the_kl():
    policy, reference = jax.nn.log_softmax(jnp.array([0.3, -1.0, 0.5])), jax.nn.log_softmax(jnp.array([-0.2, 0.4, 0.1]))
    expected = jnp.sum(jnp.exp(policy) * (policy - reference))
    np.testing.assert_allclose(jnp.sum(jnp.exp(policy) * k3(policy, reference)), expected, rtol=1e-5)


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_aggregation_equals_its_definition(name):
    rng = np.random.default_rng(1)
    lengths = [1, 4, 6, 2, 5, 6]
    mask = (np.arange(6)[None] < np.array(lengths)[:, None]).astype(np.float32)
    loss = rng.standard_normal((6, 6)).astype(np.float32)
    sums = [loss[i, : lengths[i]].sum() for i in range(6)]
    expected = {
        "bnpo": sum(sums) / sum(lengths),
        "group_bnpo": sum(sum(sums[i : i + 2]) / sum(lengths[i : i + 2]) for i in (0, 2, 4)) / 3,
        "row_sum": sum(sums) / 6,
        "grpo": sum(one / length for one, length in zip(sums, lengths, strict=True)) / 6,
        "dr_grpo": sum(sums) / (6 * 6),
    }[name]
    np.testing.assert_allclose((AGGREGATIONS[name](mask, 2) * loss).sum(), expected, rtol=1e-5, atol=1e-6)


def test_a_group_that_is_left_out_is_in_no_mean_over_groups():
    mask = np.array([[1, 1], [1, 0], [0, 0], [0, 0]], np.float32)
    np.testing.assert_allclose(AGGREGATIONS["group_bnpo"](mask, 2), mask / 3, rtol=1e-6)


EXTREMES = [
    (policy_loss, KlInLoss(0.1, estimator, level))
    for policy_loss in (PolicyGradient(), SelfNormalized(), *(made(level) for level in LEVELS for made in (Ppo, Cispo)))
    for estimator, level in (("k2", "token"), ("k3", "token"), ("k2", "sequence"), ("k2", "relative"))
]


@pytest.mark.parametrize(("policy_loss", "kl"), EXTREMES, ids=str)
def test_no_log_ratio_makes_a_loss_or_a_gradient_that_is_not_finite(policy_loss, kl):
    """Log ratios of a token from -200 to 200, so those of a text of eight from -1600 to 1600."""
    config = RlConfig(policy_loss=policy_loss, kl=kl)
    apart = np.repeat([-200.0, -88.0, -20.0, 0.4, 20.0, 88.0, 100.0, 200.0], 8).reshape(8, 8).astype(np.float32)
    mask, zeros = jnp.ones((8, 8), bool), jnp.zeros((8, 8))
    for advantage in (0.0, 1.0, -1.0):
        for reference in (zeros, jnp.asarray(2 * apart)):

            def policy(x, advantage=advantage, reference=reference):
                terms = token_terms(x, zeros, reference, zeros + advantage, mask, config)
                return terms.policy_BC.sum(), terms

            def loss(x, advantage=advantage, reference=reference):
                return token_terms(x, zeros, reference, zeros + advantage, mask, config).loss_BC.sum()

            (value, terms), gradient = jax.value_and_grad(policy, has_aux=True)(jnp.asarray(apart))
            gradient = np.asarray(gradient)
            assert all(np.isfinite(x).all() for x in (value, gradient, jax.grad(loss)(jnp.asarray(apart)), *terms))
            if advantage == 0:
                assert value == 0 and (gradient == 0).all()
            elif policy_loss.name == "ppo":
                if advantage > 0:
                    assert (gradient[4:] == 0).all(), "clipped above"
                    np.testing.assert_allclose(terms.policy_BC[4:], -1 - policy_loss.clip_high)
                else:
                    assert (gradient[4:] > 0).all(), "unbounded by definition: it still pushes the completion down"
                if advantage < 0:
                    assert (gradient[:3] == 0).all(), "clipped below"


def test_exp_is_continued_by_its_tangent():
    x = jnp.array([-3.0, 0.0, 19.9, 20.0, 20.1, 25.0, 500.0])
    value, slope = safe_exp(x), jax.vmap(jax.grad(safe_exp))(x)
    np.testing.assert_allclose(value[:4], np.exp(x[:4]), rtol=1e-5)
    np.testing.assert_allclose(value[4:], np.exp(20.0) * (1 + np.asarray(x[4:]) - 20), rtol=1e-5)
    np.testing.assert_allclose(slope, np.exp(np.minimum(x, 20.0)), rtol=1e-5)


@pytest.mark.smoke
def test_golden_diffu_grpo_step(golden):
    """Per-token log-probabilities, KL, loss and gradients of the reference implementation."""
    io = {name.removeprefix("grpo/"): value for name, value in golden.io.items() if name.startswith("grpo/")}
    prompt = int(io["prompt_len"])
    ids = jnp.asarray(io["prompt_completion_ids"])
    canvas = Canvas(ids[:, prompt:], ids[:, :prompt], jnp.full(ids.shape[0], prompt))
    mask, hidden_BP = golden.special.mask, jnp.asarray(io["prompt_token_mask"])[:, :prompt].astype(bool)
    everywhere_NBC = jnp.ones((1, *canvas.completion_BC.shape))
    views = Views(
        jnp.full(everywhere_NBC.shape, mask), jnp.where(hidden_BP, mask, canvas.prompt_BP)[None], everywhere_NBC
    )
    np.testing.assert_array_equal(np.concatenate([views.prompt_NBP[0], views.completion_NBC[0]], 1), io["noisy_ids"])
    eps, beta = map(float, io["eps_beta"])

    def loss(variables):
        logp = score(golden.model, variables, canvas, views).logp
        config = RlConfig(policy_loss=Ppo(clip_low=eps, clip_high=eps), kl=KlInLoss(beta))
        mask_BC = jnp.ones(logp.shape, bool)  # the fixture has terms behind the text too
        terms = token_terms(
            logp,
            io["old_logps"],
            io["ref_logps"],
            each(io["advantages"], logp.shape[1]),
            mask_BC,
            config,
        )
        return jnp.sum(AGGREGATIONS["bnpo"](io["completion_mask"].astype(np.float32), len(logp)) * terms.loss_BC), (
            logp,
            terms,
        )

    (value, (logp, terms)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(golden.variables)
    np.testing.assert_allclose(logp, io["per_token_logps"], atol=1e-4)
    np.testing.assert_allclose(terms.kl_BC, io["per_token_kl"], atol=1e-4)
    np.testing.assert_allclose(terms.loss_BC, io["per_token_loss"], atol=1e-4)
    np.testing.assert_allclose(value, io["loss"], atol=1e-4)
    np.testing.assert_allclose(optax.tree.norm(gradient), io["grad_global_norm"], rtol=1e-4)
    tensors = to_published(gradient, golden.model.config, FAMILIES["llada"])
    checked = [name for name in io if name.startswith("grad/")]
    assert len(checked) == 4
    for name in checked:
        np.testing.assert_allclose(tensors[name.removeprefix("grad/")], io[name], atol=1e-4)
