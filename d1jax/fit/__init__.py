"""python -m d1jax.fit: will a configuration fit, and about how long does it take? From shapes alone."""

from d1jax.fit.command import main

__all__ = ["main"]
