"""The JAX post-training stack for masked diffusion language models.

In a notebook: `load_pretrained` gives a `Policy`; `sample`, `watch` and `infill` write with it, `masked_loss`, `sft` and `rl` train it,
`evaluate` grades it, `save_pretrained` exports it. docs/notebook.md is an example. `d1jax.config` holds all settings and the choices
that they offer, e.g. `d1jax.RlConfig(estimator=d1jax.config.Coupled(samples=2))`.
"""

from __future__ import annotations

import importlib as _importlib
from typing import TYPE_CHECKING

from d1jax.config.version import __version__ as __version__

if TYPE_CHECKING:
    from d1jax.config import (  # noqa: F401
        LoraConfig,
        MeshConfig,
        ModelConfig,
        OptimizerConfig,
        PreferenceConfig,
        RlConfig,
        SamplerConfig,
        SftConfig,
        TaskConfig,
    )
    from d1jax.inference.complete import Completions, sample, watch  # noqa: F401
    from d1jax.inference.infill import Filled, infill  # noqa: F401
    from d1jax.inference.policy import Policy, load_pretrained, save_pretrained  # noqa: F401
    from d1jax.notebook.stages import Trained, evaluate, masked_loss, rl, sft  # noqa: F401


_CONFIGS = (
    "LoraConfig", "MeshConfig", "ModelConfig", "OptimizerConfig", "PreferenceConfig", "RlConfig", "SamplerConfig",
    "SftConfig", "TaskConfig",
)  # fmt: skip
_HOME = {
    **dict.fromkeys(_CONFIGS, "d1jax.config"),
    **dict.fromkeys(("Filled", "infill"), "d1jax.inference.infill"),
    **dict.fromkeys(("Policy", "load_pretrained", "save_pretrained"), "d1jax.inference.policy"),
    **dict.fromkeys(("Completions", "sample", "watch"), "d1jax.inference.complete"),
    **dict.fromkeys(("Trained", "masked_loss"), "d1jax.notebook.stages"),
}
# Modules by whose name a function of d1jax.notebook.stages is called, too.
_CALLABLE = ("evaluate", "rl", "sft")
__all__ = [*_HOME, *_CALLABLE, "__version__"]


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> object:
    # Lazily: `d1jax.train --help` needs no JAX, and a script may set JAX's flags after `import d1jax`.
    if name in _CALLABLE:
        return _importlib.import_module(f"d1jax.{name}")
    if name not in _HOME:
        offered = ", ".join([*_HOME, *_CALLABLE])
        raise AttributeError(f"module 'd1jax' has no attribute {name!r}; it has {offered}")
    return getattr(_importlib.import_module(_HOME[name]), name)
