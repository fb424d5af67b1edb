"""A module that can be called: `d1jax.sft(policy, ...)` trains, and `d1jax.sft.loop` is the module of that name.

The names that a notebook user expects are those of the folders, and importing a folder puts it under its name in the package.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module("d1jax.notebook.stages"), self.__name__.rpartition(".")[2])(
            *args, **kwargs
        )

    @property
    def __wrapped__(self) -> Any:
        """The function, for `inspect.signature` and its users."""
        return getattr(importlib.import_module("d1jax.notebook.stages"), self.__name__.rpartition(".")[2])


def make_callable(name: str) -> None:
    """Calls of the module `d1jax.NAME` go to the function NAME of d1jax/notebook/stages.py."""
    sys.modules[name].__class__ = _Callable
