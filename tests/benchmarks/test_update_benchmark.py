"""What benchmarks/update.py compares with: diffu-GRPO's update in PyTorch, on the same weights and masks."""

import dataclasses
import importlib

import numpy as np
import pytest

from d1jax.config import ModelConfig


@pytest.fixture(scope="module")
def setting():
    tiny = importlib.import_module("update").SETTINGS["tiny"]
    # A rate at which ratios leave 1, and losses and gradients change from one inner update to the next.
    return dataclasses.replace(tiny, learning_rate=1e-2, matmul=8, threads=1)


@pytest.fixture(scope="module")
def sides(setting, tmp_path_factory):
    """{side: call -> (losses, gradient norms)}, both in this process."""
    pytest.importorskip("torch", reason="PyTorch is an extra: pip install 'd1jax[torch]'")
    module, folder = importlib.import_module("update_sides"), tmp_path_factory.mktemp("handed_over")

    def runner(prepare):
        def run(call):
            start, go, _ = prepare(call)
            return go(start())

        return run

    return {name: runner(module.SIDES[name](setting, folder)[0]) for name in ("d1jax", "pytorch")}


@pytest.fixture(scope="module")
def ours(sides):
    return sides["d1jax"](importlib.import_module("update_sides").Call(micro_batches=2, inner_updates=4))


@pytest.mark.torch
@pytest.mark.parametrize(("micro_batches", "first_old"), [(1, True), (2, False), (4, True)])
def test_both_sides_have_the_same_losses(sides, ours, micro_batches, first_old):
    call = importlib.import_module("update_sides").Call(micro_batches, 4, first_old)
    theirs = sides["pytorch"](call)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-4, atol=1e-5)
    assert len(theirs[0]) == 4


@pytest.mark.torch
def test_every_inner_update_has_its_own_loss(ours):
    losses, norms = ours
    assert min(abs(np.diff(losses))) > 1e-2
    assert min(norms) < 0.2 < max(norms)  # clipped, and not


@pytest.mark.torch
def test_one_pass_for_the_completions_of_a_problem_is_an_update_too(sides, ours):
    """Other masks, so other losses; that they are those of a pass a row is tested in tests/rl/test_update.py."""
    call = importlib.import_module("update_sides").Call(2, 4, shared=True)
    losses, norms = sides["d1jax"](call)
    assert np.isfinite(losses + norms).all() and losses != ours[0]


@pytest.mark.torch
def test_both_sides_sample_the_batch(sides):
    call = importlib.import_module("update_sides").Call(1, 0, sampled=True)
    assert [side(call) for side in sides.values()] == [([], [])] * 2


@pytest.mark.torch
def test_every_call_starts_anew(sides, ours):
    call = importlib.import_module("update_sides").Call(2, 1)
    for side in sides.values():
        np.testing.assert_allclose([side(call)[0][0] for _ in range(2)], ours[0][0], rtol=1e-5)


@pytest.mark.parametrize(("loss", "norm"), [(1.01, 2.0), (1.0, 2.01), (float("nan"), 2.0)])
def test_what_differs_is_not_timed(loss, norm):
    update = importlib.import_module("update")

    class Answers:
        def __init__(self, loss, norm):
            self.found = {"losses": [loss], "gradient_norms": [norm]}

        def call(self, call):
            return self.found

    assert update.check({"d1jax": Answers(1.0, 2.0), "pytorch": Answers(1.0005, 2.0)}, 1)
    with pytest.raises(update.Disagreement, match="not timed"):
        update.check({"d1jax": Answers(1.0, 2.0), "pytorch": Answers(loss, norm)}, 1)


def test_operations_of_an_update():
    limits = importlib.import_module("limits")
    config = ModelConfig(width=4, layers=1, heads=1, kv_heads=1, mlp_width=8, vocab_size=10)
    # 4 x 16 + 3 x 32 weights in the block and 40 in the head, two operations each; scores and mixing of 5 x 5 columns of width 4.
    forward = 2 * 160 * 5 + 4 * 25 * 4 + 2 * 40 * 3
    assert limits.update_flops(config, rows=6, prompt=2, completion=3, inner_updates=4, scorings=7) == 6 * 19 * forward
