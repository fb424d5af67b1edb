"""Tokenizers of published checkpoints: what the model is given, what it is taught, and what is read back.

Dream's files are complete in shared/; LLaDA's lack tokenizer.json, for which a stand-in with the same special ids is built.
The other tokenizers are small ones with templates of our own.
"""

import json
import shutil
import unicodedata
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1jax.config import UserError
from d1jax.diffusion.canvas import through_first_end
from d1jax.inference.infill import parse_template
from d1jax.weights.tokenizer_files import load_tokenizer

hf = pytest.importorskip("tokenizers")

CHECKPOINTS = Path(__file__).resolve().parents[2].parent / "shared" / "checkpoints"
WITHOUT_CARE = st.text(max_size=20).filter(lambda text: "<" not in text)  # no special token spelt out


def published(name: str) -> Path:
    directory = CHECKPOINTS / name
    if not (directory / "tokenizer_config.json").is_file():
        pytest.skip(f"{directory} is not here")
    return directory


# -- Dream -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dream_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("published") / "dream"
    shutil.copytree(published("Dream-v0-Instruct-7B"), directory, copy_function=shutil.copyfile)
    directory.chmod(0o755)
    marker = directory / "executed"
    for module in ("tokenization_dream", "configuration_dream", "modeling_dream"):
        (directory / f"{module}.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass DreamTokenizer: pass\n")
    return directory


@pytest.fixture(scope="module")
def dream(dream_directory):
    return load_tokenizer(dream_directory)


def special_ids(tokenizer, text):
    """The ids of a text in which special tokens are spelt out, as a template does."""
    return tokenizer.wrapped(text, add_special_tokens=False)["input_ids"]


def test_dreams_prompt_is_rendered_to_the_letter(dream):
    rendered = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n Hi there <|im_end|>\n<|im_start|>assistant\n"
    )
    assert dream.chats and dream.render(" Hi there ") == rendered
    ids = dream.prompt(" Hi there ")
    assert ids == special_ids(dream, rendered) and "".join(dream.pieces(ids)) == rendered
    assert ids.count(151644) == 3 and ids.count(151645) == 2


def test_dreams_ids_are_the_published_ones(dream):
    special = dream.special
    assert (special.mask, special.end, special.turn_end, special.vocab_size) == (151666, 151643, 151645, 151667)
    assert dream.vocab_size == 151667
    assert special_ids(dream, "<|mask|><|im_end|><|endoftext|>") == [151666, 151645, 151643]


def test_dreams_answer_ends_with_the_end_of_the_turn(dream):
    assert dream.answer("Yes.\n") == [*dream.encode("Yes.\n"), 151645]
    assert dream.answer("") == [151645]


@given(text=WITHOUT_CARE)
def test_dream_reads_back_what_it_writes(dream, text):
    # Qwen2 composes accents, as the published tokenizer does.
    assert dream.decode(dream.answer(text)) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("end", [151643, 151645])
def test_dreams_text_ends_at_the_first_closing_token_and_hides_the_mask(dream, end):
    ids = [*dream.encode("two"), 151666, *dream.encode(" words"), end, *dream.encode("hidden"), 151643]
    assert dream.decode(ids) == "two words"
    assert dream.decode(ids[-1:] + ids) == ""


def test_ids_behind_the_vocabulary_are_shown_and_not_read(dream):
    ids = [*dream.encode("a"), 151700, 151666]
    assert dream.decode(ids) == "a" and dream.pieces(ids) == ["a", "<151700>", "<|mask|>"]


@pytest.mark.parametrize("turn", [{"role": "user"}, {"role": "user", "content": None}], ids=str)
def test_a_turn_without_a_text_is_a_value_error(dream, turn):
    with pytest.raises(ValueError, match="content"):
        dream.prompt([turn])


def test_nothing_in_the_directory_is_executed(dream, dream_directory):
    config = json.loads((dream_directory / "tokenizer_config.json").read_text())
    assert "auto_map" in config and not (dream_directory / "executed").exists()


def test_text_that_spells_a_special_token_is_text(dream):
    text = "write <|mask|> and <|endoftext|>"
    assert dream.decode(dream.encode(text)) == text
    assert not {151643, 151666} & set(dream.answer(text))


# -- LLaDA -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llada(tmp_path_factory):
    source, directory = published("LLaDA-8B-Instruct"), tmp_path_factory.mktemp("llada")
    for name in ("config.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(source / name, directory / name)
    added = json.loads((source / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    first = min(map(int, added))
    made = byte_level(fill_up_to=first)
    made.add_special_tokens([added[token]["content"] for token in sorted(added, key=int)])
    assert made.token_to_id("<|eot_id|>") == 126348
    made.save(str(directory / "tokenizer.json"))
    return load_tokenizer(directory)


def byte_level(fill_up_to: int = 0) -> "hf.Tokenizer":
    """Bytes and one merge; entries that no text makes fill the vocabulary up."""
    symbols = sorted(hf.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: index for index, name in enumerate([*symbols, "he"])}
    vocabulary |= {f"unused {index}": index for index in range(len(vocabulary), fill_up_to)}
    made = hf.Tokenizer(hf.models.BPE(vocab=vocabulary, merges=[("h", "e")]))
    made.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = hf.decoders.ByteLevel()
    return made


def test_lladas_prompt_is_rendered_to_the_letter(llada):
    rendered = (
        "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nHi there<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert llada.render(" Hi there ") == rendered
    ids = llada.prompt(" Hi there ")
    assert ids[:2] == [126080, 126346] and ids.count(126080) == 1
    assert [token for token in ids if token > 126079] == [126080, 126346, 126347, 126348, 126346, 126347]


def test_lladas_ids_are_the_published_ones(llada):
    special = llada.special
    assert (special.mask, special.end, special.turn_end, special.vocab_size) == (126336, 126081, 126348, 126349)


def test_lladas_answer_has_no_header(llada):
    assert llada.answer("Hello") == [*llada.encode("Hello"), 126348]
    assert not {126080, 126346, 126347} & set(llada.answer("Hello"))


@given(text=WITHOUT_CARE)
def test_llada_reads_back_what_it_writes(llada, text):
    assert llada.decode([*llada.answer(text), 126081, 126081]) == text


# -- templates of our own ----------------------------------------------------------------------------------------------

HEADER = "<|start_header_id|>assistant<|end_header_id|>\n\n"
TURN = (
    "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}{{ message.content | trim }}{{ '<|eot_id|>' }}"
)
TURNS = "{{ bos_token }}{% for message in messages %}" + TURN + "{% endfor %}"
ASSISTANT = "{{ '" + HEADER + "' }}"
TEMPLATES = {
    "always a header": TURNS + ASSISTANT,
    "a header where asked": TURNS + "{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}",
    "never a header": TURNS,
}
SPECIAL = ["<s>", "<|endoftext|>", "<|pad|>", "<|mask|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SPECIAL += ["<|im_start|>", "<|im_end|>"]
FIRST = 257  # id of SPECIAL[0]
ID = {name: FIRST + index for index, name in enumerate(SPECIAL)}
SIZE = FIRST + len(SPECIAL)


@pytest.fixture
def write(tmp_path):
    """`write(template, model_type=..., mask_token_id=..., pad_token=...)` -> directory; None leaves a setting out."""

    def write(template: str | None = TEMPLATES["always a header"], **settings) -> Path:
        made = byte_level()
        made.add_special_tokens(SPECIAL)
        made.save(str(tmp_path / "tokenizer.json"))
        config = {"model_type": "llada", "mask_token_id": ID["<|mask|>"], "eos_token_id": ID["<|endoftext|>"]}
        tokens = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
        tokens |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
        for name, value in settings.items():
            (config if name.endswith("_id") or name == "model_type" else tokens)[name] = value
        for file, values in (("config.json", config), ("tokenizer_config.json", tokens)):
            kept = {name: value for name, value in values.items() if value is not None}
            (tmp_path / file).write_text(json.dumps(kept))
        return tmp_path

    return write


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


CHATS = {
    "a text": ("  hello ", "hello"),
    "several turns": ([turn("user", "one "), turn("assistant", "two"), turn("user", " 3?")], "3?"),
    "a system message": ([turn("system", "be brief"), turn("user", "hello")], "hello"),
}


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_prompt_ends_with_exactly_one_header_whatever_the_template_does(write, template, chat):
    tokenizer, (prompt, last) = load_tokenizer(write(template)), chat
    rendered = tokenizer.render(prompt)
    assert rendered.endswith(f"{last}<|eot_id|>{HEADER}")
    messages = [turn("user", prompt)] if isinstance(prompt, str) else prompt
    assert rendered.count("<|start_header_id|>") == len(messages) + 1
    places = [rendered.index(f"\n\n{message['content'].strip()}<|eot_id|>") for message in messages]
    assert places == sorted(places)
    ids = tokenizer.prompt(prompt)
    assert ids[0] == ID["<s>"] and ids.count(ID["<s>"]) == 1 and ids == special_ids(tokenizer, rendered)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_an_answer_is_the_text_and_the_end_of_the_turn(write, template):
    tokenizer = load_tokenizer(write(template))
    assert tokenizer.answer("hello") == [*tokenizer.encode("hello"), ID["<|eot_id|>"]]
    assert tokenizer.decode([*tokenizer.answer("hello"), *tokenizer.encode("more")]) == "hello"


def test_the_template_may_stand_in_a_file_of_its_own(write):
    directory = write(None)
    (directory / "chat_template.jinja").write_text(TEMPLATES["never a header"])
    tokenizer = load_tokenizer(directory)
    assert tokenizer.chats and tokenizer.render("hello").endswith(f"hello<|eot_id|>{HEADER}")


def test_without_a_template_a_prompt_is_continued_and_a_chat_refused(write):
    tokenizer = load_tokenizer(write(None))
    assert not tokenizer.chats
    assert tokenizer.prompt(" hello ") == tokenizer.encode(" hello ")  # its files ask for no first token
    assert tokenizer.answer("hello") == tokenizer.encode("hello")
    with pytest.raises(ValueError, match="has no chat template; give a text instead of a chat") as refused:
        tokenizer.prompt([turn("user", "hello")])
    assert str(tokenizer.directory) in str(refused.value)


def test_a_chat_that_the_template_cannot_render_is_a_value_error(write):
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('a user speaks first') }}{% endif %}" + TURNS
    tokenizer = load_tokenizer(write(strict))
    with pytest.raises(ValueError, match="a user speaks first"):
        tokenizer.prompt([turn("system", "hello")])


def test_a_pad_token_of_its_own_ends_texts_as_in_diffucoder(write):
    tokenizer = load_tokenizer(write(model_type="Dream", pad_token="<|pad|>", pad_token_id=ID["<|endoftext|>"]))
    assert tokenizer.special.end == ID["<|pad|>"] and tokenizer.special.turn_end == ID["<|im_end|>"]
    for closing in ("<|pad|>", "<|endoftext|>", "<|im_end|>"):
        ids = [*tokenizer.encode("he"), ID[closing], *tokenizer.encode("llo")]
        assert tokenizer.decode(ids) == "he", closing


def test_without_a_pad_token_the_configuration_says_what_pads(write):
    assert load_tokenizer(write(pad_token=None)).special.end == ID["<|endoftext|>"]
    assert load_tokenizer(write(pad_token=None, pad_token_id=ID["<|pad|>"])).special.end == ID["<|pad|>"]


def test_without_a_mask_in_the_configuration_the_tokenizer_says_it(write):
    assert load_tokenizer(write(mask_token_id=None, mask_token="<|mask|>")).special.mask == ID["<|mask|>"]


def test_tokenizers_are_equal_when_they_give_the_same_ids(write, tmp_path):
    one = load_tokenizer(write())
    same = load_tokenizer(shutil.copytree(tmp_path, tmp_path / "copy"))
    assert one == same
    assert one != load_tokenizer(write(TEMPLATES["never a header"]))


@given(text=WITHOUT_CARE)
def test_texts_come_back_to_the_letter(write, text):
    tokenizer = load_tokenizer(write())
    assert tokenizer.decode(tokenizer.answer(text)) == text


# -- control tokens in a user's text -----------------------------------------------------------------------------------


def everything_spelt(tokenizer) -> str:
    return " x ".join(["", *tokenizer.controls, ""])


PATHS = {
    "a text": lambda tokenizer, text: tokenizer.prompt(text),
    "a turn": lambda tokenizer, text: tokenizer.prompt([turn("user", text)]),
    "a system message": lambda tokenizer, text: tokenizer.prompt([turn("system", text), turn("user", "x")]),
    "a few-shot answer": lambda tokenizer, text: tokenizer.prompt(
        [turn("user", "x"), turn("assistant", text), turn("user", "x")]
    ),
    "a role": lambda tokenizer, text: tokenizer.prompt([turn(text, "x")]),
    "a target": lambda tokenizer, text: tokenizer.answer(text),
    "around a hole": lambda tokenizer, text: parse_template(tokenizer, text + "{{mask:3}}" + text).ids,
}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("name", ["dream", "llada"])
def test_a_users_text_never_becomes_control_ids(request, name, path):
    tokenizer = request.getfixturevalue(name)
    controls = set(tokenizer.controls.values())
    harmless = path(tokenizer, " x ")
    text = everything_spelt(tokenizer)
    ids = path(tokenizer, text)
    assert [token for token in ids if token in controls] == [token for token in harmless if token in controls]
    written = "".join(tokenizer.pieces(ids))
    assert text.strip() in written or path is PATHS["a role"], "and it is all there, as text"  # Dream knows three roles


@given(
    text=st.lists(st.sampled_from(["<|mask|>", "<|im_end|>", "\n", " ", "a", "\ue000", "0"]), max_size=8).map("".join)
)
def test_what_a_template_renders_is_what_is_written(dream, text):
    chat = [turn("system", text), turn("user", text)]
    assert dream.wrapped.decode(dream.prompt(chat)) == dream.render(chat)
    if not any(control in text for control in dream.controls):
        assert dream.prompt(chat) == special_ids(dream, dream.render(chat))


def test_a_mask_that_its_file_does_not_call_special_is_one(write):
    directory = write()
    stored = json.loads((directory / "tokenizer.json").read_text())
    for added in stored["added_tokens"]:
        added["special"] = False
    (directory / "tokenizer.json").write_text(json.dumps(stored))
    tokenizer = load_tokenizer(directory)
    assert not {ID["<|mask|>"], ID["<|endoftext|>"]} & set(tokenizer.encode("<|mask|><|endoftext|>"))
    assert ID["<|mask|>"] not in tokenizer.prompt("<|mask|>")


# -- special tokens as a whole -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["mask_token_id", "eos_token_id", "generation"])
def test_a_mask_that_also_ends_a_text_is_refused(write, setting):
    clash = {"mask_token_id": ID["<|endoftext|>"]} if setting == "mask_token_id" else {}
    clash = {"eos_token_id": [ID["<|endoftext|>"], ID["<|mask|>"]]} if setting == "eos_token_id" else clash
    directory = write(**clash)
    if setting == "generation":
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ID["<|mask|>"]}))
    with pytest.raises(UserError, match="the mask token .* is also a token that ends a text"):
        load_tokenizer(directory)


def test_another_mask_in_the_configuration_than_in_the_tokenizer_is_refused(write):
    assert load_tokenizer(write(mask_token="<|mask|>")).special.mask == ID["<|mask|>"]
    with pytest.raises(UserError, match=f"mask_token_id = {ID['<|im_start|>']}, the tokenizer's own mask token is"):
        load_tokenizer(write(mask_token="<|mask|>", mask_token_id=ID["<|im_start|>"]))


def test_whatever_a_file_says_ends_a_text_ends_it(write):
    directory = write(eos_token_id=[ID["<|endoftext|>"], ID["<|pad|>"]])
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [ID["<|im_end|>"]]}))
    tokenizer = load_tokenizer(directory)
    for closing in ("<|endoftext|>", "<|pad|>", "<|im_end|>", "<|eot_id|>"):
        ids = [*tokenizer.encode("he"), ID[closing], *tokenizer.encode("llo")]
        assert tokenizer.decode(ids) == "he", closing
        # Rewards read as far as scores go: credit and score are of one text.
        scored_C = np.asarray(through_first_end(jnp.array([ids]), tokenizer.special.end_ids))[0]
        assert scored_C.sum() == len(tokenizer.encode("he")) + 1, closing


@pytest.mark.parametrize("ids", [SIZE, -1, "2", True, [1, SIZE], [[1]]], ids=str)
def test_an_end_of_text_that_is_no_id_is_refused(write, ids):
    with pytest.raises(UserError, match="eos_token_id"):
        load_tokenizer(write(eos_token_id=ids))


# -- what is wrong with a directory --------------------------------------------------------------------------------------


def without_files(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()


def cut_off(directory: Path) -> None:
    text = (directory / "tokenizer.json").read_text()
    (directory / "tokenizer.json").write_text(text[: len(text) // 2])


def no_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").write_text("{}")


def a_list(directory: Path) -> None:
    (directory / "tokenizer.json").write_text("[]")


def nothing(directory: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("damage", "settings", "problem", "cure"),
    [
        (without_files, {}, "neither tokenizer.json nor vocab.json and merges.txt", "copy"),
        (cut_off, {}, "tokenizer.json|cannot be read", "copy|download"),
        (no_tokenizer, {}, "cannot be read", "copy|download"),
        (a_list, {}, "cannot be read", "copy|download"),
        (nothing, {"mask_token_id": SIZE}, f"mask token {SIZE} is outside its {SIZE} ids", "mask_token_id"),
        (nothing, {"mask_token_id": -1}, f"mask token -1 is outside its {SIZE} ids", "mask_token_id"),
        (nothing, {"mask_token_id": None}, "no mask token", "set mask_token_id in config.json"),
        (nothing, {"pad_token": None, "eos_token_id": None}, "no end token", "eos_token_id|pad_token_id"),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_an_unusable_directory_is_named_with_the_cure(write, damage, settings, problem, cure):
    directory = write(**settings)
    damage(directory)
    with pytest.raises(UserError, match=problem) as told:
        load_tokenizer(directory)
    assert str(directory) in str(told.value)
    told.match(cure)


def test_a_directory_without_anything_is_named(tmp_path):
    with pytest.raises(UserError, match="no tokenizer is there, and no config.json") as told:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(told.value)
