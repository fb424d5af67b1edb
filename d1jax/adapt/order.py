"""In which order a model decodes the second half of held-out windows from their first half, and how sure it is at the first step.

B windows, T tokens of a window, P of them given, C decoded.

Source: DiffuCoder, arXiv 2506.20639, section 4 and appendix A.2: autoregressiveness by stage and by kind of text, and the entropy sink.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from d1jax.config import SamplerConfig
from d1jax.data.packing import Windows
from d1jax.diffusion.decoding import Prompts
from d1jax.diffusion.noise import KeyedNoise
from d1jax.diffusion.sampler import Sampler
from d1jax.evaluation import decoding_order
from d1jax.evaluation.decode import decoding_copy
from d1jax.models import sharding
from d1jax.models.transformer import Variables
from d1jax.training.context import Context

COLUMNS = 64  # that are decoded at most


def order_on_text(context: Context, variables: Variables, windows: Windows, count: int) -> dict[str, Any]:
    """`decoding_order.summary` of the first `count` windows: the likeliest token of the surest column, one a step, in one block.

    Half of a window is given, and what follows is decoded, at most COLUMNS tokens of it. Temperature 0, and nothing is forbidden or ends
    early: text goes on behind an end token.
    """
    columns = min(windows.tokens_NT.shape[1] // 2, COLUMNS)
    config = SamplerConfig(completion_length=columns, block_length=columns, steps=columns, early_exit=False)
    sampler = Sampler(context.model, config, context.tokenizer.special)
    shards = sharding.row_shards(context.mesh)
    rows = min(count, len(windows.tokens_NT))
    filled = np.minimum(np.arange(-(-rows // shards) * shards), rows - 1)  # the last row again where they do not divide
    prompt_BP = windows.tokens_NT[filled, : windows.tokens_NT.shape[1] // 2]
    length_B = np.full(len(filled), prompt_BP.shape[1], np.int32)
    placed = sharding.shard_batch(context.mesh, (prompt_BP, length_B, filled.astype(np.int32)))
    copy = decoding_copy(context, variables)
    rollout = sharding.fetch(
        sampler.sample(copy, Prompts(*placed[:2]), KeyedNoise(context.key("validation"), placed[2]))
    )
    seen = decoding_order.first_step(
        context.model, copy, *placed[:2], completion_length=columns, mask_id=context.tokenizer.special.mask
    )
    cut = type(rollout)(*(None if array is None else array[:rows] for array in rollout))
    return decoding_order.summary(cut, type(seen)(*(np.asarray(sharding.fetch(array))[:rows] for array in seen)))
