"""Which choices of an rl section have no meaning together, and why."""

from __future__ import annotations

import math

from d1jax.config import ADAPTIVE, Config

Rule = tuple[bool, str]  # (broken, what to say)


def rl_rules(config: Config) -> list[Rule]:
    """Rules for numbers that are known to be finite and positive where they must be."""
    return [*_sizes(config), *_estimator(config), *_terms(config), *_credit(config), *_data(config)]


def _sizes(config: Config) -> list[Rule]:
    rl = config.rl
    pairs = rl.advantage == "pairs"
    rows = rl.prompts_per_step * (1 if pairs else rl.group_size)
    return [
        (
            rl.group_size < 2,
            f"rl.group_size = {rl.group_size}: advantages compare completions of a group, so at least 2",
        ),
        (
            rows % rl.micro_batches != 0,
            f"rl.micro_batches = {rl.micro_batches} does not divide the {rows} {'pairs' if pairs else 'rows'} of a step",
        ),
        (
            rl.temperature <= 0 and rl.data != "targets",
            f"rl.temperature = {rl.temperature}: a group of greedy completions is all the same; use e.g. 1.0",
        ),
        (rl.clip_low > 1, f"rl.clip_low = {rl.clip_low} must be at most 1 (the ratio is never negative)"),
        (rl.clip == "dual" and rl.dual_clip <= 1, f"rl.dual_clip = {rl.dual_clip} must be above 1"),
        (
            not all(map(math.isfinite, rl.reward_weights.values())),
            f"rl.reward_weights = {rl.reward_weights} must be finite numbers",
        ),
        (not rl.reward_weights, "rl.reward_weights is empty; write e.g. {solved: 1.0}"),
        (
            bool(rl.reward_weights)
            and not any(rl.reward_weights.values())
            and rl.advantage != "accepted"
            and not rl.kl_in_reward,
            f"rl.reward_weights = {rl.reward_weights} are all 0, so every reward is 0; give one a weight",
        ),
        (rl.guard.patience > 100, f"rl.guard.patience = {rl.guard.patience} must be at most 100"),
    ]


def _estimator(config: Config) -> list[Rule]:
    rl, estimator = config.rl, config.rl.estimator
    return [
        (not 0 <= rl.prompt_mask < 1, f"rl.prompt_mask = {rl.prompt_mask} must lie in [0, 1)"),
        (
            not 0 <= estimator.low < estimator.high <= 1,
            f"rl.estimator.low = {estimator.low} and high = {estimator.high} must satisfy 0 <= low < high <= 1",
        ),
        (
            estimator.full_mask and (estimator.name not in ("coupled", "elbo") or estimator.weight == "uniform"),
            "rl.estimator.full_mask belongs to the coupled and elbo estimators with weight inverse "
            f"(here: {estimator.name}, {estimator.weight})",
        ),
        (
            estimator.shrink > 0 and estimator.name != "trajectory",
            f"rl.estimator.shrink belongs to the trajectory estimator, not to {estimator.name}",
        ),
        (
            estimator.weight == "uniform" and estimator.name not in ("elbo", "block"),
            f"rl.estimator.weight = uniform is for elbo and block; {estimator.name} has weights of its own, set inverse",
        ),
        (not 0 < estimator.subset <= 1, f"rl.estimator.subset = {estimator.subset} must lie in (0, 1]"),
        (
            estimator.subset < 1 and estimator.name != "autoregressive",
            f"rl.estimator.subset belongs to the autoregressive estimator, not to {estimator.name}",
        ),
        (
            estimator.subset < 1 and not config.sampler.record_entropy,
            "rl.estimator.subset < 1 takes the positions of highest entropy; set sampler.record_entropy = true",
        ),
        (not 0 <= estimator.upper_share <= 1, f"rl.estimator.upper_share = {estimator.upper_share} must lie in [0, 1]"),
        (
            estimator.upper_exponent < 1,
            f"rl.estimator.upper_exponent = {estimator.upper_exponent} must be at least 1, or it bounds nothing",
        ),
        (
            estimator.upper_share > 0
            and (estimator.name not in ("elbo", "block") or estimator.weight == "uniform" or estimator.full_mask),
            "rl.estimator.upper_share > 0: the upper bound needs random maskings with weights 1 / share; "
            f"set name to elbo or block, weight to inverse and full_mask to false (here: {estimator.name}, {estimator.weight})",
        ),
    ]


def _terms(config: Config) -> list[Rule]:
    rl = config.rl
    return [
        (
            rl.kl == "k3" and rl.kl_level == "sequence" and rl.kl_in_loss,
            "rl.kl = k3 on sequences: exp of a sum over tokens has no bound; set rl.kl = k2, or rl.kl_level = token",
        ),
        (
            rl.kl == "k1" and rl.kl_in_loss,
            "rl.kl = k1 in the loss has an expected gradient of zero; set rl.kl = k2 or k3, or rl.kl_in = reward",
        ),
        (
            rl.kl_in_reward and (rl.kl_to == "old" or rl.kl_level == "sequence"),
            "rl.kl_in = reward takes the sum of the tokens' KL to the reference; set rl.kl_to = reference and rl.kl_level = token",
        ),
        (
            rl.kl_in_reward and not rl_scores_the_sampler(config),
            "rl.kl_in = reward takes sums of log p / p_reference for an estimate of the KL, which they are only where the scores are the "
            "log-probabilities that the completions were drawn with; set rl.estimator.name = trajectory, rl.estimator.shrink = 1, "
            "rl.prompt_mask = 0, rl.temperature = 1, no top_k, top_p, guidance, cache or end-token rule; or rl.kl_in = loss with k2 or k3",
        ),
        (
            rl.kl_in_reward and rl.advantage in ("accepted", "pairs"),
            f"rl.kl_in = reward with rl.advantage = {rl.advantage}, which looks at right and wrong only; set rl.kl_coefficient = 0",
        ),
        (
            rl.reference_sync_every > 0 and not rl.needs_reference,
            "rl.reference_sync_every > 0 but nothing looks at a reference (no KL to it, no pairs, data is not its own); set it to 0",
        ),
        (
            rl.reference_sync_every > 0 and config.lora.rank > 0,
            "rl.reference_sync_every > 0 with LoRA: the reference is the model without its adapter and never moves; set it to 0",
        ),
        (not 0 < rl.reference_mix <= 1, f"rl.reference_mix = {rl.reference_mix} must lie in (0, 1]"),
        (
            rl.reference_mix < 1 and rl.reference_sync_every == 0,
            "rl.reference_mix < 1 without rl.reference_sync_every: the reference never moves; set both or none",
        ),
    ]


def rl_scores_the_sampler(config: Config) -> bool:
    """Whether a token's score is the log-probability with which the sampler drew it: its state, its temperature, its filters."""
    rl, sampler = config.rl, config.sampler
    most = sampler.completion_length if sampler.schedule in ADAPTIVE else sampler.steps
    one_segment_a_step = rl.estimator.name == "trajectory" and (
        rl.estimator.shrink == 1 or (rl.estimator.shrink == 0 and rl.estimator.samples >= most)
    )
    as_drawn = rl.temperature == 1 and sampler.top_k == 0 and sampler.top_p == 1 and sampler.guidance == 0
    exact = sampler.cache == "none" and sampler.end_token in ("allowed", "last")
    return one_segment_a_step and rl.prompt_mask == 0 and rl.data == "policy" and as_drawn and exact


def _credit(config: Config) -> list[Rule]:
    rl = config.rl
    by_steps, pairs = rl.supervision != "outcome", rl.advantage == "pairs"
    return [
        (
            by_steps and rl.ratio not in ("none", "token"),
            f"rl.ratio = {rl.ratio} with rl.supervision = {rl.supervision}: a ratio of many tokens has one advantage, steps have "
            "several; set rl.ratio = token or none",
        ),
        (
            by_steps and rl.advantage not in ("center", "zscore"),
            f"rl.advantage = {rl.advantage} with rl.supervision = {rl.supervision}: rewards of steps are centred or standardised; "
            "set it to center or zscore",
        ),
        (
            by_steps and rl.kl_in_reward,
            f"rl.kl_in = reward with rl.supervision = {rl.supervision}: the penalty is of a completion, not of a step; set it to loss",
        ),
        (
            by_steps and rl.negative_control == "shuffled_rewards",
            f"rl.negative_control = shuffled_rewards with rl.supervision = {rl.supervision}: steps of one text are not those of another; "
            "set rl.supervision = outcome",
        ),
        (
            rl.drop_equal_groups and rl.advantage in ("accepted", "pairs"),
            f"rl.drop_equal_groups with rl.advantage = {rl.advantage}, which leaves out what it has no use for by itself; set it to false",
        ),
        (
            pairs and (rl.ratio != "none" or rl.clip != "none" or rl.kl_coefficient > 0),
            "rl.advantage = pairs compares with the reference inside its loss; set rl.ratio = none, rl.clip = none and "
            "rl.kl_coefficient = 0",
        ),
        (
            pairs and rl.pooling not in ("grpo", "sequence_mean"),
            f"rl.pooling = {rl.pooling} with rl.advantage = pairs: its loss is one number a pair; set it to sequence_mean",
        ),
    ]


def _data(config: Config) -> list[Rule]:
    rl, length = config.rl, config.sampler.completion_length
    given = rl.data == "targets"
    return [
        (
            given and rl.estimator.name == "trajectory",
            "rl.estimator.name = trajectory needs recorded steps, and rl.data = targets was never decoded; choose another one",
        ),
        (
            given and rl.estimator.subset < 1,
            "rl.estimator.subset < 1 needs recorded entropies, and rl.data = targets was never decoded; set it to 1",
        ),
        (
            given and rl.supervision == "commit_steps",
            "rl.supervision = commit_steps needs recorded steps, and rl.data = targets was never decoded; set it to text_steps",
        ),
        (
            given and rl.negative_control == "shuffled_rewards",
            "rl.negative_control = shuffled_rewards with rl.data = targets: every text of a batch is right, so shuffling changes nothing; "
            "set it to zero_advantages",
        ),
        (
            given and rl.advantage != "accepted",
            f"rl.advantage = {rl.advantage} with rl.data = targets: the completions of a group are one text; set it to accepted",
        ),
        (
            given and config.sft.completion_length not in (0, length),
            f"sft.completion_length = {config.sft.completion_length} with rl.data = targets must be that of the sampler, {length}",
        ),
        (
            rl.data != "policy" and rl.ratio != "none",
            f"rl.ratio = {rl.ratio} with rl.data = {rl.data}: the old policy did not write these completions; set it to none",
        ),
    ]
