"""LLaDA's published decoding in plain PyTorch, on transformers' Llama: what benchmarks/sampling.py measures d1jax against.

Written anew from a description of the algorithm. As in the published code every step runs the model and its head over the whole
canvas, draws Gumbel noise in float64 for every position and every token, takes the confidence from a softmax of all logits, and
loops over the rows for their top-k.

B rows, P prompt columns, C completion columns, T = P + C, V vocabulary.
"""

from typing import NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM


class Generated(NamedTuple):
    tokens_BC: torch.Tensor
    unmask_step_BC: torch.Tensor  # the step that unmasked the position, from 0
    forward_passes: int


def bidirectional_llama(config, tensors):
    """LlamaForCausalLM with d1jax's sizes and published tensors, whose attention (sdpa) is told that it is not causal.

    So it needs no mask at all: nothing is added to the scores, and PyTorch may take its fastest kernel.
    """
    settings = LlamaConfig(
        hidden_size=config.width, num_hidden_layers=config.layers, num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads, intermediate_size=config.mlp_width, vocab_size=config.vocab_size,
        rms_norm_eps=config.norm_eps, tie_word_embeddings=False, attn_implementation="sdpa",
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta}, is_causal=False,
    )  # fmt: skip
    # No weights are drawn, only to be replaced; `strict` sees to it that none of the uninitialised ones is left.
    with torch.device("meta"):
        model = LlamaForCausalLM(settings)
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    model.load_state_dict(tensors, strict=True)
    # Computed from the sizes, so no tensor of the checkpoint, and the empty model has not computed it.
    model.model.rotary_emb = type(model.model.rotary_emb)(settings)
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    return model


def tokens_per_step(masked_B, steps):
    """How many positions each of `steps` unmasks, [B, steps]; the first ones take the remainder."""
    base_B, extra_B = masked_B // steps, masked_B % steps
    return base_B[:, None] + (torch.arange(steps)[None, :] < extra_B[:, None]).long()


def noised(logits_BTV, temperature, generator):
    """Its argmax over V is a draw from softmax(logits / temperature): exp(l) / (-ln u)^temperature, in float64."""
    if temperature == 0:
        return logits_BTV
    logits_BTV = logits_BTV.to(torch.float64)
    uniform_BTV = torch.rand(logits_BTV.shape, dtype=torch.float64, generator=generator)
    return logits_BTV.exp() / (-torch.log(uniform_BTV)) ** temperature


@torch.no_grad()
def generate(model, prompt_BP, *, completion_length, block_length, steps, temperature, mask_id, seed=0):
    rows, prompt_length = prompt_BP.shape
    blocks = completion_length // block_length
    steps_per_block = steps // blocks
    generator = torch.Generator().manual_seed(seed)
    canvas_BT = torch.full((rows, prompt_length + completion_length), mask_id, dtype=torch.long)
    canvas_BT[:, :prompt_length] = prompt_BP
    unmask_step_BT = torch.full_like(canvas_BT, -1)
    passes = 0
    for block in range(blocks):
        start = prompt_length + block * block_length
        end = start + block_length
        counts_BK = tokens_per_step((canvas_BT[:, start:end] == mask_id).sum(dim=1), steps_per_block)
        for step in range(steps_per_block):
            open_BT = canvas_BT == mask_id
            logits_BTV = model(canvas_BT, use_cache=False).logits
            passes += 1
            found_BT = noised(logits_BTV, temperature, generator).argmax(dim=-1)
            probability_BTV = torch.softmax(logits_BTV, dim=-1)
            confidence_BT = torch.gather(probability_BTV, -1, found_BT[:, :, None])[:, :, 0]
            confidence_BT[:, end:] = -torch.inf
            confidence_BT = torch.where(open_BT, confidence_BT, -torch.inf)
            unmask_BT = torch.zeros_like(open_BT)
            for row in range(rows):
                surest = torch.topk(confidence_BT[row], k=int(counts_BK[row, step])).indices
                unmask_BT[row, surest] = True
            canvas_BT = torch.where(unmask_BT, found_BT, canvas_BT)
            unmask_step_BT[unmask_BT] = block * steps_per_block + step
    return Generated(canvas_BT[:, prompt_length:], unmask_step_BT[:, prompt_length:], passes)
