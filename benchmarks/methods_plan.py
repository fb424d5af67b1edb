"""Which runs the table of methods has, and how many RL steps each may do: all methods of a task spend equally many forward passes."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from d1jax.config import AnyEstimator, Config, PreferenceConfig, RlConfig, SamplerConfig, UserError
from d1jax.config.parse import FOLDERS, parse
from d1jax.config.stored import differences
from d1jax.config.values import plain
from d1jax.data.tokenizers import SpecialTokens
from d1jax.diffusion.canvas import Canvas
from d1jax.diffusion.estimators import views_of

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
TASKS = ("sudoku", "countdown")
SEEDS = (1, 2, 3)
# A method's file says what belongs to the method. These are the context's, equal for all.
SCALARS = ("steps", "prompts_per_step", "num_generations", "grad_accumulation_steps", "temperature")
SHARED = (*SCALARS[1:], "reward_weights", "optimizer")
# Methods that are defined on another sampler than the context's: they get it for rollouts, and their likelihood is that of its order.
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
    passes_of_step: int  # forward passes x rows of a step
    spends: int  # forward passes x rows of the whole run
    budget: int

    @functools.cached_property
    def digest(self) -> str:
        """Of all that differs from the defaults: an option that is new and unused does not make old results void."""
        told = changed_from(plain(Config()), plain(dataclasses.replace(self.config, run_dir=Config().run_dir)))
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def changed_from(default: Any, value: Any) -> Any:
    """Of nested plain values, those that are not the default's."""
    if not isinstance(value, dict) or not isinstance(default, dict):
        return value
    return {key: changed_from(default.get(key), one) for key, one in value.items() if one != default.get(key)}


def stage_of(config: Config) -> RlConfig | PreferenceConfig:
    """The section of the stage that is compared: the last one, RL or preferences."""
    return getattr(config, config.stages[-1].kind)


# -- cost ----------------------------------------------------------------------------------------------------------------


def number_of_views(estimator: AnyEstimator, sampler: SamplerConfig) -> int:
    """Read off the plan itself, for one row; nothing is computed."""
    columns = jax.ShapeDtypeStruct((1, sampler.completion_length), jnp.int32)
    one = jax.ShapeDtypeStruct((1,), jnp.int32)
    canvas = Canvas(columns, jax.ShapeDtypeStruct((1, 4), jnp.int32), one)
    special = SpecialTokens(mask=1, end=0)

    def plan(key: Any, canvas: Canvas, row_ids_B: Any, unmask_step_BC: Any) -> Any:
        return views_of(
            key, canvas, row_ids_B, unmask_step_BC,
            estimator=estimator, sampler=sampler, special=special, prompt_mask=0.0,
        )  # fmt: skip

    return jax.eval_shape(plan, jax.random.key(0), canvas, one, columns).completion_NBC.shape[0]


def rollout_passes(config: Config) -> int:
    """Forward passes of a row while it is decoded (early exit spares some of them, which is not counted)."""
    return config.sampler.max_steps * (2 if config.sampler.guidance > 0 else 1)


def update_passes(config: Config) -> int:
    """N (3 mu + mu [reference] + (mu - 1) [old]), and 2 N for a KL in the reward, of a row that is trained on.

    N is the number of views. Each of the mu inner updates takes a forward and a backward pass of every view, one pass of the reference
    where the loss reads it, and one of the old policy where its scores are read. The first inner update has the old scores for nothing.
    Weights that are normalised over groups take N (mu - 1) more, of the current policy, and a KL that is centred in them N mu.
    Preferences have one update a step, which reads the reference.
    """
    stage = stage_of(config)
    views = number_of_views(stage.estimator, config.sampler)
    if isinstance(stage, PreferenceConfig):
        return views * (FORWARD_AND_BACKWARD + 1)
    in_loss = stage.kl.name == "loss"
    reference = in_loss and stage.kl.to == "reference"
    weighted, centred = stage.policy_loss.name == "self_normalized", in_loss and stage.kl.level == "relative"
    old = stage.policy_loss.name != "policy_gradient" or (in_loss and stage.kl.to == "old")
    in_reward = stage.kl.name == "reward"
    mu = stage.num_iterations
    return views * (
        FORWARD_AND_BACKWARD * mu + reference * mu + (old + weighted) * (mu - 1) + centred * mu + 2 * in_reward
    )


def row_passes(config: Config) -> int:
    """Forward passes x rows of one step. Of preferences, only the best and the worst row of each group are trained on."""
    stage = stage_of(config)
    trained = 2 * stage.prompts_per_step if isinstance(stage, PreferenceConfig) else stage.rollout_rows
    return stage.rollout_rows * rollout_passes(config) + trained * update_passes(config)


# -- configurations ------------------------------------------------------------------------------------------------------


def experiment_file(task: str) -> Path:
    return CONFIGS / "experiments" / f"{task}.yaml"


def base_config(task: str, extra: tuple[str, ...] = ()) -> Config:
    return parse(["--config", str(experiment_file(task)), *extra])


def budget_of(task: str, extra: tuple[str, ...] = ()) -> int:
    """Forward passes x rows that a run may spend: what the context's rl.steps steps of d1 cost."""
    config, _ = method_config(task, CONFIGS / "methods" / f"{BUDGET_OF}.yaml", extra)
    return config.rl.steps * row_passes(config)


def method_config(task: str, method: Path, extra: tuple[str, ...] = ()) -> tuple[Config, dict[str, str]]:
    """(the method on the task with what is shared laid over it, what that changed in the file). Raises UserError."""
    base, kind = base_config(task, extra), kind_of(method)
    start = ["--config", str(experiment_file(task)), *extra, "--stages", f"[sft, {kind}]", f"--{kind}", str(method)]
    theirs = parse([*start, f"--{kind}.grad_accumulation_steps", "1"])  # the context's need not divide their rows
    # Through the parser, so that an impossible combination is refused with its reason.
    scalars = [piece for name in SCALARS for piece in (f"--{kind}.{name}", str(getattr(base.rl, name)))]
    sampler = {
        key: theirs.sampler.completion_length if value == "completion_length" else value
        for key, value in NEEDS.get(method.stem, {}).items()
    }
    needs = [piece for key, value in sampler.items() for piece in (f"--sampler.{key}", str(value))]
    checked = parse([*start, *scalars, *needs])
    shared = {"reward_weights": base.rl.reward_weights, "optimizer": base.rl.optimizer}
    config = dataclasses.replace(checked, **{kind: dataclasses.replace(stage_of(checked), **shared)})
    if kind == "rl":
        changed = [line.partition(": ") for line in differences(theirs, config)]
    else:  # a file of preferences says nothing of what is shared, so whatever is laid over it changes defaults only
        changed = []
    return config, {name: change for name, _, change in changed if name != "rl.grad_accumulation_steps"}


def kind_of(method: Path) -> str:
    """The kind of stage whose section a file is: rl of configs/methods, preference of configs/preferences."""
    return next(kind for kind, folder in FOLDERS.items() if folder == method.parent.name)


def make_run(task: str, arm: str, seed: int, config: Config, overridden: dict[str, str], budget: int) -> Run:
    """The run with as many steps as come closest to the budget."""
    cost = row_passes(config)
    steps = max(round(budget / cost), 1)
    section = dataclasses.replace(stage_of(config), steps=steps)
    config = dataclasses.replace(config, seed=seed, **{config.stages[-1].kind: section})
    return Run(task, arm, seed, config, overridden, cost, steps * cost, budget)


def method_files() -> list[Path]:
    return sorted([*(CONFIGS / "methods").glob("*.yaml"), *(CONFIGS / "preferences").glob("*.yaml")])


def method_file(name: str) -> Path:
    """configs/methods/NAME.yaml or configs/preferences/NAME.yaml."""
    return {file.stem: file for file in method_files()}[name]


def ablation_arms() -> dict[str, dict[str, Any]]:
    """d1's two ablations (arXiv 2504.12216): arm -> changes of d1's rl section."""
    arms: dict[str, dict[str, Any]] = {}
    for mu in INNER_UPDATES:
        for fresh in (True, False):
            if fresh or mu > 1:  # one inner update has one mask
                name = f"mu {mu}, {'fresh' if fresh else 'fixed'} masks"
                arms[name] = {"num_iterations": mu, "fresh_masks": fresh}
    return arms | {f"p {p}": {"prompt_mask": p} for p in PROMPT_MASKS}


def plan_runs(
    tasks: tuple[str, ...] = TASKS,
    seeds: tuple[int, ...] = SEEDS,
    files: list[Path] | None = None,
    ablations: bool = True,
    extra: tuple[str, ...] = (),
) -> tuple[list[Run], list[str]]:
    """(runs, what is left out and why), seed by seed: a table that is not finished has all methods once before any twice.

    `extra` are flags laid over the context files, for pilots.
    """
    arms: list[tuple[str, str, Config, dict[str, str], int]] = []
    skipped = []
    for task in tasks:
        budget = budget_of(task, extra)
        for file in method_files() if files is None else files:
            try:
                config, overridden = method_config(task, file, extra)
                row_passes(config)
            except (UserError, ValueError, KeyError, TypeError) as error:
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
    """What a result says about its context beyond the method."""
    raw = plain(config)
    return {key: raw[key] for key in ("task", "model", "sampler", "sft", "rl", "evaluation")}
