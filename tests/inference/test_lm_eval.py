"""d1jax as a model of lm-evaluation-harness, on small tasks of our own; nothing is downloaded."""

import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from d1jax import lm_eval as command
from d1jax.config import SamplerConfig, UserError
from d1jax.data.tokenizers import ByteTokenizer
from d1jax.inference.complete import sample, sample_ids
from d1jax.inference.lm_eval import D1jaxLM
from d1jax.inference.lm_eval_settings import cut
from d1jax.inference.log_likelihood import Pair, are_greedy, elbos, masks
from d1jax.models.families import family_for
from d1jax.weights.hf_io import in_memory, save_weights
from d1jax.weights.tokenizer_files import write_new_companions

MASK = 257
GENERATE = """
task: small_generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
CHOOSE = """
task: small_choose
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def checkpoint(folder: Path, tiny, **changes) -> Path:
    model, variables = tiny(**{"vocab_size": 258, **changes})
    companions = lambda beside: write_new_companions(model.config, ByteTokenizer(), beside, published=True)  # noqa: E731
    family = family_for(model.config)
    save_weights(in_memory(variables, model.config, family), model.config, family, folder, companions)
    return folder


@pytest.fixture(scope="module")
def directory(tmp_path_factory, tiny) -> Path:
    return checkpoint(tmp_path_factory.mktemp("lm_eval") / "llada", tiny)


@pytest.fixture(scope="module")
def lm(directory) -> D1jaxLM:
    return D1jaxLM(pretrained=str(directory), length=16, block=8, samples=15, batch_size=8)


@pytest.fixture
def tasks(tmp_path) -> Path:
    rows = [
        {"question": "one and ", "answer": "two", "choices": [" two", " three", "x"], "gold": 0},
        {"question": "a longer question, which is ", "answer": "b", "choices": ["b", "cc", "ddd"], "gold": 1},
        {"question": "red or ", "answer": "blue", "choices": ["blue", "a long answer of many bytes", "no"], "gold": 2},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "generate.yaml").write_text(GENERATE.format(rows=path))
    (folder / "choose.yaml").write_text(CHOOSE.format(rows=path))
    return folder


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, one, number, ("task", number, 1)) for number, one in enumerate(arguments)]


# -- in the harness ----------------------------------------------------------------------------------------------------


def test_the_harness_runs_both_kinds_of_tasks(directory, tasks):
    found = {}
    for batch_size in (1, 4):
        found[batch_size] = simple_evaluate(
            "d1jax",
            model_args=f"pretrained={directory},samples=7,block=4,steps_per_token=0.5",
            tasks=["small_generate", "small_choose"],
            batch_size=batch_size,
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        )
    one, four = found[1]["samples"], found[4]["samples"]
    assert set(one) == {"small_generate", "small_choose"} and all(len(samples) == 3 for samples in one.values())
    texts = [[sample["resps"] for sample in samples["small_generate"]] for samples in (one, four)]
    assert texts[0] == texts[1]
    values = [[sample["resps"] for sample in samples["small_choose"]] for samples in (one, four)]
    a, b = (np.array([[float(value) for ((value, _),) in row] for row in side]) for side in values)
    np.testing.assert_allclose(a, b, rtol=1e-5)
    assert found[1]["results"]["small_choose"]["acc,none"] in (0, 1 / 3, 2 / 3, 1)
    assert found[1]["config"]["sampler"]["block_length"] == 4 and found[1]["config"]["steps_per_token"] == 0.5


def test_the_command_prints_the_harness_s_table(directory, tasks, capsys):
    arguments = ["--model", "d1jax", "--model_args", f"pretrained={directory},samples=3", "--tasks", "small_choose"]
    assert command.main([*arguments, "--include_path", str(tasks), "--batch_size", "4"]) == 0
    assert "small_choose" in capsys.readouterr().out


def test_without_the_harness_its_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    assert command.main(["ls", "tasks"]) == 2
    assert "install the harness with `pip install 'd1jax[lm-eval]'`" in capsys.readouterr().err


def test_the_registry_keeps_the_harness_s_own_models():
    assert get_model("d1jax") is D1jaxLM
    assert get_model("dummy").__name__ == "DummyLM"


# -- log-likelihoods ---------------------------------------------------------------------------------------------------


def plain_elbo(policy, context: list[int], target: list[int]) -> float:
    """Every set of masked tokens, one forward pass each, weighted by its probability."""
    total, length = 0.0, len(target)
    for count in range(1, length + 1):
        sets = list(itertools.combinations(range(length), count))
        for hidden in sets:
            shown = [MASK if place in hidden else token for place, token in enumerate(target)]
            logits = np.asarray(policy.logits([[*context, *shown]])[0], np.float64)[len(context) :]
            logp = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
            total += sum(logp[place, target[place]] for place in hidden) * length / count / len(sets) / length
    return total


@pytest.mark.parametrize("changes", [{}, {"alignment": "shifted", "qkv_bias": True, "rope_full_precision": False}])
def test_a_short_continuation_has_its_elbo_exactly(tmp_path, tiny, changes):
    policy = D1jaxLM(pretrained=str(checkpoint(tmp_path / "model", tiny, **changes)), samples=15).policy
    pairs = [Pair(list(b"ab"), list(b"c")), Pair(list(b"a context"), list(b"four")), Pair([], list(b"two"))]
    found = elbos(policy, pairs, samples=15, seed=0, batch=4)
    np.testing.assert_allclose(found, [plain_elbo(policy, *pair) for pair in pairs], rtol=2e-5)


def test_a_longer_continuation_is_estimated_without_bias(lm):
    pair = Pair(list(b"context "), list(b"sixteen"))
    exact = elbos(lm.policy, [pair], samples=127, seed=0, batch=32)[0]
    assert exact == pytest.approx(plain_elbo(lm.policy, *pair), rel=2e-5)
    drawn = [elbos(lm.policy, [pair], samples=16, seed=seed, batch=32)[0] for seed in range(40)]
    error = np.std(drawn) / math.sqrt(len(drawn))
    assert 0 < error < 0.05 * abs(exact) and abs(np.mean(drawn) - exact) < 4 * error


@pytest.mark.parametrize(("length", "samples"), [(1, 1), (3, 7), (7, 128), (3, 6), (20, 128)])
def test_masks_weigh_every_token_once_on_average(length, samples):
    drawn = [masks(length, samples, seed, 5) for seed in range(200 if samples < 2**length - 1 else 1)]
    often = np.mean([(masked * weight[:, None]).sum(axis=0) for masked, weight in drawn], axis=0)
    np.testing.assert_allclose(often, 1, atol=1e-12 if len(drawn) == 1 else 0.25)
    assert all(masked.any(axis=1).all() and len(masked) <= samples for masked, _ in drawn)
    assert all((masked * weight[:, None]).sum() == pytest.approx(length) for masked, weight in drawn)


def test_log_likelihoods_depend_on_the_request_alone(lm, directory):
    arguments = [
        ("context ", "a continuation"),
        ("", "nothing before"),
        ("context ", "b"),
        ("of", ""),
        ("w ", "x" * 40),
    ]
    asked = requests("loglikelihood", arguments)
    found = lm.loglikelihood(asked, disable_tqdm=True)
    assert found[3] == (0.0, True) and all(value < 0 for value, _ in found[:3])
    other = D1jaxLM(pretrained=str(directory), samples=15, batch_size=3)
    again = other.loglikelihood(asked[::-1], disable_tqdm=True)[::-1]
    np.testing.assert_allclose([value for value, _ in again], [value for value, _ in found], rtol=1e-5)
    assert [greedy for _, greedy in again] == [greedy for _, greedy in found]


def test_greedy_is_what_the_sampler_writes(lm):
    context = list(b"a context")
    for length in (1, 5, 11):
        settings = SamplerConfig(completion_length=length, block_length=length, steps=length, early_exit=False)
        written = sample_ids(lm.policy, [context], settings, 0, 0.0, [0]).tokens[0].tolist()
        other = [*written[:-1], (written[-1] + 1) % 256]
        assert are_greedy(lm.policy, [Pair(context, written), Pair(context, other)], batch=2) == [True, False]


def test_a_long_text_is_scored_window_by_window(lm, directory):
    short = D1jaxLM(pretrained=str(directory), samples=15, max_length=10, batch_size=8)
    text = "abcdefghijklmnopqrstuvw"  # 23 tokens: 10, 10 and 3 behind 7
    (found,) = short.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]), disable_tqdm=True)
    ids = list(text.encode())
    windows = [Pair([], ids[:10]), Pair([], ids[10:20]), Pair(ids[13:20], ids[20:])]
    assert found == pytest.approx(sum(elbos(lm.policy, windows, samples=15, seed=0, batch=4)), rel=1e-5)
    (whole,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]), disable_tqdm=True)
    assert whole == pytest.approx(elbos(lm.policy, [Pair([], ids)], samples=15, seed=0, batch=4)[0], rel=1e-5)


# -- texts -------------------------------------------------------------------------------------------------------------


def test_texts_are_the_sampler_s_cut_where_the_task_says(lm):
    lm_of = lambda **wanted: lm.generate_until(requests("generate_until", [("a prompt", wanted)]), disable_tqdm=True)  # noqa: E731
    assert lm.settings.steps_per_token == 0.5
    whole = sample(lm.policy, ["a prompt"], SamplerConfig(completion_length=16, block_length=8, steps=8)).text[0]
    assert lm_of() == [whole]
    stop = whole[4]
    assert lm_of(until=[stop, "never there"]) == [whole[: whole.index(stop)]]
    assert cut("one two", ("wo", "e")) == "on"
    tokens = sample(lm.policy, ["a prompt"], SamplerConfig(completion_length=16, block_length=8, steps=8)).tokens[0]
    assert lm_of(max_gen_toks=11) == [lm.policy.tokenizer.decode(tokens[:11].tolist())]  # of two whole blocks


def test_drawn_texts_differ_between_repeats_and_not_between_batches(lm, directory):
    wanted = {"do_sample": True, "temperature": 1.0, "top_p": 0.9, "max_gen_toks": 8}
    asked = requests("generate_until", [("one", wanted), ("another", wanted), ("one", wanted)])
    found = lm.generate_until(asked, disable_tqdm=True)
    assert found[0] != found[2]
    assert D1jaxLM(pretrained=str(directory), batch_size=2, block=8).generate_until(asked, disable_tqdm=True) == found
    greedy = requests("generate_until", [("one", {"do_sample": False, "temperature": 1.0, "max_gen_toks": 8})] * 2)
    first, second = lm.generate_until(greedy, disable_tqdm=True)
    assert first == second


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"sample": 3}, r"unknown argument sample = 3 \(did you mean 'samples'\?\); choices: pretrained"),
        ({"samples": "many"}, "--model_args: samples = 'many' is no int; write a whole number"),
        ({"samples": 0}, "samples = 0 must be at least 1"),
        ({"length": 16, "block": 5}, "block = 5 does not divide length = 16; try 4"),
        ({"schedule": "threshhold"}, r"schedule = 'threshhold' is not one of .*did you mean 'threshold'"),
        ({"threshold": 0.9}, "threshold belongs to schedule threshold or klass, not to even; choose that"),
        ({"steps": 64}, "steps = 64 would be of one length.*write steps_per_token"),
        ({"steps_per_token": 2.0}, "steps_per_token = 2.0 must be above 0 and at most 1"),
        ({"schedule": "threshold", "steps_per_token": 0.5}, "steps_per_token = 0.5: without effect here"),
        ({"batch_size": "auto"}, "--batch_size auto: d1jax tries no sizes; write a number"),
        ({"max_batch_size": 64}, "--max_batch_size 64: read with --batch_size auto only"),
    ],
)
def test_a_wrong_argument_is_named_with_its_cure(directory, given, said):
    with pytest.raises(UserError, match=said):
        D1jaxLM(pretrained=str(directory), **given)


def test_what_is_no_checkpoint_and_no_template_is_said(lm, tmp_path, capsys):
    with pytest.raises(UserError, match="pretrained is missing"):
        D1jaxLM()
    with pytest.raises(UserError, match="nowhere"):
        D1jaxLM(pretrained=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="has no chat template; leave the flag out"):
        lm.apply_chat_template([{"role": "user", "content": "hello"}])
    assert "llada" in lm.tokenizer_name and "/" not in lm.tokenizer_name
    assert command.main(["--model", "d1jax", "--model_args", "pretrained=nowhere", "--tasks", "arc_easy"]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: ")


TEMPLATE = (
    "{% for turn in messages %}{% if loop.first %}<s>{% endif %}<|start_header_id|>{{ turn.role }}<|end_header_id|>\n\n"
    "{{ turn.content }}{% if not (loop.last and not add_generation_prompt) %}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


@pytest.fixture
def chat_lm(tmp_path, tiny) -> D1jaxLM:
    """A checkpoint with a chat template, its tokenizer apart from it."""
    tokenizers = pytest.importorskip("tokenizers")
    symbols = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={name: i for i, name in enumerate(symbols)}, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(
        ["<|endoftext|>", "<|mask|>", "<s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    )
    apart = tmp_path / "tokenizer"
    apart.mkdir()
    made.save(str(apart / "tokenizer.json"))
    settings = {
        "bos_token": "<s>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "chat_template": TEMPLATE,
    }
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "mask_token": "<|mask|>"}
    (apart / "tokenizer_config.json").write_text(json.dumps(settings))
    directory = checkpoint(tmp_path / "chat", tiny, vocab_size=262)
    return D1jaxLM(pretrained=str(directory), tokenizer=str(apart), samples=3, length=8, block=8)


def test_a_chat_reaches_the_model_as_its_template_writes_it(chat_lm):
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    text = chat_lm.apply_chat_template(turns)
    assert text.endswith("<|start_header_id|>assistant<|end_header_id|>\n\n") and text.count("<s>") == 1
    assert chat_lm.tok_encode(text) == chat_lm.policy.tokenizer.prompt(turns)
    begun = chat_lm.apply_chat_template([*turns, {"role": "assistant", "content": "A: "}], add_generation_prompt=False)
    assert begun.endswith("A:") or begun.endswith("A: ")
    assert chat_lm.chat_template(True) == TEMPLATE
    (written,) = chat_lm.generate_until(requests("generate_until", [(text, {})]), disable_tqdm=True)
    assert written == sample(chat_lm.policy, [turns], chat_lm.settings.sampler).text[0]


def test_a_context_that_is_too_long_loses_its_beginning(lm, directory):
    short = D1jaxLM(pretrained=str(directory), samples=15, max_length=10, length=8, block=8)
    (found,) = short.loglikelihood(requests("loglikelihood", [("of many words:", "abc")]), disable_tqdm=True)
    assert found[0] == pytest.approx(plain_elbo(lm.policy, list(b" words:"), list(b"abc")), rel=2e-5)
    asked = [("of many words:", {"max_gen_toks": 8}), ("s:", {"max_gen_toks": 8})]
    first, second = short.generate_until(requests("generate_until", asked), disable_tqdm=True)
    assert first == second
    with pytest.raises(UserError, match="11 tokens .* more than the 10 positions"):
        short.loglikelihood(requests("loglikelihood", [("a", "x" * 11)]), disable_tqdm=True)
