"""Protects: every published protocol loads with a source, benchmarks go over defaults and flags over both, mistakes name the file."""

import pytest

from d1jax.config import UserError
from d1jax.evaluation import suite
from d1jax.evaluation.protocol import Protocol, load_protocol, protocol_names
from d1jax.tasks.benchmarks import BENCHMARKS


@pytest.mark.parametrize("name", protocol_names())
def test_every_protocol_loads_and_settles_every_benchmark(name):
    protocol = load_protocol(name)
    assert protocol.name == name and len(protocol.source) > 20
    assert set(protocol.benchmarks) <= set(BENCHMARKS), "a benchmark that is none"
    for benchmark in BENCHMARKS:
        for config in suite.Asked((benchmark,), protocol, {}).variants(benchmark):
            assert config.length % config.block_length == 0


def test_d1_is_what_its_paper_says():
    variants = suite.Asked(("gsm8k",), load_protocol("d1"), {}).variants("gsm8k")
    assert [(one.length, one.steps, one.block, one.temperature) for one in variants] == [
        (128, 64, 32, 0.0), (256, 128, 32, 0.0), (512, 256, 32, 0.0),
    ]  # fmt: skip
    assert {one.prefill for one in variants} == {"<reasoning>\n"}


PROTOCOL = """
source: "somebody, somewhere"
lengths: [32, 64]
defaults: {temperature: 0.3, sampler: {top_p: 0.9}}
benchmarks:
  gsm8k: {few_shot: 4, sampler: {top_k: 5}}
"""


def write(tmp_path, text, name="mine.yaml"):
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def test_a_benchmark_goes_over_the_defaults_and_flags_go_over_both(tmp_path):
    protocol = load_protocol(write(tmp_path, PROTOCOL))
    assert protocol.name == "mine" and protocol.lengths == (32, 64)
    config = protocol.settings("gsm8k", {"temperature": 0.6, "sampler": {"top_p": 0.8}})
    assert (config.temperature, config.few_shot, config.sampler.top_p, config.sampler.top_k) == (0.6, 4, 0.8, 5)
    other = protocol.settings("math500", {})
    assert (other.temperature, other.few_shot, other.sampler.top_p, other.sampler.top_k) == (0.3, 0, 0.9, 0)


def test_lengths_come_from_flags_then_from_the_protocol_then_from_the_settings(tmp_path):
    protocol = load_protocol(write(tmp_path, PROTOCOL))

    def lengths(protocol, given=(), **more):
        asked = suite.Asked(("gsm8k",), protocol, dict(given), **more)
        return [one.length for one in asked.variants("gsm8k")]

    assert lengths(protocol) == [32, 64]
    assert lengths(protocol, lengths=(96,)) == [96]
    assert lengths(protocol, {"length": 128}) == [128]
    assert lengths(Protocol()) == [256]


def test_every_length_steps_and_temperature_is_a_variant():
    asked = suite.Asked(
        ("gsm8k",), Protocol(), {}, lengths=(16, 64), steps_per_token=(0.5, 0.25), temperatures=(0.0, 1.0)
    )
    found = [(one.length, one.block, one.steps, one.temperature) for one in asked.variants("gsm8k")]
    assert found == [
        (16, 16, 8, 0.0), (16, 16, 8, 1.0), (16, 16, 4, 0.0), (16, 16, 4, 1.0),
        (64, 32, 32, 0.0), (64, 32, 32, 1.0), (64, 32, 16, 0.0), (64, 32, 16, 1.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("lengths: [64]", "source must say where these settings were published"),
        ("source: 7", "source must say where these settings were published"),
        ("source: here\nlenghts: [64]", "unknown key 'lenghts'; choices: source, lengths, defaults, benchmarks"),
        ("source: here\nlengths: 64", "lengths = 64: write a list of whole numbers above 0"),
        ("source: here\nlengths: [64, many]", "lengths = [64, 'many']: write a list of whole numbers above 0"),
        ("source: here\nlengths: [0]", "lengths = [0]: write a list of whole numbers above 0"),
        ("source: here\ndefaults: [1]", "defaults must be a mapping"),
        ("source: here\nbenchmarks: {gsm8k: 3}", "benchmarks.gsm8k must be a mapping"),
        ("source: here\nbenchmarks: {gsm9k: {limit: 3}}", "'gsm9k' is not one of gsm8k,"),
        ("source: here\ndefaults: {limt: 3}", "did you mean 'limit'?"),
        ("source: here\ndefaults: {length: 100}", "block = 32 does not divide length = 100"),
        ("source: here\nlengths: [48]", "block = 32 does not divide length = 48"),
        ("source: here\nbenchmarks: {gsm8k: {samples: 2}}", "gsm8k: samples = 2 at temperature 0"),
        ("source: [", "mine.yaml"),
        ("- 1", "mine.yaml"),
    ],
)
def test_mistakes_in_a_protocol_are_named(tmp_path, text, told):
    path = write(tmp_path, text)
    with pytest.raises(UserError) as found:
        load_protocol(path)
    assert told in str(found.value) and "mine" in str(found.value), str(found.value)
