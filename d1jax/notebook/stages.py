"""Training and evaluation of a policy from Python: the stages of `d1jax train`, without a run directory.

    policy = d1jax.load_pretrained("runs/quickstart")
    tuned = d1jax.sft(policy, [("2+2=", "4"), ...], d1jax.SftConfig(steps=20, batch_size=8))
    better = d1jax.rl(tuned.policy, ["2+2=", ...], reward=lambda row, text: float(text == "4"))
    d1jax.evaluate(better.policy, [("2+2=", "4")])

The same loops run here and there (d1jax/sft/loop.py, d1jax/rl/loop.py). What a run directory adds is left out: checkpoints,
resuming, the report. docs/notebook.md is an example that the tests run.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from jax import Array

from d1jax.config import (
    Config,
    EvaluationConfig,
    LoraConfig,
    RlConfig,
    SamplerConfig,
    SftConfig,
    TaskConfig,
)
from d1jax.config.errors import Diverged
from d1jax.config.training import TrainingConfig
from d1jax.diffusion.canvas import Canvas, through_first_end
from d1jax.diffusion.forward_process import corrupt
from d1jax.evaluation import decode
from d1jax.evaluation.grade import score_texts
from d1jax.inference.policy import Policy
from d1jax.models import lora as adapters
from d1jax.models.transformer import Variables
from d1jax.notebook.given import (
    NO_ADAPTER,
    TO_LEARN,
    Data,
    Judged,
    Pairs,
    context_of,
    rows_of,
    setup_of,
    to_stderr,
    with_answers,
)
from d1jax.rl import loop as rl_loop
from d1jax.sft import loop as sft_loop
from d1jax.sft.loss import NORMALIZERS
from d1jax.sft.loss import masked_loss as loss_of_rows
from d1jax.training.context import Context, check_rows_divide
from d1jax.training.stage_log import bad_updates_of


class Trained(NamedTuple):
    """What `sft` and `rl` return."""

    policy: Policy  # the last weights; the policy that was given is as it was
    metrics: list[dict[str, float]]  # one dictionary a step, as in metrics.jsonl (docs/metrics.md)


def masked_loss(
    policy: Policy,
    pairs: Pairs,
    *,
    variables: Variables | None = None,
    config: SftConfig | None = None,
    seed: int = 0,
) -> Array:
    """The masked SFT loss of (prompt, answer) pairs, one batch: an fp32 scalar, in nats.

    Each answer gets a masking of its own, drawn from (seed, its place); the loss is the cross-entropy of the hidden tokens, each
    divided by the probability of hiding it, and an unbiased estimate of a bound on -log p(answer | prompt) / columns. Only
    completion_length, eps, score_padding and normalizer of `config` are read. variables: the weights (None: the policy's), so
    that it can be differentiated. Raises UserError for a text that cannot be written or is too long.

        gradient = jax.grad(lambda weights: d1jax.masked_loss(policy, pairs, variables=weights))(policy.variables)

    Source: LLaDA, arXiv 2502.09992, algorithm 2; d1jax/sft/loss.py.
    """
    config = config or SftConfig()
    special = policy.tokenizer.special
    problems = context_of(setup_of(policy, ("sft",), sft=config), with_answers(rows_of(pairs), TO_LEARN), None).train
    clean = Canvas(problems.target_RC, problems.prompt_RP, problems.prompt_length_R)
    clean = jax.tree.map(jnp.asarray, clean)
    text_BC = through_first_end(clean.completion_BC, special.end_ids)
    eligible_BC = jnp.ones_like(text_BC) if config.score_padding else text_BC
    weights = policy.variables if variables is None else variables
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(weights))
    # A transformation is under the mesh that its caller has set, or under none.
    with contextlib.nullcontext() if traced else jax.set_mesh(policy.mesh):
        row_ids_B = jnp.arange(len(problems), dtype=jnp.int32)
        corruption = corrupt(jax.random.key(seed), clean, row_ids_B, mask_id=special.mask, eps=config.eps)
        weight_B = NORMALIZERS[config.normalizer](eligible_BC)
        return loss_of_rows(policy.model, weights, clean, corruption, eligible_BC, weight_B)


def sft(
    policy: Policy,
    pairs: Pairs | TaskConfig,
    config: SftConfig | None = None,
    *,
    lora: LoraConfig = NO_ADAPTER,
    seed: int = 0,
    log: Callable[[str], None] | None = None,
) -> Trained:
    """Masked supervised fine-tuning on (prompt, answer) pairs, or on the rows of a task; returns `Trained`.

    config: steps, batch_size, optimizer, ... (None: the defaults of SftConfig). lora: of rank above 0 trains an adapter, which
    stays beside the weights; one of these settings that the policy has already is trained on; otherwise all weights are trained,
    in fp32. An answer stands in config.completion_length columns (0: as many as the policy samples), padded with end tokens.
    seed: of masks and the order of rows. log: called with lines about the training (None: they are printed to standard error). Raises
    UserError for impossible settings, rows without answers and texts that cannot be written or are too long, Diverged where updates
    are not finite.

        tuned = d1jax.sft(policy, [("2+2=", "4"), ("1+2=", "3")], d1jax.SftConfig(steps=20, batch_size=2))
        tuned.metrics[-1]["loss"]
    """
    data = pairs if isinstance(pairs, TaskConfig) else with_answers(rows_of(pairs), TO_LEARN)
    setup = setup_of(policy, ("sft",), data, sft=config or SftConfig(), lora=lora, seed=seed)
    check_rows_divide(setup.config, setup.mesh, training=True)
    return _train(policy, context_of(setup, data, None, log), sft_loop.train, "sft", log)


def rl(
    policy: Policy,
    data: Data,
    config: RlConfig | None = None,
    *,
    reward: Judged | None = None,
    sampler: SamplerConfig | None = None,
    lora: LoraConfig = NO_ADAPTER,
    seed: int = 0,
    log: Callable[[str], None] | None = None,
) -> Trained:
    """Reinforcement learning on prompts; returns `Trained`. The defaults of RlConfig are diffu-GRPO (d1).

    data: prompts, (prompt, answer) pairs, dictionaries with a "prompt", or a TaskConfig, whose rewards are its own.
    reward: `reward(row, text)` -> a number, or {name: number} to be weighted by config.reward_weights; `row` is a dictionary with
    "prompt" and, of a pair, "answer" (None: 1 where the text is the answer). sampler: of the rollouts (None: as the policy
    brings along). lora, seed, log: as in `sft`. Raises UserError, DataError where a named reward is missing or no text can be
    rewarded in any step or in 10 in a row, and Diverged where updates are not finite or the policy has collapsed.

        better = d1jax.rl(policy, ["2+2="], d1jax.RlConfig(steps=5, prompts_per_step=1), reward=lambda row, text: float("4" in text))
        [step["reward"] for step in better.metrics]
    """
    rows = data if isinstance(data, TaskConfig) else rows_of(data)
    setup = setup_of(policy, ("rl",), rows, rl=config or RlConfig(), sampler=sampler, lora=lora, seed=seed)
    check_rows_divide(setup.config, setup.mesh, training=True)
    return _train(policy, context_of(setup, rows, reward, log), rl_loop.train, "rl", log)


def evaluate(
    policy: Policy,
    data: Data,
    *,
    grade: Judged | None = None,
    sampler: SamplerConfig | None = None,
    temperature: float = 0.0,
    batch_size: int = 32,
    seed: int = 0,
) -> dict[str, Any]:
    """How many problems a policy solves: {"n", "solved_rate", "solved_rate_ci95", other grades, "nfe", "texts"}.

    data: (prompt, answer) pairs, dictionaries with a "prompt", or a TaskConfig (its first evaluation set, graded by the
    task). grade: `grade(row, text)` -> a number in [0, 1], or {"solved": ..., other names: ...} (None: whether the text is the answer, but
    for spaces around it). Rates are shares, the interval is Wilson's at 95 %; nfe is the mean number of forward passes, texts the
    completions in the order of the rows. Raises UserError, also for what is no grade.

        d1jax.evaluate(policy, [("2+2=", "4")])["solved_rate"]
    """
    rows = data if isinstance(data, TaskConfig) else rows_of(data)
    evaluation = EvaluationConfig(batch_size=batch_size, temperature=temperature)
    setup = setup_of(policy, (), rows, evaluation=evaluation, sampler=sampler, lora=policy.model.lora, seed=seed)
    check_rows_divide(setup.config, setup.mesh, training=False)
    context = context_of(setup, rows, grade, training=False)
    problems = next(iter(context.eval_sets.values()))
    with jax.set_mesh(policy.mesh):
        rollout = decode.decode(context, policy.variables, problems)
    texts = decode.texts_of(context, rollout)
    scores = score_texts(context, problems, texts)
    return {**scores, "nfe": float(rollout.nfe_B.mean()), "texts": texts}


def _start(policy: Policy, lora: LoraConfig) -> Variables:
    """The weights that training begins with: an adapter of the same kind is trained on, another one is merged first."""
    if "lora" not in policy.variables or lora == policy.model.lora:
        return policy.variables
    # A base that stays frozen keeps its dtype; what will be trained loses nothing.
    return adapters.merge(policy.variables, policy.model.lora, None if lora.rank else "float32")


def _train(policy: Policy, context: Context, train: Any, stage: str, log: Callable[[str], None] | None) -> Trained:
    journal = _Notes(stage, getattr(context.config, stage), context.config, log or to_stderr)
    with jax.set_mesh(policy.mesh):
        variables = train(context, _start(policy, context.config.lora), journal)
    trained = dataclasses.replace(policy, model=context.model, variables=variables)
    return Trained(trained, journal.metrics)


class _Notes:
    """The part of a StageLog that needs no run directory."""

    def __init__(self, stage: str, section: TrainingConfig, config: Config, log: Callable[[str], None]) -> None:
        self.stage, self._section = stage, section
        self._config, self._log = config, log
        self.metrics: list[dict[str, float]] = []

    @property
    def recent(self) -> list[dict[str, float]]:
        return self.metrics[-100:]

    def note(self, line: str) -> None:
        self._log(f"{self.stage}: {line}")

    def notes(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.note(line)

    def evaluates(self, step: int) -> bool:
        return False  # there are no evaluation sets here

    def resume(self, items: dict[str, Any]) -> tuple[dict[str, Any], int]:
        return items, 0

    def log_metrics(self, step: int, values: Mapping[str, float], watch: Sequence[str]) -> None:
        self.metrics.append({"step": step, **values})
        problem = bad_updates_of(
            self.stage, step, self._section, int(values["nonfinite/in_a_row"]), self._config.max_bad_updates
        )
        if problem:
            raise Diverged(f"{problem}; lower optimizer.learning_rate, and check the weights that it starts from")

    def quarantine(self, step: int, steps: int, signs: Sequence[str]) -> NoReturn:
        raise Diverged(
            f"{self.stage} step {step}: the policy has collapsed; for {steps} steps in a row it showed {', '.join(signs)}. Lower "
            "optimizer.learning_rate, add a KL term, or set collapse = ignore"
        )

    def save_checkpoint(self, step: int, items: dict[str, Any]) -> None:
        pass
