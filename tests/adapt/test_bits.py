"""Bits per byte against the exact values that enumeration gives."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d1jax.adapt.bits import _ratio, bits_per_byte
from d1jax.config import MeshConfig
from d1jax.data.packing import Windows
from d1jax.models.sharding import make_mesh

MASK = 12


def windows(rows=3, columns=5):
    tokens = np.random.default_rng(1).integers(0, 11, (rows, columns)).astype(np.int32)
    return Windows(tokens, np.full((rows, columns), 2.0, np.float32))


def measured(model, variables, given, samples, devices=1, batch=8):
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    with jax.set_mesh(mesh):
        return bits_per_byte(model, variables, given, mesh, batch, MASK, samples, jax.random.key(5))


def log_probabilities(logits):
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("alignment", ["same_position", "shifted"])
def test_many_maskings_come_to_the_enumerated_elbo(tiny, oracle, alignment):
    model, variables = tiny(alignment=alignment)
    given = windows()
    forward, nats = oracle(model, variables), 0.0
    for row in given.tokens_NT.tolist():
        for count in range(1, 5):
            subsets = list(itertools.combinations(range(1, 5), count))
            for hidden in subsets:
                logp = log_probabilities(forward([MASK if place in hidden else t for place, t in enumerate(row)])[1])
                scored = sum(logp[place - (alignment == "shifted"), row[place]] for place in hidden)
                nats -= scored * 4 / count / len(subsets) / 4
    expected = nats / math.log(2) / (3 * 4 * 2)
    found = measured(model, variables, given, samples=4000)
    assert found.bits_per_byte == pytest.approx(expected, rel=0.01)
    assert (found.windows, found.samples) == (3, 4000)


def test_next_tokens_are_exact_whatever_the_samples(tiny):
    model, variables = tiny(alignment="shifted", attention_mask="causal")
    found = measured(model, variables, windows(), samples=7)
    assert found == measured(model, variables, windows(), samples=1) and found.samples == 1


def test_neither_the_batch_nor_the_devices_change_it(tiny):
    model, variables = tiny()
    once = measured(model, variables, windows(11), samples=3)
    for devices, batch in ((1, 4), (4, 8), (8, 8)):
        other = measured(model, variables, windows(11), samples=3, devices=devices, batch=batch)
        np.testing.assert_allclose(other[:2], once[:2], rtol=1e-5)


def test_the_error_is_that_of_windows_drawn_again():
    rng = np.random.default_rng(0)

    def draw(count):
        size = rng.uniform(50, 150, count)
        return size * rng.normal(2.0, 0.4, count), size

    values = [_ratio(*draw(40), 1).bits_per_byte for _ in range(400)]
    errors = [_ratio(*draw(40), 1).error for _ in range(400)]
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.15)


def test_one_window_has_no_error():
    assert math.isnan(_ratio(np.array([8.0]), np.array([4.0]), 1).error)
    assert _ratio(np.array([8.0]), np.array([4.0]), 1).bits_per_byte == 2.0


def test_more_maskings_vary_less(tiny):
    model, variables = tiny()

    def spread(samples):
        mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        with jax.set_mesh(mesh):
            keys = jax.random.split(jax.random.key(0), 24)
            found = [bits_per_byte(model, variables, windows(), mesh, 8, MASK, samples, key)[0] for key in keys]
        return np.std(found)

    assert spread(8) < 0.7 * spread(1)
    assert jnp.isfinite(spread(1))
