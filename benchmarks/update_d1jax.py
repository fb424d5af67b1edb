"""d1jax's side of benchmarks/update.py: its compiled update and its compiled rollout, of one random policy and reference."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
from update_sides import best_of

from d1jax.config import MeshConfig, SamplerConfig
from d1jax.data.tokenizers import SpecialTokens
from d1jax.diffusion.canvas import Canvas
from d1jax.diffusion.decoding import Prompts
from d1jax.diffusion.noise import KeyedNoise
from d1jax.diffusion.sampler import Sampler
from d1jax.models.families import FAMILIES
from d1jax.models.sharding import make_mesh
from d1jax.models.transformer import Transformer, initialize
from d1jax.rl.update import Batch, make_update, rows_alike, view_keys
from d1jax.training.likelihood import RolloutBatch, Scorer
from d1jax.training.optimizer import make_optimizer, new_state
from d1jax.weights.names import to_published


class Ours:
    """Weights and the rollout batch of a setting, and what is compiled of them for a call."""

    def __init__(self, setting):
        config = setting.model
        self.setting, self.mesh, self.model = setting, make_mesh(MeshConfig()), Transformer(config)
        self.key = jax.random.key(2)
        self.special = SpecialTokens(mask=config.vocab_size - 1, end=config.vocab_size - 2)
        # Another random policy as the reference: with a copy the KL and its gradient would be 0 in the comparison of the losses.
        self.policy, self.reference = (initialize(self.model, jax.random.key(seed), self.mesh) for seed in (0, 1))
        prompt_BP, completion_BC, advantage_B = map(jnp.asarray, setting.rollouts())
        canvas = Canvas(completion_BC, prompt_BP, jnp.full(setting.rows, setting.prompt))
        self.ids_B = jnp.arange(setting.rows)  # d1: each row meets its own masks
        rollout = RolloutBatch(canvas, self.ids_B, jnp.zeros_like(completion_BC))
        self.batch = Batch(rollout, advantage_B[:, None] * jnp.ones(completion_BC.shape))

    def scorer(self, rl):
        sampler = SamplerConfig(completion_length=self.setting.completion, block_length=self.setting.completion)
        alike = rows_alike(rl, self.mesh)
        return Scorer(
            self.model, rl.estimator, sampler, self.special, rl.prompt_mask, rl.grad_accumulation_steps, alike
        )

    def hand_over(self, folder):
        """Writes the weights and the masked prompts of every inner update."""
        scorer, rollout = self.scorer(self.setting.rl()), self.batch.rollout
        views = [
            scorer.views(key, rollout) for key in view_keys(self.key, self.setting.inner_updates, fresh_masks=True)
        ]
        arrays = {
            "prompt_UBP": np.stack([one.prompt_NBP[0] for one in views]),
            "text_BC": np.asarray(scorer.text_BC(rollout)),
        }
        for name, variables in (("policy", self.policy), ("reference", self.reference)):
            # Llama's tensors have the same names.
            tensors = to_published(variables, self.setting.model, FAMILIES["dream"])
            arrays |= {f"{name}/{tensor}": np.asarray(x) for tensor, x in tensors.items()}
        np.savez(folder / "handed_over.npz", **arrays)

    def prepare(self, call):
        """(start, go, what is known of the program): `go(start())` is what is timed."""
        return self.rollout() if call.sampled else self.update(call)

    def rollout(self):
        setting = self.setting
        decoding = SamplerConfig(
            completion_length=setting.completion,
            block_length=setting.block,
            steps=setting.completion // 2,
            early_exit=False,
        )
        canvas = self.batch.rollout.canvas
        arrays = (self.policy, Prompts(canvas.prompt_BP, canvas.prompt_length_B), KeyedNoise(self.key, self.ids_B))
        sampling = Sampler(self.model, decoding, self.special, setting.temperature)
        compiled, known = compile_timed(sampling.lower(*arrays))

        def go(_):
            jax.block_until_ready(compiled(sampling.inputs(*arrays)))
            return [], []

        return lambda: None, go, known

    def update(self, call):
        rl, batch = self.setting.rl(call.inner_updates, call.micro_batches), self.batch
        if call.shared:
            rl = dataclasses.replace(rl, mask_sharing="group")
            batch = batch._replace(rollout=batch.rollout._replace(mask_ids_B=self.ids_B // rl.num_generations))
        optimizer = make_optimizer(rl.optimizer, 1000)
        first = new_state(optimizer, self.policy, self.mesh)
        update = make_update(self.scorer(rl), optimizer, rl, first)
        compiled, known = compile_timed(update.lower(first, {}, self.reference, batch, self.key))
        plan = compiled.memory_analysis()
        if plan is not None:
            size = plan.argument_size_in_bytes + plan.temp_size_in_bytes  # the state is donated: the output is in there
            known["planned_memory_GB"] = round(size / 1e9, 3)

        def start():
            return jax.block_until_ready(new_state(optimizer, self.policy, self.mesh))

        def go(state):
            _, metrics, _ = jax.block_until_ready(compiled(state, {}, self.reference, batch, self.key))
            return metrics["loss"].tolist(), metrics["grad_norm"].tolist()

        return start, go, known


def compile_timed(lowered):
    began = time.perf_counter()
    compiled = lowered.compile()
    return compiled, {"compile_seconds": round(time.perf_counter() - began, 2)}


def matmul_rate(size):
    """GFLOP/s of a product of two square matrices."""
    square = jax.random.normal(jax.random.key(2), (size, size))
    product = jax.jit(lambda x: x @ x)
    product(square).block_until_ready()
    return 2 * size**3 / best_of(lambda: product(square).block_until_ready()) / 1e9
