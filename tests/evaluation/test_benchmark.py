"""Protects: samples depend on row and seed alone, a killed evaluation continues to the same file, mistakes cost no model load."""

import dataclasses
import json
import re

import numpy as np
import pytest

from d1jax import evaluate
from d1jax.config import UserError
from d1jax.evaluation import benchmark_command, suite
from d1jax.evaluation.benchmark import completions_of, hand_over, run_cell, summarise
from d1jax.evaluation.protocol import Protocol
from d1jax.tasks.judging import grade_all

GIVEN = {"style": "bare", "samples": 2, "limit": 3, "length": 20, "block": 10, "temperature": 1.0, "seed": 7}
FLAGS = ["--tasks", "sudoku", "--style", "bare", "--limit", "3", "--length", "20", "--block", "10", "--steps_per_token", "0.2"]  # fmt: skip
MODEL = {"path": "here"}


def cell(**changes):
    asked = suite.Asked(("sudoku",), Protocol(), {**GIVEN, **changes}, steps_per_token=(0.2,))
    (made,) = suite.plan(asked)
    return made


def untimed(path):
    return re.sub(rb'"seconds": [^,]*,', b"", path.read_bytes())


@pytest.fixture(scope="module")
def finished(sudoku_policy, tmp_path_factory):
    """(folder, samples) of an evaluation that nothing disturbed, three at a time."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, run_cell(sudoku_policy, cell(), folder, MODEL, batch=3)


def test_prompts_that_do_not_fit_are_counted_before_anything_is_sampled(sudoku_policy, tmp_path):
    model = sudoku_policy.model.clone(config=dataclasses.replace(sudoku_policy.config, max_positions=39))
    with pytest.raises(
        UserError, match=r"the prompts of (\d+) of \1 rows leave no room for 20 new tokens .* 39 positions"
    ):
        run_cell(dataclasses.replace(sudoku_policy, model=model), cell(), tmp_path, MODEL, batch=3)


@pytest.mark.parametrize("batch", [1, 32])
def test_samples_do_not_depend_on_the_batch(sudoku_policy, finished, tmp_path, batch):
    found = run_cell(sudoku_policy, cell(), tmp_path, MODEL, batch)
    kept = [(one["row"], one["sample"], one["completion"], one["grade"], one["tokens"], one["nfe"]) for one in found]
    expected = [
        (one["row"], one["sample"], one["completion"], one["grade"], one["tokens"], one["nfe"]) for one in finished[1]
    ]
    assert kept == expected
    assert [pair[:2] for pair in kept] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert len({one["completion"] for one in found}) > 3, "samples of a row are draws of their own"


@pytest.mark.parametrize("left", ["half a line", "whole lines", "nothing", "all"])
def test_a_killed_evaluation_continues_to_the_same_file(sudoku_policy, finished, tmp_path, left, monkeypatch):
    folder, samples = finished
    name = f"{cell().label}.jsonl"
    content = (folder / name).read_bytes()
    ends = [place + 1 for place, byte in enumerate(content) if byte == ord("\n")]
    cut = {"half a line": ends[4] - 40, "whole lines": ends[2], "nothing": 0, "all": len(content)}[left]
    (tmp_path / name).write_bytes(content[:cut])
    (tmp_path / f"{cell().label}.settings.json").write_bytes((folder / f"{cell().label}.settings.json").read_bytes())
    if left == "all":
        monkeypatch.setattr("d1jax.evaluation.benchmark.hand_over", None)  # nothing is drawn again
    found = run_cell(sudoku_policy, cell(), tmp_path, MODEL, batch=3)
    assert untimed(tmp_path / name) == untimed(folder / name)
    assert [one["completion"] for one in found] == [one["completion"] for one in samples]


@pytest.mark.parametrize(
    ("changes", "model", "other"),
    [
        ({"seed": 8}, MODEL, "config"),
        ({"limit": 2}, MODEL, "config, data"),
        ({}, {"path": "there"}, "model"),
        ({"prefill": "12"}, MODEL, "config"),
    ],
)
def test_samples_of_another_evaluation_are_not_continued(finished, changes, model, other):
    folder, _ = finished
    before = (folder / f"{cell().label}.jsonl").read_bytes()
    with pytest.raises(benchmark_command.UserError, match=re.escape(f"other {other}); name another --out")):
        run_cell(None, cell(**changes), folder, model, batch=3)
    assert (folder / f"{cell().label}.jsonl").read_bytes() == before


def test_damaged_files_are_named(finished, tmp_path):
    folder, label = finished[0], cell().label
    settings = (folder / f"{label}.settings.json").read_bytes()
    samples, beside = tmp_path / f"{label}.jsonl", tmp_path / f"{label}.settings.json"
    samples.write_bytes(b'{"row": 0}\n')
    with pytest.raises(benchmark_command.UserError, match="settings that nothing tells"):
        run_cell(None, cell(), tmp_path, MODEL, batch=3)
    for damage in (b'{"bench', b"[]"):
        beside.write_bytes(damage)
        with pytest.raises(benchmark_command.UserError, match=re.escape(f"{beside}: is damaged")):
            run_cell(None, cell(), tmp_path, MODEL, batch=3)
    beside.write_bytes(settings)
    whole = (folder / f"{label}.jsonl").read_bytes()
    first = whole[: whole.index(b"\n") + 1]
    elsewhere, ungraded = first.replace(b'"row": 0', b'"row": 3'), first.replace(b'"solved"', b'"solve"')
    for damage in (
        b'{"row": 0}\n',
        b"7\n",
        b"\xff\n",
        b"{\n",
        b"\n",
        elsewhere,
        ungraded,
        first.replace(b'"nfe"', b'"n"'),
    ):
        samples.write_bytes(first + damage)
        with pytest.raises(benchmark_command.UserError, match=re.escape(f"{samples}:2: is damaged")):
            run_cell(None, cell(), tmp_path, MODEL, batch=3)
        assert samples.read_bytes() == first + damage


def test_an_evaluation_that_ended_before_its_first_sample_is_in_nobodys_way(sudoku_policy, finished, tmp_path):
    label = cell().label
    (tmp_path / f"{label}.jsonl").write_bytes(b"")
    (tmp_path / f"{label}.settings.json").write_text('{"config": "another"}')
    run_cell(sudoku_policy, cell(), tmp_path, MODEL, batch=3)
    for name in (f"{label}.jsonl", f"{label}.settings.json"):
        assert untimed(tmp_path / name) == untimed(finished[0] / name)


def test_a_batch_is_graded_while_the_next_one_is_decoded(sudoku_policy, finished, tmp_path, monkeypatch):
    events = []
    for name, real in (("hand_over", hand_over), ("completions_of", completions_of), ("grade_all", grade_all)):
        monkeypatch.setattr(
            f"d1jax.evaluation.benchmark.{name}",
            lambda *given, name=name, real=real: events.append(name) or real(*given),
        )
    found = run_cell(sudoku_policy, cell(), tmp_path, MODEL, batch=2)
    between = ["hand_over", "completions_of", "grade_all"]
    assert events == ["hand_over", *between, *between, "completions_of", "grade_all"]
    assert [one["completion"] for one in found] == [one["completion"] for one in finished[1]]
    assert [one["seconds"] is None for one in found] == [True, True, False, False, False, False]


def test_the_prefill_is_part_of_the_graded_text(sudoku_policy, finished, tmp_path, monkeypatch):
    """And of the prompt: a row's answer whose beginning is given is completed, not answered again."""
    graded = []

    def keep(task, rows, texts):
        graded.extend(texts)
        return [{"solved": 0.0} for _ in texts]

    monkeypatch.setattr("d1jax.evaluation.benchmark.grade_all", keep)
    asked = []
    monkeypatch.setattr(
        "d1jax.evaluation.benchmark.hand_over", lambda policy, prompts, *more: asked.extend(prompts) or hand_over(policy, prompts, *more)
    )  # fmt: skip
    found = run_cell(sudoku_policy, cell(prefill="12\n", samples=1), tmp_path, MODEL, batch=3)
    assert all(text.startswith("12\n") for text in graded) and graded == [one["completion"] for one in found]
    encoded = sudoku_policy.tokenizer.encode("12\n")
    assert all(list(prompt[-3:]) == encoded for prompt in asked)


def test_a_text_is_whole_where_a_token_ends_it_or_a_grid_is_full(sudoku_policy, tmp_path, monkeypatch):
    end = min(sudoku_policy.tokenizer.special.end_ids)
    digit = sudoku_policy.tokenizer.encode("1")[0]

    def drawn(*given):
        found = completions_of(*given)
        tokens = found.tokens * 0 + digit
        tokens[0, 4:] = end
        return dataclasses.replace(
            found, tokens=tokens, length=np.array([5, 20, 20]), text=["1111", "1111\n" * 4, "1" * 20]
        )

    monkeypatch.setattr("d1jax.evaluation.benchmark.completions_of", drawn)
    found = run_cell(sudoku_policy, cell(samples=1), tmp_path, MODEL, batch=3)
    assert [(one["tokens"], one["ended"]) for one in found] == [(4, True), (20, True), (20, False)]
    assert [len(one["pieces"]) for one in found] == [5, 20, 20]


def test_a_summary_counts_rows_and_samples(finished):
    one = dataclasses.replace(cell(), rows=[{}, {}])
    samples = [
        {**finished[1][0], "row": row, "sample": sample, "grade": {"solved": right, "format": 1.0}, "offer": offer,
         "seconds": None, "tokens": 5, "ended": row == 0}
        for row, sample, right, offer in [(0, 0, 1.0, "4"), (0, 1, 0.0, None), (1, 0, 0.0, "3"), (1, 1, 0.0, "3")]
    ]  # fmt: skip
    told = summarise(one, samples)
    assert {key: told[key] for key in ("n", "samples", "correct", "accuracy", "grades", "cut_off", "effective_tokens")} == {
        "n": 2, "samples": 2, "correct": 1, "accuracy": 0.25, "grades": {"format": 1.0}, "cut_off": 0.5, "effective_tokens": 5.0,
    }  # fmt: skip
    assert told["tokens_per_second"] is None and told["maj@2"]["value"] == 0.5 and told["pass@2"]["value"] == 0.5
    assert "maj@2" not in summarise(one, [{**sample, "offer": None} for sample in samples])


# -- the command ---------------------------------------------------------------------------------------------------------


def test_a_base_is_compared_on_the_same_rows(sudoku_checkpoints, tmp_path, capsys, monkeypatch):
    first, second = sudoku_checkpoints
    flags = [*FLAGS, "--base", str(second), "--out", str(tmp_path / "out"), "--batch", "3", "--model"]
    assert evaluate.main([*flags, str(first)]) == 0
    said = capsys.readouterr().out
    assert re.search(
        r"^sudoku_20_s4: first and base second alone solve \d+ and \d+ rows; McNemar p = [\d.]+$", said, re.M
    )
    result = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert list(result["results"]) == ["first", "base second"] and result["compared"][0]["cell"] == "sudoku_20_s4"
    assert result["rows"]["sudoku"]["rows"] == 3 and len(result["rows"]["sudoku"]["sha256"]) == 64
    assert (tmp_path / "out" / "base" / "sudoku_20_s4.jsonl").exists() and (tmp_path / "out" / "report.html").exists()
    monkeypatch.setattr(benchmark_command, "load_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    assert evaluate.main([*FLAGS, "--model", str(second), "--out", str(tmp_path / "out")]) == 2
    assert "holds samples of another evaluation (other model)" in capsys.readouterr().err


OWN = """
from d1jax.tasks.sudoku import Sudoku


class Mine(Sudoku):
    name = "mine"
"""


def test_a_task_of_the_users_own_writes_under_out(sudoku_policy, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"puzzle": "1234341221430321"}\n')
    name = f"{tmp_path / 'own.py'}:Mine"
    given = {**GIVEN, "samples": 1, "temperature": 0.0}
    (made,) = suite.plan(suite.Asked((name,), Protocol(), given, steps_per_token=(0.2,), data={name: str(rows)}))
    assert made.label == "Mine_20_s4"
    run_cell(sudoku_policy, made, tmp_path / "out", MODEL, batch=3)
    assert (tmp_path / "out" / "Mine_20_s4.jsonl").exists()


MISTAKES = {
    "unknown task": (["--tasks", "gsm8"], "'gsm8' is not one of gsm8k,", "did you mean 'gsm8k'?"),
    "unknown protocol": (["--protocol", "llada"], "--protocol 'llada' is not one of d1, ", "did you mean 'llada15'?"),
    "protocol that is no file": (["--protocol", "mine.yaml"], "--protocol 'mine.yaml'", "and no file"),
    "block does not divide": (["--lengths", "48", "--block", "32"], "block = 32 does not divide length = 48", "0 takes"),
    "length 0": (["--lengths", "0"], "sudoku at length 0", "length"),
    "same samples": (["--samples", "4"], "samples = 4 at temperature 0 are all the same", "set a temperature"),
    "data of another": (["--data", "gsm8k=rows.jsonl"], "names 'gsm8k', which is not among --tasks sudoku", "--data"),
    "data without =": (["--data", "rows.jsonl"], "--data 'rows.jsonl'", "write BENCHMARK=SOURCE"),
    "data that is not there": (["--data", "sudoku=nowhere.jsonl"], "nowhere.jsonl: no such file", "check the path"),
    "shots above the rows": (
        ["--few_shot", "3", "--shots", "sudoku=SHOTS"], "few_shot = 3: of 2 rows for worked examples only 1 have", "--shots",
    ),
    "shots that nothing reads": (["--shots", "sudoku=SHOTS"], "--shots sudoku=", "without effect here, read only with few_shot above 0"),
    "style among the options": (["--options", "{style: bare}"], "options.style = 'bare': the style is --style", "leave it out"),
    "split seed among the options": (["--options", "{split_seed: 1}"], "options.split_seed = 1: rows that are generated", "leave it out"),
    "task of their own that is not there": (["--tasks", "my/no.py:Mine"], "--tasks 'my/no.py:Mine': there is no file", ""),
    "few_shot out of bounds": (["--few_shot", "-1"], "few_shot", "-1"),
    "own flag twice": (["--batch", "2", "--batch", "3"], "--batch is given twice", "once is meant"),
    "setting twice": (["--limit", "2", "--limit", "3"], "--limit is given twice", "once is meant"),
    "setting twice, two spellings": (["--few-shot", "2", "--few_shot=3"], "--few_shot is given twice", "once is meant"),
    "nested setting twice": (["--sampler.top_p", ".9", "--sampler.top_p", ".8"], "--sampler.top_p is given twice", ""),
    "length and lengths": (["--length", "32", "--lengths", "64"], "--length beside --lengths", "one of them"),
    "batch 0": (["--batch", "0"], "--batch 0 must be above 0", ""),
    "batch no number": (["--batch", "many"], "--batch 'many'", "write numbers"),
    "lengths no number": (["--lengths", "64,big"], "--lengths 'big'", "write numbers"),
    "same cell twice": (["--lengths", "64,64"], "two of the settings are one", "sudoku_64_s32"),
    "same task twice": (["--tasks", "sudoku,sudoku"], "two of the settings are one", "sudoku_256_s128"),
    "unknown setting": (["--lenght", "64"], "lenght", "did you mean"),
    "no value": (["--limit"], "--limit has no value", ""),
    "no flag": (["extra"], "'extra' is not a flag", "--setting value"),
    "wrong kind": (["--limit", "many"], "limit", "many"),
    "size of the sampler": (["--sampler.steps", "7"], "sampler.steps is set by steps_per_token", "give that"),
    "top_p at temperature 0": (
        ["--sampler.top_p", "0.9"], "--sampler.top_p 0.9: without effect here, read only with a temperature above 0", "leave this out",
    ),
    "top_k at several lengths": (["--lengths", "32,64", "--sampler", "{top_k: 5}"], "--sampler.top_k 5: without effect here", "set that"),
    "probability of what is never drawn": (
        ["--sampler.remasking.confidence_of", "sampling"], "--sampler.remasking.confidence_of sampling: without effect", "top_p",
    ),
    "steps of a schedule that has none": (
        ["--sampler.schedule", "threshold", "--steps_per_token", "0.2"], "--steps_per_token: without effect", "sampler.schedule = even",
    ),
    "unknown template field": (["--template", "{puzle}?"], "template: {puzle} is no field", "choices: prompt, puzzle"),
    "no such model": (["--model", "nowhere"], "nowhere", ""),
    "no such base": (["--base", "nowhere"], "--base 'nowhere': no such directory", "none"),
    "the model as its base": (["--base", "BASE/../first"], "is the model itself", "leave it out"),
    "no such adapter": (["--adapter", "nowhere"], "--adapter 'nowhere': no such directory", "PEFT"),
    "out is a file": (["--out", "SHOTS"], "is a file", "name a directory"),
    "mesh": (["--mesh", "2,2"], "--mesh '2,2' is not of the form data,fsdp,tensor", "1,-1,1"),
    "nothing to ask": (["--tasks", ","], "--tasks", "gsm8k"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_cost_one_line_and_no_model(sudoku_checkpoints, tmp_path, monkeypatch, capsys, name):
    flags, told, cure = MISTAKES[name]
    shots = tmp_path.parent / f"{tmp_path.name}_shots.jsonl"
    shots.write_text('{"puzzle": "1234341221430320"}\n{"puzzle": "1234341221430020", "solution": "1234341221434321"}\n')
    flags = [flag.replace("SHOTS", str(shots)).replace("BASE", str(sudoku_checkpoints[0])) for flag in flags]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark_command, "load_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    default = {"--tasks": "sudoku", "--model": str(sudoku_checkpoints[0])}
    given = [part for flag, value in default.items() if flag not in flags for part in (flag, value)]
    assert evaluate.main([*given, *flags]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and said.out == ""
    assert told in said.err and cure in said.err, said.err
    assert list(tmp_path.iterdir()) == [], "nothing is written"


@pytest.mark.parametrize(
    ("temperatures", "given", "protocol"),
    [
        ((0.0, 0.5), {"sampler": {"top_p": 0.9}}, Protocol()),
        ((), {"sampler": {"top_p": 0.9, "remasking": {"confidence_of": "sampling"}}}, Protocol()),
        ((), {"sampler": {"top_p": 1.0}}, Protocol()),
        ((), {}, Protocol(defaults={"sampler": {"top_p": 0.9}})),
        ((), {"sampler": {"top_p": 0.9}}, Protocol(benchmarks={"countdown": {"temperature": 0.2}})),
    ],
    ids=["read at one temperature", "read without one", "the default", "of a protocol", "read by one benchmark"],
)
def test_a_sampler_setting_that_some_cell_reads_is_taken(temperatures, given, protocol):
    asked = suite.Asked(("sudoku", "countdown"), protocol, {"limit": 2, **given}, temperatures=temperatures)
    assert len(suite.plan(asked)) == 2 * max(len(temperatures), 1)


def test_a_hub_that_cannot_be_reached_says_what_to_do(sudoku_checkpoints, tmp_path, monkeypatch, capsys):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(benchmark_command, "load_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    assert evaluate.main(["--model", str(sudoku_checkpoints[0]), "--tasks", "gsm8k"]) == 2
    said = capsys.readouterr().err
    assert "hub:openai/gsm8k/main:test: cannot be loaded" in said and said.count("\n") == 1
    assert "give --data gsm8k=FILE.jsonl" in said
