"""The two processes that benchmarks/update.py sends its calls to: d1jax's compiled update, and PyTorch's."""

import dataclasses
import os
import time
import traceback
from pathlib import Path

import numpy as np
from sampling_sides import busy_seconds, forget_peak, resident_peak

from d1jax.config import ModelConfig, OptimizerConfig
from d1jax.config.parse import parse


@dataclasses.dataclass(frozen=True)
class Setting:
    """The rollout batch, and what is done with it."""

    model: ModelConfig
    prompts: int
    prompt: int  # tokens
    completion: int
    inner_updates: int = 4
    block: int = 32  # of the rollout, in which a step unmasks two tokens: d1's
    temperature: float = 0.9
    sampled_rows: int = 4  # of PyTorch at a time: its noise is float64 over [rows, prompt + completion, vocabulary]
    learning_rate: float = 3e-6  # d1's, as the decay and the clip below; the time does not depend on it
    matmul: int = 2048  # rows and columns of the matrix product that the limit is measured with
    threads: int = 2

    @property
    def rows(self):
        return self.prompts * self.rl().num_generations

    def rl(self, inner_updates=None, micro_batches=1):
        """configs/methods/d1.yaml, with mu = 4 in the place of 12."""
        return dataclasses.replace(
            parse(["--rl", "d1"]).rl,
            prompts_per_step=self.prompts,
            num_iterations=inner_updates or self.inner_updates,
            grad_accumulation_steps=micro_batches,
            optimizer=OptimizerConfig(learning_rate=self.learning_rate, weight_decay=0.1, clip_norm=0.2),
        )

    def rollouts(self):
        """Random prompts, completions (half of them end early) and advantages; mask and end are the last two of the vocabulary."""
        random = np.random.default_rng(0)
        words = self.model.vocab_size - 2
        prompt_BP = random.integers(0, words, (self.prompts, self.prompt)).repeat(self.rl().num_generations, axis=0)
        completion_BC = random.integers(0, words, (self.rows, self.completion))
        ends_B = random.integers(0, 2 * self.completion, self.rows)
        completion_BC[np.arange(self.completion)[None, :] >= ends_B[:, None]] = words
        rewards_PG = random.integers(0, 2, (self.prompts, self.rl().num_generations))
        advantage_B = (rewards_PG - rewards_PG.mean(axis=1, keepdims=True)).reshape(-1)
        return prompt_BP.astype(np.int32), completion_BC.astype(np.int32), advantage_B.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Call:
    micro_batches: int
    inner_updates: int
    first_old: bool = True  # PyTorch scores the old policy for the first inner update; d1jax never does
    shared: bool = False  # d1jax: the completions of a problem meet one prompt mask, so that one pass scores them
    sampled: bool = False  # the rollout in the place of the update


def best_of(function, times=5):
    """Seconds of the fastest of some calls."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def d1jax_side(setting, folder):
    """(prepare, GFLOP/s of a matrix product, environment). prepare: call -> (start, go, known): `go(start())` is what is timed.

    Writes the weights and the masked prompts for the other side.
    """
    from update_d1jax import Ours, matmul_rate  # JAX looks at the CPUs that it may use when it starts

    from d1jax.evaluation import summary

    ours = Ours(setting)
    ours.hand_over(folder)
    return ours.prepare, matmul_rate(setting.matmul), summary.environment()


def torch_side(setting, folder):
    import torch
    import torch_sampler
    import torch_update

    torch.set_num_threads(setting.threads)
    with np.load(folder / "handed_over.npz") as arrays:
        handed = {name: torch.tensor(x) for name, x in arrays.items()}

    def tensors(side):
        return {name.removeprefix(side): x for name, x in handed.items() if name.startswith(side)}

    policy, reference = (
        torch_sampler.bidirectional_llama(setting.model, tensors(side)) for side in ("policy/", "reference/")
    )
    policy.requires_grad_(True)
    _, completion_BC, advantage_B = map(torch.tensor, setting.rollouts())
    rollouts = torch_update.Rollouts(
        handed["prompt_UBP"].long(),
        completion_BC.long(),
        handed["text_BC"],
        advantage_B,
        setting.rl().num_generations,
        setting.model.vocab_size - 1,
    )

    def sample(_):
        for prompt_RP in rollouts.prompt_UBP[0].split(setting.sampled_rows):
            torch_sampler.generate(
                policy, prompt_RP, completion_length=setting.completion, block_length=setting.block,
                steps=setting.completion // 2, temperature=setting.temperature, mask_id=rollouts.mask_id,
            )  # fmt: skip
        return [], []

    def prepare(call):
        if call.sampled:
            return lambda: None, sample, {}
        rl = setting.rl()
        method = torch_update.Method(
            call.inner_updates, call.micro_batches, rl.policy_loss.clip_low, rl.policy_loss.clip_high,
            rl.kl.coefficient, rl.optimizer.clip_norm, call.first_old,
        )  # fmt: skip

        def start():
            policy.load_state_dict(tensors("policy/"))
            return torch_update.new_optimizer(policy, rl.optimizer)

        return start, lambda optimizer: torch_update.update(policy, reference, optimizer, rollouts, method), {}

    square = torch.randn(setting.matmul, setting.matmul)
    square @ square
    seconds = best_of(lambda: square @ square)
    versions = {"torch": torch.__version__, "torch_threads": str(torch.get_num_threads())}
    return prepare, 2 * setting.matmul**3 / seconds / 1e9, versions


SIDES = {"d1jax": d1jax_side, "pytorch": torch_side}


def serve(connection, name, setting, folder):
    """Answers calls with what one run of them gave, until None comes."""
    # XLA has a thread for every CPU that the process may use.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: setting.threads])
    try:
        prepare, matmul, environment = SIDES[name](setting, Path(folder))
        connection.send({"matmul_GFLOP_per_second": round(matmul, 1), "environment": environment})
        ready = {}
        while (call := connection.recv()) is not None:
            if call not in ready:
                ready[call] = prepare(call)
            start, go, known = ready[call]
            state = start()
            forget_peak()
            all_before, own_before = busy_seconds()
            began = time.perf_counter()
            losses, norms = go(state)
            seconds = time.perf_counter() - began
            all_after, own_after = busy_seconds()
            others = max(0.0, (all_after - all_before) - (own_after - own_before)) / seconds
            found = {"seconds": seconds, "peak_memory_GB": resident_peak(), "cpus_others_used": others}
            connection.send({**known, **found, "losses": losses, "gradient_norms": norms})
    except EOFError:
        pass  # the parent is gone
    except Exception:
        connection.send(RuntimeError(traceback.format_exc()))
