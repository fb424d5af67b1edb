"""The weights of a run: before its first stage, and at every saved step; and which adapter belongs to them."""

from __future__ import annotations

import dataclasses
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from jax import Array
from jax.sharding import Mesh

from d1jax.config import Config, ModelConfig, UserError
from d1jax.files import write_json
from d1jax.models import lora, processes
from d1jax.models.reward_head import HEAD, new_head
from d1jax.models.sharding import replicated
from d1jax.models.transformer import MASTER, Transformer, Variables, abstract_variables, initialize
from d1jax.weights.adapted import as_diffusion, begun, is_adapted
from d1jax.weights.checkpoints import Checkpoints, DamagedCheckpoint
from d1jax.weights.hf_io import load_weights, not_finite_at
from d1jax.weights.run import RunDirectory, open_run, read_record
from d1jax.weights.source import CheckpointSource, RunSource, Source, open_source

KEYS = {"weights": 0, "sft": 1, "rl": 2, "evaluation": 3, "sft adapter": 4, "rl adapter": 5, "audit": 6}
FREE = ("dtype", "param_dtype", "attention", "remat", "max_positions")  # may differ between runs on the same weights


@dataclass(frozen=True)
class RunModel:
    """A configuration and the model that it describes, on its devices; no weights yet."""

    config: Config  # with the architecture of what it starts from
    mesh: Mesh
    model: Transformer
    # Of a model that is made from an autoregressive one: the first token id that that one had not.
    new_ids_from: int | None = field(default=None, kw_only=True)

    def key(self, purpose: str) -> Array:
        """The root key of a purpose (the name of a stage, say): a function of the seed and that name only."""
        number = KEYS.get(purpose, 2**31 + zlib.crc32(purpose.encode()) // 2)
        return jax.random.fold_in(jax.random.key(self.config.seed), number)


# -- before the first stage: four cases, in this order ---------------------------------------------------------------------


def start_variables(built: RunModel, run: RunDirectory) -> Variables:
    """The weights before the first stage of a run. The order of the cases matters:

    1. without init_from, random ones of the run's seed;
    2. of a checkpoint: its files, which must be those that the run began with;
    3. of a run whose adapter is of the same kind: its base and its adapter, nothing merged;
    4. of another run: its weights, an adapter merged in.

    Which ones those were is written down the first time (init_from.json), so that a source that changes moves nothing here.
    """
    config = built.config
    # A base that is not trained is stored as the configuration says; what will be trained loses nothing.
    held_in = config.model.param_dtype if config.lora.rank else "float32"
    if not config.init_from:
        # Drawn in fp32, because a draw in bf16 is another one: a seed means the same weights in every dtype.
        drawn = Transformer(dataclasses.replace(built.model.config, param_dtype="float32"), config.lora)
        return lora.merge(initialize(drawn, built.key("weights"), built.mesh), config.lora, held_in)
    source = open_source(config.init_from, f"init_from {config.init_from!r}")
    if is_adapted(config.model, source.model):
        theirs = dataclasses.replace(built, model=Transformer(begun(source.model, built.model.config), config.lora))
        return as_diffusion(_loaded(theirs, run, source, held_in), built.model.config, built.mesh, built.new_ids_from)
    return _loaded(built, run, source, held_in)


def _loaded(built: RunModel, run: RunDirectory, source: Source, held_in: str) -> Variables:
    """The weights of a source, cases 2 to 4."""
    config = built.config
    if isinstance(source, CheckpointSource):
        _recorded(run, source)
        return load_weights(source.checkpoint, built.model.config, built.mesh)
    check_same_model(built, source)
    recorded = _recorded(run, source)
    stored = dataclasses.replace(built.model.config, param_dtype=source.config.model.param_dtype)
    theirs = RunModel(source.config, built.mesh, Transformer(stored, source.config.lora))
    variables, _ = variables_at(theirs, source.run, recorded["stage"], recorded["step"])
    if config.lora.rank and source.config.lora == config.lora:
        # It goes on with the adapter of that run: nothing is merged, so nothing of it is rounded.
        return {**variables, **lora.merge({"params": variables["params"]}, source.config.lora, held_in)}
    rounding = lora.Rounding()
    merged = lora.merge(variables, source.config.lora, held_in, rounding)
    cure = f"set lora as in {config.init_from!r}, to go on with its adapter, or model.param_dtype = float32, to keep all of it"
    lora.warn_of_rounding(rounding, held_in, cure)
    return merged


def _recorded(run: RunDirectory, source: Source) -> dict[str, Any]:
    """What the run began with, written down the first time. Raises UserError where the files of a checkpoint have changed."""
    recorded = processes.agreed(lambda: read_record(run.origin) if run.origin.exists() else None)
    if isinstance(source, RunSource) and recorded is not None:
        return recorded  # of a run that was trained on since, the former step is still there
    now = source.identity()
    if recorded not in (None, now):
        raise UserError(
            f"init_from {str(source.path)!r} has other files than when this run began; give that checkpoint, or a new run_dir"
        )
    if recorded is None:
        write_json(run.origin, now)
    return now


def check_same_model(built: RunModel, source: RunSource) -> None:
    """Raises UserError where the weights of a run do not fit the model here."""
    models = (
        source.config.model if is_adapted(built.config.model, source.config.model) else built.config.model,
        source.config.model,
    )
    here, there = (dataclasses.asdict(_architecture(model)) for model in models)
    other = [f"model.{name} = {there[name]} (here: {here[name]})" for name in here if here[name] != there[name]]
    if other:
        raise UserError(f"run {str(source.path)!r} has another model: {', '.join(other)}")


def _architecture(model: ModelConfig) -> ModelConfig:
    """The model's configuration without what may change between runs on the same weights."""
    return dataclasses.replace(model, **{name: getattr(ModelConfig(), name) for name in FREE})


# -- at a saved step -------------------------------------------------------------------------------------------------------


def variables_at(built: RunModel, run: RunDirectory, stage: str, step: int | None = None) -> tuple[Variables, int]:
    """(weights, step) of a stage of a run at `step` (None: the selected checkpoint, or else the last). Raises UserError if there are none.

    What was trained is fp32, as in training; an adapter stands beside the weights that it was trained on, not merged.
    """
    stages = built.config.trained_stages
    if stage not in stages:
        raise UserError(f"run {str(run.path)!r} has no stage {stage!r}; choices: {', '.join(stages)}")
    if not processes.agreed(run.checkpoints(stage).is_dir):
        raise UserError(f"run {str(run.path)!r} has no checkpoint of stage {stage!r} yet")
    checkpoints = Checkpoints(run.checkpoints(stage))
    try:
        step = _saved_step(checkpoints, run, stage, step)
        if built.config.lora.rank:
            check_one_adapter(built.config, run)
            # A base of random weights is that of the run's own seed, whatever seed the texts are drawn with here.
            own = dataclasses.replace(built.config, seed=open_run(run.path)[1].seed)
            frozen, names = start_variables(dataclasses.replace(built, config=own), run), ("lora",)
        else:
            frozen, names = {}, ("params",)
        trained = abstract_variables(built.model, built.mesh, names)
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, MASTER, sharding=x.sharding), trained)
        loaded = load_or_name_the_last_good(checkpoints, step, {"trainable": like}, run.path, stage)
    finally:
        checkpoints.close()
    for keys, array in jax.tree_util.tree_flatten_with_path(loaded["trainable"])[0]:
        if not_finite_at(array) is not None:
            name = jax.tree_util.keystr(keys, simple=True, separator="/")
            raise UserError(
                f"run {str(run.path)!r}: {name} of stage {stage!r}, step {step}, holds NaN or infinite values; "
                "take an earlier step"
            )
    return {**frozen, **loaded["trainable"]}, step


def reward_variables_at(built: RunModel, run: RunDirectory, stage: str) -> Variables:
    """The weights of a reward model with its head, at its last step. Raises UserError if there are none."""
    if not processes.agreed(run.checkpoints(stage).is_dir):
        raise UserError(f"run {str(run.path)!r} has no checkpoint of stage {stage!r} yet")
    checkpoints = Checkpoints(run.checkpoints(stage))
    try:
        step = _saved_step(checkpoints, run, stage, None)
        names = ("lora",) if built.config.lora.rank else ("params",)
        frozen = {"params": start_variables(built, run)["params"]} if built.config.lora.rank else {}
        trained = {**abstract_variables(built.model, built.mesh, names), HEAD: _abstract_head(built)}
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, MASTER, sharding=x.sharding), trained)
        loaded = load_or_name_the_last_good(checkpoints, step, {"trainable": like}, run.path, stage)
    finally:
        checkpoints.close()
    return {**frozen, **loaded["trainable"]}


def _abstract_head(built: RunModel) -> Variables:
    shapes = jax.eval_shape(lambda: new_head(built.model.config.width))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(built.mesh)), shapes)


def _saved_step(checkpoints: Checkpoints, run: RunDirectory, stage: str, step: int | None) -> int:
    """The step that was asked for (None: the selected one, or else the last). Raises UserError where it is not saved."""
    saved = checkpoints.steps()
    step = processes.agreed(lambda: run.selected(stage)) if step is None else step
    if not saved:
        raise UserError(f"run {str(run.path)!r} has no checkpoint of stage {stage!r} yet")
    if step is not None and step not in saved:
        raise UserError(f"run {str(run.path)!r}: stage {stage!r} has checkpoints of steps {saved}, not of {step}")
    return saved[-1] if step is None else step


def adapter_of(built: RunModel, source: RunSource) -> Variables:
    """{"lora": ...} of a run that trained an adapter of a checkpoint, at the step that is named or after its last stage. The base is
    not read; the stages of a run share one adapter.
    """
    done = source.saved()
    stage = source.last_stage
    if stage not in done:
        raise UserError(f"run {str(source.path)!r} has no checkpoint of stage {stage!r}; choices: {', '.join(done)}")
    check_one_adapter(source.config, source.run)
    like = abstract_variables(built.model, built.mesh, ("lora",))
    checkpoints = Checkpoints(source.run.checkpoints(stage))
    try:
        step = _saved_step(checkpoints, source.run, stage, source.step)
        return load_or_name_the_last_good(checkpoints, step, {"trainable": like}, source.path, stage)["trainable"]
    finally:
        checkpoints.close()


def check_one_adapter(config: Config, run: RunDirectory) -> None:
    """Raises UserError for a LoRA run of several stages whose adapters are not one (d1jax before 0.2 merged between stages)."""
    if config.lora.rank and len(config.trained_stages) > 1 and not processes.agreed(run.adapter.exists):
        begun = [stage for stage, step in run.saved_steps(config.stage_names).items() if step]
        if begun[1:]:
            raise UserError(
                f"run {str(run.path)!r} was written by an older d1jax, whose stages {', '.join(begun)} had an adapter each; "
                "train it again, or export it with the version that wrote it"
            )


def mark_one_adapter(config: Config, run: RunDirectory) -> None:
    """Writes down, before the first checkpoint, that the stages of this LoRA run share one adapter."""
    check_one_adapter(config, run)
    if config.lora.rank and not run.adapter.exists():
        write_json(run.adapter, {"stages": list(config.stage_names), "adapters": 1})


def load_or_name_the_last_good(
    checkpoints: Checkpoints, step: int, like: Variables, run: Path, stage: str
) -> Variables:
    """The checkpoint of a step. Raises UserError that names what is damaged there, and the step to take instead."""
    try:
        return checkpoints.load(step, like)
    except DamagedCheckpoint as error:
        good = checkpoints.last_good(step, like)
        cure = "no earlier one of this stage is good"
        if good is not None:
            cure = f"the last good one is step {good} ({run / 'checkpoints' / stage / str(good)})"
        raise UserError(f"stage {stage}: {error}; {cure}") from None
