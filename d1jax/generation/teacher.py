"""Another model that writes the completions of a generate stage: distillation, as in DeepSeek-R1 (arXiv 2501.12948, section 2.4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d1jax.config import Stage, UserError
from d1jax.data.examples import Examples, tokenise
from d1jax.data.hf_tokenizer import PretrainedTokenizer
from d1jax.data.tokenizers import Tokenizer
from d1jax.inference.policy import load_pretrained
from d1jax.models.transformer import Variables
from d1jax.training.context import Context
from d1jax.weights.source import Source, open_source
from d1jax.weights.tokenizer_files import load_tokenizer


def with_teacher(context: Context, stage: str) -> tuple[Context, Variables]:
    """(the context of a generate stage with its teacher's model, tokenizer and prompts, the teacher's weights).

    The rows, the rewards and the way of sampling are those of the stage. Raises UserError where the teacher cannot be read.
    """
    policy = load_pretrained(context.config.generate.teacher, mesh=context.mesh)
    prompts = _prompts(context, policy.tokenizer)
    train = prompts.padded((prompts.longest_prompt, 0), policy.tokenizer.special.end, f"stage {stage!r}")
    config = dataclasses.replace(context.config, model=policy.config, lora=policy.model.lora)
    taught = dataclasses.replace(context, config=config, model=policy.model, tokenizer=policy.tokenizer, train=train)
    return taught, policy.variables


def check_teachers(contexts: Mapping[str, Context], stages: tuple[Stage, ...]) -> None:
    """Raises UserError where a teacher is not there, cannot read the prompts, or writes other tokens than a reward model reads."""
    for stage in stages:
        context = contexts[stage.name]
        if stage.kind != "generate" or not context.config.generate.teacher:
            continue
        source = _teacher(context, stage.name)
        source.check_saved()
        tokenizer = load_tokenizer(source.files) if source.files is not None else None
        if tokenizer is None:
            raise UserError(f"config: {_named(context, stage.name)} has no tokenizer, so its completions are no texts")
        try:
            longest = _prompts(context, tokenizer).longest_prompt
        except UserError as error:
            raise UserError(f"config: {_named(context, stage.name)} cannot read the prompts: {error}") from None
        limit, columns = source.model.max_positions, context.config.sampler.completion_length
        if limit and longest + columns > limit:
            raise UserError(
                f"config: {_named(context, stage.name)} has {limit} positions, fewer than the {longest} tokens of the longest prompt and "
                f"the {columns} of sampler.completion_length; lower it, or shorten the prompts"
            )
        asked = context.config.models_of(stage)
        if asked and not same_tokens(tokenizer, context.tokenizer):
            raise UserError(
                f"config: stage {stage.name!r} asks the reward model {asked[0]!r} about completions of "
                f"{_named(context, stage.name)}, whose tokenizer is another one; leave that reward out"
            )


def identity(context: Context, stage: str) -> dict[str, Any]:
    """What tells the teacher of a generate stage from other weights under the same name."""
    return {"path": context.config.generate.teacher, **_teacher(context, stage).identity()}


def same_tokens(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether a token means the same text to both."""
    if isinstance(one, PretrainedTokenizer) and isinstance(other, PretrainedTokenizer):
        return one.special == other.special and one.wrapped.get_vocab() == other.wrapped.get_vocab()
    return type(one) is type(other) and one == other


def _teacher(context: Context, stage: str) -> Source:
    named, path = _named(context, stage), Path(context.config.generate.teacher)
    if path.resolve() == Path(context.config.run_dir).resolve():
        raise UserError(
            f"config: {named} is this run itself, whose weights write where there is no teacher; leave it out"
        )
    return open_source(path, f"config: {named}")


def _named(context: Context, stage: str) -> str:
    return f"{stage}.teacher = {context.config.generate.teacher!r}"


def _prompts(context: Context, tokenizer: Tokenizer) -> Examples:
    """The stage's rows as the teacher reads them."""
    return tokenise(context.task, tokenizer, context.train.rows, targets=False)
