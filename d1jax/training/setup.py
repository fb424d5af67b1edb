"""What a stage stands on before any data: mesh, tokenizer, architecture; and what of a model is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from d1jax.config import Config, ModelConfig, OptimizerConfig, TaskConfig, UserError
from d1jax.config.no_effect import no_effect
from d1jax.data.hf_tokenizer import PretrainedTokenizer, load_pretrained_tokenizer, with_mask_token
from d1jax.data.tokenizers import ByteTokenizer, CharacterTokenizer, SmallTokenizer, Tokenizer
from d1jax.diffusion.sampler import Sampler
from d1jax.files import new_directory
from d1jax.models import attention, lora, sharding
from d1jax.models.families import TURNS, adapted_family
from d1jax.models.transformer import MASTER, Transformer, Variables, abstract_variables, initialize
from d1jax.tasks import make
from d1jax.tasks.task import Task
from d1jax.weights.adapted import bidirectional, grown, is_adapted
from d1jax.weights.hf_directory import copy_companions, is_checkpoint
from d1jax.weights.run import RunDirectory
from d1jax.weights.source import lasting, open_source
from d1jax.weights.tokenizer_files import load_tokenizer, write_pretrained_companions
from d1jax.weights.variables import FREE, RunModel

PRINTABLE = "".join(map(chr, range(32, 127))) + "\n"


@dataclass(frozen=True)
class Setup(RunModel):
    """A `RunModel` and its tokenizer."""

    tokenizer: Tokenizer

    def sampler(self, temperature: float, record_entropy: bool = False) -> Sampler:
        """How completions are decoded in this run, at this temperature."""
        special = self.tokenizer.special
        return Sampler(self.model, self.config.sampler, special, temperature, record_entropy=record_entropy)


def set_up(config: Config, saved: Path | None = None, mesh: Mesh | None = None, runs: bool = True) -> Setup:
    """Mesh, tokenizer and model of a configuration. Raises UserError before weights and rows are read.

    A model that starts from a checkpoint or a run takes its architecture and, where that is a published one, its tokenizer.
    `saved` is the source directory of an existing run: then nothing else is looked up. `runs`: the devices of the mesh are there.
    """
    mesh = sharding.make_mesh(config.mesh) if mesh is None else mesh
    origin, adapted = saved, False
    if saved is None and config.init_from:
        config = dataclasses.replace(config, init_from=lasting(config.init_from))
        source = open_source(config.init_from, f"init_from {config.init_from!r}")
        origin, theirs = source.files, source.model
        adapted = is_adapted(config.model, theirs)
        if adapted:
            _check_adapts(config)
            theirs = bidirectional(config.model, theirs)
        elif theirs.attention_mask == "full":
            _check_opens(config)
        config = dataclasses.replace(config, model=_adopt(config.model, theirs, config.init_from))
    if runs:
        attention.check(config.model, mesh)
    tokenizer, new_ids_from = _tokenizer(config, origin), None
    if adapted and isinstance(tokenizer, PretrainedTokenizer):
        before = tokenizer.vocab_size
        if 0 < config.model.vocab_size < before:
            raise UserError(
                f"init_from {config.init_from!r}: the tokenizer has {before} ids, the embedding only {config.model.vocab_size} rows; they "
                "belong to different models"
            )
        tokenizer = with_mask_token(tokenizer)
        new_ids_from = before if tokenizer.vocab_size > before else None
        config = dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, vocab_size=grown(config.model.vocab_size, tokenizer.vocab_size)),
        )
    # A multiple of 8 divides over any small mesh.
    rows = config.model.vocab_size or -(-tokenizer.vocab_size // 8) * 8
    if rows < tokenizer.vocab_size:
        raise UserError(
            f"config: model.vocab_size = {rows} is smaller than the tokenizer's {tokenizer.vocab_size}; use 0"
        )
    model = Transformer(dataclasses.replace(config.model, vocab_size=rows), config.lora)
    if config.lora.rank:
        lora.check_targets(abstract_variables(model, mesh)["params"], config.lora)
    return Setup(config, mesh, model, tokenizer, new_ids_from=new_ids_from)


def _check_adapts(config: Config) -> None:
    """Raises UserError where a stage would work with a model that is autoregressive still."""
    for stage in config.stages:
        if stage.kind != "adapt" and config.works_on_start(stage):
            raise UserError(
                f"init_from {config.init_from!r} is an autoregressive model, and stage {stage.name!r} works on masked diffusion models; "
                "put a stage of kind adapt first"
            )


def _check_opens(config: Config) -> None:
    """Raises UserError where a mask would be opened step by step to a model that is no autoregressive one."""
    for stage in config.stages:
        if stage.kind == "adapt" and config.section_of(stage).anneal_steps:
            raise UserError(
                f"init_from {config.init_from!r} sees both sides already, and {stage.name}.anneal_steps = "
                f"{config.section_of(stage).anneal_steps} would hide what stands behind again; set it to 0"
            )


def keep_programs(config: Config) -> None:
    """Lets JAX keep what it compiles in the directory that `compile_cache` names; one that JAX_COMPILATION_CACHE_DIR names stays."""
    name = config.compile_cache
    if name == "auto":
        name = "" if jax.default_backend() == "cpu" else "~/.cache/d1jax/programs"
    if not name or jax.config.jax_compilation_cache_dir:
        return
    directory = Path(name).expanduser()
    try:
        directory.mkdir(
            mode=0o700, parents=True, exist_ok=True
        )  # who can write there can make this process run what they like
    except OSError as error:
        raise UserError(f"config: compile_cache = {config.compile_cache!r} cannot be made ({error.strerror})") from None
    jax.config.update("jax_compilation_cache_dir", str(directory))


def make_task(config: TaskConfig) -> Task:
    """The task that the section names. Raises UserError where it cannot be made."""
    try:
        return make(config.name, **{"style": config.style, "split_seed": config.seed, **config.options})
    except ValueError as error:
        raise UserError(f"config: task: {error}") from None


def _tokenizer(config: Config, origin: Path | None) -> Tokenizer:
    """A published one where the weights come with it; else the one that the configuration asks for, which must fit the weights."""
    if origin is None and config.tokenizer not in ("characters", "bytes"):
        return with_mask_token(_tokenizer_of(Path(config.tokenizer)))
    found = load_tokenizer(origin) if origin is not None else None
    if found is not None and not isinstance(found, SmallTokenizer):
        if config.tokenizer != Config().tokenizer and config.init_from:
            raise UserError(
                f"config: {no_effect(f'tokenizer = {config.tokenizer}', 'weights that bring no published tokenizer')} "
                f"(here: {str(origin)!r})"
            )
        return found
    alphabet = make_task(config.task).alphabet if config.task.style == "bare" else PRINTABLE
    made = ByteTokenizer() if config.tokenizer == "bytes" else CharacterTokenizer(alphabet)
    if found not in (None, made):
        raise UserError(
            f"{str(origin)!r} has another tokenizer than task {config.task.name!r} needs in this style "
            f"(tokenizer: {config.tokenizer}): {found} and {made}"
        )
    return made


def _tokenizer_of(directory: Path) -> PretrainedTokenizer:
    """The published tokenizer in a directory, without a model. Raises UserError where there is none."""
    try:
        return load_pretrained_tokenizer(directory, mask=None, end=None, turns=TURNS, masks=False, alone=True)
    except ValueError as error:
        raise UserError(f"config: tokenizer: {error}") from None


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
        raise UserError(
            f"init_from {origin!r} has another model: {', '.join(other)}; leave them out, or give --model its own file"
        )
    return dataclasses.replace(mine, **adopted)


def began_autoregressive(setup: Setup) -> bool:
    """Whether the weights that the run starts from are those of an autoregressive model, and its own model is none."""
    if not setup.config.init_from:
        return False
    return is_adapted(setup.config.model, open_source(setup.config.init_from).model)


def save_source(setup: Setup, run: RunDirectory) -> None:
    """Puts what is not weights into the run: the tokenizer; of a checkpoint also config.json and remote code."""
    if run.source.is_dir():
        return
    source = open_source(setup.config.init_from) if setup.config.init_from else None
    origin = source.files if source is not None else None
    adapted = source is not None and is_adapted(setup.config.model, source.model)
    with new_directory(run.source) as beside:
        if isinstance(setup.tokenizer, PretrainedTokenizer) and (origin is None or adapted):
            family = adapted_family(setup.model.config) if adapted else None
            write_pretrained_companions(setup.model.config, setup.tokenizer, beside, family)
        elif origin is not None and is_checkpoint(origin):
            copy_companions(origin, beside)
        elif isinstance(setup.tokenizer, SmallTokenizer):
            setup.tokenizer.save(beside)


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


def trained_table(
    trainable: Variables, frozen: Variables, optimizer: OptimizerConfig, log: Callable[[str], None]
) -> None:
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
    first = jnp.dtype(optimizer.first_moment)
    dtypes = "float32" if first == MASTER else f"float32, the first one in {first}"
    each = 3 * jnp.dtype(MASTER).itemsize + first.itemsize
    log(
        f"memory: trained weights, their gradient and Adam's two moments in {dtypes}: {each * count / 1e9:.3g} GB; "
        f"frozen weights ({kinds}): {held / 1e9:.3g} GB; over all devices, without activations"
    )
