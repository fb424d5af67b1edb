"""The configuration of a run: its sections and its stages; what they may not say together is in run_rules.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from d1jax.config.adapt import AdaptConfig
from d1jax.config.after import EvaluateConfig, ExportConfig
from d1jax.config.generation import GenerateConfig
from d1jax.config.model import LoraConfig, MeshConfig, ModelConfig
from d1jax.config.preference import PreferenceConfig
from d1jax.config.profile import ProfileConfig
from d1jax.config.reward_model import MODEL, RewardModelConfig
from d1jax.config.rl import RlConfig
from d1jax.config.sampler import SamplerConfig
from d1jax.config.setting import section, setting, with_fields
from d1jax.config.stage import START, TRAINING, Stage
from d1jax.config.task import EvaluationConfig, TaskConfig
from d1jax.config.training import SftConfig
from d1jax.config.values import build, merge, plain


@with_fields
@dataclass(frozen=True)
class Config:
    """One run: one config in, one run directory out."""

    run_dir: str = setting("runs/run", "where everything goes")
    stages: tuple[Stage, ...] = setting(
        ("sft", "rl"),
        "in this order, each a kind (adapt, sft, rl, preference, generate, reward_model, evaluate, export) or {name: ..., kind: ..., ...}",
    )
    seed: int = setting(0, "of weights, masks, rollouts and row order", at_least=0, at_most=2**32 - 1)
    init_from: str = setting(
        "",
        "start from a checkpoint (Hugging Face, d1jax, GGUF), the end of a run, or RUN/checkpoints/STAGE/STEP ('' = random weights)",
    )
    tokenizer: str = setting(
        "characters",
        "of random weights: the task's characters, UTF-8 bytes, or a directory with tokenizer files; a checkpoint brings its own",
    )
    checkpoint_every: int = setting(20, "steps between checkpoints (the last step always has one)", above=0)
    keep_last: int = setting(
        0,
        "checkpoints of a stage that stay: so many, the best by evaluation.every, and what a roll-back needs (0 = all)",
        at_least=0,
    )
    max_bad_updates: int = setting(
        10,
        "stop after so many skipped (NaN or infinite) updates in a row, or RL steps without a text that could be rewarded",
        above=0,
    )
    track: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = setting(
        (), "where metrics go beside metrics.jsonl: [tensorboard], [wandb], [trackio] or several (off unless asked for)"
    )
    compile_cache: str = setting(
        "auto",
        "directory where compiled programs are kept for the next start (auto = ~/.cache/d1jax/programs, and none on CPUs; '' = none)",
    )
    task: TaskConfig = section(TaskConfig)
    model: ModelConfig = section(ModelConfig)
    lora: LoraConfig = section(LoraConfig)
    sampler: SamplerConfig = section(SamplerConfig)
    adapt: AdaptConfig = section(AdaptConfig)
    sft: SftConfig = section(SftConfig)
    rl: RlConfig = section(RlConfig)
    preference: PreferenceConfig = section(PreferenceConfig)
    generate: GenerateConfig = section(GenerateConfig)
    reward_model: RewardModelConfig = section(RewardModelConfig)
    evaluate: EvaluateConfig = section(EvaluateConfig)
    export: ExportConfig = section(ExportConfig)
    evaluation: EvaluationConfig = section(EvaluationConfig)
    mesh: MeshConfig = section(MeshConfig)
    profile: ProfileConfig = section(ProfileConfig)

    def __post_init__(self) -> None:
        stages = tuple(Stage(stage, stage) if isinstance(stage, str) else stage for stage in self.stages)
        object.__setattr__(self, "stages", stages)

    @property
    def apart_from_the_machine(self) -> Config:
        """Without what does not decide what is learnt: where it is written, mirrored to, and run."""
        return dataclasses.replace(
            self, run_dir="", track=(), compile_cache="", mesh=MeshConfig(), profile=ProfileConfig()
        )

    @property
    def watched_set(self) -> str:
        """The evaluation set that is looked at during a stage: the one that selects, or the headline."""
        return self.evaluation.select or next(iter(self.task.eval_sets))

    @property
    def stage_names(self) -> tuple[str, ...]:
        return tuple(stage.name for stage in self.stages)

    @property
    def trained_stages(self) -> tuple[str, ...]:
        """The names of the stages that update weights."""
        return tuple(stage.name for stage in self.stages if stage.kind in TRAINING)

    def works_on_start(self, stage: Stage) -> bool:
        """Whether the stage works with the weights that the run begins with."""
        before = self.stages[: self.stages.index(stage)]
        return stage.weights == START or (not stage.weights and not any(one.kind in TRAINING for one in before))

    @property
    def answers_task(self) -> bool:
        """Whether anything is done with the task: no stage of a run on plain text answers one."""
        return bool(self.kinds - {"adapt", "export"})

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds that occur among the stages."""
        return frozenset(stage.kind for stage in self.stages)

    def stage(self, name: str) -> Stage:
        """The stage of this name. Raises KeyError where there is none."""
        return {stage.name: stage for stage in self.stages}[name]

    def section_of(self, stage: Stage) -> Any:
        """The section that a stage works with: that of its kind, with its changes."""
        default = getattr(self, stage.kind)
        return _changed(default, stage.changes, stage.kind, stage) if stage.changes else default

    def for_stage(self, name: str) -> Config:
        """The configuration as a stage sees it, with its changes in the section of its kind, in `task` and in `sampler`."""
        stage = self.stage(name)
        own = {stage.kind: self.section_of(stage)} if stage.changes else {}
        if "task" in stage.shared:
            own["task"] = self._task_of(stage)
        if "sampler" in stage.shared:
            own["sampler"] = _changed(self.sampler, stage.shared["sampler"], "sampler", stage)
        return dataclasses.replace(self, **own) if own else self

    def _task_of(self, stage: Stage) -> TaskConfig:
        """The task of a stage. Of another one than the run's only what is no matter of its rows is taken over."""
        given, base = stage.shared["task"], self.task
        if given.get("name", base.name) != base.name:
            base = TaskConfig(style=base.style, seed=base.seed, too_long=base.too_long)
        return _changed(dataclasses.replace(base, eval_sets={}, held_out_by_solution=()), given, "task", stage)

    def of_kind(self, kind: str) -> Iterator[Any]:
        """The section of every stage of a kind."""
        for stage in self.stages:
            if stage.kind == kind:
                yield self.section_of(stage)

    def models_of(self, stage: Stage) -> list[str]:
        """The reward models that a stage asks."""
        section = self.section_of(stage)
        names = [*getattr(section, "reward_weights", ()), *(section.accept if stage.kind == "generate" else ())]
        return [name.removeprefix(MODEL) for name in names if name.startswith(MODEL)]

    def step_model_of(self, stage: Stage) -> str:
        """The reward model that a stage asks for the rewards of single steps; "" where it asks none."""
        return getattr(self.section_of(stage).supervision, "model", "") if stage.kind == "rl" else ""


def _changed(section: Any, changes: Mapping[str, Any], name: str, stage: Stage) -> Any:
    """A section with the changes of a stage."""
    raw = plain(section)
    merge(raw, changes, type(section), f"stage {stage.name!r}", f"{name}.")
    return build(type(section), raw)
