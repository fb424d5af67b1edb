"""What benchmarks/sampling.py compares with: the limits of the hardware, and LLaDA's decoding in PyTorch."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d1jax.config import ModelConfig, SamplerConfig
from d1jax.data.tokenizers import SpecialTokens
from d1jax.diffusion.decoding import Prompts
from d1jax.diffusion.noise import KeyedNoise
from d1jax.diffusion.sampler import Sampler
from d1jax.diffusion.schedule import step_schedule
from d1jax.models.families import FAMILIES
from d1jax.weights.names import to_published

LLADA_8B = ModelConfig(width=4096, layers=32, heads=32, kv_heads=32, mlp_width=12288, vocab_size=126464)
DREAM_7B = ModelConfig(width=3584, layers=28, heads=28, kv_heads=4, mlp_width=18944, vocab_size=152064)


def module(name):
    path = Path(__file__).resolve().parents[2] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def limits():
    return module("limits")


# -- limits of an H200, worked out by hand in the same way elsewhere -----------------------------------------------------


def test_parameters(limits):
    assert limits.body_parameters(LLADA_8B) == 6_979_321_856
    assert limits.head_parameters(LLADA_8B) == 517_996_544


@pytest.mark.parametrize(
    ("config", "scored", "teraflops"),
    [(LLADA_8B, 384, 5.835), (LLADA_8B, 256, 5.703), (LLADA_8B, 32, 5.471), (DREAM_7B, 384, 5.489), (DREAM_7B, 32, 5.105)],
)  # fmt: skip
def test_operations_of_a_forward_pass(limits, config, scored, teraflops):
    assert limits.forward_flops(config, 384, 384, scored) / 1e12 == pytest.approx(teraflops, abs=6e-4)


@pytest.mark.parametrize(
    ("batch", "computed", "milliseconds"), [(1, 384, 6.92), (1, 32, 3.17), (4, 32, 3.29), (5, 32, 3.33), (6, 32, 3.69), (8, 32, 4.92)]
)  # fmt: skip
def test_seconds_of_a_forward_pass(limits, batch, computed, milliseconds):
    assert limits.forward_seconds(LLADA_8B, batch, computed, 384, 32) * 1e3 == pytest.approx(milliseconds, abs=0.01)


@pytest.mark.parametrize(
    ("cache", "steps", "batch", "tokens_per_second"),
    [
        ("none", 128, 1, 289), ("none", 128, 8, 289), ("none", 128, 64, 289),
        ("prefix", 128, 1, 538), ("prefix", 128, 8, 692), ("prefix", 128, 64, 692),
        ("dual", 128, 1, 588), ("dual", 128, 8, 1980), ("dual", 128, 64, 1980),
        ("dual", 64, 1, 1100), ("dual", 64, 8, 2849), ("dual", 32, 1, 1949), ("dual", 32, 8, 3648),
    ],
)  # fmt: skip
def test_tokens_per_second(limits, cache, steps, batch, tokens_per_second):
    seconds = limits.sampling_seconds(LLADA_8B, batch, 128, 256, steps, 32, cache)
    assert batch * 256 / seconds == pytest.approx(tokens_per_second, abs=1)


@pytest.mark.parametrize(("cache", "columns"), [("none", 49_152), ("prefix", 20_352), ("dual", 6_912)])
def test_columns_computed(limits, cache, columns):
    made = limits.passes(128, 256, 128, 32, cache)
    assert len(made) == 128 and sum(computed for computed, _, _ in made) == columns


# -- the PyTorch side ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torch_sampler():
    pytest.importorskip("torch", reason="PyTorch is an extra: pip install 'd1jax[torch]'")
    pytest.importorskip("transformers")
    return module("torch_sampler")


@pytest.mark.torch
@pytest.mark.parametrize(("length", "steps"), [(8, 3), (8, 8), (32, 16), (5, 4), (4, 1)])
def test_both_unmask_as_many_in_each_step(torch_sampler, length, steps):
    import torch

    config = SamplerConfig(completion_length=2 * length, block_length=length, steps=2 * steps)
    theirs = torch_sampler.tokens_per_step(torch.tensor([length, length]), steps)
    assert theirs.tolist() == [step_schedule(config).count_K[:steps].tolist()] * 2


@pytest.fixture
def both(torch_sampler, tiny):
    """(d1jax's model, its variables, the same in PyTorch); the head never writes the mask token, id 12."""
    import torch

    model, variables = tiny(width=32, layers=3, heads=4, kv_heads=2)
    params = {**variables["params"], "ff_out": variables["params"]["ff_out"].at[:, 12].set(0)}
    tensors = to_published({"params": params}, model.config, FAMILIES["dream"])
    tensors = {name: torch.tensor(np.array(x)) for name, x in tensors.items()}
    return model, {"params": params}, torch_sampler.bidirectional_llama(model.config, tensors)


@pytest.mark.torch
def test_the_pytorch_model_is_bidirectional(both):
    import torch

    first = torch.arange(9)[None, :]
    second = torch.where(first == 8, 0, first)
    with torch.no_grad():
        assert (both[2](first).logits[:, 0] - both[2](second).logits[:, 0]).abs().max() > 1e-3


@pytest.mark.torch
@pytest.mark.parametrize(("block", "steps"), [(16, 6), (8, 6), (4, 16)])
def test_token_for_token_at_temperature_zero(torch_sampler, both, block, steps):
    import torch

    model, variables, torch_model = both
    prompt_BP = np.random.default_rng(0).integers(0, 11, (3, 5))
    config = SamplerConfig(completion_length=16, block_length=block, steps=steps, early_exit=False)
    ours = Sampler(model, config, SpecialTokens(mask=12, end=11)).sample(
        variables,
        Prompts(jnp.asarray(prompt_BP), jnp.full(3, 5)),
        KeyedNoise(jax.random.key(0), jnp.arange(3)),
    )
    theirs = torch_sampler.generate(
        torch_model, torch.tensor(prompt_BP), completion_length=16, block_length=block, steps=steps, temperature=0.0, mask_id=12
    )  # fmt: skip
    np.testing.assert_array_equal(ours.tokens_BC, theirs.tokens_BC)
    np.testing.assert_array_equal(ours.unmask_step_BC, theirs.unmask_step_BC)
    assert ours.nfe_B.tolist() == [theirs.forward_passes] * 3 == [steps] * 3


@pytest.mark.torch
def test_noise_draws_from_the_tempered_distribution(torch_sampler):
    import torch

    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    generator = torch.Generator().manual_seed(0)
    drawn = torch_sampler.noised(logits.expand(1, 20_000, 4), 0.7, generator).argmax(dim=-1)
    share = torch.bincount(drawn[0], minlength=4) / 20_000
    np.testing.assert_allclose(share, torch.softmax(logits / 0.7, dim=0), atol=0.015)
