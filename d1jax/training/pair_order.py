"""In which order stored pairs are met: a function of the seed and the step.

Q pairs of a step.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from d1jax.data.order import RowOrder
from d1jax.data.pairs import StoredPairs
from d1jax.diffusion.canvas import Canvas


@dataclass
class PairOrder:
    """`count` pairs a step, in a shuffled order.

    Single texts are drawn in equal numbers, better and worse, whatever their shares are.
    """

    pairs: StoredPairs
    count: int
    seed: int
    orders: tuple[RowOrder, RowOrder] = field(init=False)

    def __post_init__(self) -> None:
        # Of matched pairs both sides are met in one order.
        seeds = (self.seed + 2, self.seed + 2 if self.pairs.matched else self.seed + 3)
        sides = (self.pairs.better, self.pairs.worse)
        self.orders = tuple(RowOrder(len(side), seed) for side, seed in zip(sides, seeds, strict=True))

    def take(self, step: int) -> tuple[Canvas, Canvas]:
        """(the better texts, the worse ones) of a step, Q rows each."""
        taken = (
            side.at(order.take(step * self.count, self.count))
            for side, order in zip((self.pairs.better, self.pairs.worse), self.orders, strict=True)
        )
        better, worse = (Canvas(side.target_RC, side.prompt_RP, side.prompt_length_R) for side in taken)
        return better, worse
