"""d1jax as a model of EleutherAI's lm-evaluation-harness, whose registry has it under the name "d1jax" once this is imported.

    import d1jax.inference.lm_eval
    lm_eval.simple_evaluate("d1jax", model_args="pretrained=DIR,samples=128", tasks=["gsm8k"], batch_size=32)

On the command line: d1jax lm_eval --model d1jax --model_args pretrained=DIR --tasks gsm8k. Needs the extra lm-eval; only that
command imports this module. Settings: docs/evaluation.md.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import lm_eval.models  # noqa: F401  a registry that holds d1jax alone would not be filled with the others
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from d1jax.config import UserError
from d1jax.config.values import plain
from d1jax.config.version import __version__
from d1jax.data.hf_tokenizer import PretrainedTokenizer
from d1jax.inference.complete import sample_ids
from d1jax.inference.lm_eval_settings import Generating, cut, generating, settings_of
from d1jax.inference.log_likelihood import Pair, are_greedy, elbos, row_id
from d1jax.inference.policy import load_pretrained

LOG = logging.getLogger(__name__)


class Ask(NamedTuple):
    """A request for a text."""

    number: int  # its place among the requests
    ids: list[int]
    row: int  # what its draws depend on


@register_model("d1jax")
class D1jaxLM(TemplateLM):
    """A masked diffusion language model for the harness: texts by the sampler, log-likelihoods by the ELBO estimator.

    given: what `--model_args` names (docs/evaluation.md has the list), and batch_size. A text depends on (seed, its prompt, how
    often that prompt came before), a log-likelihood on (seed, context, continuation): neither on the batch size, the order or the
    number of the requests. Raises UserError for arguments that are unknown or impossible, before the weights are read.
    """

    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.settings = settings_of(given)
        self.policy = load_pretrained(
            self.settings.pretrained,
            dtype=self.settings.dtype,
            mesh=self.settings.mesh,
            adapter=self.settings.adapter,
            tokenizer=self.settings.tokenizer,
        )
        self.tok_encode("")  # a checkpoint without tokenizer files says so now
        ends = [self.settings.max_length, self.policy.config.max_positions]
        self.max_length = min((one for one in ends if one), default=None)  # None: no text is too long

    # -- what the harness asks for -----------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(ELBO of the continuation given the context, nats; whether greedy denoising writes just it) of each request."""
        asked = [(request.args, *self._encoded(*request.args)) for request in requests]
        return self._loglikelihood_tokens(asked, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [Pair(self._shortened(context, len(target)), target) for _, context, target in requests]
        # In parts, so that there is a bar, and what was found is in the cache where the process is killed. Those of one shape together.
        order = sorted(range(len(pairs)), key=lambda place: pairs[place].shape)
        results: dict[int, tuple[float, bool]] = {}
        part = 4 * self.settings.batch_size
        for start in tqdm(range(0, len(order), part), desc="log-likelihoods", disable=disable_tqdm):
            places = order[start : start + part]
            some = [pairs[place] for place in places]
            greedy = self._are_greedy(some)
            for place, one in zip(places, zip(self._elbos(some), greedy, strict=True), strict=True):
                results[place] = one
                self.cache_hook.add_partial("loglikelihood", requests[place][0], one)
        return [results[place] for place in range(len(pairs))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The ELBO of each text, nats. One that is longer than the model's positions is scored window by window, each token once.

        A window has no other context than a first token where the tokenizer's files say so; the last one sees as many tokens before it
        as there is room for.
        """
        results = []
        for request in tqdm(requests, desc="rolling log-likelihoods", disable=disable_tqdm):
            (text,) = request.args
            first, ids = self._without_context(text)
            total = sum(self._elbos(self._windows(first, ids)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
            results.append(total)
        return results

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """A completion of each context, cut before the first of the request's `until` and at its max_gen_toks."""
        texts = [""] * len(requests)
        often: Counter[tuple[int, ...]] = Counter()
        asked: dict[Generating, list[Ask]] = defaultdict(list)
        for number, request in enumerate(requests):
            context, arguments = request.args
            wanted = normalize_gen_kwargs(arguments, self.settings.sampler.completion_length)
            if wanted["do_sample"] and "temperature" not in arguments:
                wanted["temperature"] = 1.0  # what the harness's other models take; its function says 0
            how = generating(self.settings, wanted)
            ids = self._shortened(self.tok_encode(context), how.sampler.completion_length)
            # A repeat of a request is another draw.
            asked[how].append(Ask(number, ids, row_id([often[tuple(ids)], *ids])))
            often[tuple(ids)] += 1
        with tqdm(total=len(requests), desc="texts", disable=disable_tqdm) as bar:
            for how, asks in asked.items():
                asks.sort(key=lambda one: len(one.ids))
                for start in range(0, len(asks), self.settings.batch_size):
                    part = asks[start : start + self.settings.batch_size]
                    for ask, text in zip(part, self._texts(how, part), strict=True):
                        texts[ask.number] = text
                        self.cache_hook.add_partial("generate_until", requests[ask.number].args, text)
                    bar.update(len(part))
        return texts

    # -- its tokenizer -----------------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.policy.tokenizer.special.end

    @property
    def tokenizer_name(self) -> str:
        """What the harness's cache of requests calls the tokenizer."""
        return str(Path(self.settings.tokenizer or self.settings.pretrained).resolve()).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids. As in the harness's other models, control tokens that a text spells are control tokens: a chat comes as text."""
        tokenizer = self.policy.tokenizer
        try:
            if isinstance(tokenizer, PretrainedTokenizer):
                return tokenizer.encode_rendered(string, first=add_special_tokens is not False)
            return tokenizer.encode(string)
        except ValueError as error:
            raise UserError(f"lm_eval: {error}") from None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat as the checkpoint's template writes it, up to where the assistant answers or inside of its last turn."""
        tokenizer = self._with_template()
        try:
            if add_generation_prompt:
                return tokenizer.render(chat_history)
            return tokenizer.wrapped.apply_chat_template(chat_history, tokenize=False, continue_final_message=True)
        except Exception as error:  # a template may raise anything
            raise UserError(f"--apply_chat_template: {error}") from None

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template itself, for the record of the run."""
        if not chat_template:
            return None
        if isinstance(chat_template, str):
            raise UserError(
                f"--apply_chat_template {chat_template}: a checkpoint's template has no name here; write the flag alone"
            )
        return str(self._with_template().wrapped.chat_template)

    def _with_template(self) -> PretrainedTokenizer:
        tokenizer = self.policy.tokenizer
        if isinstance(tokenizer, PretrainedTokenizer) and tokenizer.chats:
            return tokenizer
        raise UserError(
            f"--apply_chat_template: {self.settings.pretrained!r} has no chat template; leave the flag out, or name a "
            "tokenizer that has one, --model_args tokenizer=DIR"
        )

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results beside the scores."""
        settings = self.settings
        return {
            "model_num_parameters": sum(x.size for x in jax.tree.leaves(self.policy.variables)),
            "model_dtype": self.policy.config.param_dtype,
            "d1jax_version": __version__,
            "loglikelihood": f"ELBO, {settings.samples} samples, exact where a continuation has no more sets of tokens",
            "sampler": plain(settings.sampler),
            "steps_per_token": settings.steps_per_token,
            "model_seed": settings.seed,
        }

    # -- parts -------------------------------------------------------------------------------------------------------------

    def _encoded(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        return self._encode_pair(context, continuation) if context else self._without_context(continuation)

    def _without_context(self, text: str) -> tuple[list[int], list[int]]:
        """(what the tokenizer's files put before a text, the text). Unlike a causal model, this one needs nothing to stand there."""
        whole, ids = self.tok_encode(text), self.tok_encode(text, add_special_tokens=False)
        return whole[: len(whole) - len(ids)], ids

    def _shortened(self, context: list[int], new: int) -> list[int]:
        """The last tokens of the context that leave room for the new ones."""
        if self.max_length is None or len(context) + new <= self.max_length:
            return context
        if new > self.max_length:
            raise UserError(
                f"lm_eval: {new} tokens to write or to score are more than the {self.max_length} positions there are; lower "
                "max_gen_toks by --gen_kwargs, or raise --model_args max_length up to the model's positions"
            )
        LOG.warning("d1jax: a context of %d tokens is cut to its last %d", len(context), self.max_length - new)
        return context[len(context) + new - self.max_length :]

    def _windows(self, first: list[int], ids: list[int]) -> list[Pair]:
        size = len(ids) if self.max_length is None else self.max_length - len(first)
        pairs = []
        for start in range(0, len(ids), max(size, 1)):
            end = min(start + size, len(ids))
            pairs.append(Pair([*first, *ids[max(end - size, 0) : start]], ids[start:end]))
        return pairs

    def _elbos(self, pairs: list[Pair]) -> list[float]:
        settings = self.settings
        return elbos(self.policy, pairs, samples=settings.samples, seed=settings.seed, batch=settings.batch_size)

    def _are_greedy(self, pairs: list[Pair]) -> list[bool]:
        if not self.settings.check_greedy:
            return [False] * len(pairs)
        return are_greedy(self.policy, pairs, batch=self.settings.batch_size)

    def _texts(self, how: Generating, part: list[Ask]) -> list[str]:
        filled = part + part[-1:] * (self.settings.batch_size - len(part))  # one shape for all batches
        rows, draws = [one.ids for one in filled], [one.row for one in filled]
        found = sample_ids(self.policy, rows, how.sampler, self.settings.seed, how.temperature, draws)
        kept = [self.policy.tokenizer.decode(row[: how.tokens]) for row in found.tokens[: len(part)].tolist()]
        return [cut(text, how.until) for text in kept]
