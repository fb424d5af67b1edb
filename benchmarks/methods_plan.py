"""Which runs the table of methods has, and how many RL steps each may do: all methods of a task spend equally many forward passes."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from d1jax.config import ADAPTIVE, Config, ConfigError, RlConfig, SamplerConfig
from d1jax.config.parse import differences, parse, to_dict
from d1jax.data.tokenizers import SpecialTokens
from d1jax.diffusion.canvas import Canvas
from d1jax.diffusion.estimators import views_of

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
TASKS = ("sudoku", "countdown")
SEEDS = (1, 2, 3)
# A method's file says what belongs to the method. These are the experiment's, equal for all.
SCALARS = ("steps", "prompts_per_step", "group_size", "micro_batches", "temperature")
SHARED = (*SCALARS[1:], "reward_weights", "optimizer")
# Methods that are defined on another sampler than the experiment's: they get it for rollouts, and their likelihood is that of its order.
LEFT_TO_RIGHT = {"remasking": "left_to_right", "steps": "completion_length"}
NEEDS: dict[str, dict[str, str]] = {"just_grpo": LEFT_TO_RIGHT}
BUDGET_OF = "d1"
INNER_UPDATES = (1, 2, 4, 8, 12)
PROMPT_MASKS = (0.0, 0.1, 0.3, 0.5, 0.7)
FORWARD_AND_BACKWARD = 3  # in forward passes: a backward pass costs two


@dataclass(frozen=True)
class Run:
    """One row of results to come. Two arms with the same settings have the same `digest`, and share the run."""

    task: str
    arm: str
    seed: int
    config: Config
    overridden: dict[str, str]  # "rl.temperature": "1.2 -> 1.0"
    passes_of_step: int  # forward passes x rows of an RL step
    spends: int  # forward passes x rows of the whole run
    budget: int

    @functools.cached_property
    def digest(self) -> str:
        """Of all that differs from the defaults: an option that is new and unused does not make old results void."""
        lines = differences(Config(), dataclasses.replace(self.config, run_dir=Config().run_dir))
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


# -- cost ----------------------------------------------------------------------------------------------------------------


def number_of_views(rl: RlConfig, sampler: SamplerConfig) -> int:
    """Read off the plan itself, for one row; nothing is computed."""
    columns = jax.ShapeDtypeStruct((1, sampler.completion_length), jnp.int32)
    one = jax.ShapeDtypeStruct((1,), jnp.int32)
    canvas = Canvas(columns, jax.ShapeDtypeStruct((1, 4), jnp.int32), one)
    special = SpecialTokens(mask=1, end=0)

    def plan(key: Any, canvas: Canvas, row_ids_B: Any, reveal_step_BC: Any) -> Any:
        return views_of(
            key, canvas, row_ids_B, reveal_step_BC,
            estimator=rl.estimator, sampler=sampler, special=special, prompt_mask=rl.prompt_mask,
        )  # fmt: skip

    return jax.eval_shape(plan, jax.random.key(0), canvas, one, columns).completion_NBC.shape[0]


def rollout_passes(config: Config) -> int:
    """Forward passes of a row while it is decoded (early exit spares some of them, which is not counted); none for given texts."""
    sampler = config.sampler
    if config.rl.data == "targets":
        return 0
    steps = sampler.completion_length if sampler.schedule in ADAPTIVE else sampler.steps
    return steps * (2 if sampler.guidance > 0 else 1)


def update_passes(config: Config) -> int:
    """N (3 mu + mu [reference] + (mu - 1) [old]), and 2 N for a KL in the reward, of a row that is trained on.

    N is the number of views. Each of the mu inner updates takes a forward and a backward pass of every view, one pass of the reference
    where the loss reads it, and one of the old policy where its scores are read. The first inner update has the old scores for nothing.
    """
    rl = config.rl
    in_loss = rl.kl_coefficient > 0 and rl.kl_in == "loss"
    reference = rl.advantage == "pairs" or (in_loss and rl.kl_to == "reference")
    old = (rl.ratio != "none" and rl.advantage != "pairs") or (in_loss and rl.kl_to == "old")
    in_reward = rl.kl_coefficient > 0 and rl.kl_in == "reward"
    mu = rl.inner_updates
    return number_of_views(rl, config.sampler) * (
        FORWARD_AND_BACKWARD * mu + reference * mu + old * (mu - 1) + 2 * in_reward
    )


def row_passes(config: Config) -> int:
    """Forward passes x rows of one RL step. Of pairs, only the best and the worst row of each group are trained on."""
    rl = config.rl
    trained = rl.prompts_per_step * (2 if rl.advantage == "pairs" else rl.group_size)
    return rl.prompts_per_step * rl.group_size * rollout_passes(config) + trained * update_passes(config)


# -- configurations ------------------------------------------------------------------------------------------------------


def experiment_file(task: str) -> Path:
    return CONFIGS / "experiments" / f"{task}.yaml"


def base_config(task: str, extra: tuple[str, ...] = ()) -> Config:
    return parse(["--config", str(experiment_file(task)), *extra])


def budget_of(task: str, extra: tuple[str, ...] = ()) -> int:
    """Forward passes x rows that a run may spend: what the experiment's rl.steps steps of d1 cost."""
    config, _ = method_config(task, CONFIGS / "methods" / f"{BUDGET_OF}.yaml", extra)
    return config.rl.steps * row_passes(config)


def method_config(task: str, method: Path, extra: tuple[str, ...] = ()) -> tuple[Config, dict[str, str]]:
    """(the method on the task with what is shared laid over it, what that changed in the file). Raises ConfigError."""
    base = base_config(task, extra)
    start = ["--config", str(experiment_file(task)), *extra, "--rl", str(method)]
    theirs = parse([*start, "--rl.micro_batches", "1"])  # the experiment's need not divide their rows
    # Through the parser, so that an impossible combination is refused with its reason.
    scalars = [piece for name in SCALARS for piece in (f"--rl.{name}", str(getattr(base.rl, name)))]
    sampler = {
        key: theirs.sampler.completion_length if value == "completion_length" else value
        for key, value in NEEDS.get(method.stem, {}).items()
    }
    needs = [piece for key, value in sampler.items() for piece in (f"--sampler.{key}", str(value))]
    checked = parse([*start, *scalars, *needs])
    config = dataclasses.replace(
        checked,
        rl=dataclasses.replace(checked.rl, reward_weights=base.rl.reward_weights, optimizer=base.rl.optimizer),
    )
    changed = [line.partition(": ") for line in differences(theirs, config)]
    return config, {name: change for name, _, change in changed if name != "rl.micro_batches"}


def make_run(task: str, arm: str, seed: int, config: Config, overridden: dict[str, str], budget: int) -> Run:
    """The run with as many steps as come closest to the budget."""
    cost = row_passes(config)
    steps = max(round(budget / cost), 1)
    config = dataclasses.replace(config, seed=seed, rl=dataclasses.replace(config.rl, steps=steps))
    return Run(task, arm, seed, config, overridden, cost, steps * cost, budget)


def method_files() -> list[Path]:
    return sorted((CONFIGS / "methods").glob("*.yaml"))


def ablation_arms() -> dict[str, dict[str, Any]]:
    """d1's two ablations (arXiv 2504.12216): arm -> changes of d1's rl section."""
    arms: dict[str, dict[str, Any]] = {}
    for mu in INNER_UPDATES:
        for fresh in (True, False):
            if fresh or mu > 1:  # one inner update has one mask
                name = f"mu {mu}, {'fresh' if fresh else 'fixed'} masks"
                arms[name] = {"inner_updates": mu, "fresh_masks": fresh}
    return arms | {f"p {p}": {"prompt_mask": p} for p in PROMPT_MASKS}


def plan_runs(
    tasks: tuple[str, ...] = TASKS,
    seeds: tuple[int, ...] = SEEDS,
    files: list[Path] | None = None,
    ablations: bool = True,
    extra: tuple[str, ...] = (),
) -> tuple[list[Run], list[str]]:
    """(runs, what is left out and why), seed by seed: a table that is not finished has all methods once before any twice.

    `extra` are flags laid over the experiment files, for pilots.
    """
    arms: list[tuple[str, str, Config, dict[str, str], int]] = []
    skipped = []
    for task in tasks:
        budget = budget_of(task, extra)
        for file in method_files() if files is None else files:
            try:
                config, overridden = method_config(task, file, extra)
                row_passes(config)
            except (ConfigError, ValueError, KeyError, TypeError) as error:
                skipped.append(f"{task} / {file.stem}: {error}")
                continue
            arms.append((task, file.stem, config, overridden, budget))
        if ablations and task == "sudoku":
            d1, overridden = method_config(task, CONFIGS / "methods" / "d1.yaml", extra)
            for arm, changes in ablation_arms().items():
                config = dataclasses.replace(d1, rl=dataclasses.replace(d1.rl, **changes))
                arms.append((task, arm, config, overridden, budget))
    return [make_run(task, arm, seed, *rest) for seed in seeds for task, arm, *rest in arms], skipped


def settings_of(config: Config) -> dict[str, Any]:
    """What a result says about its experiment beyond the method."""
    raw = to_dict(config)
    return {key: raw[key] for key in ("task", "model", "sampler", "sft", "rl", "evaluation")}
