"""d1jax: the JAX post-training stack for masked diffusion language models."""

__version__ = "0.1.0"
