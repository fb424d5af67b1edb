"""The JAX post-training stack for masked diffusion language models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from d1jax.config import LoraConfig, MeshConfig, ModelConfig, SamplerConfig  # noqa: F401
    from d1jax.infilling import Filled, infill  # noqa: F401
    from d1jax.policy import Policy, load_pretrained, save_pretrained  # noqa: F401
    from d1jax.sampling import Completions, sample, watch  # noqa: F401

__version__ = "0.1.0"

_HOME = {
    **dict.fromkeys(("LoraConfig", "MeshConfig", "ModelConfig", "SamplerConfig"), "d1jax.config"),
    **dict.fromkeys(("Filled", "infill"), "d1jax.infilling"),
    **dict.fromkeys(("Policy", "load_pretrained", "save_pretrained"), "d1jax.policy"),
    **dict.fromkeys(("Completions", "sample", "watch"), "d1jax.sampling"),
}
__all__ = [*_HOME, "__version__"]


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])


def __getattr__(name: str) -> Any:
    # Lazily: `d1jax.train --help` needs no JAX, and a script may set JAX's flags after `import d1jax`.
    if name not in _HOME:
        raise AttributeError(f"module 'd1jax' has no attribute {name!r}; it has {', '.join(_HOME)}")
    return getattr(importlib.import_module(_HOME[name]), name)
