"""The tokenizer inside a GGUF file, as the files that Hugging Face's libraries read.

Byte-level BPE only. A GGUF file names the way in which text is cut into words before the merges (`tokenizer.ggml.pre`), but does not
hold it: it is part of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from d1jax.config import UserError
from d1jax.files import to_json
from d1jax.weights.hf_directory import first_line

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
KEYS = {"bos": "bos", "eos": "eos", "eot": "eot", "pad": "padding", "unk": "unknown", "mask": "mask"}

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|NUMBER| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Words(NamedTuple):
    """How a text is cut into words."""

    patterns: tuple[str, ...]  # one after the other, each within the pieces of the one before
    nfc: bool = False  # it is normalised first
    whole: bool = False  # a word that is a token is not merged from its letters
    begins: bool = False  # the token `bos` comes first, where the file does not say


# From llm_tokenizer_bpe and load() in llama.cpp's llama-vocab.cpp, and from transformers 5: PRETOKENIZE_REGEX and NFC of Qwen2Tokenizer
# (llama.cpp does not normalise), TikTokenConverter's pattern, which is Llama 3's, and ByteLevel's own, which is GPT-2's. A converter
# writes "default" where it did not recognise a tokenizer: the words are llama.cpp's then, perhaps not the model's own.
PRE = {
    "smollm": Words((r"\p{N}", GPT2)),
    "llama-bpe": Words((WORDS.replace("NUMBER", r"\p{N}{1,3}"),), whole=True, begins=True),
    "qwen2": Words((WORDS.replace("NUMBER", r"\p{N}"),), nfc=True),
    "gpt-2": Words((GPT2,)),
    "default": Words((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}


def token_ids(values: Mapping[str, Any], *names: str) -> list[int]:
    """The ids that the file gives to "bos", "eos", "eot", "pad", "unk" or "mask", each once; those that it does not give are left out."""
    found = (values.get(f"tokenizer.ggml.{KEYS[name]}_token_id") for name in names)
    return list(dict.fromkeys(token for token in found if token is not None))


def tokenizer_files(values: Mapping[str, Any], rows: int, context: int, where: str) -> dict[str, str]:
    """{file: text} of tokenizer.json and tokenizer_config.json. `rows` are the embedding's, `context` the longest text.

    Tokens that only fill up the embedding (type UNUSED, at the end) are left out. Raises UserError for another kind of tokenizer, and
    where its parts do not fit together.
    """
    from tokenizers import AddedToken  # lazily, as transformers

    model, pre = values.get("tokenizer.ggml.model"), values.get("tokenizer.ggml.pre")
    if model != "gpt2":
        raise UserError(
            f"{where}: tokenizer.ggml.model = {model!r} is not supported; d1jax reads gpt2, a byte-level BPE"
        )
    if pre not in PRE:
        raise UserError(f"{where}: tokenizer.ggml.pre = {pre!r} is none of {', '.join(PRE)}, which d1jax reads")
    if values.get("tokenizer.ggml.add_space_prefix"):
        raise UserError(f"{where}: tokenizer.ggml.add_space_prefix is on, which d1jax does not support")
    tokens, types = _list(values, "tokens", str, where), _list(values, "token_type", int, where)
    if not len(tokens) == len(types) == rows:
        raise UserError(
            f"{where}: it has {len(tokens)} tokens and {len(types)} token types, but its embedding {rows} rows; download it again"
        )
    special = {name: ids[0] for name in KEYS if (ids := token_ids(values, name))}
    for name, token in special.items():
        if not isinstance(token, int) or not 0 <= token < rows:
            raise UserError(f"{where}: tokenizer.ggml.{KEYS[name]}_token_id = {token!r} is none of its {rows} tokens")
    used = max((number for number, kind in enumerate(types) if kind != UNUSED), default=-1) + 1
    tokenizer = _bpe(tokens[:used], _list(values, "merges", str, where), PRE[pre], where)
    for kind, is_special in ((CONTROL, True), (UNKNOWN, True), (USER_DEFINED, False)):
        named = [token for token, its in zip(tokens[:used], types[:used], strict=True) if its == kind]
        tokenizer.add_tokens([AddedToken(token, special=is_special, normalized=False) for token in named])
    begins = values.get("tokenizer.ggml.add_bos_token", PRE[pre].begins and "bos" in special)
    around = _around(tokens, special, begins, bool(values.get("tokenizer.ggml.add_eos_token")), where)
    if around is not None:
        tokenizer.post_processor = around
    named = {f"{name}_token": tokens[token] for name, token in special.items() if name != "eot"}
    template = values.get("tokenizer.chat_template")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        **named,
        **({"chat_template": template} if template else {}),
    }
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": to_json(settings, indent=2) + "\n",
    }


def _list(values: Mapping[str, Any], name: str, kind: type, where: str) -> list[Any]:
    found = values.get(f"tokenizer.ggml.{name}")
    if not isinstance(found, list) or not all(isinstance(item, kind) for item in found):
        raise UserError(f"{where}: has no list tokenizer.ggml.{name} of {kind.__name__}; a byte-level BPE needs it")
    return found


def _bpe(tokens: Sequence[str], merges: Sequence[str], words: Words, where: str) -> Any:
    """A tokenizer of the library `tokenizers` with these ids."""
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        twice = next(token for number, token in enumerate(tokens) if vocabulary[token] != number)
        raise UserError(f"{where}: token {twice!r} stands in its vocabulary twice")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    odd = next((merge for merge, pair in zip(merges, pairs, strict=True) if len(pair) != 2), None)
    if odd is not None:
        raise UserError(f"{where}: the merge {odd!r} is not of two tokens")
    try:
        tokenizer = Tokenizer(BPE(vocabulary, pairs, fuse_unk=False, byte_fallback=False, ignore_merges=words.whole))
    except Exception as error:  # of the Rust library, which has no class of its own
        raise UserError(f"{where}: its merges do not fit its tokens ({first_line(error)}); download it again") from None
    if words.nfc:
        tokenizer.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in words.patterns]
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, letters])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _around(tokens: Sequence[str], special: Mapping[str, int], begins: bool, ends: bool, where: str) -> Any:
    """What puts `bos` before a text and `eos` behind it; None for neither."""
    from tokenizers import processors

    used = [name for name, wanted in (("bos", begins), ("eos", ends)) if wanted]
    missing = [name for name in used if name not in special]
    if missing:
        raise UserError(f"{where}: tokenizer.ggml.add_{missing[0]}_token is on, but there is no {missing[0]}_token_id")
    if not used:
        return None
    names = {name: tokens[special[name]] for name in used}

    def text(part: str) -> list[str]:
        return [names[name] for name in ("bos",) if begins] + [part] + [names[name] for name in ("eos",) if ends]

    return processors.TemplateProcessing(
        single=text("$A"), pair=text("$A") + text("$B"), special_tokens=[(names[name], special[name]) for name in used]
    )
