"""Masked supervised fine-tuning. `d1jax.sft(policy, ...)` is d1jax.notebook.stages.sft."""

from d1jax.training.callable_module import make_callable

make_callable(__name__)
