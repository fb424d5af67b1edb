"""What the sections and the stages of a run may not say together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from d1jax.config.reward_model import MODEL
from d1jax.config.rl import RlConfig
from d1jax.config.sampler import SamplerConfig
from d1jax.config.schema import Config
from d1jax.config.setting import MOST, Rule, rules_of
from d1jax.config.stage import MASKED_KINDS, RESERVED, START, TRAINING, Stage
from d1jax.config.yaml_text import shown


def rules_of_run(config: Config) -> Iterator[Rule]:
    """What the sections may not say together, for numbers that are within their bounds; beside `rules_between_sections`."""
    names = config.stage_names
    first = next((stage.kind for stage in config.stages if _asks_weights(config, stage)), "")
    yield not config.run_dir, "run_dir is empty; name a directory"
    yield not config.stages, "stages is empty; write e.g. [sft, rl]"
    yield not config.task.eval_sets, "task.eval_sets is empty; write e.g. {held_out: generated}"
    yield (
        len({name.casefold() for name in names}) != len(names),
        f"stages = {list(names)} has a name twice (files are called by it, so capitals do not tell two apart); give each its own, "
        "e.g. {name: sft_2, kind: sft}",
    )
    for name in RESERVED & set(names):
        yield True, f"stages: {name!r} is what d1jax calls something else; choose another name for the stage"
    yield (
        first not in ("", "adapt", "sft") and not config.init_from,
        f"stages begins with {first!r}, from random weights; set init_from to a run, or put 'sft' first",
    )
    trained = [config.section_of(config.stage(name)).steps for name in config.trained_stages]
    yield (
        config.profile.steps > 0 and config.profile.start >= max(trained, default=0),
        f"profile.start = {config.profile.start}, but no stage that trains has more than {max(trained, default=0)} steps; lower it",
    )
    masked = config.model.attention_mask != "full"
    odd = [stage.name for stage in config.stages if stage.kind not in MASKED_KINDS[config.model.attention_mask]]
    yield (
        masked and bool(odd),
        f"model.attention_mask = {config.model.attention_mask}: stages {odd} work on models whose columns see all others; only "
        "an adapt stage trains under a causal mask, and none under block_causal",
    )
    yield from _weights_of_stages(config)
    yield from _annealed_stages(config)
    yield from _rows_of_stages(config)
    yield from _steps_of_evaluations(config)
    yield from _selection(config)


def rules_between_sections(config: Config) -> Iterator[Rule]:
    """What holds of the sections whatever the stages; checked with the changes of every stage (config/check.py)."""
    length = config.sampler.completion_length
    for name, rows, columns in (
        ("adapt.batch_size", config.adapt.batch_size, config.adapt.length),
        ("sft.batch_size", config.sft.batch_size, config.sft.completion_length or length),
        ("rl.prompts_per_step x rl.num_generations", config.rl.rollout_rows, length),
        ("preference.prompts_per_step x preference.num_generations", config.preference.rollout_rows, length),
        ("generate.prompts_per_step x generate.num_generations", config.generate.rollout_rows, length),
        ("evaluation.batch_size", config.evaluation.batch_size, length),
    ):
        yield (
            rows * columns > MOST,
            f"{name} makes arrays of {rows} rows of {columns} tokens, more than {MOST} numbers; lower it",
        )
    yield (
        config.rl.kl.name == "reward" and not scores_the_sampler(config.rl, config.sampler),
        "rl.kl = reward takes sums of log p / p_reference for an estimate of the KL, which they are only where the scores are the "
        "log-probabilities that the completions were drawn with; set rl.estimator = trajectory, rl.estimator.shrink = 1, "
        "rl.prompt_mask = 0, rl.temperature = 1, no top_k, top_p, guidance, cache or end-token rule; or rl.kl = loss",
    )
    yield (
        config.rl.reference.name == "moving" and config.lora.rank > 0,
        "rl.reference = moving with LoRA: the reference is the model without its adapter and never moves; set it to fixed",
    )


def _selection(config: Config) -> Iterator[Rule]:
    """The set by which checkpoints are chosen is evaluated during training, and none that a result is reported on."""
    select, sets = config.evaluation.select, config.task.eval_sets
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
        config.evaluation.every == 0,
        f"evaluation.select = {shown(select)} with evaluation.every = 0 has one checkpoint to choose from; say after how many steps",
    )


def _annealed_stages(config: Config) -> Iterator[Rule]:
    """A mask is opened once: a stage that goes on from another one has nothing causal to open."""
    for stage in config.stages:
        again = stage.kind == "adapt" and not config.works_on_start(stage)
        steps = config.section_of(stage).anneal_steps if again else 0
        yield (
            steps > 0,
            f"stage {stage.name!r}: adapt.anneal_steps = {steps} would hide from the model again what a stage before it has opened; "
            "write anneal_steps: 0 in this stage",
        )


def _weights_of_stages(config: Config) -> Iterator[Rule]:
    """A stage works with weights that are there when it begins."""
    trained, models = [START], []
    for stage in config.stages:
        known = trained + models if stage.kind == "reward_model" else trained
        yield (
            stage.weights != "" and stage.weights not in known,
            f"stage {stage.name!r}: from = {shown(stage.weights)} is no stage before it that trains; choices: {known}",
        )
        yield (
            any(name in stage.shared.get("task", {}) for name in ("eval_sets", "eval_rows", "held_out_by_solution")),
            f"stage {stage.name!r}: evaluation sets belong to the run; write them in its section task, not in a stage",
        )
        yield (
            stage.weights != "" and _teacher_of(config, stage) != "",
            f"stage {stage.name!r}: from = {shown(stage.weights)} with a teacher, which writes everything; leave one of them out",
        )
        idle = {"evaluate": ["task"], "export": ["task", "sampler"]}.get(stage.kind, [])
        yield from (
            (True, f"stage {stage.name!r}: the kind {stage.kind} reads no {name} of its own; leave it out")
            for name in idle
            if name in stage.shared
        )
        of_steps = config.step_model_of(stage)
        for name in (*config.models_of(stage), *filter(None, (of_steps,))):
            yield (
                name not in models,
                f"stage {stage.name!r} asks {MODEL + name!r}, but no reward_model stage before it has that name; choices: {models}",
            )
        yield (
            of_steps in models and config.section_of(config.stage(of_steps)).loss != "stepwise",
            f"stage {stage.name!r}: supervision asks {of_steps!r} about single lines, but it learns from whole texts; give that stage "
            "loss: stepwise",
        )
        if stage.kind in TRAINING:
            trained.append(stage.name)
        if stage.kind == "reward_model":
            models.append(stage.name)


def _steps_of_evaluations(config: Config) -> Iterator[Rule]:
    """The numbers of denoising steps that evaluate stages try are numbers that the sampler can take."""
    for stage in config.stages:
        steps = config.section_of(stage).steps if stage.kind == "evaluate" else ()
        sampler = config.for_stage(stage.name).sampler
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


def _rows_of_stages(config: Config) -> Iterator[Rule]:
    """A stage that learns from kept rows comes after the stage that keeps them."""
    kept: list[str] = []
    for stage in config.stages:
        for wanted in _data_of(config, stage):
            yield (
                wanted != "task" and wanted not in kept,
                f"stage {stage.name!r} learns from {wanted!r}, which is no generate stage before it; choices: {['task', *kept]}",
            )
        if stage.kind == "generate":
            kept.append(stage.name)


def _asks_weights(config: Config, stage: Stage) -> bool:
    """Whether a stage wants weights that know something already, of those that do not only measure or store them."""
    return stage.kind not in ("evaluate", "export") and not _teacher_of(config, stage)


def _teacher_of(config: Config, stage: Stage) -> str:
    return config.section_of(stage).teacher if stage.kind == "generate" else ""


def _data_of(config: Config, stage: Stage) -> tuple[str, ...]:
    """What a stage learns from, by name."""
    if stage.kind == "preference":
        return tuple(filter(None, [config.section_of(stage).data]))
    return config.section_of(stage).data if stage.kind in ("sft", "reward_model") else ()


def scores_the_sampler(rl: RlConfig, sampler: SamplerConfig) -> bool:
    """Whether a token's score is the log-probability with which the sampler drew it: its state, its temperature, its filters."""
    estimator = rl.estimator
    segment_a_step = estimator.name == "trajectory" and (
        estimator.shrink == 1 or (estimator.shrink == 0 and estimator.samples >= sampler.max_steps)
    )
    as_drawn = rl.temperature == 1 and sampler.top_k == 0 and sampler.top_p == 1 and sampler.guidance == 0
    exact = sampler.cache.name == "none" and sampler.end_token in ("allowed", "last")
    return segment_a_step and rl.prompt_mask == 0 and as_drawn and exact
