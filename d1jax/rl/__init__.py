"""Reinforcement learning: one engine, a method is a row of names. `d1jax.rl(policy, ...)` is d1jax.notebook.stages.rl."""

from d1jax.training.callable_module import make_callable

make_callable(__name__)
