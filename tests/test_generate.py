"""python -m d1jax.generate: prompts from everywhere, the denoising shown, mistakes told."""

import html
import io
import json

import numpy as np
import pytest

import d1jax
from d1jax import generate, load_pretrained

SHORT = ["--length", "8", "--steps", "4"]


@pytest.fixture
def model(write_checkpoint):
    return str(write_checkpoint()[0])


@pytest.fixture
def run(capsys, monkeypatch):
    """`run(arguments, typed="")` -> (exit code, standard output, standard error)."""

    def call(*arguments, typed=""):
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        try:
            code = generate.main([*map(str, arguments)])
        except SystemExit as stopped:
            code = stopped.code
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def records(out):
    return [json.loads(line) for line in out.splitlines()]


def test_one_line_a_prompt(run, model):
    code, out, _ = run("--model", model, "--prompt", "abc", "--prompt", "kj", *SHORT)
    assert code == 0 and len(out.splitlines()) == 2


def test_json_has_tokens_steps_and_confidence_and_the_text_is_their_decoding(run, model):
    code, out, _ = run("--model", model, "--prompt", "abc", "--json", *SHORT)
    (record,) = records(out)
    assert code == 0 and record["prompt"] == "abc"
    assert len(record["tokens"]) == len(record["reveal_step"]) == len(record["confidence"]) == 8
    assert record["text"] == load_pretrained(model).tokenizer.decode(record["tokens"])
    assert record["nfe"] == max(record["reveal_step"]) + 1


def test_batches_files_and_standard_input_give_the_same_texts(run, model, tmp_path):
    flags = ["--model", model, "--json", "--temperature", "0.8", "--seed", "3", *SHORT]
    prompts = ["abc", "a", "hgfedcba"]
    (tmp_path / "prompts.txt").write_text("abc\n\na\nhgfedcba\n")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    _, together, _ = run(*flags, *(word for text in prompts for word in ("--prompt", text)))
    for other in (["--file", tmp_path / "prompts.txt"], ["--file", tmp_path / "prompts.jsonl", "--batch", "1"]):
        assert run(*flags, *other)[1] == together
    assert records(run(*flags, typed="abc")[1])[0] == records(together)[0]


def test_the_denoising_is_shown_step_by_step_and_ends_in_the_same_text(run, model):
    flags = ["--model", model, "--prompt", "abc", "--steps", "8", "--length", "8"]
    _, quiet, silence = run(*flags)
    _, text, drawn = run(*flags, "--show", "always")
    assert text == quiet and "\x1b" not in text and silence == ""
    frames = drawn.split("\x1b[J")
    masked = [part.count("░") for part in frames[:-1]]
    assert masked[0] == 7 and masked == sorted(masked, reverse=True) and "step 1, 1 of 8" in frames[0]


def test_holes_are_filled_between_other_prompts(run, model):
    texts = ["abc", "a{{mask:3}}c", "kj", "{{mask:2}}d{{mask:1}}"]
    flags = ["--model", model, *SHORT, "--temperature", "1"]
    prompts = [word for text in texts for word in ("--prompt", text)]
    code, out, err = run(*flags, *prompts, "--json")
    found = records(out)
    assert code == 0 and err == "" and [record["prompt"] for record in found] == texts
    assert [len(record["tokens"]) for record in found] == [8, 3, 8, 3]
    assert found[1]["text"][0] == "a" and found[1]["text"][-1] == "c" and "mask" not in found[1]["text"]
    assert records(run(*flags, *prompts, "--json", "--batch", "1")[1]) == found
    _, text, drawn = run(*flags, "--prompt", texts[1], "--show", "always")
    assert len(text.strip()) == 5 and drawn.count("step") == 2 and "a" in drawn.split("step 1")[0]


def test_the_samplers_rules_are_flags(run, model):
    flags = ["--model", model, "--prompt", "abc", "--length", "8", "--block", "4", "--json"]
    plain, parallel, cached = (
        records(run(*flags, *more)[1])[0]
        for more in ([], ["--schedule", "threshold", "--threshold", "0.05"], ["--cache", "dual", "--no-early-exit"])
    )
    assert parallel["nfe"] == 2 < plain["nfe"] and len(cached["tokens"]) == 8
    code, _, err = run(*flags, "--schedule", "entropy_bound")
    assert code == 2 and "set --remasking entropy" in err


def test_prompts_that_are_too_long_fail_or_are_left_out_and_counted(run, write_checkpoint):
    short = str(write_checkpoint("short", max_positions=12)[0])
    prompts = [word for text in ("abc", "abcdefgh", "a{{mask:2}}bcdefghijk") for word in ("--prompt", text)]
    code, out, err = run("--model", short, *SHORT, *prompts)
    assert code == 2 and "12 positions" in err and out == ""
    code, out, err = run("--model", short, *SHORT, *prompts, "--json", "--too-long", "drop")
    found = records(out)
    assert code == 0 and "left out 2 of 3 prompts" in err
    assert found[0]["text"] and [record["text"] for record in found[1:]] == [None, None]
    assert all("12 positions" in record["dropped"] for record in found[1:])


def test_all_prompts_are_checked_before_the_first_is_decoded(run, write_checkpoint):
    short = str(write_checkpoint("short", max_positions=12)[0])
    flags = ["--model", short, *SHORT, "--prompt", "abc"]
    for bad, message in (
        ("abcdefgh", "prompt 1: 8 tokens"),
        ("Z", "sample:"),
        ("Z{{mask:2}}", "infill:"),
        ("a{{mask}}", "a hole is"),
    ):
        for more in (["--batch", "1"], ["--show", "always"], ["--too-long", "drop"] if bad != "abcdefgh" else []):
            code, out, err = run(*flags, "--prompt", bad, *more)
            assert code == 2 and out == "" and message in err, (bad, more, err)
    assert run(*flags, "--raw", "--prompt", "Z")[0] == 2


def test_a_length_without_a_block_near_the_usual_one_is_told(run, model):
    code, _, err = run("--model", model, "--prompt", "abc", "--length", "101")
    assert code == 2 and "--length 96 or 128" in err and "--block" in err
    code, _, err = run("--model", model, "--prompt", "abc", "--length", "100000000000", "--block", "3")
    assert code == 2 and "--length = 100000000000 is more than 1000000" in err


def test_a_conversation_ends_at_an_empty_line(run, model):
    code, out, err = run("--model", model, "--chat", *SHORT, typed="abc\nkj\n\nnot asked\n")
    assert code == 0 and len(out.splitlines()) == 2 and "empty line" in err


@pytest.mark.parametrize(
    ("flags", "typed", "message"),
    [
        (["--model", "no/such", "--prompt", "a"], "", "no such directory"),
        (["--prompt", "a", "--length", "10", "--block", "4"], "", "does not divide"),
        (["--prompt", "a", "--length", "4", "--steps", "9"], "", "more than the 4 tokens"),
        (["--prompt", ""], "", "prompt 0 is empty"),
        ([], "", "is empty"),
        (["--prompt", "xyz"], "", "cannot write 'xyz'"),
        (["--file", "nowhere.txt"], "", "not readable"),
        (["--prompt", "a", "--mesh", "8"], "", "data,fsdp,tensor"),
        (["--prompt", "a", "--mesh", "3,1,1"], "", "does not cover"),
        (["--prompt", "a", "--temperature", "-1"], "", "temperature = -1"),
        (["--prompt", "a", "--seed", "-1"], "", "seed = -1"),
        (["--prompt", "a", "--batch", "0"], "", "--batch 0"),
        (["--prompt", "a", "--length", "0"], "", "--length 0 must be above 0"),
        (["--prompt", "a", "--length", "8", "--steps", "-4"], "", "--steps -4 must be above 0"),
        (["--prompt", "a", "--system", "be brief"], "", "chat template"),
        (["--prompt", "a", "--chat"], "", "leave --prompt"),
        (["--prompt", "a", "--adapter", "nowhere"], "", "adapter"),
        (["--prompt", "a", "--player", "no/such/out.html"], "", "there is no directory 'no/such'"),
        (["--prompt", "a", "--player", "/"], "", "is a directory"),
        (["--prompt", "a", "--player", ""], "", "is a directory"),
        (["--chat", "--player", "out.html"], "", "not a conversation"),
    ],
)
def test_mistakes_are_told(run, model, flags, typed, message):
    flags = flags if "--model" in flags else ["--model", model, *flags]
    code, out, err = run(*flags, *([] if "--length" in flags else SHORT), typed=typed)
    assert code == 2 and out == "" and message in err, err


@pytest.mark.parametrize("place", ["no/such/out.html", "."])
def test_a_player_that_cannot_be_written_is_refused_before_the_model_is_read(run, place):
    code, out, err = run("--model", "no/model", "--prompt", "a", "--player", place, *SHORT)
    assert code == 2 and out == "" and "--player" in err and "no/model" not in err


@pytest.mark.parametrize("flags", [["--json"], ["--batch", "2"], ["--show", "always"]])
def test_the_player_holds_every_prompt_that_was_answered(run, model, tmp_path, flags):
    (tmp_path / "p.txt").write_text("kj\nhg\n")
    page = tmp_path / "out.html"
    arguments = ["--model", model, "--prompt", "abc", "--file", tmp_path / "p.txt", *SHORT]
    code, out, _ = run(*arguments, *flags, "--player", page)
    assert code == 0 and out == run(*arguments, *flags)[1], "what is printed stays as it was"
    samples = json.loads(page.read_text().split('class="viewer-data">')[1].split("</script>")[0])
    assert [(one["prompt"], one["set"], one["index"]) for one in samples] == [
        ("abc", "prompt", 1), ("kj", "prompt", 2), ("hg", "prompt", 3),
    ]  # fmt: skip
    decode = load_pretrained(model).tokenizer
    for one, record in zip(samples, records(run(*arguments, "--json")[1]), strict=True):
        assert one["reveal"] == record["reveal_step"] and one["confidence"] == record["confidence"]
        assert one["pieces"] == decode.pieces(record["tokens"])


def test_the_player_of_a_prompt_from_standard_input(run, model, tmp_path):
    assert run("--model", model, "--player", tmp_path / "out.html", *SHORT, typed="abc")[0] == 0
    assert (tmp_path / "out.html").exists()


def test_an_unwritable_turn_does_not_end_a_conversation(run, model):
    code, out, err = run("--model", model, "--chat", *SHORT, typed="abc\nxyz\nkj\n")
    assert code == 0 and len(out.splitlines()) == 2 and "cannot write 'xyz'" in err


def test_a_length_that_no_default_fits_finds_its_blocks_and_steps(run, model):
    code, out, _ = run("--model", model, "--prompt", "a", "--length", "50", "--json")
    assert code == 0 and len(records(out)[0]["tokens"]) == 50  # 2 blocks of 25


def test_json_is_plain_ascii_whatever_the_model_writes(run, write_checkpoint):
    directory, *_ = write_checkpoint()
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {("\x9b" if name == "b" else name): token for name, token in vocabulary.items()}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    code, out, _ = run("--model", directory, *(w for c in "acdefghijk" for w in ("--prompt", c)), "--json", *SHORT)
    assert code == 0 and out.isascii()
    assert "\x9b" not in run("--model", directory, *(w for c in "acdefghijk" for w in ("--prompt", c)), *SHORT)[1]


def test_lines_of_a_file_may_hold_other_line_separators(run, model, tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a"}) + "\r\n" + '{"prompt": "b", "note": "x\u2028y"}\n')
    code, out, _ = run("--model", model, "--file", tmp_path / "p.jsonl", "--json", *SHORT)
    assert code == 0 and [record["prompt"] for record in records(out)] == ["a", "b"]


def test_a_bad_line_of_a_jsonl_file_is_named(run, model, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    code, _, err = run("--model", model, "--file", path, *SHORT)
    assert code == 2 and "bad.jsonl:2" in err
    path.write_text('{"prompt": "a"}\n{"prompt": "a", "prompt": "b"}\n')
    code, _, err = run("--model", model, "--file", path, *SHORT)
    assert code == 2 and "bad.jsonl:2" in err and "'prompt' stands there twice" in err


def test_eight_devices_write_what_one_writes(run, model):
    flags = ["--model", model, "--json", *(w for text in ("ab", "c", "de", "f") for w in ("--prompt", text)), *SHORT]
    one, eight = (records(run(*flags, "--mesh", mesh)[1]) for mesh in ("8,1,1", "2,2,2"))
    for a, b in zip(one, eight, strict=True):
        assert a["tokens"] == b["tokens"] and a["reveal_step"] == b["reveal_step"]
        np.testing.assert_allclose(a["confidence"], b["confidence"], atol=2e-4)


# -- a run -------------------------------------------------------------------------------------------------------------


def test_a_row_of_a_run_is_asked_as_it_was_evaluated_and_graded(run, small_run):
    samples = [json.loads(line) for line in (small_run / "samples.jsonl").read_text().splitlines()]
    code, out, err = run("--model", small_run, "--row", "0", "--row", "3", "--json")
    assert code == 0
    for number, record in zip((0, 3), records(out), strict=True):
        kept = samples[number]
        assert record["prompt"] == kept["prompt"] and "\n" in kept["prompt"]
        assert record["text"] == kept["text"]
        assert f"held_out row {number}: prompt {json.dumps(kept['prompt'])}" in err
        assert f"held_out row {number}: solved {kept['grade']['solved']:g}, cell_accuracy" in err


def test_what_is_printed_as_the_prompt_is_the_prompt(run, small_run):
    kept = json.loads((small_run / "samples.jsonl").read_text().splitlines()[1])
    same = ["--prompt", kept["prompt"]], ["--prompt-json", json.dumps(kept["prompt"])]
    for how in same:
        code, out, err = run("--model", small_run, *how, "--json")
        assert code == 0 and records(out)[0]["text"] == kept["text"]
        assert 'a prompt of task sudoku has the form "' in err, "for who types one"
    report = (small_run / "report.html").read_text()
    assert json.dumps(kept["prompt"]) in html.unescape(report)
    assert run("--model", small_run, "--file", small_run / "samples.jsonl", "--json")[0] == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--row", "8"], "the rows of held_out are 0 to 7"),
        (["--row", "0", "--set", "other"], "no evaluation set of the run; choices: held_out"),
        (["--set", "held_out", "--prompt", "1"], "--set held_out: without effect"),
        (["--row", "0", "--prompt", "1"], "leave --prompt"),
        (["--row", "0", "--chat"], "leave --prompt"),
        (["--prompt-json", "4130"], "is no JSON text"),
        (["--ids", "1 x"], "are no token ids"),
        (["--ids", "1 999"], "id 999 at row 0, column 1 is outside the vocabulary"),
    ],
)
def test_mistakes_about_rows_and_ids_are_told(run, small_run, flags, message):
    code, out, err = run("--model", small_run, *flags)
    assert code == 2 and out == "" and message in err, err


def test_a_row_needs_a_run(run, model):
    code, _, err = run("--model", model, "--row", "0")
    assert code == 2 and "is none; write --prompt TEXT" in err
    code, _, err = run("--model", "nowhere", "--row", "0")
    assert code == 2 and "--model 'nowhere': no such directory" in err


def test_a_prompt_with_its_quotes_is_pointed_out(run, small_run):
    text = json.dumps("4130\n0300\n1004\n0000\n")
    *_, err = run("--model", small_run, "--prompt", text)
    assert "--prompt-json reads it" in err, err
    code, _, err = run("--model", small_run, "--prompt-json", text)
    assert code == 0 and "note:" not in err


# -- flags -------------------------------------------------------------------------------------------------------------


def test_token_ids_are_a_prompt(run, model):
    tokenizer = load_pretrained(model).tokenizer
    ids = " ".join(map(str, tokenizer.prompt("abc")))
    _, by_text, _ = run("--model", model, "--prompt", "abc", "--json", *SHORT)
    code, by_ids, _ = run("--model", model, "--ids", ids, "--json", *SHORT)
    assert code == 0 and records(by_ids)[0]["tokens"] == records(by_text)[0]["tokens"]
    assert (
        run("--model", model, "--ids", ids, "--show", "always", *SHORT)[1]
        == run("--model", model, "--prompt", "abc", *SHORT)[1]
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--prompt", "a", "--threshold", "0.5"],
            "--threshold belongs to --schedule threshold or klass, not to even",
        ),
        (["--prompt", "a", "--kl-threshold", "0.5"], "--kl-threshold belongs to --schedule klass"),
        (["--prompt", "a", "--factor", "0.5"], "--factor belongs to --schedule factor"),
        (["--prompt", "a", "--entropy-bound", "0.5"], "--entropy-bound belongs to --schedule entropy_bound"),
        (["--prompt", "a", "--cache-refresh", "2"], "--cache-refresh belongs to --cache prefix or dual, not to none"),
        (["--prompt", "a", "--top-k", "2"], "a temperature above 0"),
        (["--prompt", "a", "--top-p", "0.5"], "a temperature above 0"),
        (["--prompt", "a", "--confidence-of", "sampling"], "a temperature above 0, top_k or top_p"),
        (
            ["--prompt", "a", "--remasking", "random", "--remasking-temperature", "1"],
            "belongs to --remasking low_confidence or topk_margin or entropy, not to random",
        ),
        (["--prompt", "a", "--schedule", "threshold", "--steps", "2"], "--steps = 2: without effect"),
        (["--prompt", "a", "--seed", "3"], "--seed: without effect here, read only with --temperature above 0"),
        (["--prompt", "a", "--show", "always", "--batch", "2"], "--batch: without effect"),
        (
            ["--prompt", "a{{mask:2}}", "--end-token", "last"],
            "--end-token: without effect here, read only with a prompt without holes",
        ),
        (["--prompt", "a{{mask:2}}", "--block", "2"], "--block: without effect"),
        (["--prompt", "a{{mask:2}}", "--length", "8"], "--length: without effect"),
        (["--chat", "--json"], "--json: without effect here, read only with prompts"),
        (["--chat", "--batch", "2"], "--batch: without effect"),
        (["--ids", "1 2", "--raw"], "--raw: without effect here, read only with prompts of text"),
    ],
)
def test_a_flag_without_an_effect_is_refused(run, model, flags, message):
    code, out, err = run("--model", model, *flags)
    assert code == 2 and out == "" and message in err, err


def test_flags_with_an_effect_are_not_refused(run, model):
    for flags in (
        ["--top-k", "2", "--confidence-of", "sampling"],
        ["--remasking", "random", "--seed", "3"],
        ["--schedule", "klass", "--threshold", "0.5", "--kl_threshold", "0.1"],
    ):
        assert run("--model", model, "--prompt", "a", *flags)[0] == 0


def test_there_is_no_flag_for_what_is_not_shown(run, model):
    assert run("--model", model, "--prompt", "a", "--record-entropy")[0] == 2


def test_the_version_is_told(run):
    assert run("--version") == (0, f"d1jax {d1jax.__version__}\n", "")
