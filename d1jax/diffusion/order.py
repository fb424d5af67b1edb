"""In which order a model may be decoded: what its attention mask asks of the sampler's settings."""

from __future__ import annotations

from d1jax.config import ModelConfig, SamplerConfig, UserError


def check_order(model: ModelConfig, sampler: SamplerConfig) -> None:
    """Raises UserError where a model that does not see all columns would be decoded in another way than its own."""
    if model.attention_mask == "causal":
        _check_autoregressive(sampler)
    if model.attention_mask == "block_causal":
        check_blocks(model, sampler)


def _check_autoregressive(config: SamplerConfig) -> None:
    """Raises UserError where an autoregressive model would be decoded in another order than its own."""
    wanted = {
        "remasking": ("left_to_right", config.remasking.name),
        "schedule": ("even", config.schedule.name),
        "steps": (config.completion_length, config.steps),
        "cache": ("none", config.cache.name),
    }
    wrong = [f"sampler.{name} = {right} (here: {found})" for name, (right, found) in wanted.items() if right != found]
    if wrong:
        raise UserError(f"this model is autoregressive and writes one token after the other; set {', '.join(wrong)}")


def check_blocks(model: ModelConfig, sampler: SamplerConfig) -> None:
    """Raises UserError where a block-causal model would be decoded in other blocks than its own, or on a cache that is not exact."""
    size = model.mask_block
    if sampler.block_length != size:
        raise UserError(
            f"this model is block-causal in blocks of {size} positions; set sampler.block_length = {size} (here: {sampler.block_length}), "
            "and sampler.completion_length to a multiple of it"
        )
    if sampler.guidance > 0:
        raise UserError("sampler.guidance masks the prompt, which block-causal models do not do; set it to 0")
    if sampler.schedule.name in ("time", "chance"):
        raise UserError(
            f"sampler.schedule = {sampler.schedule.name} is of one block, and a block-causal model has several; set it to even, or to an "
            "adaptive one"
        )
    if sampler.cache.name == "prefix" or (sampler.cache.name == "dual" and model.alignment == "shifted"):
        raise UserError(
            f"sampler.cache = {sampler.cache.name} is not exact for this block-causal model; set it to "
            + ("none" if model.alignment == "shifted" else "dual, which is, or to none")
        )
