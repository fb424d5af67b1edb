"""Every method file against its paper's loss, written slowly in numpy from per-view log-probabilities.

Two inner updates of the compiled engine; the second one has a ratio that is not one. The oracles take the constants of the papers
(not those of the files) and three things from the engine: which positions each view masks, the model's log-probabilities there, and, where
shares are drawn, their values. N views, B rows, C completion columns.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from d1jax.config import MeshConfig
from d1jax.diffusion.canvas import through_first_end
from d1jax.diffusion.likelihood import Views, score
from d1jax.models.sharding import make_mesh
from d1jax.models.transformer import Transformer, initialize
from d1jax.rl.update import make_update, rows_alike, view_keys
from d1jax.training.likelihood import Scorer
from d1jax.training.optimizer import make_optimizer, new_state

BLOCK = 4  # of the toy's sampler


class Case(NamedTuple):
    """What a paper's equation is about, in float64."""

    new: np.ndarray  # [N, B, C] log-probabilities of the completion under each view
    old: np.ndarray
    reference: np.ndarray
    masked: np.ndarray  # [N, B, C] positions of the text that the view masks
    weight: np.ndarray  # [N, B, C] the plan's, for the value of a drawn share only
    length: np.ndarray  # [B]
    advantage: np.ndarray  # [B]
    reveal_step: np.ndarray  # [B, C]

    def rows(self):
        return range(len(self.length))

    def tokens(self, row):
        return range(self.length[row])


def clipped(ratio, advantage, epsilon):
    return -min(ratio * advantage, min(max(ratio, 1 - epsilon), 1 + epsilon) * advantage)


def k3(new, reference):
    return np.exp(reference - new) - (reference - new) - 1


# -- likelihoods of one token, or of a text -------------------------------------------------------------------------------


def first_view(logp, case, row, k):
    return logp[0, row, k]


def with_full_mask(logp, case, row, k):
    """DiffuCoder, eq. 13: half of the full view, half of the view of the pair that masks k, over its share t or 1 - t."""
    some = case.masked[0, row].any()
    t = 1 / (2 * case.weight[0, row].max()) if some else 1 - 1 / (2 * case.weight[1, row].max())
    part = logp[0, row, k] / t if case.masked[0, row, k] else logp[1, row, k] / (1 - t)
    return (part + logp[2, row, k]) / 2


def decoupled(logp, case, row, k):
    """The same with two maskings that know nothing of each other: each over its own share t (weight = 1 / (2 t))."""
    pair = sum(logp[n, row, k] * case.weight[n, row, k] for n in range(2) if case.masked[n, row, k])
    return logp[2, row, k] / 2 + pair


def segment_of(case, row, k, segments=None, shrink=None):
    """Which part of the recorded decoding committed the token: parts of equal length, or of `shrink` steps."""
    if shrink:
        return case.reveal_step[row, k] // shrink
    steps = max(case.reveal_step[row, j] for j in case.tokens(row)) + 1
    return next(s for s in range(segments) if (case.reveal_step[row, k] + 1) * segments <= (s + 1) * steps)


def trajectory(**how):
    return lambda logp, case, row, k: logp[segment_of(case, row, k, **how), row, k]


def left_to_right(logp, case, row, k):
    return logp[k, row, k]


def stratum(logp, case, row, k):
    """The one view in which the position is masked."""
    (view,) = (n for n in range(len(logp)) if case.masked[n, row, k])
    return logp[view, row, k]


def elbo(logp, case, row):
    """LLaDA, eq. 6: mean over maskings of L / n x the sum of what is masked."""
    views, length = len(logp), case.length[row]
    total = 0.0
    for n in range(views):
        masked = [k for k in case.tokens(row) if case.masked[n, row, k]]
        total += length / len(masked) * sum(logp[n, row, k] for k in masked) / views
    return total


def coupled_elbo(logp, case, row, pairs=2):
    """ESPO: two pairs; (L + 1) / n on a masking of n tokens and (L + 1) / (L - n) on its complement, halved."""
    length, total = case.length[row], 0.0
    for pair in range(pairs):
        for view in (2 * pair, 2 * pair + 1):
            masked = [k for k in case.tokens(row) if case.masked[view, row, k]]
            if masked:
                total += (length + 1) / len(masked) * sum(logp[view, row, k] for k in masked) / 2 / pairs
    return total


def quadrature(logp, case, row):
    """GDPO: sum over Gauss and Legendre's nodes on [0, 1] of weight / node x the sum of what is masked."""
    nodes, weights = np.polynomial.legendre.leggauss(3)
    total = 0.0
    for n, (node, weight) in enumerate(zip((1 + nodes) / 2, weights / 2, strict=True)):
        masked = [k for k in case.tokens(row) if case.masked[n, row, k]]
        assert len(masked) == max(int(node * case.length[row]), 1)
        total += weight / node * sum(logp[n, row, k] for k in masked)
    return total


# -- losses ------------------------------------------------------------------------------------------------------------------


def token_losses(case, score, epsilon, beta=0.0, to="reference", credit=None):
    """[B][L]: clipped surrogate + beta k3, DeepSeekMath's eq. 3 and d1's eq. 4."""
    credit = case.advantage[:, None].repeat(case.new.shape[2], axis=1) if credit is None else credit
    found = []
    for row in case.rows():
        losses = []
        for k in case.tokens(row):
            new, old, other = (score(logp, case, row, k) for logp in (case.new, case.old, getattr(case, to)))
            losses.append(clipped(np.exp(new - old), credit[row, k], epsilon) + beta * k3(new, other))
        found.append(losses)
    return found


def over_tokens(losses):
    return sum(map(sum, losses)) / sum(map(len, losses))


def over_groups(losses, group=4):
    """d1's and DiffuCoder's code: a micro-batch is the completions of one problem, and each has a mean over its tokens."""
    return float(np.mean([over_tokens(losses[first : first + group]) for first in range(0, len(losses), group)]))


def over_rows(losses):
    return float(np.mean([np.mean(row) for row in losses]))


def unigrpo(case):
    """One masking; the mean over masked tokens of the clipped surrogate and the KL, then over rows."""
    rows = []
    for row in case.rows():
        masked = [k for k in case.tokens(row) if case.masked[0, row, k]]
        losses = [
            clipped(np.exp(case.new[0, row, k] - case.old[0, row, k]), case.advantage[row], 0.2)
            + 0.01 * k3(case.new[0, row, k], case.reference[0, row, k])
            for k in masked
        ]
        rows.append(np.mean(losses))
    return float(np.mean(rows))


def wd1(case):
    """-(w+ - w-) x the sum of the one-step scores; the advantages here are the weights, times G."""
    sums = [case.advantage[row] * sum(case.new[0, row, k] for k in case.tokens(row)) for row in case.rows()]
    return -sum(sums) / len(sums)


def espo(case):
    rows = []
    for row in case.rows():
        new, old, reference = (coupled_elbo(logp, case, row) for logp in (case.new, case.old, case.reference))
        length = case.length[row]
        kl = (new - reference) ** 2 / 2 / length
        rows.append(clipped(np.exp((new - old) / length), case.advantage[row], 4e-4) + 0.003 * kl)
    return float(np.mean(rows))


def gdsd(case):
    """(clip(L_new - L_old) / L - psi A)^2 of one pair, psi = 1, plus 1e-3 of half the square of L_new - L_reference, over L."""
    rows = []
    for row in case.rows():
        new, old, reference = (coupled_elbo(logp, case, row, pairs=1) for logp in (case.new, case.old, case.reference))
        length = case.length[row]
        moved = min(max(new - old, np.log(1 - 4e-4)), np.log(1 + 4e-4)) / length
        rows.append((moved - case.advantage[row]) ** 2 + 0.001 * (new - reference) ** 2 / 2 / length)
    return float(np.mean(rows))


def rspo(case, group=4):
    """-A d + 0.01 / 2 d'^2, d = the change of ELBO / L since the reference, d' = d less its mean in the group; here with ELBO / L for d."""
    new, reference = (
        np.array([elbo(logp, case, row) for row in case.rows()]) / case.length for logp in (case.new, case.reference)
    )
    rows = []
    for row in case.rows():
        first = row // group * group
        others = [new[k] - reference[k] for k in range(first, first + group)]
        centred = new[row] - reference[row] - sum(others) / group
        rows.append(-case.advantage[row] * new[row] + 0.01 * centred**2 / 2)
    return float(np.mean(rows))


def gdpo(case):
    ratios = [np.exp(quadrature(case.new, case, row) - quadrature(case.old, case, row)) for row in case.rows()]
    return float(np.mean([clipped(r, a, 0.5) for r, a in zip(ratios, case.advantage, strict=True)]))


def igpo(case):
    rows = []
    for row in case.rows():
        apart = np.mean([case.new[0, row, k] - case.old[0, row, k] for k in case.tokens(row)])
        kl = np.mean([k3(case.new[0, row, k], case.reference[0, row, k]) for k in case.tokens(row)])
        rows.append(clipped(np.exp(apart), case.advantage[row], 0.2) + 0.01 * kl)
    return float(np.mean(rows))


def just_grpo(case):
    total = sum(map(sum, token_losses(case, left_to_right, 0.2)))
    return total / (len(case.length) * case.new.shape[2])


def spg_scores(logp, case):
    """A >= 0: the lower bound; A < 0: half of it, half the upper bound with b = 1.5. Sums over a text."""
    block, scores = BLOCK, []
    for row in case.rows():
        length = case.length[row]
        blocks = -(-length // block)
        lower, powers = 0.0, {}
        for n in range(2):
            first = next(k for k in case.tokens(row) if case.weight[n, row, k] > 0) // block * block
            inside = range(first, min(first + block, length))
            masked = [k for k in inside if case.masked[n, row, k]]
            share = len(masked) / (blocks * len(inside))  # of all tokens; here blocks are counted as if all were full
            for k in masked:
                lower += logp[n, row, k] / share / 2
                powers[k] = powers.get(k, 0.0) + np.exp(logp[n, row, k]) ** 1.5 / share / 2
        upper = length / len(powers) * sum(np.log(power) / 1.5 for power in powers.values())
        scores.append(lower if case.advantage[row] >= 0 else (lower + upper) / 2)
    return np.array(scores)


def spg(case):
    """-A x score, weighted by length: over all tokens."""
    return -np.sum(case.advantage * spg_scores(case.new, case)) / case.length.sum()


def stable_drl(case, group=4):
    """The sum over a group of -w A score / L, w = min(r, 5) / its sum over the group, r = exp((score - old score) / L); mean of groups."""
    new, old = (spg_scores(logp, case) / case.length for logp in (case.new, case.old))
    total = 0.0
    for first in range(0, len(new), group):
        ratios = [min(np.exp(new[row] - old[row]), 5.0) for row in range(first, first + group)]
        for ratio, row in zip(ratios, range(first, first + group), strict=True):
            total -= ratio / sum(ratios) * case.advantage[row] * new[row]
    return total / (len(new) // group)


def imitation(case):
    """-reward x ELBO / L, the mean over all completions."""
    rows = [-case.advantage[row] * elbo(case.new, case, row) / case.length[row] for row in case.rows()]
    return float(np.mean(rows))


def cispo(case):
    """-sg(min(ratio, 1.5)) A log p, mean over tokens; its value has log ratio in the place of log p, whose gradient is the same."""
    losses = []
    for row in case.rows():
        for k in case.tokens(row):
            apart = case.new[0, row, k] - case.old[0, row, k]
            losses.append(-min(np.exp(apart), 1.5) * case.advantage[row] * apart)
    return float(np.mean(losses))


EQUATIONS = {
    "d1": lambda case: over_groups(token_losses(case, first_view, 0.5, 0.04)),
    "d1_fixed_mask": lambda case: over_groups(token_losses(case, first_view, 0.5, 0.04)),
    "full_mask": lambda case: over_groups(token_losses(case, first_view, 0.5, 0.01)),
    "coupled_grpo": lambda case: over_groups(token_losses(case, with_full_mask, 0.5, 0.01)),
    "coupled_decoupled": lambda case: over_groups(token_losses(case, decoupled, 0.5, 0.01)),
    "unigrpo": unigrpo,
    "wd1": wd1,
    "spg": spg,
    "stable_drl": stable_drl,
    "espo": espo,
    "gdsd": gdsd,
    "rspo": rspo,
    "gdpo": gdpo,
    "igpo": igpo,
    "d2": lambda case: over_tokens(token_losses(case, trajectory(segments=4), 0.5, 0.04)),
    "cj_grpo": lambda case: over_tokens(token_losses(case, trajectory(shrink=1), 0.5, 0.04)),
    "tracerl": lambda case: over_rows(token_losses(case, trajectory(shrink=8), 0.2, 0.01, to="old")),
    "just_grpo": just_grpo,
    "online_rft": imitation,
    "cispo": cispo,
    "ppo": lambda case: over_rows(token_losses(case, trajectory(shrink=1), 0.2, 0.01, to="old")),
    "ppo_kl": lambda case: over_rows(token_losses(case, trajectory(shrink=1), 0.2)),
    "grpo": lambda case: over_rows(token_losses(case, first_view, 0.2, 0.04)),
    "strata": lambda case: over_rows(token_losses(case, stratum, 0.2, 0.04)),
    "decoupled": lambda case: over_rows(token_losses(case, first_view, 0.2, 0.04)),
    "grpo_process": lambda case: over_rows(token_losses(case, first_view, 0.2, 0.04)),
    "grpo_lines": lambda case: over_rows(token_losses(case, first_view, 0.2, 0.04)),
}


@functools.cache
def start(config):
    """(model, mesh, weights, those of the reference): the same for all methods."""
    model, mesh = Transformer(config), make_mesh(MeshConfig())
    variables = initialize(model, jax.random.key(0), mesh)
    return model, mesh, variables, jax.tree.map(lambda x: x * 1.05, variables)


@functools.partial(jax.jit, static_argnums=0)
def scored(model, weights, canvas, view):
    return score(model, weights, canvas, view).logp


def test_every_file_has_its_equation(toy):
    assert set(EQUATIONS) == {path.stem for path in toy.files}


def test_the_loss_is_that_of_the_paper(toy, method, request):
    name = request.node.callspec.params["method"].stem
    config = dataclasses.replace(method, num_iterations=2)
    model, mesh, variables, reference = start(toy.model)
    # The rate is zero at the second update, so the weights after it are those that it was computed with.
    once = dataclasses.replace(config.optimizer, schedule="linear", warmup_steps=0)
    optimizer, key = make_optimizer(once, 1), jax.random.key(7)
    advantage = toy.advantages(method, np.random.default_rng(1).random((2, 4)))
    rows = jax.tree.map(jnp.asarray, toy.batch(advantage))

    state = new_state(optimizer, variables, mesh)
    alike = rows_alike(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    scorer = Scorer(model, config.estimator, toy.sampler, toy.special, config.prompt_mask, rows_alike=alike)
    update = make_update(scorer, optimizer, config, state)
    after, metrics, _ = update(state, {}, reference if config.needs_reference else {}, rows, key)
    moved, found = after.trainable, np.asarray(metrics["loss"])
    assert not np.array_equal(moved["params"]["wte"], variables["params"]["wte"])
    batch = rows.rollout
    views = scorer.views(view_keys(key, 2, config.fresh_masks)[1], batch)
    text = np.asarray(through_first_end(batch.canvas.completion_BC, toy.special.end_ids))

    def per_view(weights):
        """[N, B, C]: the model's log-probabilities under each view alone."""
        alone = [
            Views(
                views.completion_NBC[n : n + 1],
                views.prompt_NBP[n : n + 1],
                jnp.ones((1, *text.shape)),
                sampled_by=views.sampled_by,
            )
            for n in range(len(views.completion_NBC))
        ]
        return np.stack([np.asarray(scored(model, weights, batch.canvas, view), np.float64) for view in alone])

    case = Case(
        new=per_view(moved), old=per_view(variables), reference=per_view(reference),
        masked=(np.asarray(views.completion_NBC) == toy.special.mask) & text[None], weight=np.asarray(views.weight_NBC),
        length=text.sum(axis=1), advantage=advantage, reveal_step=np.asarray(batch.unmask_step_BC),
    )  # fmt: skip
    np.testing.assert_allclose(found[1], EQUATIONS[name](case), rtol=2e-4, atol=1e-5)
