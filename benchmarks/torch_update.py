"""One rollout batch of diffu-GRPO in plain PyTorch: what benchmarks/update.py measures d1jax's compiled update against.

Written anew from the paper (d1, arXiv 2504.12216, eq. 4), as one would write it who knows PyTorch: eager, the vocabulary head on the
completion alone, the whole log_softmax of a micro-batch, gradients accumulated over micro-batches. The masked prompts come ready
made, so drawing them costs this side nothing.

U inner updates (mu), B rows, P prompt columns, C completion columns, V vocabulary.
"""

from typing import NamedTuple

import torch


class Rollouts(NamedTuple):
    prompt_UBP: torch.Tensor  # with the masks of each inner update
    completion_BC: torch.Tensor
    text_BC: torch.Tensor  # True through the first end token
    advantage_B: torch.Tensor
    num_generations: int
    mask_id: int


class Method(NamedTuple):
    inner_updates: int
    micro_batches: int
    clip_low: float
    clip_high: float
    kl_coefficient: float
    clip_norm: float
    first_old: (
        bool  # score the old policy for the first inner update too, as d1's code does; there it is the policy itself
    )


def new_optimizer(model, config):
    """AdamW whose decay is for matrices."""
    matrices = [x for name, x in model.named_parameters() if x.ndim == 2 and "embed" not in name]
    decayed = {id(x) for x in matrices}
    others = [x for x in model.parameters() if id(x) not in decayed]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
    )


def token_logprobs(model, prompt_BP, completion_BC, mask_id):
    """log p(o_k | masked prompt, all of o masked), [B, C]."""
    columns = completion_BC.shape[1]
    canvas_BT = torch.cat([prompt_BP, torch.full_like(completion_BC, mask_id)], dim=1)
    logits_BCV = model(canvas_BT, use_cache=False, logits_to_keep=columns).logits
    return torch.log_softmax(logits_BCV, dim=-1).gather(-1, completion_BC[:, :, None])[:, :, 0]


@torch.no_grad()
def frozen_logprobs(model, prompt_BP, rollouts, micro_batches):
    parts = zip(prompt_BP.chunk(micro_batches), rollouts.completion_BC.chunk(micro_batches), strict=True)
    return torch.cat([token_logprobs(model, prompt, completion, rollouts.mask_id) for prompt, completion in parts])


def token_losses(logp_BC, old_BC, reference_BC, advantage_B1, method):
    ratio_BC = torch.exp(logp_BC - old_BC)
    clipped_BC = torch.clamp(ratio_BC, 1 - method.clip_low, 1 + method.clip_high)
    surrogate_BC = torch.minimum(ratio_BC * advantage_B1, clipped_BC * advantage_B1)
    difference_BC = reference_BC - logp_BC
    kl_BC = torch.exp(difference_BC) - difference_BC - 1
    return method.kl_coefficient * kl_BC - surrogate_BC


def update(policy, reference, optimizer, rollouts, method):
    """(loss, gradient norm before the clip) of every inner update."""
    parts, masks = method.micro_batches, range(method.inner_updates)
    reference_UBC = [frozen_logprobs(reference, rollouts.prompt_UBP[u], rollouts, parts) for u in masks]
    old_UBC = [
        frozen_logprobs(policy, rollouts.prompt_UBP[u], rollouts, parts) if u > 0 or method.first_old else None
        for u in masks
    ]
    rows = torch.arange(len(rollouts.completion_BC))
    # The mean over the tokens of a prompt's completions, then over prompts, as d1's code does; every split gives the same gradient.
    tokens_Q = rollouts.text_BC.sum(dim=1).reshape(-1, rollouts.num_generations).sum(dim=1)
    weight_BC = rollouts.text_BC / tokens_Q.repeat_interleave(rollouts.num_generations)[:, None] / len(tokens_Q)
    losses, norms = [], []
    for u in masks:
        optimizer.zero_grad()
        loss = 0.0
        for part in rows.chunk(parts):
            logp_BC = token_logprobs(
                policy, rollouts.prompt_UBP[u, part], rollouts.completion_BC[part], rollouts.mask_id
            )
            old_BC = logp_BC.detach() if old_UBC[u] is None else old_UBC[u][part]
            loss_BC = token_losses(logp_BC, old_BC, reference_UBC[u][part], rollouts.advantage_B[part, None], method)
            share = (loss_BC * weight_BC[part]).sum()
            share.backward()
            loss += share.item()
        norms.append(torch.nn.utils.clip_grad_norm_(policy.parameters(), method.clip_norm).item())
        optimizer.step()
        losses.append(loss)
    return losses, norms
