"""Tokenizers of published checkpoints, through transformers and from their own files. No remote code is executed."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from d1jax.data.tokenizers import Chat, SpecialTokens

NO_MASK = -1  # the mask token of a tokenizer that has none
MASKS = ("<|mask|>", "<mask>", "[MASK]", "<|MASK|>")  # what mask tokens are called; a new one by the first of them
RESERVED = re.compile(
    r"^(<\|reserved_special_token_\d+\|>|<\|?reserved.*>|<unused_?\d+>|\[unused\d+\]|<extra_id_\d+>)$"
)
SETTING = {"mask": "mask_token_id", "end": "pad_token_id"}


@dataclass(frozen=True)
class PretrainedTokenizer:
    """A tokenizer of transformers, with the special tokens of its checkpoint."""

    special: SpecialTokens
    assistant_header: str
    fingerprint: str  # of vocabulary, merges and template: what equality means
    directory: Path = field(compare=False)
    wrapped: Any = field(compare=False, repr=False)
    controls: Mapping[str, int] = field(compare=False, repr=False)  # spelling -> id of what no text may turn into

    @property
    def vocab_size(self) -> int:
        return self.special.vocab_size

    @property
    def chats(self) -> bool:
        return bool(self.wrapped.chat_template)

    def encode(self, text: str) -> list[int]:
        """The ids of plain text: one that spells a control token gets the ids of its letters."""
        ids = self._ids(text, split_special_tokens=True)
        turned = set(self.controls.values()) & set(ids)
        if turned:
            # The model of the tokenizer knows it as a word.
            spelt = self.wrapped.convert_ids_to_tokens(min(turned))
            raise ValueError(
                f"tokenizer {str(self.directory)!r}: the text {text[:60]!r} would be read as the control token {spelt!r}; "
                "leave it out of the text"
            )
        return ids

    def _ids(self, text: str, **settings: bool) -> list[int]:
        return self._encoding(text, **settings)["input_ids"]

    def _encoding(self, text: str, **settings: bool) -> Any:
        try:
            return self.wrapped(text, **{"add_special_tokens": False, **settings})
        except Exception as error:  # of the Rust library, which has no class of its own
            raise ValueError(f"tokenizer {str(self.directory)!r}: cannot write {text[:60]!r} ({error})") from None

    def render(self, prompt: str | Chat) -> str:
        """The chat as text, a text being a user's turn. It ends with exactly one assistant header, whatever the template does."""
        chat = _as_chat(prompt)
        for index, turn in enumerate(chat):
            if not all(isinstance(turn.get(name), str) for name in ("role", "content")):
                raise ValueError(f"tokenizer: turn {index} of the chat, {turn!r}, needs a text as role and as content")
        try:
            text = self.wrapped.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template may raise anything
            raise ValueError(
                f"tokenizer {str(self.directory)!r}: the chat template cannot render this chat ({error})"
            ) from None
        header = self.assistant_header
        return text if text.rstrip().endswith(header.rstrip()) else text + header

    def prompt(self, prompt: str | Chat) -> list[int]:
        """The ids of the rendered chat. Control tokens are the template's alone: those that a turn spells out are text."""
        if self.chats:
            return self._chat_ids(_as_chat(prompt))
        if not isinstance(prompt, str):
            raise ValueError(f"tokenizer {str(self.directory)!r}: has no chat template; give a text instead of a chat")
        self.encode(prompt)  # refuses what would become a control token
        # With a first token where the files say so.
        return self._ids(prompt, add_special_tokens=True, split_special_tokens=True)

    def encode_rendered(self, text: str, first: bool = True) -> list[int]:
        """The ids of a text in which control tokens are meant, as in a rendered chat.

        first: with a first token where the files say so and the text does not begin with it.
        """
        begun = self.wrapped.bos_token and text.startswith(self.wrapped.bos_token)
        return self._ids(text, add_special_tokens=first and not begun)

    def _chat_ids(self, chat: Chat) -> list[int]:
        said = "".join(value for turn in chat for value in turn.values() if isinstance(value, str))
        spelt = sorted((control for control in self.controls if control in said), key=len, reverse=True)
        if not spelt:
            return self._ids(self.render(chat))
        # The template must not see them: each is rendered under a name that no turn and no template contains, the control tokens
        # of the template are found, and what stands between them is written as plain text under its own name again.
        private = (chr(code) for code in range(0xE000, 0xF900))
        opening, closing = itertools.islice((mark for mark in private if mark not in said), 2)
        names = {control: f"{opening}{index}{closing}" for index, control in enumerate(spelt)}
        either = re.compile("|".join(map(re.escape, spelt)))
        hidden = [
            {
                key: either.sub(lambda found: names[found[0]], value) if isinstance(value, str) else value
                for key, value in turn.items()
            }
            for turn in chat
        ]
        rendered = self.render(hidden)
        encoding = self._encoding(rendered, return_offsets_mapping=True)
        control_ids = set(self.controls.values())
        ids: list[int] = []
        last = 0
        for token, (begin, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
            if token not in control_ids:
                continue
            ids += [*self._shown(rendered[last:begin], names), token]
            last = end
        return ids + self._shown(rendered[last:], names)

    def _shown(self, text: str, names: Mapping[str, str]) -> list[int]:
        for control, name in names.items():
            text = text.replace(name, control)
        return self.encode(text) if text else []

    def answer(self, text: str) -> list[int]:
        """The text and the token that closes the turn. It is not rendered: LLaDA's template would add one more header."""
        closed = self.chats and self.special.turn_end >= 0
        return self.encode(text) + ([self.special.turn_end] if closed else [])

    def decode(self, ids: Sequence[int]) -> str:
        end = next((column for column, token in enumerate(ids) if token in self.special.end_ids), len(ids))
        known = [token for token in ids[:end] if token < self.vocab_size]
        return self.wrapped.decode(known, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        known = [token if token < self.vocab_size else None for token in ids]
        return [f"<{ids[i]}>" if token is None else self.wrapped.decode([token]) for i, token in enumerate(known)]


def _as_chat(prompt: str | Chat) -> Chat:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def load_pretrained_tokenizer(
    directory: Path,
    *,
    mask: int | None,
    end: int | None,
    turns: Sequence[tuple[str, str]],
    masks: bool = True,
    alone: bool = False,
) -> PretrainedTokenizer:
    """The tokenizer in a checkpoint directory. `mask` and `end` are the ids that config.json gives, where it does.

    turns: pairs of what closes a turn and what a chat ends with before the answer; the first whose token the tokenizer has counts. masks:
    a mask token is needed; without it a tokenizer of an autoregressive model has the mask NO_MASK. alone: no config.json belongs to it, so
    what ends a text is its own eos_token.

    The end token is the one that pads texts: the tokenizer's pad token, or else config.json's. DiffuCoder has a pad token of
    its own; LLaDA and Dream pad with their end-of-text token.

    Raises ValueError where there are no tokenizer files, or no mask or end token, or one outside the vocabulary.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found"
    import transformers

    if (directory / "tokenizer.json").is_file():
        kind = transformers.PreTrainedTokenizerFast
    elif (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
        kind = transformers.Qwen2Tokenizer  # Dream's own class is remote code for the same byte-level BPE
    else:
        raise ValueError(
            f"tokenizer {str(directory)!r}: has neither tokenizer.json nor vocab.json and merges.txt; "
            "copy the tokenizer files of the checkpoint there"
        )
    try:
        wrapped = kind.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # broken JSON, broken merges: the library has no class of its own for them
        raise ValueError(
            f"tokenizer {str(directory)!r}: cannot be read ({error}); copy or download the tokenizer files again"
        ) from None
    if alone:
        end = wrapped.eos_token_id
    size = max(wrapped.get_vocab().values(), default=-1) + 1  # more than their number where ids are left out
    ids = {
        "mask": mask if mask is not None else wrapped.mask_token_id,
        "end": wrapped.pad_token_id if wrapped.pad_token_id is not None else end,
    }
    without = not masks and ids["mask"] is None
    if without:
        del ids["mask"]
    for name, token in ids.items():
        if token is None:
            cure = "eos_token in tokenizer_config.json" if alone else f"{SETTING[name]} in config.json"
            raise ValueError(f"tokenizer {str(directory)!r}: no {name} token; set {cure}")
        if not 0 <= token < size:
            raise ValueError(
                f"tokenizer {str(directory)!r}: {name} token {token} is outside its {size} ids; correct {SETTING[name]} in config.json"
            )
    found = [(_id_of(wrapped, end), header) for end, header in turns]
    turn, header = next((pair for pair in found if pair[0] >= 0), found[0])
    others = {wrapped.eos_token_id, end} - {None, ids["end"], turn}
    outside = [token for token in others if not 0 <= token < size]
    if outside:
        raise ValueError(
            f"tokenizer {str(directory)!r}: the end of a text is token {outside[0]}, outside its {size} ids; "
            "correct eos_token_id in config.json"
        )
    special = SpecialTokens(NO_MASK if without else ids["mask"], ids["end"], turn, size, tuple(sorted(others)))
    return _wrapping(wrapped, special, header, directory)


def _id_of(wrapped: Any, token: str) -> int:
    """The id of a token; -1 where there is none of that name."""
    found = wrapped.convert_tokens_to_ids(token)
    return found if found is not None and wrapped.convert_ids_to_tokens(found) == token else -1


def _wrapping(wrapped: Any, special: SpecialTokens, header: str, directory: Path) -> PretrainedTokenizer:
    # What masks or ends a text is a control token, also where the files forgot to mark it as special.
    forgotten = [wrapped.convert_ids_to_tokens(token) for token in {special.mask, *special.end_ids} - {NO_MASK}]
    wrapped.add_special_tokens({"additional_special_tokens": forgotten}, replace_extra_special_tokens=False)
    controls = {added.content: token for token, added in wrapped.added_tokens_decoder.items() if added.special}
    text = wrapped.backend_tokenizer.to_str() + str(wrapped.chat_template)
    fingerprint = hashlib.sha256(text.encode()).hexdigest()
    return PretrainedTokenizer(special, header, fingerprint, directory, wrapped, controls)


def with_mask_token(tokenizer: PretrainedTokenizer) -> PretrainedTokenizer:
    """The tokenizer with a mask token: its own, one that its makers have reserved, or else a new one behind the last id.

    The tokenizer of transformers is changed in place, and saves the token as its mask token.
    """
    if tokenizer.special.mask != NO_MASK:
        return tokenizer
    wrapped, special = tokenizer.wrapped, tokenizer.special
    reserved = sorted(
        (token, name)
        for name, token in wrapped.get_vocab().items()
        if token not in special.end_ids and (name in MASKS or RESERVED.search(name))
    )
    named = [(token, name) for token, name in reserved if name in MASKS]
    name = (named or reserved or [(0, MASKS[0])])[0][1]
    wrapped.add_special_tokens({"mask_token": name})
    mask = wrapped.mask_token_id
    size = max(special.vocab_size, mask + 1)
    return _wrapping(
        wrapped,
        dataclasses.replace(special, mask=mask, vocab_size=size),
        tokenizer.assistant_header,
        tokenizer.directory,
    )
