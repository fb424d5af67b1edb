"""Two tiny random checkpoints that answer Sudoku, for the tests of benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from d1jax.data.tokenizers import CharacterTokenizer
from d1jax.inference.policy import Policy, load_pretrained
from d1jax.models.families import family_for
from d1jax.weights.hf_io import in_memory, save_weights
from d1jax.weights.tokenizer_files import write_new_companions


@pytest.fixture(scope="session")
def sudoku_checkpoints(tmp_path_factory: pytest.TempPathFactory, tiny: Any) -> tuple[Path, Path]:
    """(first, second): random weights of two seeds; the characters are digits and the line break, then <end> and <mask>."""
    made = []
    for seed, name in enumerate(("first", "second")):
        model, variables = tiny(seed=seed, layers=1)
        tokenizer = CharacterTokenizer("\n0123456789")
        companions = lambda beside: write_new_companions(model.config, tokenizer, beside, published=True)  # noqa: B023, E731
        out = tmp_path_factory.mktemp("sudoku") / name
        family = family_for(model.config)
        save_weights(in_memory(variables, model.config, family), model.config, family, out, companions)
        made.append(out)
    return made[0], made[1]


@pytest.fixture(scope="session")
def sudoku_policy(sudoku_checkpoints: tuple[Path, Path]) -> Policy:
    return load_pretrained(sudoku_checkpoints[0])
