"""No array takes its dtype from a default: the default is a setting of the process, and other masks or sums come with it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "d1jax"
# Where the dtype stands among the positional arguments.
CONSTRUCTORS = {"array": 1, "asarray": 1, "zeros": 1, "ones": 1, "full": 2, "arange": 3, "linspace": 5, "eye": 3}
DRAWS = {"uniform": 2, "normal": 2, "gumbel": 2, "exponential": 2, "randint": 4}


def without_dtype(source: str) -> list[str]:
    """The calls of jax.numpy's constructors, and of jax.random's draws, that leave their dtype to the default."""
    found = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        module, _, name = ast.unparse(call.func).rpartition(".")
        place = {"jnp": CONSTRUCTORS, "jax.random": DRAWS}.get(module, {}).get(name)
        named = any(keyword.arg == "dtype" for keyword in call.keywords)
        if place is not None and not named and len(call.args) <= place:
            found.append(f"line {call.lineno}: {ast.unparse(call)}")
    return found


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_every_dtype_is_named(file):
    assert without_dtype(file.read_text(encoding="utf-8")) == []


def test_a_default_is_found():
    source = "jnp.zeros(3); jnp.zeros(3, x.dtype); jnp.arange(3); jax.random.uniform(key, (3,)); np.zeros(3)"
    assert [line.partition(": ")[2] for line in without_dtype(source)] == [
        "jnp.zeros(3)", "jnp.arange(3)", "jax.random.uniform(key, (3,))",
    ]  # fmt: skip
