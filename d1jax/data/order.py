"""In which order rows are met: a pure function of (seed, position), so a resumed run needs no iterator state."""

from __future__ import annotations

import numpy as np


class RowOrder:
    """An endless shuffled order of `count` rows, a new permutation an epoch; `order.take(start, n)` are positions start .. start + n."""

    def __init__(self, count: int, seed: int) -> None:
        import grain  # lazily: generating and evaluating need no data library

        self._order = grain.MapDataset.range(count).seed(seed).shuffle().repeat()

    def take(self, start: int, count: int) -> np.ndarray:
        return np.array([self._order[position] for position in range(start, start + count)], np.int32)
