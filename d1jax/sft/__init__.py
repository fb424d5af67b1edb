"""Masked supervised fine-tuning. `d1jax.sft(policy, ...)` is d1jax.notebook.sft."""

from d1jax.callable_module import make_callable

make_callable(__name__)
