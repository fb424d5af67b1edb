"""What tests of expressions compare with: random trees, and values by Python's own `ast` and exact fractions."""

import ast
from fractions import Fraction

from hypothesis import strategies as st

from d1jax.tasks import expressions

TREES = st.recursive(
    st.integers(0, 99),
    lambda inner: st.tuples(st.sampled_from("+-*/"), inner, inner),
    max_leaves=expressions.MAX_NUMBERS,
).filter(lambda tree: len(oracle_leaves(tree)) <= expressions.MAX_NUMBERS)


def oracle_leaves(tree):
    return [tree] if isinstance(tree, int) else [*oracle_leaves(tree[1]), *oracle_leaves(tree[2])]


def full(tree):
    """Every pair of parentheses written out."""
    return str(tree) if isinstance(tree, int) else f"({full(tree[1])}{tree[0]}{full(tree[2])})"


def oracle(text):
    """Value by walking Python's own syntax tree with fractions; None where Python divides by zero. Raises for other
    syntax.
    """

    def walk(node):
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return Fraction(node.value)
        assert isinstance(node, ast.BinOp)
        left, right = walk(node.left), walk(node.right)
        if left is None or right is None:
            return None
        match node.op:
            case ast.Add():
                return left + right
            case ast.Sub():
                return left - right
            case ast.Mult():
                return left * right
            case ast.Div():
                return left / right if right else None
        raise AssertionError(node.op)

    return walk(ast.parse(text.strip(), mode="eval").body)
