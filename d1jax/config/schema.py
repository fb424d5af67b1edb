"""The configuration of a run: its sections, its stages, and what they may not say together."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from d1jax.config.errors import UserError
from d1jax.config.model import LoraConfig, MeshConfig, ModelConfig
from d1jax.config.rl import RlConfig
from d1jax.config.sampler import SamplerConfig
from d1jax.config.setting import MOST, Rule, section, setting, with_fields
from d1jax.config.training import MAX_ROWS, PreferenceConfig, RejectionConfig, SftConfig
from d1jax.config.values import alternatives, build, hints_of, merge, plain
from d1jax.config.yaml_text import shown

SECTIONS = {"sft": SftConfig, "rl": RlConfig, "preference": PreferenceConfig, "rejection": RejectionConfig}
KINDS = tuple(SECTIONS)
RESERVED = {"weights", "evaluation", "audit"}  # purposes that have random keys of their own (weights/variables.py)
TASK_NAMES = ("sudoku", "countdown", "arithmetic", "gsm8k", "math", "code", "traces", "jsonl", "mixture")
TRAINING = (
    "sft",
    "rl",
    "preference",
)  # kinds that update weights, so that checkpoints and an evaluation belong to them


@with_fields
@dataclass(frozen=True)
class TaskConfig:
    """What is learnt: the rows, the prompts, the rewards."""

    name: str = setting(
        "sudoku",
        "sudoku, countdown, arithmetic, gsm8k, math, traces, code (d1jax/tasks), or a class of your own: my/file.py:Mine",
    )
    style: Literal["bare", "instruct"] = setting(
        "bare", "bare: puzzle in, answer out; instruct: instructions and <answer> tags"
    )
    train: str = setting("generated", "'generated', a file (.jsonl, .jsonl.gz, .parquet), or hub:NAME of a dataset")
    train_rows: int = setting(20000, "rows to generate, or to keep of the file (0 = all)", at_least=0, at_most=10**8)
    eval_sets: dict[str, str] = setting(
        lambda: {"held_out": "generated"},
        "name -> such a source, or 'share:0.01' of task.train; the first is the headline",
    )
    eval_rows: int = setting(1024, "rows of each evaluation set (0 = all of a file)", at_least=0, at_most=10**8)
    held_out_by_solution: tuple[str, ...] = setting(
        (), "evaluation sets whose solutions may not occur in training (all: no problem may)"
    )
    too_long: Literal["fail", "drop"] = setting(
        "fail", "a training row whose prompt or target has too many tokens: an error, or left out and counted"
    )
    seed: int = setting(0, "seeds the generator and the train/test split", at_least=0, at_most=2**32 - 1)
    options: dict[str, Any] = setting(
        dict, "fields of the task itself, e.g. {numbers: [3, 4]} of countdown or {judge: number} of jsonl (d1jax/tasks)"
    )

    def rules(self) -> Iterator[Rule]:
        near = difflib.get_close_matches(self.name, TASK_NAMES, n=1)
        suggestion = f" (did you mean {near[0]!r}?)" if near else ""
        yield (
            self.name not in TASK_NAMES and not re.fullmatch(r".+\.py:\w+", self.name),
            f"task.name = {shown(self.name)} is not one of {', '.join(TASK_NAMES)}{suggestion}, and not of the form my/file.py:Mine",
        )
        generated_sets = "generated" in self.eval_sets.values()
        yield not self.eval_sets, "task.eval_sets is empty; write e.g. {held_out: generated}"
        yield (
            self.train == "generated" and self.train_rows == 0,
            "task.train_rows = 0 with generated rows; say how many",
        )
        yield (
            self.eval_rows == 0 and generated_sets,
            "task.eval_rows = 0 with a generated evaluation set; say how many",
        )
        yield (
            not set(self.held_out_by_solution) <= set(self.eval_sets),
            f"task.held_out_by_solution = {list(self.held_out_by_solution)} names sets that are not in task.eval_sets",
        )


@with_fields
@dataclass(frozen=True)
class EvaluationConfig:
    """Greedy decoding with the grader."""

    batch_size: int = setting(256, "rows at a time", above=0, at_most=MAX_ROWS)
    temperature: float = setting(0.0, "0 = greedy", at_least=0)
    every: int = setting(
        0,
        "steps between evaluations of one set during a stage, the headline or `select` (0 = only at its end)",
        at_least=0,
    )
    select: str = setting(
        "",
        "the evaluation set by which the checkpoint of a stage is chosen, e.g. one that is 'share:0.02' ('' = the last checkpoint)",
    )
    samples: int = setting(8, "rows kept for the report", at_least=0, at_most=MAX_ROWS)


@dataclass(frozen=True)
class Stage:
    """One stage of a run: `{name: cold_start, kind: sft, steps: 50}`; `sft` is short for `{name: sft, kind: sft}`.

    Checkpoints, metrics and evaluations are filed under the name. What else is given changes the section of the kind for this stage.
    """

    name: str
    kind: str
    changes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_plain(cls, value: Any, where: str, source: str) -> Stage:
        """A stage as it is written. Raises UserError."""
        given = {"name": value, "kind": value} if isinstance(value, str) else value
        if not isinstance(given, Mapping):
            raise UserError(
                f"{source}: {where} = {shown(value)} is no stage; write a kind, or {{name: NAME, kind: KIND}}"
            )
        name, kind = given.get("name"), given.get("kind", given.get("name"))
        if kind not in KINDS:
            near = difflib.get_close_matches(str(kind), KINDS, n=1)
            suggestion = f" (did you mean '{near[0]}'?)" if near else ""
            raise UserError(f"{source}: {where}: kind {shown(kind)} is not one of {', '.join(KINDS)}{suggestion}")
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
            raise UserError(
                f"{source}: {where}: name {shown(name)} must be letters, digits and _, beginning with a letter: files are called by it"
            )
        changes = {key: found for key, found in given.items() if key not in ("name", "kind")}
        merge(plain(SECTIONS[kind]()), _with_names(changes, SECTIONS[kind]), SECTIONS[kind], f"{source}: {where}")
        return cls(name, kind, changes)

    @property
    def short(self) -> Any:
        """How it is written: the name alone where that says everything."""
        if self.name == self.kind and not self.changes:
            return self.name
        return {"name": self.name, "kind": self.kind, **self.changes}


def _with_names(changes: Mapping[str, Any], cls: type) -> dict[str, Any]:
    """The changes, to be looked at before the section that they change is known: parameters of a choice that the section makes
    (`kl: {coefficient: 0.1}`) under the name of one that has them."""
    named = dict(changes)
    for key, value in changes.items():
        choices = alternatives(hints_of(cls).get(key))
        if isinstance(value, Mapping) and "name" not in value:
            owner = next((name for name, one in choices.items() if value.keys() <= hints_of(one).keys()), None)
            named[key] = {"name": owner, **value} if owner else value
    return named


@with_fields
@dataclass(frozen=True)
class Config:
    """One run: one config in, one run directory out."""

    run_dir: str = setting("runs/run", "where everything goes")
    stages: tuple[Stage, ...] = setting(
        ("sft", "rl"),
        "in this order: sft, rl, preference, rejection; or {name: NAME, kind: KIND, key: value, ...} with settings of its own",
    )
    seed: int = setting(0, "of weights, masks, rollouts and row order", at_least=0, at_most=2**32 - 1)
    init_from: str = setting(
        "",
        "start from a checkpoint (Hugging Face or d1jax), the last weights of a run, or RUN/checkpoints/STAGE/STEP ('' = random weights)",
    )
    tokenizer: Literal["characters", "bytes"] = setting(
        "characters", "of random weights: the task's characters, or UTF-8 bytes; a checkpoint brings its own"
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
    task: TaskConfig = section(TaskConfig)
    model: ModelConfig = section(ModelConfig)
    lora: LoraConfig = section(LoraConfig)
    sampler: SamplerConfig = section(SamplerConfig)
    sft: SftConfig = section(SftConfig)
    rl: RlConfig = section(RlConfig)
    preference: PreferenceConfig = section(PreferenceConfig)
    rejection: RejectionConfig = section(RejectionConfig)
    evaluation: EvaluationConfig = section(EvaluationConfig)
    mesh: MeshConfig = section(MeshConfig)

    def __post_init__(self) -> None:
        stages = tuple(Stage(stage, stage) if isinstance(stage, str) else stage for stage in self.stages)
        object.__setattr__(self, "stages", stages)

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
        if not stage.changes:
            return default
        raw = plain(default)
        merge(raw, stage.changes, type(default), f"stage {stage.name!r}", f"{stage.kind}.")
        return build(type(default), raw)

    def for_stage(self, name: str) -> Config:
        """The configuration as a stage sees it, with its changes in the section of its kind."""
        stage = self.stage(name)
        return dataclasses.replace(self, **{stage.kind: self.section_of(stage)}) if stage.changes else self

    def of_kind(self, kind: str) -> Iterator[Any]:
        """The section of every stage of a kind."""
        for stage in self.stages:
            if stage.kind == kind:
                yield self.section_of(stage)

    def rules(self) -> Iterator[Rule]:
        """What the sections may not say together, for numbers that are within their bounds."""
        names = self.stage_names
        first = self.stages[0].kind if self.stages else ""
        yield not self.run_dir, "run_dir is empty; name a directory"
        yield not self.stages, "stages is empty; write e.g. [sft, rl]"
        yield (
            len({name.casefold() for name in names}) != len(names),
            f"stages = {list(names)} has a name twice (files are called by it, so capitals do not tell two apart); give each its own, "
            "e.g. {name: sft_2, kind: sft}",
        )
        for name in RESERVED & set(names):
            yield True, f"stages: {name!r} is what d1jax calls something else; choose another name for the stage"
        yield (
            first not in ("", "sft") and not self.init_from,
            f"stages begins with {first!r}, from random weights; set init_from to a run, or put 'sft' first",
        )
        yield from self._rows_of_stages()
        yield from self._selection()
        yield from self.rules_between_sections()

    def rules_between_sections(self) -> Iterator[Rule]:
        """What holds of the sections whatever the stages; also checked with the changes of every stage."""
        length = self.sampler.completion_length
        for name, rows, columns in (
            ("sft.batch_size", self.sft.batch_size, self.sft.completion_length or length),
            ("rl.prompts_per_step x rl.num_generations", self.rl.rollout_rows, length),
            ("preference.prompts_per_step x preference.num_generations", self.preference.rollout_rows, length),
            ("rejection.prompts_per_step x rejection.num_generations", self.rejection.rollout_rows, length),
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

    def _rows_of_stages(self) -> Iterator[Rule]:
        """A stage that learns from kept rows comes after the stage that keeps them."""
        kept: list[str] = []
        for stage in self.stages:
            wanted = self.section_of(stage).data if stage.kind == "sft" else ""
            yield (
                bool(wanted) and wanted not in kept,
                f"stage {stage.name!r} learns from {wanted!r}, which is no rejection stage before it; choices: {kept or 'none'}",
            )
            if stage.kind == "rejection":
                kept.append(stage.name)


def scores_the_sampler(rl: RlConfig, sampler: SamplerConfig) -> bool:
    """Whether a token's score is the log-probability with which the sampler drew it: its state, its temperature, its filters."""
    estimator = rl.estimator
    segment_a_step = estimator.name == "trajectory" and (
        estimator.shrink == 1 or (estimator.shrink == 0 and estimator.samples >= sampler.max_steps)
    )
    as_drawn = rl.temperature == 1 and sampler.top_k == 0 and sampler.top_p == 1 and sampler.guidance == 0
    exact = sampler.cache.name == "none" and sampler.end_token in ("allowed", "last")
    return segment_a_step and rl.prompt_mask == 0 and as_drawn and exact
