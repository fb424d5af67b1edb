"""Completions of a set of problems, and what the model knows before it decodes any.

R problems, B rows at a time, C completion columns.
"""

from __future__ import annotations

import jax
import numpy as np
from jax import Array
from tqdm import tqdm

from d1jax.config.errors import Diverged
from d1jax.data.examples import Problems
from d1jax.diffusion.decoding import Prompts
from d1jax.diffusion.noise import KeyedNoise
from d1jax.diffusion.rollout import Rollout, not_finite
from d1jax.evaluation import decoding_order
from d1jax.evaluation.decoding_order import FirstStep
from d1jax.models import sharding
from d1jax.models.transformer import Variables, in_model_dtype
from d1jax.training.context import Context


def decode(
    context: Context, variables: Variables, problems: Problems, progress: str = "", key: Array | None = None
) -> Rollout:
    """Completions of all problems, as host arrays. The last batch repeats its last row, so one program serves all batches.

    progress: what a bar on a terminal is called ("": there is none). key: of the draws, row i's being of (key, i) alone (None: that of
    evaluations). Raises Diverged where the predictions are not finite: a score of
    such texts would be one of token 0.
    """
    variables = decoding_copy(context, variables)
    size = context.config.evaluation.batch_size
    sampler = context.sampler(context.config.evaluation.temperature)
    key = context.key("evaluation") if key is None else key
    parts = []
    starts = range(0, len(problems), size)
    for start in tqdm(starts, desc=progress, unit="batch", leave=False, disable=None if progress else True):
        rows_B = np.minimum(np.arange(start, start + size), len(problems) - 1)
        inputs = (problems.prompt_RP[rows_B], problems.prompt_length_R[rows_B], rows_B.astype(np.int32))
        prompt_BP, prompt_length_B, row_ids_B = sharding.shard_batch(context.mesh, inputs)
        rollout = sampler.sample(variables, Prompts(prompt_BP, prompt_length_B), KeyedNoise(key, row_ids_B))
        parts.append(sharding.fetch(rollout))
        problem = not_finite(parts[-1].confidence_BC)
        if problem:
            raise Diverged(f"evaluation, batch from row {start}: {problem}")
    return Rollout(*(np.concatenate(arrays)[: len(problems)] for arrays in zip(*parts, strict=True)))


def decoding_copy(context: Context, variables: Variables) -> Variables:
    """The weights as the sampler reads them many times over: in the dtype of the activations, and not cut over fsdp any more.

    Weights that stay cut (`mesh.rollout_weights: as_trained`) are gathered in every denoising step. No token changes by it.
    """
    copy = in_model_dtype(variables, context.model.config)
    if context.mesh.shape["fsdp"] == 1 or context.config.mesh.rollout_weights == "as_trained":
        return copy
    return jax.device_put(copy, jax.tree.map(lambda x: sharding.gathered(x.sharding), copy))


def look_ahead(context: Context, variables: Variables, problems: Problems) -> FirstStep:
    """What the model knows before anything is decoded, of the first batch of problems, as host arrays."""
    config = context.config
    rows_B = np.minimum(np.arange(config.evaluation.batch_size), len(problems) - 1)
    prompts = sharding.shard_batch(context.mesh, (problems.prompt_RP[rows_B], problems.prompt_length_R[rows_B]))
    seen = decoding_order.first_step(
        context.model, variables, *prompts,
        completion_length=config.sampler.completion_length, mask_id=context.tokenizer.special.mask,
    )  # fmt: skip
    return FirstStep(*(values_BC[: len(problems)] for values_BC in sharding.fetch(seen)))


def texts_of(context: Context, rollout: Rollout) -> list[str]:
    """The texts of a rollout, as the tokenizer writes them."""
    return [context.tokenizer.decode(row) for row in np.asarray(rollout.tokens_BC).tolist()]
