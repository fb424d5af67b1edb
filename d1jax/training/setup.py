"""What a run stands on before any data: mesh, tokenizer, architecture; and where its weights come from.

Weights are random, or those of a checkpoint directory, or the last ones of another run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
from jax import Array
from jax.sharding import Mesh

from d1jax.config import Config, ConfigError, ModelConfig, TaskConfig
from d1jax.config.no_effect import no_effect
from d1jax.data.tokenizers import ByteTokenizer, CharacterTokenizer, SmallTokenizer, Tokenizer
from d1jax.files import new_directory, write_json
from d1jax.models import lora, sharding
from d1jax.models.transformer import Transformer, Variables, abstract_variables, initialize
from d1jax.tasks import TASKS
from d1jax.tasks.task import Task
from d1jax.training.optimizer import MASTER
from d1jax.weights.checkpoints import Checkpoints, DamagedCheckpoint
from d1jax.weights.hf_directory import (
    Checkpoint,
    copy_companions,
    fingerprint,
    is_checkpoint,
    open_checkpoint,
)
from d1jax.weights.hf_io import load_weights, not_finite_at
from d1jax.weights.run import RunDirectory, is_run, open_run, read_record, run_and_step
from d1jax.weights.tokenizer_files import load_tokenizer

PRINTABLE = "".join(map(chr, range(32, 127))) + "\n"
KEYS = {"weights": 0, "sft": 1, "rl": 2, "evaluation": 3, "sft adapter": 4, "rl adapter": 5, "audit": 6}
FREE = ("dtype", "param_dtype", "remat", "max_positions")  # may differ between runs on the same weights


@dataclass(frozen=True)
class Setup:
    config: Config  # with the architecture of what it starts from
    mesh: Mesh
    tokenizer: Tokenizer
    model: Transformer

    def key(self, purpose: str) -> Array:
        """The root key of a purpose: a function of the seed and the purpose's name only."""
        return jax.random.fold_in(jax.random.key(self.config.seed), KEYS[purpose])


def set_up(config: Config, saved: Path | None = None, mesh: Mesh | None = None) -> Setup:
    """Mesh, tokenizer and model of a configuration. Raises ConfigError before anything is read or compiled.

    A model that starts from a checkpoint or a run takes its architecture and, where that is a published one, its tokenizer.
    `saved` is the source directory of an existing run: then nothing else is looked up.
    """
    mesh = sharding.make_mesh(config.mesh) if mesh is None else mesh
    origin = saved
    if saved is None and config.init_from:
        config = dataclasses.replace(config, init_from=str(Path(config.init_from).absolute()))
        checkpoint = _origin_checkpoint(config)
        theirs, origin = (
            (checkpoint.config, checkpoint.path) if checkpoint is not None else _model_of_run(config.init_from)
        )
        config = dataclasses.replace(config, model=_adopt(config.model, theirs, config.init_from))
    tokenizer = _tokenizer(config, origin)
    # A multiple of 8 divides over any small mesh.
    rows = config.model.vocab_size or -(-tokenizer.vocab_size // 8) * 8
    if rows < tokenizer.vocab_size:
        raise ConfigError(
            f"config: model.vocab_size = {rows} is smaller than the tokenizer's {tokenizer.vocab_size}; use 0"
        )
    model = Transformer(dataclasses.replace(config.model, vocab_size=rows), config.lora)
    if config.lora.rank:
        lora.check_targets(abstract_variables(model, mesh)["params"], config.lora)
    return Setup(config, mesh, tokenizer, model)


def make_task(config: TaskConfig) -> Task:
    options = {"numbers": config.numbers} if config.name == "countdown" else {}
    try:
        return TASKS[config.name](style=config.style, split_seed=config.seed, **options)
    except ValueError as error:
        raise ConfigError(f"config: task: {error}") from None


def _tokenizer(config: Config, origin: Path | None) -> Tokenizer:
    """A published one where the weights come with it; else the one that the configuration asks for, which must fit the weights."""
    found = load_tokenizer(origin) if origin is not None else None
    if found is not None and not isinstance(found, SmallTokenizer):
        if config.tokenizer != Config().tokenizer:
            raise ConfigError(
                f"config: {no_effect(f'tokenizer = {config.tokenizer}', 'weights that bring no published tokenizer')} "
                f"(here: {str(origin)!r})"
            )
        return found
    alphabet = make_task(config.task).alphabet if config.task.style == "bare" else PRINTABLE
    made = ByteTokenizer() if config.tokenizer == "bytes" else CharacterTokenizer(alphabet)
    if found not in (None, made):
        raise ConfigError(
            f"{str(origin)!r} has another tokenizer than task {config.task.name!r} needs in this style "
            f"(tokenizer: {config.tokenizer}): {found} and {made}"
        )
    return made


def _origin_checkpoint(config: Config) -> Checkpoint | None:
    """The checkpoint that `init_from` names; None where it names a run."""
    path = Path(config.init_from)
    if is_checkpoint(path):
        return open_checkpoint(path)
    if is_run(run_and_step(path)[0]):
        return None
    raise ConfigError(
        f"init_from {config.init_from!r} is no run directory (config.yaml), no RUN/checkpoints/STAGE/STEP and no checkpoint "
        "directory (config.json)"
    )


def _model_of_run(path: str) -> tuple[ModelConfig, Path | None]:
    run, config = open_run(run_and_step(Path(path))[0])
    return config.model, run.source if run.source.is_dir() else None


def _adopt(mine: ModelConfig, theirs: ModelConfig, origin: str) -> ModelConfig:
    """The architecture of what the run starts from. What the configuration says otherwise than by default must agree."""
    default, adopted, other = ModelConfig(), {}, []
    for field in dataclasses.fields(ModelConfig):
        name = field.name
        here, there = getattr(mine, name), getattr(theirs, name)
        if name == "max_positions":
            adopted[name] = min(filter(None, (here, there)), default=0)
        if name in FREE:
            continue
        if here not in (there, getattr(default, name)):
            other.append(f"model.{name} = {there} (here: {here})")
        adopted[name] = there
    if other:
        raise ConfigError(
            f"init_from {origin!r} has another model: {', '.join(other)}; leave them out, or give --model its own file"
        )
    return dataclasses.replace(mine, **adopted)


# -- weights ------------------------------------------------------------------------------------------------------------


def start_variables(setup: Setup, run: RunDirectory) -> Variables:
    """The weights before the first stage: random, of a checkpoint, or of the run that `init_from` names, its last ones or those of a step.

    Which ones those were is written down the first time, so that a source that changes moves nothing here.
    """
    config = setup.config
    # A base that is not trained is stored as the configuration says; what will be trained loses nothing.
    held_in = config.model.param_dtype if config.lora.rank else "float32"
    if not config.init_from:
        # Drawn in fp32, because a draw in bf16 is another one: a seed means the same weights in every dtype.
        drawn = Transformer(dataclasses.replace(setup.model.config, param_dtype="float32"), config.lora)
        return lora.merge(initialize(drawn, setup.key("weights"), setup.mesh), config.lora, held_in)
    recorded = read_record(run.origin) if run.origin.exists() else None
    checkpoint = _origin_checkpoint(config)
    if checkpoint is not None:
        origin = {"files": fingerprint(checkpoint)}
        if recorded not in (None, origin):
            raise ConfigError(
                f"init_from {config.init_from!r} has other files than when this run began; give that checkpoint, or a new run_dir"
            )
        if recorded is None:
            write_json(run.origin, origin)
        return load_weights(checkpoint, setup.model.config, setup.mesh)
    path, stage, step = run_and_step(Path(config.init_from))
    source_run, source = open_run(path)
    check_same_model(setup, source_run, source)
    if recorded is None:
        if stage is None:
            saved = [(stage, step) for stage, step in source_run.saved_steps(source.stages).items() if step]
            if not saved:
                raise ConfigError(f"init_from {config.init_from!r} has no checkpoint yet")
            stage, step = saved[-1]
        recorded = {"stage": stage, "step": step}
        write_json(run.origin, recorded)
    stored = dataclasses.replace(setup.model.config, param_dtype=source.model.param_dtype)
    theirs = dataclasses.replace(setup, config=source, model=Transformer(stored, source.lora))
    variables, _ = variables_at(theirs, source_run, recorded["stage"], recorded["step"])
    if config.lora.rank and source.lora == config.lora:
        # It goes on with the adapter of that run: nothing is merged, so nothing of it is rounded.
        return {**variables, **lora.merge({"params": variables["params"]}, source.lora, held_in)}
    rounding = lora.Rounding()
    merged = lora.merge(variables, source.lora, held_in, rounding)
    cure = f"set lora as in {config.init_from!r}, to go on with its adapter, or model.param_dtype = float32, to keep all of it"
    lora.warn_of_rounding(rounding, held_in, cure)
    return merged


def save_source(setup: Setup, run: RunDirectory) -> None:
    """Puts what is not weights into the run: the tokenizer; of a checkpoint also config.json and remote code."""
    if run.source.is_dir():
        return
    origin = Path(setup.config.init_from) if setup.config.init_from else None
    if origin is not None and not is_checkpoint(origin):
        origin = RunDirectory(run_and_step(origin)[0]).source
    with new_directory(run.source) as beside:
        if origin is not None and is_checkpoint(origin):
            copy_companions(origin, beside)
        elif isinstance(setup.tokenizer, SmallTokenizer):
            setup.tokenizer.save(beside)


def check_same_model(setup: Setup, run: RunDirectory, source: Config) -> None:
    """Raises ConfigError where the weights of a run do not fit the model of this setup."""
    here, there = (dataclasses.asdict(_architecture(config)) for config in (setup.config, source))
    other = [f"model.{name} = {there[name]} (here: {here[name]})" for name in here if here[name] != there[name]]
    if other:
        raise ConfigError(f"run {str(run.path)!r} has another model: {', '.join(other)}")


def _architecture(config: Config) -> ModelConfig:
    """The model's configuration without what may change between runs on the same weights."""
    return dataclasses.replace(config.model, **{name: getattr(ModelConfig(), name) for name in FREE})


def with_adapter(setup: Setup, variables: Variables, stage: str) -> Variables:
    """The variables of a stage: under LoRA with an adapter.

    A run has one adapter. The first stage gets a fresh one, which changes nothing until it is trained; later stages go on with
    it. (Merging it into a bf16 base between stages would round most of it away.)
    """
    if setup.config.lora.rank == 0 or "lora" in variables:
        return variables
    return {**variables, **initialize(setup.model, setup.key(f"{stage} adapter"), setup.mesh, ("lora",))}


def split(variables: Variables) -> tuple[Variables, Variables]:
    """(trainable, frozen): the adapter and the rest, or everything and nothing."""
    name = "lora" if "lora" in variables else "params"
    return {name: variables[name]}, {other: value for other, value in variables.items() if other != name}


def variables_at(setup: Setup, run: RunDirectory, stage: str, step: int | None = None) -> tuple[Variables, int]:
    """(weights, step) of a stage of a run at `step` (None: its last checkpoint). Raises ConfigError if there are none.

    What was trained is fp32, as in training; an adapter stands beside the weights that it was trained on, not merged.
    """
    stages = setup.config.stages
    if stage not in stages:
        raise ConfigError(f"run {str(run.path)!r} has no stage {stage!r}; choices: {', '.join(stages)}")
    if not run.checkpoints(stage).is_dir():
        raise ConfigError(f"run {str(run.path)!r} has no checkpoint of stage {stage!r} yet")
    checkpoints = Checkpoints(run.checkpoints(stage))
    try:
        step = _saved_step(checkpoints, run, stage, step)
        if setup.config.lora.rank:
            check_one_adapter(setup.config, run)
            # A base of random weights is that of the run's own seed, whatever seed the texts are drawn with here.
            own = dataclasses.replace(setup.config, seed=open_run(run.path)[1].seed)
            frozen, names = start_variables(dataclasses.replace(setup, config=own), run), ("lora",)
        else:
            frozen, names = {}, ("params",)
        trained = abstract_variables(setup.model, setup.mesh, names)
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, MASTER, sharding=x.sharding), trained)
        loaded = load_or_name_the_last_good(checkpoints, step, {"trainable": like}, run.path, stage)
    finally:
        checkpoints.close()
    for keys, array in jax.tree_util.tree_flatten_with_path(loaded["trainable"])[0]:
        if not_finite_at(array) is not None:
            name = jax.tree_util.keystr(keys, simple=True, separator="/")
            raise ConfigError(
                f"run {str(run.path)!r}: {name} of stage {stage!r}, step {step}, holds NaN or infinite values; "
                "take an earlier step"
            )
    return {**frozen, **loaded["trainable"]}, step


def _saved_step(checkpoints: Checkpoints, run: RunDirectory, stage: str, step: int | None) -> int:
    """The step that was asked for (None: the last one). Raises ConfigError where it is not saved."""
    saved = checkpoints.steps()
    if not saved:
        raise ConfigError(f"run {str(run.path)!r} has no checkpoint of stage {stage!r} yet")
    if step is not None and step not in saved:
        raise ConfigError(f"run {str(run.path)!r}: stage {stage!r} has checkpoints of steps {saved}, not of {step}")
    return saved[-1] if step is None else step


def adapter_of(path: Path, mesh: Mesh) -> tuple[Setup, Variables]:
    """(setup, {"lora": ...}) of a run that trained an adapter of a checkpoint, after its last stage; of RUN/checkpoints/STAGE/STEP, of
    that step. The base is not read.

    The stages of a run share one adapter. Raises ConfigError for a run without one, and for one that did not start from a
    checkpoint: its base exists nowhere.
    """
    path, stage, step = run_and_step(path)
    run, config = open_run(path)
    if not config.lora.rank or not config.init_from or not is_checkpoint(Path(config.init_from)):
        what = "it trained all weights" if not config.lora.rank else "it did not start from a checkpoint directory"
        raise ConfigError(
            f"run {str(path)!r} has no adapter of a checkpoint: {what} (lora.rank {config.lora.rank}, init_from "
            f"{config.init_from!r}); export its merged weights, without --adapter-only. For an adapter, export the weights first "
            "and train with lora.rank and init_from that directory"
        )
    setup = set_up(config, run.source, mesh)
    done = [stage for stage, step in run.saved_steps(config.stages).items() if step]
    if not done:
        raise ConfigError(f"run {str(path)!r} has no checkpoint yet")
    stage = done[-1] if stage is None else stage
    if stage not in done:
        raise ConfigError(f"run {str(path)!r} has no checkpoint of stage {stage!r}; choices: {', '.join(done)}")
    check_one_adapter(config, run)
    like = abstract_variables(setup.model, mesh, ("lora",))
    checkpoints = Checkpoints(run.checkpoints(stage))
    try:
        step = _saved_step(checkpoints, run, stage, step)
        return setup, load_or_name_the_last_good(checkpoints, step, {"trainable": like}, path, stage)["trainable"]
    finally:
        checkpoints.close()


def check_one_adapter(config: Config, run: RunDirectory) -> None:
    """Raises ConfigError for a LoRA run of several stages whose adapters are not one (d1jax before 0.2 merged between stages)."""
    if config.lora.rank and len(config.stages) > 1 and not run.adapter.exists():
        begun = [stage for stage, step in run.saved_steps(config.stages).items() if step]
        if begun[1:]:
            raise ConfigError(
                f"run {str(run.path)!r} was written by an older d1jax, whose stages {', '.join(begun)} had an adapter each; "
                "train it again, or export it with the version that wrote it"
            )


def mark_one_adapter(config: Config, run: RunDirectory) -> None:
    """Writes down, before the first checkpoint, that the stages of this LoRA run share one adapter."""
    check_one_adapter(config, run)
    if config.lora.rank and not run.adapter.exists():
        write_json(run.adapter, {"stages": list(config.stages), "adapters": 1})


def load_or_name_the_last_good(
    checkpoints: Checkpoints, step: int, like: Variables, run: Path, stage: str
) -> Variables:
    """The checkpoint of a step. Raises ConfigError that names what is damaged there, and the step to take instead."""
    try:
        return checkpoints.load(step, like)
    except DamagedCheckpoint as error:
        good = checkpoints.last_good(step, like)
        cure = "no earlier one of this stage is good"
        if good is not None:
            cure = f"the last good one is step {good} ({run / 'checkpoints' / stage / str(good)})"
        raise ConfigError(f"stage {stage}: {error}; {cure}") from None


def trained_table(trainable: Variables, frozen: Variables, log: Callable[[str], None]) -> None:
    """Logs every array that is trained, how many of all parameters they are, and the bytes of what training holds."""
    rows = lora.parameter_table(trainable)
    count, total = (
        sum(size for *_, size in rows),
        sum(size for *_, size in lora.parameter_table({**trainable, **frozen})),
    )
    width = max(len(path) for path, *_ in rows)
    for path, shape, size in rows:
        log(f"trained: {path:<{width}}  {'x'.join(map(str, shape)):>18}  {size:>14,}")
    log(f"trained: {count:,} of {total:,} parameters ({count / total:.2%})")
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(frozen))
    kinds = ", ".join(sorted({str(leaf.dtype) for leaf in jax.tree.leaves(frozen)})) or "none"
    log(
        f"memory: trained weights, their gradient and Adam's two moments in float32: {4 * 4 * count / 1e9:.3g} GB; "
        f"frozen weights ({kinds}): {held / 1e9:.3g} GB; over all devices, without activations"
    )
