"""The configuration of a run: its sections, its stages, and what they may not say together."""

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
from d1jax.config.setting import MOST, Rule, rules_of, section, setting, with_fields
from d1jax.config.stage import MASKED_KINDS, RESERVED, START, TRAINING, Stage
from d1jax.config.task import EvaluationConfig, TaskConfig
from d1jax.config.training import SftConfig
from d1jax.config.values import build, merge, plain
from d1jax.config.yaml_text import shown


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

    def rules(self) -> Iterator[Rule]:
        """What the sections may not say together, for numbers that are within their bounds; beside `rules_between_sections`."""
        names = self.stage_names
        first = next((stage.kind for stage in self.stages if self._asks_weights(stage)), "")
        yield not self.run_dir, "run_dir is empty; name a directory"
        yield not self.stages, "stages is empty; write e.g. [sft, rl]"
        yield not self.task.eval_sets, "task.eval_sets is empty; write e.g. {held_out: generated}"
        yield (
            len({name.casefold() for name in names}) != len(names),
            f"stages = {list(names)} has a name twice (files are called by it, so capitals do not tell two apart); give each its own, "
            "e.g. {name: sft_2, kind: sft}",
        )
        for name in RESERVED & set(names):
            yield True, f"stages: {name!r} is what d1jax calls something else; choose another name for the stage"
        yield (
            first not in ("", "adapt", "sft") and not self.init_from,
            f"stages begins with {first!r}, from random weights; set init_from to a run, or put 'sft' first",
        )
        trained = [self.section_of(self.stage(name)).steps for name in self.trained_stages]
        yield (
            self.profile.steps > 0 and self.profile.start >= max(trained, default=0),
            f"profile.start = {self.profile.start}, but no stage that trains has more than {max(trained, default=0)} steps; lower it",
        )
        masked = self.model.attention_mask != "full"
        odd = [stage.name for stage in self.stages if stage.kind not in MASKED_KINDS[self.model.attention_mask]]
        yield (
            masked and bool(odd),
            f"model.attention_mask = {self.model.attention_mask}: stages {odd} work on models whose columns see all others; only "
            "an adapt stage trains under a causal mask, and none under block_causal",
        )
        yield from self._weights_of_stages()
        yield from self._annealed_stages()
        yield from self._rows_of_stages()
        yield from self._steps_of_evaluations()
        yield from self._selection()

    def rules_between_sections(self) -> Iterator[Rule]:
        """What holds of the sections whatever the stages; checked with the changes of every stage (config/check.py)."""
        length = self.sampler.completion_length
        for name, rows, columns in (
            ("adapt.batch_size", self.adapt.batch_size, self.adapt.length),
            ("sft.batch_size", self.sft.batch_size, self.sft.completion_length or length),
            ("rl.prompts_per_step x rl.num_generations", self.rl.rollout_rows, length),
            ("preference.prompts_per_step x preference.num_generations", self.preference.rollout_rows, length),
            ("generate.prompts_per_step x generate.num_generations", self.generate.rollout_rows, length),
            ("evaluation.batch_size", self.evaluation.batch_size, length),
        ):
            yield (
                rows * columns > MOST,
                f"{name} makes arrays of {rows} rows of {columns} tokens, more than {MOST} numbers; lower it",
            )
        yield (
            self.rl.kl.name == "reward" and not scores_the_sampler(self.rl, self.sampler),
            "rl.kl = reward takes sums of log p / p_reference for an estimate of the KL, which they are only where the scores are the "
            "log-probabilities that the completions were drawn with; set rl.estimator = trajectory, rl.estimator.shrink = 1, "
            "rl.prompt_mask = 0, rl.temperature = 1, no top_k, top_p, guidance, cache or end-token rule; or rl.kl = loss",
        )
        yield (
            self.rl.reference.name == "moving" and self.lora.rank > 0,
            "rl.reference = moving with LoRA: the reference is the model without its adapter and never moves; set it to fixed",
        )

    def models_of(self, stage: Stage) -> list[str]:
        """The reward models that a stage asks."""
        section = self.section_of(stage)
        names = [*getattr(section, "reward_weights", ()), *(section.accept if stage.kind == "generate" else ())]
        return [name.removeprefix(MODEL) for name in names if name.startswith(MODEL)]

    def step_model_of(self, stage: Stage) -> str:
        """The reward model that a stage asks for the rewards of single steps; "" where it asks none."""
        return getattr(self.section_of(stage).supervision, "model", "") if stage.kind == "rl" else ""

    def _asks_weights(self, stage: Stage) -> bool:
        """Whether a stage wants weights that know something already, of those that do not only measure or store them."""
        return stage.kind not in ("evaluate", "export") and not self._teacher_of(stage)

    def _teacher_of(self, stage: Stage) -> str:
        return self.section_of(stage).teacher if stage.kind == "generate" else ""

    def _data_of(self, stage: Stage) -> tuple[str, ...]:
        """What a stage learns from, by name."""
        if stage.kind == "preference":
            return tuple(filter(None, [self.section_of(stage).data]))
        return self.section_of(stage).data if stage.kind in ("sft", "reward_model") else ()

    def _selection(self) -> Iterator[Rule]:
        """The set by which checkpoints are chosen is evaluated during training, and none that a result is reported on."""
        select, sets = self.evaluation.select, self.task.eval_sets
        if not select:
            return
        yield (
            select not in sets,
            f"evaluation.select = {shown(select)} is not in task.eval_sets; choices: {list(sets)}; write e.g. "
            "--task.eval_sets \"{test: FILE, validation: 'share:0.02'}\"",
        )
        yield (
            select == next(iter(sets), ""),
            f"evaluation.select = {shown(select)} is the first of task.eval_sets, which the results are reported on: the best of many "
            "checkpoints is better there than anywhere else. Put another set first",
        )
        yield (
            sets.get(select) in [source for name, source in sets.items() if name != select],
            f"evaluation.select = {shown(select)} has the rows of another set of task.eval_sets; "
            "cut it from training: 'share:0.02'",
        )
        yield (
            self.evaluation.every == 0,
            f"evaluation.select = {shown(select)} with evaluation.every = 0 has one checkpoint to choose from; say after how many steps",
        )

    def _annealed_stages(self) -> Iterator[Rule]:
        """A mask is opened once: a stage that goes on from another one has nothing causal to open."""
        for stage in self.stages:
            again = stage.kind == "adapt" and not self.works_on_start(stage)
            steps = self.section_of(stage).anneal_steps if again else 0
            yield (
                steps > 0,
                f"stage {stage.name!r}: adapt.anneal_steps = {steps} would hide from the model again what a stage before it has opened; "
                "write anneal_steps: 0 in this stage",
            )

    def _weights_of_stages(self) -> Iterator[Rule]:
        """A stage works with weights that are there when it begins."""
        trained, models = [START], []
        for stage in self.stages:
            known = trained + models if stage.kind == "reward_model" else trained
            yield (
                stage.weights != "" and stage.weights not in known,
                f"stage {stage.name!r}: from = {shown(stage.weights)} is no stage before it that trains; choices: {known}",
            )
            yield (
                any(
                    name in stage.shared.get("task", {}) for name in ("eval_sets", "eval_rows", "held_out_by_solution")
                ),
                f"stage {stage.name!r}: evaluation sets belong to the run; write them in its section task, not in a stage",
            )
            yield (
                stage.weights != "" and self._teacher_of(stage) != "",
                f"stage {stage.name!r}: from = {shown(stage.weights)} with a teacher, which writes everything; leave one of them out",
            )
            idle = {"evaluate": ["task"], "export": ["task", "sampler"]}.get(stage.kind, [])
            yield from (
                (True, f"stage {stage.name!r}: the kind {stage.kind} reads no {name} of its own; leave it out")
                for name in idle
                if name in stage.shared
            )
            of_steps = self.step_model_of(stage)
            for name in (*self.models_of(stage), *filter(None, (of_steps,))):
                yield (
                    name not in models,
                    f"stage {stage.name!r} asks {MODEL + name!r}, but no reward_model stage before it has that name; choices: {models}",
                )
            yield (
                of_steps in models and self.section_of(self.stage(of_steps)).loss != "stepwise",
                f"stage {stage.name!r}: supervision asks {of_steps!r} about single lines, but it learns from whole texts; give that stage "
                "loss: stepwise",
            )
            if stage.kind in TRAINING:
                trained.append(stage.name)
            if stage.kind == "reward_model":
                models.append(stage.name)

    def _steps_of_evaluations(self) -> Iterator[Rule]:
        """The numbers of denoising steps that evaluate stages try are numbers that the sampler can take."""
        for stage in self.stages:
            steps = self.section_of(stage).steps if stage.kind == "evaluate" else ()
            sampler = self.for_stage(stage.name).sampler
            yield (
                bool(steps) and sampler.schedule.adaptive,
                f"stage {stage.name!r}: evaluate.steps with sampler.schedule = {sampler.schedule.name}, which takes as many as it needs; "
                "leave it out",
            )
            for number in steps if all(number > 0 for number in steps) else ():
                tried = rules_of(dataclasses.replace(sampler, steps=number), "sampler")
                yield from (
                    (True, f"stage {stage.name!r}: evaluate.steps: {message}") for broken, message in tried if broken
                )

    def _rows_of_stages(self) -> Iterator[Rule]:
        """A stage that learns from kept rows comes after the stage that keeps them."""
        kept: list[str] = []
        for stage in self.stages:
            for wanted in self._data_of(stage):
                yield (
                    wanted != "task" and wanted not in kept,
                    f"stage {stage.name!r} learns from {wanted!r}, which is no generate stage before it; choices: {['task', *kept]}",
                )
            if stage.kind == "generate":
                kept.append(stage.name)


def _changed(section: Any, changes: Mapping[str, Any], name: str, stage: Stage) -> Any:
    """A section with the changes of a stage."""
    raw = plain(section)
    merge(raw, changes, type(section), f"stage {stage.name!r}", f"{name}.")
    return build(type(section), raw)


def scores_the_sampler(rl: RlConfig, sampler: SamplerConfig) -> bool:
    """Whether a token's score is the log-probability with which the sampler drew it: its state, its temperature, its filters."""
    estimator = rl.estimator
    segment_a_step = estimator.name == "trajectory" and (
        estimator.shrink == 1 or (estimator.shrink == 0 and estimator.samples >= sampler.max_steps)
    )
    as_drawn = rl.temperature == 1 and sampler.top_k == 0 and sampler.top_p == 1 and sampler.guidance == 0
    exact = sampler.cache.name == "none" and sampler.end_token in ("allowed", "last")
    return segment_a_step and rl.prompt_mask == 0 and as_drawn and exact
