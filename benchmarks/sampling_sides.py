"""The two processes that benchmarks/sampling.py sends its settings to: d1jax, and PyTorch."""

import dataclasses
import multiprocessing
import os
import time
import traceback
from pathlib import Path

import numpy as np

from d1jax.config import DualCache, Even, MeshConfig, NoCache, PrefixCache, SamplerConfig, Threshold

PROGRAMS = {"none": "exact", "prefix": "prefix cache", "dual": "dual cache"}
CACHES = {"none": NoCache(), "prefix": PrefixCache(), "dual": DualCache()}
SCHEDULES = {"even": Even(), "threshold": Threshold(0.9)}


@dataclasses.dataclass(frozen=True)
class Setting:
    batch: int
    prompt: int
    new: int
    steps: int
    block: int
    cache: str = "none"
    schedule: str = "even"
    temperature: float = 0.0

    def __str__(self):
        rule = f"{self.steps} steps" if self.schedule == "even" else f"{self.schedule} 0.9"
        return f"{PROGRAMS[self.cache]}, {rule}, T {self.temperature}, {self.batch} x {self.prompt}+{self.new}"

    def shapes(self):
        return {name: getattr(self, name) for name in ("batch", "prompt", "new", "steps", "block", "cache")}


def prompts(setting, vocabulary):
    return np.random.default_rng(0).integers(0, vocabulary - 2, (setting.batch, setting.prompt))


def d1jax_side(config, folder, hand_over):
    """setting -> (call it once, figures known beforehand). Writes the weights for the other side if `hand_over`."""
    import jax
    import jax.numpy as jnp

    from d1jax.data.tokenizers import SpecialTokens
    from d1jax.diffusion.decoding import Prompts
    from d1jax.diffusion.noise import KeyedNoise
    from d1jax.diffusion.sampler import Sampler
    from d1jax.models.families import FAMILIES
    from d1jax.models.sharding import make_mesh
    from d1jax.models.transformer import Transformer, initialize
    from d1jax.weights.names import to_published

    model, special = Transformer(config), SpecialTokens(mask=config.vocab_size - 1, end=config.vocab_size - 2)
    params = initialize(model, jax.random.key(0), make_mesh(MeshConfig()))["params"]
    # d1jax never unmasks into a mask token, the published code would: a score of 0 is never the highest of thousands.
    params["ff_out"] = params["ff_out"].at[:, special.mask].set(0)
    variables = {"params": params}
    if hand_over:
        tensors = to_published(variables, config, FAMILIES["dream"])  # Llama's tensors have the same names
        np.savez(folder / "weights.npz", **{name: np.asarray(x) for name, x in tensors.items()})
    device = jax.devices()[0]

    def prepare(setting):
        sampler = SamplerConfig(
            completion_length=setting.new, block_length=setting.block, steps=setting.steps,
            schedule=SCHEDULES[setting.schedule], cache=CACHES[setting.cache], early_exit=False,
        )  # fmt: skip
        prompt_BP = jnp.asarray(prompts(setting, config.vocab_size), jnp.int32)
        made = Sampler(model, sampler, special, setting.temperature)
        row_prompts = Prompts(prompt_BP, jnp.full(setting.batch, setting.prompt))
        noise = KeyedNoise(jax.random.key(0), jnp.arange(setting.batch))
        began = time.perf_counter()
        compiled = made.lower(variables, row_prompts, noise).compile()
        known = {"compile_seconds": round(time.perf_counter() - began, 2)}
        plan = compiled.memory_analysis()
        if plan is not None:
            size = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
            known["planned_memory_GB"] = round(size / 1e9, 3)

        def call():
            rollout = jax.block_until_ready(compiled(made.inputs(variables, row_prompts, noise)))
            cached = int(rollout.cached_nfe_B.max())
            return np.asarray(rollout.tokens_BC), np.asarray(rollout.unmask_step_BC), int(rollout.nfe_B.max()), cached

        return call, known

    def peak():
        statistics = device.memory_stats()
        return statistics["peak_bytes_in_use"] / 1e9 if statistics else resident_peak()

    return prepare, peak, f"{len(jax.devices())} x {device.device_kind}"


def torch_side(config, folder, hand_over):
    import torch
    import torch_sampler

    torch.set_num_threads(os.cpu_count())
    with np.load(folder / "weights.npz") as arrays:
        tensors = {name: torch.tensor(x) for name, x in arrays.items()}
    model = torch_sampler.bidirectional_llama(config, tensors)

    def prepare(setting):
        prompt_BP = torch.tensor(prompts(setting, config.vocab_size))

        def call():
            made = torch_sampler.generate(
                model, prompt_BP, completion_length=setting.new, block_length=setting.block, steps=setting.steps,
                temperature=setting.temperature, mask_id=config.vocab_size - 1,
            )  # fmt: skip
            return made.tokens_BC.numpy(), made.unmask_step_BC.numpy(), made.forward_passes, 0

        return call, {}

    return prepare, resident_peak, f"{torch.get_num_threads()} threads"


SIDES = {"d1jax": d1jax_side, "pytorch": torch_side}


def resident_peak():
    """Of this process since `forget_peak`, GB: interpreter and libraries included."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def forget_peak():
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # then the peak is that of the process so far


def busy_seconds():
    """CPU seconds that all processes of the machine have spent, and this one."""
    user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK"), time.process_time()


def serve(connection, name, config, folder, hand_over):
    """Answers settings with what one call of them gave, until None comes."""
    try:
        prepare, peak, device = SIDES[name](config, Path(folder), hand_over)
        connection.send(device)
        ready = {}
        while (setting := connection.recv()) is not None:
            if setting not in ready:
                ready[setting] = prepare(setting)
            call, known = ready[setting]
            forget_peak()
            all_before, own_before = busy_seconds()
            began = time.perf_counter()
            tokens_BC, unmask_step_BC, passes, cached = call()
            seconds = time.perf_counter() - began
            all_after, own_after = busy_seconds()
            others = max(0.0, (all_after - all_before) - (own_after - own_before)) / seconds
            unmasked_BK = [np.bincount(row, minlength=passes) for row in unmask_step_BC]
            figures = {"seconds": seconds, "peak_memory_GB": peak(), "forward_passes": passes, "over_windows": cached}
            figures["cpus_others_used"] = others
            connection.send({**known, **figures, "tokens_BC": tokens_BC, "unmasked_BK": unmasked_BK})
    except EOFError:
        pass  # the parent is gone
    except Exception:
        connection.send(RuntimeError(traceback.format_exc()))


class Side:
    """A process that runs `serve(connection, *arguments)`; its first answer says what it runs on."""

    def __init__(self, serve, *arguments):
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, *arguments), daemon=True)
        self.process.start()
        other.close()
        self.device = self.answer()

    def answer(self):
        found = self.connection.recv()
        if isinstance(found, Exception):
            raise found
        return found

    def call(self, setting):
        self.connection.send(setting)
        return self.answer()

    def close(self):
        self.connection.send(None)
        self.process.join()
